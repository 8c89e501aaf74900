"""HF configuration to a megatron-core GPTModel with our own layer spec."""
