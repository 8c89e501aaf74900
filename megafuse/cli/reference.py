"""`megafuse reference`: log-probs of a data set under a frozen model, once."""

from megafuse.config.forward import ReferenceRunConfig

DESCRIPTION = """Write the reference log-probs of a data set.

The cache is keyed by weights, tokenizer, chat template, data and settings; training refuses one that does not match and
says which part differs. Readable at any layout; a killed run is finished by starting it again."""
CONFIG = ReferenceRunConfig


def run(config: ReferenceRunConfig) -> int:
    """Write the cache; returns the exit code."""
    from megafuse.parallel.cpu_runtime import compile_when_called
    from megafuse.parallel.quiet import quiet_dependencies

    with quiet_dependencies(), compile_when_called():
        from megafuse.reference.run import run_reference

        run_reference(config, config.out, config.name)
    return 0
