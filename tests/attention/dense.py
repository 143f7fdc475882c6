"""Attention written out with a mask, in the dtype of its inputs."""

import torch
from torch import Tensor

from gmpo.attention.segments import Reach, Tree


def visible(trees: list[Tree], reach: Reach) -> Tensor:
    """Return [L, L], true where the query sees the key: by the definition, for all pairs."""
    tokens = [
        (number, branch, position)
        for number, tree in enumerate(trees)
        for branch, start, length in branches(tree)
        for position in range(start, start + length)
    ]
    tree, branch, position = torch.tensor(tokens).T
    on_path = (branch == 0) | (branch == branch[:, None])
    seen = (tree == tree[:, None]) & on_path & (position <= position[:, None])
    if reach.window is not None:
        seen &= position > position[:, None] - reach.window
    if reach.chunk is not None:
        seen &= position // reach.chunk == position[:, None] // reach.chunk
    return seen


def branches(tree: Tree) -> list[tuple[int, int, int]]:
    """Return (branch, first position, length) of the prompt (branch 0) and of each completion."""
    written = [(n, tree.prompt, length) for n, length in enumerate(tree.completions, start=1)]
    return [(0, 0, tree.prompt), *written]


def dense_attention(query, key, value, seen, *, scale, softcap=None, sinks=None):
    """Return attention of [q, Hq, D] queries to [k, Hk, D] keys, and its log-sum-exp, [q, Hq]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->qhk", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(len(query), -1)[..., None]], dim=-1)
    weights = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("qhk,khd->qhd", weights, value), scores.logsumexp(-1)
