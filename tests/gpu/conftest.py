"""Transformer Engine multiplies fp32 matrices in TF32; cuBLAS reads this, once, when it is first used."""

import os

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
