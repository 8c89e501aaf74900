"""`megafuse doctor`: what is installed, what is usable, and how to repair the rest."""

import json
import warnings
from dataclasses import asdict
from functools import partial
from typing import Annotated

import tyro

from megafuse.config.base import Config
from megafuse.doctor import hardware, software
from megafuse.doctor.finding import Finding, guarded

DESCRIPTION = "Report what is installed, what is usable, and how to repair the rest. Exit status 1: unusable here."


class DoctorConfig(Config):
    """Form of the report."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """One JSON object instead of a table: {"usable": bool, "findings": [{name, status, detail, fix, core}]}."""


CONFIG = DoctorConfig


def examine() -> list[Finding]:
    """Run every probe. Nothing that a probe meets raises from here."""
    core = [
        ("Python", software.python),
        ("dependencies", software.requirements),
        ("torch", software.torch),
        ("megatron-core", software.megatron),
        ("gloo", software.gloo),
        ("megafuse.kernels._C", software.extension),
    ]
    optional = [
        ("C++ compiler", software.compiler),
        ("triton", software.triton),
        ("Transformer Engine", software.transformer_engine),
        ("NVIDIA Apex", software.apex),
        ("top-level `kernels`", software.hf_kernels),
        ("Slurm", software.slurm),
        ("machine", hardware.machine),
        ("CPU", hardware.cpu_precision),
    ]
    findings = [guarded(name, probe, core=True) for name, probe in core]
    findings += [guarded(name, probe) for name, probe in optional]
    return findings + [
        guarded(name, partial(software.optional_package, name, *extra)) for name, extra in software.EXTRAS.items()
    ]


def run(config: DoctorConfig) -> int:
    """Print the report; 0 when every core finding is `ok`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns of each optional package; the report says it better
        findings = examine()
    usable = all(finding.status == "ok" for finding in findings if finding.core)
    if config.as_json:
        print(json.dumps({"usable": usable, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings, usable)
    return 0 if usable else 1


def _print_table(findings: list[Finding], usable: bool) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from megafuse.observe.console import make_console

    colours = {"ok": "green", "absent": "dim", "problem": "red"}
    table = Table("", "what", "found", "what to do", box=box.SIMPLE)
    for finding in findings:
        row = (finding.status, finding.name, finding.detail, finding.fix)
        table.add_row(*(Text(cell, style=colours[finding.status] if i == 0 else "") for i, cell in enumerate(row)))
    console = make_console(highlight=False)
    console.print(table)
    if usable:
        console.print("megafuse can run here.", style="green")
    else:
        broken = [finding.name for finding in findings if finding.core and finding.status != "ok"]
        console.print(f"megafuse cannot run here: repair {', '.join(broken)}.", style="red")
