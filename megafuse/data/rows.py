"""Groups, or parts of them, to rows: the plan of a global batch over the data-parallel ranks, and a row's tensors.

The plan is the same on every rank, so every rank knows the exact denominator of the global batch without asking.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megafuse.config.train import ParallelConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.parts import Parts, data_parts
from megafuse.data.tokenise import vocabulary_digest
from megafuse.data.types import Group, Part
from megafuse.errors import ConfigError, DataError
from megafuse.kernels.group_loss import Blocks
from megafuse.kernels.packing import group_tokens, pack_batch
from megafuse.losses.types import Terms
from megafuse.model.arch import ModelArch
from megafuse.observe.flops import flops_per_pair, flops_per_token, layer_pairs


@dataclass(frozen=True)
class Row:
    """One packed row: a micro-batch. t tokens, n responses of g groups (or parts of groups), r response tokens."""

    tokens: Tensor  # [1, t] int64
    positions: Tensor  # [t] int64, restarting at each sequence (after the prompt where prefixes are shared)
    layout: Tensor  # [2, t] int32: segment and parent of each place, -1 pads; [3, t] with owners, see data.shard
    targets: Tensor  # [r] int64: response tokens
    target_rows: Tensor  # [r] int64: the place that predicts each of them
    target_response: Tensor  # [r] int64 in [0, n)
    rewards: Tensor  # [n] float32
    terms: Terms
    parts: tuple[Part, ...]  # g: which responses of which group of the data set
    blocks: Blocks  # where the LM head may cut the row, and the targets of each response on each context-parallel rank
    idle: bool  # some response has no weight in any term

    @property
    def num_responses(self) -> int:
        """n."""
        return len(self.rewards)

    def to(self, device: torch.device) -> "Row":
        """The same row with its tensors on `device`."""
        if device.type == "cpu":
            return self
        # target_rows stays on the host: the LM head looks at it there, and a copy back would stop the stream
        names = ("tokens", "positions", "layout", "targets", "target_response", "rewards")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return Row(**{**vars(self), **moved, "terms": self.terms.to(device)})


@dataclass(frozen=True)
class BatchPlan:
    """Rows of one optimizer step: `rows[rank][i]` is what that rank's i-th micro-batch holds: with prefix sharing whole
    groups, else parts of them (`data.parts`), so that a group may lie in several rows."""

    rows: tuple[tuple[tuple[Part, ...], ...], ...]
    lengths: tuple[tuple[int, ...], ...]  # places of each row, padding included
    groups: int
    useful_tokens: int  # prompts once, and responses
    model_tokens: int  # what the layers compute, padding excluded
    head_rows: int  # rows of logits
    pairs: int  # attended (query, key) pairs, summed over the layers, each with its window

    @property
    def computed_tokens(self) -> int:
        """Places of all rows of the step, padding included."""
        return sum(map(sum, self.lengths))


RowLengths = Literal["own", "stage", "padded", "fixed"]


@dataclass(frozen=True)
class RowShape:
    """What the layout asks of the rows of a step."""

    dp_size: int = 1
    multiple: int = 1
    """Row lengths are rounded up to it: sequence and context parallelism cut a row into equal parts, of whole tiles."""
    tile: int = 1
    """Places that the attention computes at once; `multiple` is a multiple of it."""
    count_multiple: int = 1
    """Rows a rank are made a multiple of it: the interleaved schedule takes micro-batches in turns of the stages."""
    lengths: RowLengths = "own"
    """own: each row is as long as what it holds. padded: the rows of a rank get the length of its longest. stage:
    pipeline stages exchange tensors, and learning each one's shape costs a message, so padded, unless that wastes more
    than 2%. fixed: always the longest that is allowed."""


class RowPlanner:
    """Packs global batches of a data set into rows of at most `max_row_tokens` tokens for `dp_size` ranks."""

    def __init__(
        self,
        data: GroupDataset,
        arch: ModelArch,
        *,
        max_row_tokens: int,
        prefix_sharing: bool,
        max_group_tokens: int | None = None,
        shape: RowShape = RowShape(),
    ) -> None:
        """What is packed are groups, without prefix sharing their parts, of up to `max_group_tokens` (None:
        `max_row_tokens`) tokens; one above `max_row_tokens` makes the rows of its step as long as it needs, where rows
        are not of fixed length.

        Raises:
            DataError: when one is longer than that.
        """
        self.parts = data_parts(data, prefix_sharing=prefix_sharing)
        lengths = part_lengths(data, self.parts)
        self.shape = shape
        self.budget = max_row_tokens // shape.multiple * shape.multiple
        longest = max_row_tokens if shape.lengths == "fixed" else max(max_group_tokens or 0, max_row_tokens)
        limit = longest // shape.multiple * shape.multiple
        self.useful = data.group_lengths
        self.tokens = group_tokens(*lengths, prefix_sharing=prefix_sharing)
        self.pairs = layer_pairs(arch, *lengths, prefix_sharing=prefix_sharing)
        self.cost = self.tokens * float(flops_per_token(arch)) + self.pairs * float(flops_per_pair(arch))
        # a shared prompt's last place predicts the first token of every response: one row of logits for all
        shared = np.diff(data.response_lengths[1]) - 1 if prefix_sharing else 0
        self.head_rows = self.useful - data.prompt_lengths - shared
        if self.budget == 0:
            tiles = f" of {shape.tile} tokens, which flex attention computes at once," if shape.tile > 1 else ""
            cut = shape.multiple > shape.tile
            raise ConfigError(
                f"data.max_row_tokens = {max_row_tokens} is less than one place{tiles} for each of the "
                f"{shape.multiple // shape.tile} parts that the layout cuts a row into; raise it to {shape.multiple}"
                + (", or lower parallel.context or parallel.tensor" if cut else "")
            )
        if len(self.tokens) and self.tokens.max() > limit:
            worst = int(self.tokens.argmax())
            group, own = self.parts[worst]
            what = ","
            if len(own) > 1 and not prefix_sharing:
                what = f" for its responses {', '.join(map(str, own))}, which a term combines;"
            elif not prefix_sharing:
                what = f" for its response {own[0]};"
            name = "data.max_row_tokens" if limit == self.budget else "data.max_group_tokens"
            raise DataError(
                f"group {group} (prompt_id {data[group].prompt_id!r}) needs {self.tokens[worst]} tokens in one row"
                f"{what} {name} allows {limit}; raise it, or build the data set with "
                f"{'fewer or shorter responses a prompt' if len(own) > 1 else 'a smaller max_length'}"
            )

    def plan(self, groups: np.ndarray) -> BatchPlan:
        """Rows of one global batch `groups` [b] (positions in the data set)."""
        parts = self.parts.of(groups)
        longest = int(self.tokens[parts].max(initial=1))
        budget = max(self.budget, self._round(longest))
        packed = pack_batch(self.tokens[parts], self.cost[parts], budget, self.shape.dp_size)
        count = -(-len(packed[0]) // self.shape.count_multiple) * self.shape.count_multiple
        rows = [[parts[row] for row in self._split(list(rank), parts, count)] for rank in packed]
        return BatchPlan(
            rows=tuple(tuple(tuple(self.parts[int(p)] for p in row) for row in rank) for rank in rows),
            lengths=tuple(self._lengths(rank, budget) for rank in rows),
            groups=len(groups),
            useful_tokens=int(self.useful[groups].sum()),
            model_tokens=int(self.tokens[parts].sum()),
            head_rows=int(self.head_rows[groups].sum()),
            pairs=int(self.pairs[parts].sum()),
        )

    def _round(self, tokens: int) -> int:
        return -(-max(tokens, 1) // self.shape.multiple) * self.shape.multiple

    def _lengths(self, rank: list[np.ndarray], budget: int) -> tuple[int, ...]:
        own = [self._round(int(self.tokens[row].sum())) for row in rank]
        if self.shape.lengths == "fixed":
            return (budget,) * len(own)
        padded = (max(own),) * len(own)
        wasteful = sum(padded) > 1.02 * sum(own)
        return tuple(own) if self.shape.lengths == "own" or (self.shape.lengths == "stage" and wasteful) else padded

    def _split(self, rank: list[np.ndarray], parts: np.ndarray, count: int) -> list[np.ndarray]:
        """`rank` with its longest rows halved until there are `count`; empty rows where no row can be halved."""
        tokens = self.tokens[parts]
        while len(rank) < count:
            split = [i for i, row in enumerate(rank) if len(row) > 1]
            if not split:
                rank.append(np.zeros(0, np.int64))
                continue
            row = rank.pop(max(split, key=lambda i: (int(tokens[rank[i]].sum()), -i)))
            halves: tuple[list[int], list[int]] = ([], [])
            for g in sorted(row.tolist(), key=lambda g: (-int(tokens[g]), g)):
                min(halves, key=lambda half: int(tokens[half].sum())).append(g)
            rank += [np.array(sorted(half), np.int64) for half in halves]
        return rank


def part_lengths(data: Any, parts: Parts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompt tokens of each part [U], response tokens [R], offsets [U + 1]): the lengths of parts as of groups."""
    return data.prompt_lengths[parts.groups], data.response_lengths[0][parts.responses], parts.offsets


def part_tokens(data: Any, parts: Parts, *, prefix_sharing: bool) -> np.ndarray:
    """Tokens that each part takes in a row. [U] int64."""
    return group_tokens(*part_lengths(data, parts), prefix_sharing=prefix_sharing)


def check_vocabulary(data: GroupDataset, arch: ModelArch) -> None:
    """Refuse a data set whose token ids the model may not have.

    Raises:
        ConfigError: with both vocabulary sizes.
    """
    if data.manifest["vocab_size"] > arch.vocab_size:
        raise ConfigError(
            f"data set {data.path} was tokenised for a vocabulary of {data.manifest['vocab_size']}, the model has "
            f"{arch.vocab_size}; build it again with the tokenizer of the model"
        )


def warnings_of(data: GroupDataset, arch: ModelArch, model: Path) -> list[str]:
    """What to tell before the model in folder `model` is run on a data set: sequences beyond the positions that it
    claims (rotary ones compute on), vocabulary files other than those that the data set was tokenised with."""
    found = []
    longest, positions = data.manifest.get("max_sequence_tokens", 0), arch.max_position_embeddings
    if longest > positions:
        found.append(
            f"warning: data set {data.path} has a sequence of {longest} tokens, the model's max_position_embeddings is "
            f"{positions}: it was not trained on positions beyond; build the data set with max_length = {positions} or "
            "less"
        )
    own = vocabulary_digest(model / "hf" if (model / "hf").is_dir() else model)
    if own and own != data.manifest["digest"].get("tokenizer"):
        found.append(
            f"warning: data set {data.path} was tokenised with other vocabulary files than those of {model}: right "
            "only where both give the same ids, as a base model's and its chat model's mostly do"
        )
    return found


def row_shape(parallel: ParallelConfig, dp_size: int, backend: Any) -> RowShape:
    """What the layout and the backend (model.build.Backend) ask of the rows of a step."""
    lengths: RowLengths = "own" if parallel.pipeline == 1 else "stage"
    tile = 128 if backend.attention == "flex" else 1  # model.flex.TILE: no ragged edges, few shapes to compile
    if parallel.virtual_pipeline > 1:
        lengths = "padded"  # mcore's interleaved schedule cannot tell whose shape is whose between two stages
    if backend.policy.tp_comm_overlap:
        lengths = "fixed"
    return RowShape(
        dp_size=dp_size,
        multiple=parallel.context * lcm(parallel.tensor if parallel.sequence else 1, tile),
        count_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        tile=tile,
        lengths=lengths,
    )


def row_planner(config: Any, data: GroupDataset, arch: ModelArch, world_size: int, backend: Any) -> RowPlanner:
    """The planner of a run: `config` has `data` (DataConfig) and `parallel` (ParallelConfig, which fits the world)."""
    return RowPlanner(
        data,
        arch,
        max_row_tokens=config.data.max_row_tokens,
        max_group_tokens=config.data.max_group_tokens or 4 * config.data.max_row_tokens,
        prefix_sharing=config.data.prefix_sharing,
        shape=row_shape(config.parallel, world_size // config.parallel.model_ranks, backend),
    )


class _RowBuilder:
    """Collects sequences one behind the other."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[np.ndarray] = []
        self.parents: list[np.ndarray] = []
        self.length = self.segment = 0

    def add(self, tokens: np.ndarray, first_position: int = 0, parent: int | None = None) -> int:
        """Append one segment; returns the place of its first token."""
        start, n = self.length, len(tokens)
        self.tokens.append(tokens)
        self.positions.append(np.arange(first_position, first_position + n))
        self.segments.append(np.full(n, self.segment))
        self.parents.append(np.full(n, self.segment if parent is None else parent))
        self.length += n
        self.segment += 1
        return start


def build_row(groups: Sequence[Group], *, prefix_sharing: bool, row_tokens: int) -> Row:
    """The tensors of one row of groups, or parts of them, padded at its end to `row_tokens`.

    The token before a response predicts its first token: the prompt's last token, so with prefix sharing that place
    serves every response of the group.
    """
    row = _RowBuilder()
    targets, target_rows, target_response = [], [], []
    members, weights, term_group, rewards = [], [], [], []
    count = 0
    for g, group in enumerate(groups):
        if prefix_sharing:
            prompt_segment = row.segment
            prompt_end = row.add(group.prompt) + len(group.prompt) - 1
        for i, response in enumerate(group.responses):
            n = len(response)
            if prefix_sharing:
                start = row.add(response, len(group.prompt), prompt_segment)
                before = prompt_end
            else:
                start = row.add(np.concatenate((group.prompt, response))) + len(group.prompt)
                before = start - 1
            targets.append(response)
            target_rows.append(np.concatenate(([before], np.arange(start, start + n - 1))))
            target_response.append(np.full(n, count + i))
        members.append(np.where(group.members >= 0, group.members + count, -1))
        weights.append(group.weights)
        term_group.append(np.full(len(group.weights), g))
        rewards.append(group.rewards)
        count += len(group.responses)
    if row.length > row_tokens:
        raise ValueError(f"{row.length} tokens do not fit a row of {row_tokens}")
    padding = row_tokens - row.length
    flat = _members(members)
    weight = np.concatenate([np.zeros(0), *weights]).astype(np.float32)
    lengths = [len(response) for group in groups for response in group.responses]
    return Row(
        tokens=_ints([*row.tokens, np.zeros(padding)])[None],
        positions=_ints([*row.positions, np.zeros(padding)]),
        layout=torch.stack(
            [_ints([*ids, np.full(padding, -1)]).to(torch.int32) for ids in (row.segments, row.parents)]
        ),
        targets=_ints(targets),
        target_rows=_ints(target_rows),
        target_response=_ints(target_response),
        rewards=torch.from_numpy(np.concatenate([np.zeros(0), *rewards])).float(),
        terms=Terms(
            flat,
            torch.from_numpy(weight),
            _ints(term_group),
            len(groups),
            torch.tensor([group.counted for group in groups], dtype=torch.bool),
        ),
        parts=tuple(group.part for group in groups),
        blocks=Blocks(torch.tensor([lengths], dtype=torch.int64), block_sizes(flat.numpy(), count)),
        idle=len(np.setdiff1d(np.arange(count), flat.numpy()[weight > 0])) > 0,
    )


def block_sizes(members: np.ndarray, responses: int) -> tuple[int, ...]:
    """Sizes of the shortest runs of `responses` responses that no term of `members` [m, k] (-1 pads) leaves."""
    present = members >= 0
    first, last = np.where(present, members, responses).min(1, initial=responses), members.max(1, initial=-1)
    spans = np.zeros(responses + 1, np.int64)
    np.add.at(spans, first[present.any(1)], 1)
    np.add.at(spans, last[present.any(1)], -1)
    ends = np.flatnonzero(spans.cumsum()[:responses] == 0)  # no term holds a response and its successor together
    return tuple(np.diff(ends, prepend=-1).tolist())


def _ints(parts: list[np.ndarray]) -> Tensor:
    """Concatenation as int64. An empty list gives [0]."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))


def _members(parts: list[np.ndarray]) -> Tensor:
    """[m, k] int64 of all terms; narrower groups are padded with -1 to the widest."""
    width = max((p.shape[1] for p in parts), default=1)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in parts]
    return torch.from_numpy(np.concatenate([np.zeros((0, width), np.int64), *padded]).astype(np.int64))
