"""Errors a user can act on. Each message names the field or file, the value, and the fix.

The command line prints the message without a traceback and exits with `exit_code`:
2 wrong configuration or input, 3 damaged data, 4 not enough disk, 75 hang, 85 preempted after a save, 86 stopped on a
non-finite step or a spike, 87 replicas differ or a step
cannot be repeated, 143 terminated (after a save where there was time).
"""


class MegafuseError(Exception):
    """Base of every error that the command line reports as one message instead of a traceback."""

    exit_code = 1


class ConfigError(MegafuseError):
    """A configuration value, or a combination of values, cannot work."""

    exit_code = 2


class DataError(MegafuseError):
    """An input file holds something that megafuse refuses to train on."""

    exit_code = 2


class UnsupportedModelError(MegafuseError):
    """A Hugging Face configuration has a key or a value that no rule covers."""

    exit_code = 2


class IntegrityError(MegafuseError):
    """A checkpoint, cache or data set does not match what its manifest says."""

    exit_code = 3


class NonFiniteError(MegafuseError):
    """Loss or gradient norm is NaN, infinite, or a spike, and no rank has updated any parameter; or what is to be saved
    is NaN or infinite, and no checkpoint is written."""

    exit_code = 86


class StorageError(MegafuseError):
    """The file system has no room for what has to be written."""

    exit_code = 4


class PreemptedError(MegafuseError):
    """Asked to stop before a time limit or for another job; a checkpoint is written, the run is to be started again."""

    exit_code = 85


class TerminatedError(MegafuseError):
    """Asked to end for good (SIGTERM, scancel); a checkpoint is written where there was time."""

    exit_code = 143


class ReplicaError(MegafuseError):
    """Copies of a parameter differ between ranks, or a step computed twice does: a silent hardware error, or a bug."""

    exit_code = 87


def reason(error: BaseException) -> str:
    """Any error on one line: its type, first and last line. Triton's begin with a place and end with what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    parts = [type(error).__name__, *(line[:160] for line in dict.fromkeys([*lines[:1], *lines[-1:]]))]
    return ": ".join(parts)
