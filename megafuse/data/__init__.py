"""Public files to groups, groups to a tokenised data set, groups to rows of tensors."""
