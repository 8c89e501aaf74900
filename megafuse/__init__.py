"""megafuse: a Megatron-scale training backend for heterogeneous model fusion (FuseSFT, FusePO)."""

__version__ = "0.1.0"
