"""Log-probs under what the sampler left, in every path of the head and every layout, against dense float64 logits."""

import dataclasses

import pytest
import torch
from torch import nn

from gmpo.policy.head import chunked as tiles
from gmpo.policy.head.chunked import token_logps
from gmpo.policy.head.fused import fused_loss
from gmpo.policy.head.lm_head import Head, Transform
from gmpo.policy.head.logits_shaping import Shaping
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.settings import PolicySettings
from gmpo.token_sets import TokenSets
from tests.policy.cases import (
    VOCABULARY,
    assert_same_gradients,
    float64_throughout,
    gradients,
    make_batch,
    make_model,
    weighted,
    weighted_rows,
)

ROWS, HIDDEN = 23, 6
PENALTY = 1.4
TRANSFORMS = {
    "temperature": Transform(temperature=0.6),
    "soft cap": Transform(slope=1.5, cap=2.0, temperature=0.7),
}
KINDS = {"cut": (True, False), "penalty": (False, True), "penalty and cut": (True, True)}


def lists_of(members):
    """Sets of a [N, V] mask: of each second row what it holds, of the others what it does not hold."""
    of = [row if number % 2 else ~row for number, row in enumerate(members)]
    return TokenSets.of(
        [
            (row.nonzero().flatten().to(torch.int32), number % 2 == 0)
            for number, row in enumerate(of)
        ]
    )


def shaped(logits, kept, seen, penalty):
    """The penalty as the CTRL paper has it, then only the kept logits."""
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits).masked_fill(~kept, -torch.inf)


def dense_scores(logits, targets, kept, seen, penalty):
    every = shaped(logits, kept, seen, penalty).log_softmax(-1)
    safe = torch.where(kept, every, 0.0)
    return every.gather(-1, targets[:, None])[:, 0], -(every.exp() * safe).sum(-1)


class Doubled(nn.Linear):
    """A head that is not a plain matrix product."""

    def forward(self, input):
        return 2 * super().forward(input)


def score(path, hidden, head, targets, transform, shaping, weigh):
    """A loss of all rows, in one of the ways to compute it."""
    if path == "fused":
        sizes, starts = [5, 9, 0, 9], [0, 5, 14, 14]
        return fused_loss(
            hidden,
            head,
            targets,
            list(torch.arange(4)),
            sizes,
            lambda n, *scores: weigh(*scores, starts[n]),
            transform,
            shaping=shaping,
        )
    scores = token_logps(
        hidden, Head(head), targets, transform, shaping=shaping, want_entropy_grad=path != "frozen"
    )
    return weigh(*scores, 0)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("path", ["scores", "frozen", "fused", "module"])
def test_every_path_has_the_values_and_gradients_of_the_dense_distribution(
    path, transform, kind, monkeypatch
):
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * VOCABULARY * 8)
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    head = (Doubled if path == "module" else nn.Linear)(HIDDEN, VOCABULARY, dtype=torch.float64)
    head.requires_grad_(path != "frozen")
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    strength = torch.randn(2, ROWS, dtype=torch.float64)
    cut, penalised = kind
    kept = (
        (torch.rand(ROWS, VOCABULARY) < 0.3)
        | (torch.arange(VOCABULARY) == targets[:, None])
        | (not cut)
    )
    seen = (torch.rand(ROWS, VOCABULARY) < 0.4) & penalised
    shaping = Shaping(
        lists_of(kept) if cut else None,
        lists_of(seen) if penalised else None,
        PENALTY if penalised else 1.0,
    )

    def weigh(logps, entropy, start):
        rows = slice(start, start + len(logps))
        mine = logps.square() @ strength[0, rows]
        return mine if path == "frozen" else mine + entropy.exp() @ strength[1, rows]

    outputs = head(hidden)
    wanted = weigh(*dense_scores(transform(outputs), targets, kept, seen, PENALTY), 0)
    loss = score(path, hidden, head, targets, transform, shaping, weigh)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs),
        torch.autograd.grad(wanted, inputs),
        rtol=1e-11,
        atol=1e-11,
    )


# -- whole models ------------------------------------------------------------------------------------------------------


def cut_batch(**options):
    """A batch whose tokens were each drawn from about 15 tokens."""
    batch = make_batch(longest=12, **options)
    kept = (
        torch.rand(*batch.mask.shape, VOCABULARY, generator=torch.Generator().manual_seed(5)) < 0.3
    )
    kept.scatter_(-1, batch.completion_ids[..., None], True)
    rows = [
        lists_of(row[:length]) if length else None
        for row, length in zip(kept, batch.lengths.tolist(), strict=True)
    ]
    return dataclasses.replace(
        batch, support=TokenSets.padded(rows, batch.lengths.tolist(), 12)
    ), kept


def naive_scores(model, batch, kept, temperature):
    """From the model's logits of one row after the other."""
    logps, entropies = [], []
    for row, prompt in enumerate(batch.prompt_ids):
        written = batch.completion_ids[row, : batch.lengths[row]]
        ids = torch.cat([prompt, written])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 :][
            : len(written)
        ]
        seen = torch.zeros(len(written), VOCABULARY, dtype=torch.bool)
        for number in range(len(written)):
            seen[number, ids[: len(prompt) + number]] = True
        scores = dense_scores(
            logits / temperature, written, kept[row, : len(written)], seen, PENALTY
        )
        padding = (0, batch.mask.shape[1] - len(written))
        logps.append(nn.functional.pad(scores[0], padding))
        entropies.append(nn.functional.pad(scores[1], padding))
    return torch.stack(logps) * batch.mask, torch.stack(entropies) * batch.mask


@pytest.mark.parametrize("name", ["llama", "gemma2-window-softcap"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_scores_and_losses_are_of_the_shaped_distribution_whole_and_in_chunks(
    layout, name, monkeypatch
):
    monkeypatch.setattr(tiles, "TILE_BYTES", 10 * VOCABULARY * 8)
    batch, kept = cut_batch()
    with float64_throughout():
        model = make_model(name)
        logps, entropy = naive_scores(model, batch, kept, 0.7)
        whole = weighted(logps, entropy, torch.arange(len(batch)))
        expected = gradients(whole, model)
        logprobs = LogProbs(
            PolicySettings(batch_layout=layout), temperature=0.7, repetition_penalty=PENALTY
        )
        scores = logprobs.compute(model, batch)
        losses = []
        for limit in (None, 30):
            model.zero_grad()
            total = 0.0
            chunks = logprobs.cut_batch(batch, limit)
            for chunk in chunks:
                loss = logprobs.loss(
                    model,
                    batch.rows(chunk),
                    weighted_rows(batch.rows(chunk), chunk),
                )
                loss.backward()
                total += loss.detach()
            losses.append(
                (len(chunks), total, {n: p.grad.clone() for n, p in model.named_parameters()})
            )

    torch.testing.assert_close(scores.logps, logps, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-10, atol=1e-10)
    assert losses[0][0] == 1 and losses[1][0] > 1
    for _, total, found in losses:
        torch.testing.assert_close(total, whole.detach(), rtol=1e-10, atol=1e-10)
        assert_same_gradients(found, expected, rtol=1e-9, atol=1e-10)


def test_log_probs_of_all_tokens_that_could_be_drawn_sum_to_one():
    model, prompt, allowed = make_model("llama"), torch.tensor([3, 4, 5]), [2, 7, 11, 30]
    one = make_batch(groups=1, group_size=4, longest=1, holes=False)
    batch = dataclasses.replace(
        one,
        prompt_ids=[prompt] * 4,
        completion_ids=torch.tensor(allowed)[:, None],
        lengths=torch.ones(4, dtype=torch.int64),
        mask=torch.ones(4, 1, dtype=torch.bool),
    )
    full = LogProbs(PolicySettings(), repetition_penalty=PENALTY).compute(model, batch).logps
    drawn = (torch.tensor(allowed, dtype=torch.int32), False)
    batch.support = TokenSets.padded([TokenSets.of([drawn])] * 4, [1] * 4, 1)
    cut = LogProbs(PolicySettings(), repetition_penalty=PENALTY).compute(model, batch).logps
    assert full.exp().sum() < 0.9
    torch.testing.assert_close(cut.exp().sum(), cut.new_tensor(1.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(cut - full, (cut - full)[:1].expand(4, 1))  # cut, and nothing else
