"""A forward-only run over a data set, on every rank: what `megafuse reference` and `megafuse eval` share."""

import sys
from functools import partial
from pathlib import Path

import torch

from megafuse.checkpoint.state import load_model
from megafuse.config.forward import EvalConfig, ReferenceRunConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.rows import check_vocabulary, row_planner, warnings_of
from megafuse.model.arch import read_arch
from megafuse.model.build import build_model, choose_backend
from megafuse.parallel.layouts import check_layout
from megafuse.parallel.precision import BEGAN, settled
from megafuse.parallel.topology import layout, process_groups, world_size_here
from megafuse.reference.cache import ReferenceLogps, began_precision, is_complete, read_cache, require_key
from megafuse.reference.compute import write_reference
from megafuse.reference.digest import reference_digest


def bound_by(folder: Path) -> tuple[str, str] | None:
    """The precision that a cache in `folder`, finished or not, binds its passes to, for `settled`."""
    precision = began_precision(folder)
    return None if precision is None else (precision, BEGAN)


def run_reference(config: ReferenceRunConfig | EvalConfig, folder: Path, name: str) -> ReferenceLogps:
    """Write (or finish, or just read) the log-probs of `config.model` on `config.data` at `folder`. Collective.

    Raises:
        ConfigError: a vocabulary or layout that does not fit.
        IntegrityError: the folder holds log-probs of something else.
    """
    arch = read_arch(config.model.path)
    data = GroupDataset(config.data.dataset)
    check_vocabulary(data, arch)
    sharing = config.data.prefix_sharing
    backend = choose_backend(config.model, config.parallel, head_dim=arch.head_dim, prefix_sharing=sharing)
    check_layout(arch, config.parallel, world_size_here())
    planner = row_planner(config, data, arch, world_size_here(), backend)
    flat, offsets = data.response_lengths
    with process_groups(), layout(config.parallel) as topology:
        config, why = settled(config, topology, partial(bound_by, folder))
        backend = backend.at(config.model.precision, why)
        if topology.rank == 0:
            print(f"world {topology.world_size} on {topology.device.type}, {backend}", file=sys.stderr, flush=True)
            for warning in warnings_of(data, arch, config.model.path):
                print(warning, file=sys.stderr, flush=True)
        digest = topology.on_rank_zero(
            lambda: reference_digest(config.model.path, data.manifest, precision=config.model.precision)
        )
        topology.on_rank_zero(lambda: require_key(folder, digest, advice="give another --out"))
        if not topology.on_rank_zero(lambda: is_complete(folder)):
            with torch.no_grad():
                model = build_model(arch, config.parallel, topology, backend)
                load_model(model, topology, config.model.path)
                write_reference(
                    model, topology, data, planner, folder, name=name, digest=digest,
                    source=config.model.path, prefix_sharing=sharing, show_progress=topology.rank == 0,
                )  # fmt: skip
        return read_cache(folder, digest, offsets, flat)
