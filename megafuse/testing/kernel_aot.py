"""`python -m megafuse.testing.kernel_aot`: every Triton kernel compiled for sm_90 without a GPU; facts as JSON.

Needs only the triton wheel, which carries ptxas and cuobjdump. TRITON_INTERPRET must be unset: in the interpreter there
is nothing to compile, which is why tests start this as a process of its own.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COUNTED = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDG.E.128", "STG.E.128", "MUFU.EX2", "ATOM", "RED", "LDL", "STL")


@dataclass(frozen=True)
class Build:
    """One kernel as it is launched: types of its arguments, compile-time values, launch options."""

    name: str
    kernel: Any
    types: Mapping[str, str]  # of the arguments that are not compile-time values
    constants: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()  # arguments divisible by 16: Triton sees that at launch


def builds() -> Iterator[Build]:
    """Every kernel of megafuse.kernels, in the variants that hold the most code."""
    yield from _logits()
    yield from _segments()
    yield from _heads()
    yield from _products()
    yield from _linear()
    yield from _rope()


def _logits() -> Iterator[Build]:
    from megafuse.kernels._triton_logits import finish_rows, row_gradient, row_stats

    sizes = {"rows": "i32", "start": "i32", "columns": "i32", "scale": "fp32", "cap": "fp32"}
    wide = {"num_warps": 8}
    for capped, dtypes in ((False, ("bf16", "fp32")), (True, ("bf16",))):
        for dtype in dtypes:
            constants = {"CAPPED": capped, "BLOCK": 4096}
            types = {"logits": f"*{dtype}", "stride": "i32", "targets": "*i64", "stats": "*fp32", **sizes}
            aligned: tuple[str, ...] = ("logits", "stride", "targets", "stats", "columns")
            yield Build(f"row_stats-{dtype}-cap{capped:d}", row_stats, types, constants, wide, aligned)
            types = {
                **types,
                "out": f"*{dtype}",
                "out_stride": "i32",
                "saved": "*fp32",
                "grad": "*fp32",
                "width": "i32",
            }
            aligned = ("logits", "stride", "out", "out_stride", "width", "columns", "saved", "grad")
            yield Build(f"row_gradient-{dtype}-cap{capped:d}", row_gradient, types, constants, wide, aligned)
    types = {"parts": "*fp32", "ranks": "i32", "logp": "*fp32", "saved": "*fp32", "rows": "i32"}
    yield Build("finish_rows", finish_rows, types, {"BLOCK": 128})


def _segments() -> Iterator[Build]:
    from megafuse.kernels._triton_segments import finish_segments, segment_gradient, segment_sum

    types = {"logp": "*fp32", "ids": "*i64", "tokens": "i32", "segments": "i32", "part": "*fp64", "parts": "*fp64"}
    types |= {"ranks": "i32", "sums": "*fp32", "counts": "*i64", "grad": "*fp32", "out": "*fp32"}
    yield Build("segment_sum", segment_sum, types, {"BLOCK": 2048}, {"num_warps": 8}, ("logp", "ids"))
    constants = {"MEAN": True, "BLOCK": 256}
    yield Build("finish_segments", finish_segments, types, constants)
    yield Build("segment_gradient", segment_gradient, types, constants)


def _heads() -> Iterator[Build]:
    from megafuse.kernels._triton_heads import reduce_terms, sums_gradient, terms_pair, terms_rloo, terms_sft

    types = {"logps": "*fp32", "refs": "*fp64", "lengths": "*i64", "rewards": "*fp32", "members": "*i64"}
    types |= {"weights": "*fp32", "loss": "*fp64", "coef": "*fp64", "values": "*fp64", "group": "*i64"}
    types |= {"losses": "*fp32", "entropy": "*fp64", "metrics": "*fp64", "grad": "*fp32", "out": "*fp32"}
    types |= dict.fromkeys(("terms", "groups", "width", "pairs"), "i32")
    types |= dict.fromkeys(("beta", "gamma", "smoothing", "alpha", "beta_kl", "clip", "max_log_ratio"), "fp32")
    for per_token, triple in ((True, False), (False, True)):
        constants = {"HAS_REF": True, "USE_REF": True, "PER_TOKEN": per_token, "TRIPLE": triple, "BLOCK": 64}
        yield Build(f"terms_pair-mean{per_token:d}-triple{triple:d}", terms_pair, types, constants)
    constants = {"HAS_REF": False, "USE_REF": False, "PER_TOKEN": True, "TRIPLE": False, "BLOCK": 64}
    yield Build("terms_pair-simpo", terms_pair, types, constants)
    yield Build("terms_sft", terms_sft, types, {"PER_TOKEN": True, "BLOCK": 64})
    constants = {"HAS_REF": True, "CLIPPED": True, "K": 4, "BLOCK": 64}
    yield Build("terms_rloo", terms_rloo, types, constants)
    yield Build("reduce_terms", reduce_terms, types, {"BLOCK": 64})
    yield Build("sums_gradient", sums_gradient, types, {"BLOCK": 64})


def _products() -> Iterator[Build]:
    """The large product as `_linear_triton.plan` cuts it for sm_90, and with the loads and tiles of other devices."""
    from megafuse.kernels._linear_triton import Tiles
    from megafuse.kernels._triton_gemm import exp_product

    hopper, entropy = Tiles(), Tiles(bn=128, stages=3)
    older, single = Tiles(128, 128, 64, stages=3, tma=False), Tiles(64, 64, 32, warps=4, stages=3, tma=False)
    plain = {"CAPPED": False, "STORE": True, "ENTROPY": False, "MAXIMUM": False, "GUARDED": False}
    variants = {
        "keep": (hopper, plain),
        "forward": (hopper, {**plain, "STORE": False}),
        "keep-cap": (hopper, {**plain, "CAPPED": True}),
        "keep-guarded": (hopper, {**plain, "GUARDED": True}),
        "maximum": (hopper, {**plain, "STORE": False, "MAXIMUM": True, "GUARDED": True}),
        "entropy": (entropy, {**plain, "ENTROPY": True}),
        "pointers": (older, plain),
        "fp32": (single, plain),
    }
    for name, (tiles, flags) in variants.items():
        dtype = "fp32" if name == "fp32" else "bf16"
        types = dict.fromkeys(("rows", "columns", "start", "x_stride", "weight_stride", "e_stride"), "i32")
        types |= {"scale": "fp32", "cap": "fp32", "targets": "*i64", "anchors": "*fp32", "parts": "*fp32"}
        types |= {"spreads": "*fp32", "marked": "*i32", "flag": "*i32"}
        blocks = {"x": (tiles.bm, tiles.bk), "weight": (tiles.bn, tiles.bk), "e": (tiles.bm, tiles.bn // 2)}
        for operand, block in blocks.items():
            types[operand] = f"tensordesc<{dtype}{list(block)}>" if tiles.tma else f"*{dtype}"
        sizes = {"BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk, "GROUP": 16, "PROGRAMS": 132, "WIDTH": 4096}
        constants = {**flags, **sizes, "TMA": tiles.tma, "UPCAST": False}
        aligned: tuple[str, ...] = ("parts", "columns")
        if not tiles.tma:
            aligned += ("x", "weight", "e", "x_stride", "weight_stride", "e_stride")
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        yield Build(f"exp_product-{name}", exp_product, types, constants, options, aligned)


def _linear() -> Iterator[Build]:
    from megafuse.kernels import _triton_linear as linear

    types = dict.fromkeys(("z", "parts", "spreads", "sums", "spread", "maxima", "anchors", "logp", "entropy"), "*fp32")
    types |= dict.fromkeys(("saved", "v", "factor", "patch", "grad"), "*fp32")
    types |= dict.fromkeys(("hidden", "weight", "x", "e", "scaled", "product", "out"), "*bf16")
    types |= dict.fromkeys(("index", "targets", "order", "ends"), "*i64") | dict.fromkeys(("marked", "flag"), "*i32")
    types |= dict.fromkeys(("scale", "cap", "slope_scale"), "fp32")
    types |= dict.fromkeys(("hidden_stride", "weight_stride", "e_stride", "width", "start", "columns"), "i32")
    types |= dict.fromkeys(("tiles", "rows", "ranks"), "i32")
    wide = ("hidden", "weight", "x", "e", "scaled", "product", "out", "hidden_stride", "weight_stride", "width")
    wide_row = {"BLOCK": 2048}
    yield _linear_build(linear.target_logits, types, {"INDEXED": True, "CAPPED": True, **wide_row}, wide)
    yield _linear_build(linear.sum_tiles, types, {"ENTROPY": True, "MARK": True, "BLOCK": 128})
    yield _linear_build(linear.move_anchors, types, {"BLOCK": 128})
    yield _linear_build(linear.finish_targets, types, {"CAPPED": True, "ENTROPY": True, "BLOCK": 128})
    yield _linear_build(linear.bind_gradient, types, {"SCALED": True, **wide_row}, wide)
    yield _linear_build(linear.fold_rows, types, {"REPEATED": True, "BLOCK": 1024}, wide)


def _linear_build(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], wide: tuple[str, ...] = ()
) -> Build:
    aligned = tuple(name for name in wide if name in kernel.arg_names)
    return Build(kernel.__name__, kernel, types, constants, {}, aligned)


def _rope() -> Iterator[Build]:
    from megafuse.kernels._triton_rope import turn_heads

    types = {"table": "*fp32", "x_row": "i32", "x_head": "i32", "heads": "i32", "direction": "fp32"}
    aligned = ("x", "table", "out", "x_row", "x_head")
    for dtype, width in (("bf16", 128), ("bf16", 64), ("fp32", 128)):
        constants = {"HALF": width // 2, "COLUMNS": width // 2, "HEADS": 2048 // width}
        heads = {**types, "x": f"*{dtype}", "out": f"*{dtype}"}
        yield Build(f"turn_heads-{dtype}-{width}", turn_heads, heads, constants, {"num_warps": 4}, aligned)


def compile_one(build: Build, folder: Path, capability: int = 90) -> dict[str, Any]:
    """Registers, stack (spills), shared memory and counts of chosen instructions of one build."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    started = time.monotonic()
    names = build.kernel.arg_names
    signature = {name: "constexpr" if name in build.constants else build.types[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned}
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=dict(build.constants), attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(build.options))
    binary = folder / f"{build.name}.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, f"cuobjdump says nothing of {build.name}: {usage.stdout}{usage.stderr}"
    sass = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout
    counts = {op: len(re.findall(rf"(?<![\w.]){re.escape(op)}(?!UX)", sass)) for op in COUNTED}
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": int(compiled.metadata.shared),
        "seconds": round(time.monotonic() - started, 2),
        **{op: n for op, n in counts.items() if n},
    }


def main() -> int:
    """Compile all builds (or those whose name has `--only` in it) and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="compile only what has this in its name")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: nothing is compiled in the interpreter", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        chosen = [build for build in builds() if args.only in build.name]
        print(json.dumps({build.name: compile_one(build, Path(folder)) for build in chosen}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
