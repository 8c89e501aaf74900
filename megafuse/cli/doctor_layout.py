"""`megafuse doctor layout`: can this model be cut so, and what would a rank hold?"""

from megafuse.config.layout import LayoutConfig

DESCRIPTION = """Check a layout against a model's sizes before anything starts. Needs config.json alone: no weights, no
GPU. Exit status 2: it cannot be, with every number that does not divide and the nearest layout that can."""

CONFIG = LayoutConfig


def run(config: LayoutConfig) -> int:
    """Print the layout and the bytes of its parameters, gradients and Adam state. Raises ConfigError: it is none."""
    from megafuse.bench.shapes import parameter_count, resolve_shape
    from megafuse.parallel.layouts import check_layout, describe

    arch, parallel = resolve_shape(config.model), config.parallel
    check_layout(arch, parallel, config.ranks)
    count, copies = parameter_count(arch), config.ranks // parallel.model_ranks
    # bf16 parameter and fp32 gradient on every copy; fp32 master weight and two moments once, over copies and context
    share = count / (parallel.tensor * parallel.pipeline)
    held = share * (2 + 4) + share * 12 / (copies * parallel.context)
    experts = "; experts counted as if they were not split" if arch.num_experts and parallel.expert > 1 else ""
    print(
        f"{config.model}: {count:,} parameters on {config.ranks} rank(s): {describe(parallel)}; {copies} "
        f"copies (data parallel). Without activations about {held / 2**30:.1f} GiB a rank in bf16, with the "
        f"distributed optimizer{experts}"
    )
    return 0
