"""Forward-only log-probs of a whole data set, and their cache."""
