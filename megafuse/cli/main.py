"""The executable `megafuse`: finds a command, reads its configuration, runs it, reports its errors.

A command is a module of this folder, imported only when it is called, with `DESCRIPTION`, `CONFIG` (a Config class) and
`run(config) -> int`; a family such as `convert` has `COMMANDS`, a dict from the second word to `(config class, run)`.
"""

import difflib
import errno
import hashlib
import importlib
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafuse import __version__
from megafuse.errors import ConfigError, MegafuseError, StorageError
from megafuse.launch.environment import cuda_settings

PATH_ERRORS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """Where a command lives, and the line that `megafuse --help` shows."""

    module: str
    summary: str
    member: str | None = None  # key of the module's COMMANDS; None: the module itself is the command
    on_device: bool = False  # computes with the model, on CUDA where there is any


COMMANDS: dict[str, Command] = {
    "prompts": Command("megafuse.cli.prompts", "a published set -> prompts: filtered, one of a kind, counted"),
    "prompts list": Command("megafuse.cli.lists", "the published sets that it knows", "prompts"),
    "sample": Command(
        "megafuse.cli.sample", "prompts -> responses of one source (vLLM, or a server); resumes by itself"
    ),
    "sample list": Command("megafuse.cli.lists", "the sources whose sampling parameters it knows", "sample"),
    "score": Command(
        "megafuse.cli.score", "responses -> verified and scored responses; resumes by itself", on_device=True
    ),
    "build": Command("megafuse.cli.build", "scored answers -> tokenised data set for FuseSFT or FusePO"),
    "reference": Command(
        "megafuse.cli.reference", "log-probs of a data set under the reference model, computed once", on_device=True
    ),
    "train": Command(
        "megafuse.cli.train", "FuseSFT or FusePO; under torchrun, srun, or alone; resumes by itself", on_device=True
    ),
    "convert import": Command("megafuse.cli.convert", "Hugging Face folder -> Megatron checkpoint", "import"),
    "convert export": Command("megafuse.cli.convert", "Megatron checkpoint -> Hugging Face folder", "export"),
    "convert verify": Command(
        "megafuse.cli.convert", "is a checkpoint that model: bits, layouts, logits", "verify", on_device=True
    ),
    "convert inspect": Command("megafuse.cli.convert", "what a checkpoint or folder holds", "inspect"),
    "eval": Command("megafuse.cli.eval", "intra- and cross-rank accuracy of a model on a data set", on_device=True),
    "bench": Command(
        "megafuse.cli.bench", "training throughput on real lengths: any shape, data, loss and layout", on_device=True
    ),
    "launch": Command("megafuse.cli.launch", "a recipe of slurm/ as a job: submitted or run here, through NeMo-Run"),
    "launch sweep": Command("megafuse.cli.launch_sweep", "many jobs over sources, alpha, k, loss, target; one table"),
    "doctor": Command("megafuse.cli.doctor", "what is installed, what is usable, and how to repair the rest"),
    "doctor parity": Command(
        "megafuse.cli.doctor_parity", "every layout against one process in float64", on_device=True
    ),
    "doctor layout": Command("megafuse.cli.doctor_layout", "can a model be cut so, and what a rank would hold"),
    "data report": Command("megafuse.cli.data_report", "one HTML page about scored answers, to read before training"),
    "data check": Command("megafuse.cli.data_check", "check input files line by line: file:line, problem, counts"),
}


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run one command line and return its exit status: see megafuse.errors; 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(args, commands, own_process=argv is None)
        sys.stdout.flush()
        return status
    except MegafuseError as error:
        _report(str(error))
        return error.exit_code
    except BrokenPipeError:
        if _is_read():
            raise
        return 141  # `megafuse prompts list | head`: as of a process that SIGPIPE has ended
    except OSError as error:
        return _report_os_error(error)
    except KeyboardInterrupt:
        _report("interrupted")
        return 130
    except SystemExit as stop:  # --help, --print_config, and tyro's refusals, which have been printed
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _dispatch(args: list[str], commands: Mapping[str, Command], *, own_process: bool) -> int:
    if args[:1] == ["--version"]:
        print(f"megafuse {__version__}")
        return 0
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview(commands))
        return 0 if args else 2
    words = next((n for n in (2, 1) if " ".join(args[:n]) in commands), 0)
    if not words:
        return _unknown(args, commands)
    name = " ".join(args[:words])
    if own_process and commands[name].on_device:  # before anything imports torch, which reads them
        os.environ.update(cuda_settings(os.environ))
    config_class, run, description = _load(name, commands[name])
    from megafuse.config.load import parse  # pydantic and tyro: 0.3 s that `megafuse --help` need not pay

    return int(run(parse(config_class, args[words:], prog=f"megafuse {name}", description=description)) or 0)


def _load(name: str, command: Command) -> tuple[Any, Callable[[Any], int], str]:
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "megafuse":
            raise
        raise MegafuseError(f"megafuse {name} needs the package {error.name}: run `megafuse doctor`") from error
    if command.member is None:
        return module.CONFIG, module.run, module.DESCRIPTION
    config_class, run = module.COMMANDS[command.member]
    return config_class, run, command.summary[0].upper() + command.summary[1:] + "."


def _overview(commands: Mapping[str, Command], family: str = "") -> str:
    shown = {name: c.summary for name, c in commands.items() if name.startswith(family)}
    width = max(map(len, shown))
    lines = [
        f"usage: megafuse {family or 'COMMAND '}{'COMMAND ' if family else ''}[FILE.toml ...] [options]",
        "",
        *(f"  {name:<{width}}  {summary}" for name, summary in shown.items()),
        "",
        "`megafuse COMMAND --help` shows every field with its unit and default; `megafuse --version` the version.",
        "Exit status: 0 done, 2 configuration or input, 3 damaged data, 4 not enough disk, 75 hang, 85 preempted after",
        "a save, 86 stopped on a non-finite step or a spike, 87 replicas differ, 130 interrupted, 143 terminated,",
        "1 anything else.",
    ]
    return "\n".join(lines)


def _unknown(args: list[str], commands: Mapping[str, Command]) -> int:
    """A family without its second word, or a typo: say what there is."""
    family = [name for name in commands if name.startswith(f"{args[0]} ")]
    second = args[1] if len(args) > 1 and not args[1].startswith("-") else ""
    if family and not second:
        print(_overview(commands, f"{args[0]} "))
        return 0 if args[1:2] in (["-h"], ["--help"]) else 2
    typed = f"{args[0]} {second}" if family else args[0]
    close = difflib.get_close_matches(typed, commands, n=1)
    hint = f"did you mean `megafuse {close[0]}`?" if close else "`megafuse --help` lists the commands"
    _report(f"unknown command {typed!r}; {hint}")
    return 2


def _report(message: str) -> None:
    """Print one red message on stderr; of equal messages of one node's ranks, only the first."""
    from rich.text import Text

    from megafuse.observe.console import make_console

    rank = os.environ.get("RANK")
    if rank is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not _first_on_node(message):
            return
        message = f"[rank {rank}] {message}"
    make_console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)


def _is_read() -> bool:
    """Whether somebody still reads what this process prints; if not, the interpreter shall not complain at its end."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return False


def _report_os_error(error: OSError) -> int:
    """A full disk, or a path that cannot be read or written, as a message; anything else is raised again.

    Under several ranks a path is no reason to give up: shared file systems come and go, and a job is tried again after
    exit status 1.
    """
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        _report(f"{where}the disk is full ({error.strerror or error}); free some of it, or write to another one")
        return StorageError.exit_code
    if error.errno not in PATH_ERRORS or not error.filename or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise error
    _report(f"{where}{error.strerror}")
    return ConfigError.exit_code


def _first_on_node(message: str) -> bool:
    """Whether no other rank of this run has claimed this message.

    No collective: other ranks may be fine, or gone. An exclusively created empty file decides instead; its name has the
    parent process (torchrun or slurmstepd: the same for all ranks of a node) and its age rules out a reused process id.
    """
    parts = [str(os.getppid()), os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), message]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    claim = Path(tempfile.gettempdir()) / f"megafuse-{os.getuid()}-{digest}"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return time.time() - claim.stat().st_mtime > 3600
    except OSError:  # no temporary folder: better twice than never
        return True
    return True
