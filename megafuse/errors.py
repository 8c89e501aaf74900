"""Errors a user can act on. Each message names the field or file, the value, and the fix.

The command line prints the message without a traceback and exits with `exit_code`:
2 wrong configuration or input, 3 damaged data, 75 hang, 85 preempted after a save, 86 stopped on a non-finite step.
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
    """Loss or gradient norm is NaN or infinite; no rank has updated any parameter."""

    exit_code = 86
