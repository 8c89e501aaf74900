"""Builds the pybind11 extension; all metadata is in pyproject.toml.

Tracked relative symlinks `megafuse/{kernels,launch,converters}` put the top-level folders inside the package, so that
`megafuse.kernels` is importable while a bare `kernels` never shadows the Hugging Face package of that name.
"""

import re
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_namespace_packages, setup

VERSION = re.search(r'__version__ = "([^"]+)"', Path("megafuse/__init__.py").read_text())[1]

setup(
    version=VERSION,
    packages=find_namespace_packages(include=["megafuse", "megafuse.*"], exclude=["*.csrc", "*.csrc.*"]),
    package_data={"megafuse": ["py.typed"], "megafuse.config": ["presets/*.toml"]},
    ext_modules=[
        Pybind11Extension(
            "megafuse.kernels._C",
            ["megafuse/kernels/csrc/packer.cpp"],
            depends=[f"megafuse/kernels/csrc/{name}.hpp" for name in ("packing", "balance", "cost")],
            cxx_std=17,
            # No fused multiply-add: plans and costs are the same bits on every machine.
            extra_compile_args=["-O3", "-ffp-contract=off"],
        )
    ],
    cmdclass={"build_ext": build_ext},
    zip_safe=False,
)
