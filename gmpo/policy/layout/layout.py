"""Rows of a batch, laid out for the model: where tokens stand, see, and are predicted.

Every layout is a list of trees.  A tree is a prompt and the completions that continue it; a token
sees the prompt and the earlier tokens of its own completion.

    padded          one completion per tree, one tree per line of a rectangle
    packed          one completion per tree, all trees in one line
    shared_prefix   the completions of a group in one tree, all trees in one line
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gmpo.attention.segments import Segments, Tree
from gmpo.token_sets import ranges
from gmpo.types import Batch


@dataclass(frozen=True, slots=True)
class Layout:
    """A chunk of rows as model inputs.

    R lines and L columns of cells; B rows and T tokens of the batch.
    """

    kind: str
    input_ids: Tensor  # [R, L] int64, 0 on padding
    position_ids: Tensor  # [R, L] int64, from 0 at each prompt's start, 0 on padding
    weight: Tensor  # [R, L] float32, rows of the batch that contain the token, 0 on padding
    source: Tensor  # [B, T] int64, which of [R * L] states predicts the token, 0 on padding
    mask: Tensor | None  # [R, L] int64, 1 on tokens, 0 on padding; None for a single line
    segments: Segments | None  # what sees what in a single line; None for a rectangle


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything goes, in sizes only."""

    kind: str
    trees: list[list[int]]  # rows of the batch by tree
    prompts: list[int]  # B prompt lengths
    branches: list[int]  # B completion tokens that go into the model
    lines: int
    columns: int

    @property
    def cells(self) -> int:
        """Return the tokens of the forward pass, padding included."""
        return self.lines * self.columns

    def tree(self, number: int) -> Tree:
        """Return the sizes of a tree."""
        rows = self.trees[number]
        return Tree(self.prompts[rows[0]], tuple(self.branches[row] for row in rows))


def padded(batch: Batch, *, last_token: bool = False, multiple_of: int | None = None) -> Placement:
    """Place `batch` as it is.

    Padding comes last, where no token sees it, whatever a model makes of its mask.

    Args:
        last_token: Run the last token of each completion too, which predicts nothing.
        multiple_of: The columns are a multiple of it.
    """
    prompts, branches = sizes(batch, last_token=last_token)
    longest = max(map(sum, zip(prompts, branches, strict=True)), default=1)
    multiple = multiple_of or 1
    columns = -(-longest // multiple) * multiple
    trees = [[row] for row in range(len(batch))]
    return Placement("padded", trees, prompts, branches, max(len(batch), 1), columns)


def packed(batch: Batch, *, last_token: bool = False) -> Placement:
    """Place the rows of `batch` one after another."""
    return _one_line("packed", batch, [[row] for row in range(len(batch))], last_token)


def shared_prefix(batch: Batch, *, last_token: bool = False) -> Placement:
    """Place each prompt of `batch` once: rows whose prompt is the same tensor object share it."""
    return _one_line("shared_prefix", batch, groups(batch), last_token)


def groups(batch: Batch) -> list[list[int]]:
    """Return the rows of `batch` by their prompt, which is the same tensor object for a group."""
    by_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(batch.prompt_ids):
        by_prompt.setdefault(id(prompt), []).append(row)
    return list(by_prompt.values())


def sizes(batch: Batch, *, last_token: bool) -> tuple[list[int], list[int]]:
    """Return the tokens of each row's prompt, and those of its completion that the model gets."""
    spared = 0 if last_token else 1
    branches = [max(length - spared, 0) for length in batch.lengths.tolist()]
    return [len(prompt) for prompt in batch.prompt_ids], branches


def _one_line(kind: str, batch: Batch, trees: list[list[int]], last_token: bool) -> Placement:
    prompts, branches = sizes(batch, last_token=last_token)
    tokens = sum(prompts[tree[0]] for tree in trees) + sum(branches)
    return Placement(kind, trees, prompts, branches, 1, tokens or 1)


# -- the tensors -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens that stand one after another, in their source and in the layout."""

    cell: int  # of the first one, of all R * L
    length: int
    origin: int  # of the first one, in the pool of tokens
    position: int  # of the first one
    weight: int


def lay_out(batch: Batch, placement: Placement) -> Layout:
    """Return the tokens of `batch` where `placement` puts them.

    A batch of no rows has one token that counts nowhere.
    """
    device = batch.completion_ids.device
    prompts = [batch.prompt_ids[tree[0]] for tree in placement.trees]
    pool = torch.cat([*prompts, batch.completion_ids.flatten()])
    runs, prompt_ends, branch_starts = _runs(placement, batch.completion_ids.shape[1])

    fields = [(run.cell, run.length, run.origin, run.position, run.weight) for run in runs]
    cell, length, origin, position, weight = torch.tensor(fields, dtype=torch.int64).view(-1, 5).T
    cells = ranges(cell, length).to(device)

    def spread(values: Tensor) -> Tensor:
        flat = torch.zeros(placement.cells, dtype=torch.int64, device=device)
        flat[cells] = values.to(device)
        return flat.view(placement.lines, placement.columns)

    mask, segments = None, None
    if placement.kind == "padded":
        mask = spread(torch.ones_like(cells)) if runs else spread(cells) + 1
    else:
        trees = [placement.tree(number) for number in range(len(placement.trees))]
        segments = Segments(tuple(trees or [Tree(1)]), device)

    return Layout(
        kind=placement.kind,
        input_ids=spread(pool[ranges(origin, length).to(device)]),
        position_ids=spread(ranges(position, length)),
        weight=spread(weight.repeat_interleave(length)).float(),
        source=_sources(batch, prompt_ends, branch_starts),
        mask=mask,
        segments=segments,
    )


def _runs(placement: Placement, width: int) -> tuple[list[_Run], list[int], list[int]]:
    """Return the runs of a placement, and the cells that predict.

    Args:
        width: Completion tokens of a row in the pool, which holds the prompts before them.

    Returns:
        The runs; for each row of the batch, the cells of the last token of its prompt and of the
        first token of its completion.

    Example:
        one prompt of 3 tokens with completions of 2 and 1, width 2, in one line -> runs (cell,
        length, origin, position, weight) (0, 3, 0, 0, 2), (3, 2, 3, 3, 1), (5, 1, 5, 3, 1),
        and the cells [2, 2], [3, 5]
    """
    first_row = sum(placement.prompts[tree[0]] for tree in placement.trees)
    rectangle = placement.kind == "padded"
    runs: list[_Run] = []
    prompt_ends, branch_starts = [0] * len(placement.prompts), [0] * len(placement.prompts)
    cell, prompt_origin = 0, 0

    for number, tree in enumerate(placement.trees):
        if rectangle:
            cell = number * placement.columns
        prompt = placement.prompts[tree[0]]
        runs.append(_Run(cell, prompt, prompt_origin, 0, len(tree)))
        cell, prompt_origin = cell + prompt, prompt_origin + prompt
        prompt_end = cell - 1

        for row in tree:
            length = placement.branches[row]
            runs.append(_Run(cell, length, first_row + row * width, prompt, 1))
            prompt_ends[row], branch_starts[row] = prompt_end, cell
            cell += length

    return runs, prompt_ends, branch_starts


def _sources(batch: Batch, prompt_ends: Sequence[int], branch_starts: Sequence[int]) -> Tensor:
    """Return the cell whose state predicts each token, [B, T], 0 on padding.

    Example:
        a completion of 3 tokens at cells 7, 8, 9 whose prompt ends at cell 4 -> [4, 7, 8]
    """
    device, width = batch.completion_ids.device, batch.completion_ids.shape[1]
    token = torch.arange(width, device=device)
    source = torch.tensor(branch_starts, dtype=torch.int64, device=device)[:, None] + token - 1
    source[:, 0] = torch.tensor(prompt_ends, dtype=torch.int64, device=device)
    return torch.where(token < batch.lengths.to(device)[:, None], source, 0)
