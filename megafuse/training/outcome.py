"""RUN/outcome.json: how the last start of a run ended.

Launchers flatten exit codes (torchrun turns all into 1, srun kills the rest with 143); this file keeps the first one.
"""

import contextlib
import json
import os
from pathlib import Path

OUTCOME = "outcome.json"


def clear_outcome(run_dir: Path) -> None:
    """Forget how an earlier start ended. One process only."""
    (run_dir / OUTCOME).unlink(missing_ok=True)


def write_outcome(run_dir: Path, code: int, reason: str) -> None:
    """Write the exit code and the reason, with the Slurm job and the number of its restart; the first rank to do so
    counts, and rank 0 above all."""
    if os.environ.get("RANK", "0") != "0" and (run_dir / OUTCOME).exists():
        return
    facts = {
        "code": code,
        "reason": reason,
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }
    temporary = run_dir / f".{OUTCOME}.{os.getpid()}.tmp"
    with contextlib.suppress(OSError):  # a full disk must not hide the failure itself
        temporary.write_text(json.dumps(facts) + "\n")
        os.replace(temporary, run_dir / OUTCOME)
