"""Rows of a batch, laid out for the model: where each token sits, what it may see, which state predicts it.

Every layout is a set of trees.  A tree is a prompt and the completions that continue it; a token sees the prompt and
the earlier tokens of its own completion.  Trees are put one after another into the rows of a rectangle.

    padded          one completion per tree, one tree per row
    packed          one completion per tree, several trees per row
    shared_prefix   the completions of a group in one tree, one or several trees per row
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gmpo.token_sets import ranges
from gmpo.types import Batch

Cost = Callable[[int, int], float]  # of a rectangle of so many rows and columns


@dataclass(frozen=True, slots=True)
class Layout:
    """A chunk of rows as model inputs.  R rows and L columns of the rectangle; B rows and T tokens of the batch."""

    input_ids: Tensor  # [R, L] int64, 0 on padding
    position_ids: Tensor  # [R, L] int64, from 0 at each prompt's start
    tree: Tensor  # [R, L] int64, which tree a token belongs to, -1 on padding
    branch: Tensor  # [R, L] int64, 0 in a prompt, else which completion
    weight: Tensor  # [R, L] float32, rows of the batch that contain the token, 0 on padding
    source: (
        Tensor  # [B, T] int64, where in [R * L] the state is that predicts the token; 0 on padding
    )
    kind: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything goes, in sizes only.  R rows and L columns of the rectangle; B rows of the batch."""

    kind: str
    trees: list[list[int]]  # rows of the batch by tree
    rows: list[list[int]]  # trees by row of the rectangle
    columns: int
    prompts: list[int]  # B prompt lengths
    branches: list[int]  # B completion tokens that go into the model


def place(
    batch: Batch,
    kind: str,
    trees: list[list[int]],
    arrange: Callable[[list[int]], list[list[int]]],
    *,
    last_token: bool,
    multiple_of: int = 1,
) -> Placement:
    """Put trees into rows.

    Args:
        trees: Rows of the batch by tree.
        arrange: From the tokens of each tree to trees by row of the rectangle.
        last_token: Run the last token of each completion too, which predicts nothing that is trained on.
        multiple_of: The columns are a multiple of it.
    """
    prompts = [len(prompt) for prompt in batch.prompt_ids]
    branches = [length if last_token else max(length - 1, 0) for length in batch.lengths.tolist()]
    sizes = [prompts[tree[0]] + sum(branches[row] for row in tree) for tree in trees]
    rows = arrange(sizes)
    longest = max((sum(sizes[tree] for tree in row) for row in rows), default=1)
    return Placement(kind, trees, rows, -(-longest // multiple_of) * multiple_of, prompts, branches)


def pack(sizes: Sequence[int], cost: Cost) -> list[list[int]]:
    """Items by row of the cheapest rectangle found: longest first, each into the emptiest row.

    Args:
        sizes: Tokens of each item.
    """
    candidates = sorted({min(int(1.25**power), len(sizes)) for power in range(64)}) if sizes else []
    options = [balance(sizes, number) for number in candidates]
    return min(
        options,
        key=lambda rows: cost(len(rows), max(sum(sizes[item] for item in row) for row in rows)),
        default=[],
    )


def balance(sizes: Sequence[int], number: int) -> list[list[int]]:
    """Items over `number` rows of about equal size: the longest first, each into the row that is emptiest."""
    rows: list[list[int]] = [[] for _ in range(number)]
    filled = [0] * number
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        row = filled.index(min(filled))
        rows[row].append(item)
        filled[row] += sizes[item]
    return rows


def lay_out(batch: Batch, placement: Placement) -> Layout:
    """The tokens of `batch` where `plan` puts them; one token that counts nowhere for a batch of no rows."""
    device = batch.completion_ids.device
    pool = torch.cat(
        [*(batch.prompt_ids[tree[0]] for tree in placement.trees), batch.completion_ids.flatten()]
    )
    segments, last_prompt_token, branch_start = _segments(placement, batch.completion_ids.shape[1])
    start, length, origin, tree, branch, position, weight = (
        torch.tensor(segments, dtype=torch.int64).view(-1, 7).T
    )
    places = ranges(start, length).to(device)
    size = (max(len(placement.rows), 1), placement.columns)

    def filled(values: Tensor, background: int) -> Tensor:
        flat = torch.full((size[0] * size[1],), background, dtype=torch.int64, device=device)
        flat[places] = values.to(device)
        return flat.view(size)

    return Layout(
        input_ids=filled(pool[ranges(origin, length).to(device)], 0),
        position_ids=filled(ranges(position, length), 0),
        tree=filled(tree.repeat_interleave(length), -1 if placement.trees else 0),
        branch=filled(branch.repeat_interleave(length), 0),
        weight=filled(weight.repeat_interleave(length), 0).float(),
        source=_sources(batch, last_prompt_token, branch_start),
        kind=placement.kind,
    )


def _segments(
    placement: Placement, width: int
) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
    """Runs of tokens: (place, length, origin in the token pool, tree, branch, position, weight).

    Also, for each row of the batch, the places of the last token of its prompt and of the first of its completion.
    """
    prompt_origin, origin = [], 0
    for tree in placement.trees:
        prompt_origin.append(origin)
        origin += placement.prompts[tree[0]]
    segments = []
    last_prompt_token, branch_start = [0] * len(placement.prompts), [0] * len(placement.prompts)
    for number, row in enumerate(placement.rows):
        place = number * placement.columns
        for tree in row:
            members = placement.trees[tree]
            prompt = placement.prompts[members[0]]
            segments.append((place, prompt, prompt_origin[tree], tree, 0, 0, len(members)))
            place += prompt
            last = place - 1
            for branch, member in enumerate(members, start=1):
                length = placement.branches[member]
                segments.append((place, length, origin + member * width, tree, branch, prompt, 1))
                last_prompt_token[member], branch_start[member] = last, place
                place += length
    return segments, last_prompt_token, branch_start


def _sources(batch: Batch, last_prompt_token: list[int], branch_start: list[int]) -> Tensor:
    device, width = batch.completion_ids.device, batch.completion_ids.shape[1]
    token = torch.arange(width, device=device)
    source = torch.tensor(branch_start, dtype=torch.int64, device=device)[:, None] + token - 1
    source[:, 0] = torch.tensor(last_prompt_token, dtype=torch.int64, device=device)
    return torch.where(token < batch.lengths.to(device)[:, None], source, 0)


def padded(batch: Batch, *, last_token: bool = False, multiple_of: int | None = None) -> Placement:
    """`batch` as it is.  Padding comes last, where no real token sees it, whatever a model makes of its mask."""
    trees = [[row] for row in range(len(batch))]
    return place(
        batch,
        "padded",
        trees,
        lambda sizes: trees,
        last_token=last_token,
        multiple_of=multiple_of or 1,
    )


def packed(batch: Batch, cost: Cost, *, last_token: bool = False) -> Placement:
    """`batch` in the cheapest rectangle of whole rows."""
    trees = [[row] for row in range(len(batch))]
    return place(batch, "packed", trees, lambda sizes: pack(sizes, cost), last_token=last_token)


def shared_prefix(batch: Batch, cost: Cost, *, last_token: bool = False) -> Placement:
    """`batch` in the cheapest rectangle of whole groups: rows whose prompt is the same tensor object."""
    trees: dict[int, list[int]] = {}
    for row, prompt in enumerate(batch.prompt_ids):
        trees.setdefault(id(prompt), []).append(row)
    groups = list(trees.values())
    return place(
        batch, "shared_prefix", groups, lambda sizes: pack(sizes, cost), last_token=last_token
    )
