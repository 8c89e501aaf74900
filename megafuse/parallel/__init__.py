"""Process groups and layout: the only place that touches the global state of megatron-core."""
