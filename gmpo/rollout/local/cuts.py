"""The tokens that top_k, top_p and min_p leave, as separate columns.

A vocabulary has 50,000 to 250,000 tokens, and a cut leaves some hundreds.  Sorting, summing and
drawing over those only takes a fraction of the time that transformers' processors take.  The sets
are theirs: each cut sees the distribution that the one before left, in the order top_k, top_p,
min_p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import logits_process

from gmpo.rollout.local.draw import wide
from gmpo.token_sets import TokenList

# Probabilities that a token of the nucleus may have at least; the first at which enough is left.
FLOORS = (1e-4, 1e-5, 1e-6)
SLACK = 1e-5  # rounding of a float32 sum over a vocabulary
HALVINGS = 10  # of the search for the edge of a nucleus


@dataclass(frozen=True, slots=True)
class Cuts:
    """The cuts that a distribution is given."""

    top_k: int = 0  # 0 keeps all tokens
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class Columns:
    """The tokens that are left in each row, in ascending order, padded to the longest row."""

    scores: Tensor  # [R, K]; -inf on tokens that a later cut took, and on the padding
    ids: Tensor  # [R, K] int64, the tokens; 0 on the padding

    def token_lists(self, vocabulary: int) -> list[TokenList | None]:
        """Return the tokens that are left in each row; None for a row that keeps all of them."""
        kept = self.scores > -torch.inf
        counts = kept.sum(-1).tolist()
        ids = self.ids[kept].to(torch.int32).cpu().split(counts)
        return [listed(tokens, vocabulary) for tokens in ids]


def cuts_of(processors: Sequence[object]) -> Cuts | None:
    """Return the cuts that a list of transformers' processors makes; None for other processors."""
    found: dict[str, float] = {}
    for processor in processors:
        if isinstance(processor, logits_process.TopKLogitsWarper):
            found["top_k"] = processor.top_k
        elif isinstance(processor, logits_process.TopPLogitsWarper):
            found["top_p"] = processor.top_p
        elif isinstance(processor, logits_process.MinPLogitsWarper):
            found["min_p"] = processor.min_p
        elif not isinstance(processor, logits_process.LogitNormalization):  # it moves all alike
            return None
    return Cuts(**found)  # pyright: ignore[reportArgumentType] (transformers checks the types)


def cut(scores: Tensor, cuts: Cuts) -> Columns:
    """Return the tokens that the cuts leave of each row of scores, [R, V].

    Example:
        Probabilities [0.1, 0.6, 0.05, 0.25] with top_p 0.8 -> ids [[1, 3]].
    """
    if cuts.top_k:
        columns = top_columns(scores, cuts.top_k)
        probabilities = columns.scores.softmax(-1)
    else:
        of_all = scores.softmax(-1)
        columns = compressed(scores, of_all >= floor(of_all, cuts)[:, None])
        probabilities = of_all.gather(-1, columns.ids)

    left = columns.scores > -torch.inf
    if cuts.top_p < 1.0:
        left &= in_nucleus(probabilities.masked_fill(~left, 0.0), cuts.top_p)
    if cuts.min_p:
        # The most probable token of a row is always left, so that its probability is the measure.
        highest = probabilities.masked_fill(~left, 0.0).amax(-1, keepdim=True)
        left &= probabilities >= cuts.min_p * highest
    return Columns(columns.scores.masked_fill(~left, -torch.inf), columns.ids)


def top_columns(scores: Tensor, count: int) -> Columns:
    """Return the highest scores of each row, and those that equal the last of them.

    Example:
        scores [[1, 3, 2, 2, 0]] and count 2 -> scores [[3, 2, 2]], ids [[1, 2, 3]]
    """
    if count >= scores.shape[-1]:
        return compressed(scores, scores > -torch.inf)

    values, ids = scores.topk(count + 1)
    last = values[:, count - 1 : count]
    if bool((values[:, count:] == last).any()):
        return compressed(scores, (scores >= last) & (scores > -torch.inf))
    ids, order = ids[:, :count].sort(-1)
    return Columns(values.gather(-1, order), ids)


def floor(probabilities: Tensor, cuts: Cuts) -> Tensor:
    """Return [R], a probability under which no token of a row survives top_p or min_p.

    The most probable tokens that have top_p of the mass together are the nucleus.  If the tokens
    from some probability on have that much, the nucleus is among them.
    """
    highest = probabilities.amax(-1)
    if cuts.top_p == 1.0:
        return (cuts.min_p * highest).clamp_min(torch.finfo(probabilities.dtype).tiny)

    floors = torch.full_like(highest, torch.finfo(probabilities.dtype).tiny)
    open_rows = torch.arange(len(probabilities), device=probabilities.device)
    for value in FLOORS:
        rows = probabilities if len(open_rows) == len(probabilities) else probabilities[open_rows]
        enough = torch.where(rows >= value, rows, 0.0).sum(-1) >= cuts.top_p + SLACK
        floors[open_rows[enough]] = value
        open_rows = open_rows[~enough]
        if not len(open_rows):
            break
    return floors


def in_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return [R, K] bool, true where more probable tokens of a row have less than top_p together.

    Sorting is what takes time.  So the edge of the nucleus is first searched by halves, and only
    the tokens near it are sorted.

    Args:
        probabilities: [R, K]; 0 on what is no candidate.

    Example:
        probabilities [0.1, 0.6, 0.25] with top_p 0.8 -> [0, 1, 1]
    """
    low, high = around_the_edge(probabilities, top_p)
    inside = probabilities >= high[:, None]
    before = wide(torch.where(inside, probabilities, 0.0)).sum(-1, keepdim=True)

    near = compressed(probabilities, (probabilities > low[:, None]) & ~inside)
    ordered, order = near.scores.sort(dim=-1, descending=True, stable=True)
    present = ordered > -torch.inf
    ordered = wide(ordered.masked_fill(~present, 0.0))
    before = (before + ordered.cumsum(-1) - ordered).to(probabilities.device)

    rows, places = (present & (before < top_p)).nonzero(as_tuple=True)
    inside[rows, near.ids[rows, order[rows, places]]] = True
    return inside


def around_the_edge(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return two probabilities of each row, [R]: from the second on a token is in the nucleus.

    Up to the first one it is not.
    """
    low = torch.zeros_like(probabilities[:, 0])
    high = probabilities.amax(-1)
    bottom, top = torch.full_like(high, FLOORS[-1] / 100).log(), high.log()
    above, part = torch.empty_like(probabilities), torch.empty_like(probabilities)
    for _ in range(HALVINGS):
        middle = (bottom + top) / 2
        value = middle.exp()
        torch.gt(probabilities, value[:, None], out=above)
        mass = torch.mul(probabilities, above, out=part).sum(-1)
        enough, short = mass >= top_p + SLACK, mass < top_p - SLACK
        low, bottom = torch.where(enough, value, low), torch.where(enough, middle, bottom)
        high, top = torch.where(short, value, high), torch.where(short, middle, top)
    return low, high


def compressed(scores: Tensor, kept: Tensor) -> Columns:
    """Return the scores and tokens that are kept, [R, V] bool, as columns.

    Example:
        scores [[5, 6, 7], [5, 6, 7]] and kept [[0, 1, 1], [1, 0, 0]]
        -> scores [[6, 7], [5, -inf]], ids [[1, 2], [0, 0]]
    """
    rows, ids = kept.nonzero(as_tuple=True)
    counts = kept.sum(-1)  # [R]
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(rows), device=rows.device) - starts[rows]

    width = max(1, int(counts.max()))
    columns = Columns(
        scores.new_full((len(counts), width), -torch.inf),
        torch.zeros(len(counts), width, dtype=torch.int64, device=scores.device),
    )
    columns.scores[rows, places] = scores[rows, ids]
    columns.ids[rows, places] = ids
    return columns


def listed(tokens: Tensor, vocabulary: int) -> TokenList | None:
    """Return a set of tokens as the shorter list of its members or of all others.

    Args:
        tokens: [n] int32, distinct.
    """
    if len(tokens) == vocabulary:
        return None
    if 2 * len(tokens) <= vocabulary:
        return tokens, False
    absent = torch.ones(vocabulary, dtype=torch.bool)
    absent[tokens.long()] = False
    return absent.nonzero()[:, 0].to(torch.int32), True
