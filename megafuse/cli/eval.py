"""`megafuse eval`: intra- and cross-rank accuracy of a model."""

import json
import os
import sys

from megafuse.config.forward import EvalConfig

DESCRIPTION = """Rank accuracy of a model on a data set of kind `rank` (FuseRL, Appendix D.1).

A response's score is its mean log-prob per token. Intra: per source, is the best-reward response scored above the
worst? Cross: the same over one response of each source. Writes accuracy.json and the log-probs behind it."""
CONFIG = EvalConfig


def run(config: EvalConfig) -> int:
    """Evaluate; returns the exit code."""
    from megafuse.data.dataset import GroupDataset
    from megafuse.errors import ConfigError
    from megafuse.evals.rank_accuracy import rank_accuracy
    from megafuse.observe.manifest import versions, write_json_atomic
    from megafuse.parallel.cpu_runtime import compile_when_called
    from megafuse.parallel.quiet import quiet_dependencies
    from megafuse.reference.cache import began_precision

    data = GroupDataset(config.data.dataset)
    if data.kind != "rank":
        raise ConfigError(
            f"eval needs a data set of kind 'rank' (every response kept), {data.path} is of kind {data.kind!r}; "
            f"build one with `megafuse build --kind rank`"
        )
    with quiet_dependencies(), compile_when_called():
        from megafuse.reference.run import run_reference

        logps = run_reference(config, config.out / "logps", "eval")
    if int(os.environ.get("RANK", "0")) == 0:
        result = rank_accuracy(data, logps.logps, logps.lengths)
        facts = {
            "model": str(config.model.path),
            "dataset": str(config.data.dataset),
            "precision": began_precision(config.out / "logps"),
            "versions": versions(),
        }
        write_json_atomic(config.out / "accuracy.json", {**result.to_json(), **facts})
        print(json.dumps(result.to_json(), indent=1), file=sys.stdout)
    return 0
