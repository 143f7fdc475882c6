"""What is sampled: against transformers' own distribution, and against probabilities by hand."""

import math

import pytest
import torch
from transformers import GenerationConfig

from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.local.sampler import Sampler, invert, sampling_config
from gmpo.rollout.local.sequence import new_sequences
from gmpo.rollout.sampling import sampling_from
from gmpo.rollout.settings import RolloutSettings
from tests.rollout.cases import EOS, VOCABULARY, prompts, shared, tiny, tokens

# 1e-4 quantile from above of the chi-square distribution, by Wilson and Hilferty's cube root approximation.
CRITICAL = {
    df: df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3
    for df in range(1, VOCABULARY)
}


def generates_distribution(model, prompt: list[int], **options) -> torch.Tensor:
    """[V] probabilities of the first token, as transformers' generate hands them to its multinomial draw."""
    config = GenerationConfig(
        max_new_tokens=1,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=EOS,
        pad_token_id=0,
        **{"top_k": 0, **options},
    )
    with torch.no_grad(), torch.random.fork_rng():
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            generation_config=config,
        )
    return output.scores[0][0].softmax(-1).double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.08},
        {"repetition_penalty": 1.6},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
        {"typical_p": 0.6},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_tokens_follow_generates_distribution(options):
    model, (prompt,) = tiny(), prompts(6)
    expected = generates_distribution(model, prompt.ids, **options)
    extra = {name: value for name, value in options.items() if name == "typical_p"}
    fields = {name: value for name, value in options.items() if name not in extra}
    count = 4000
    drawn = tokens(
        shared(model).generate([Request(prompt, count, 0)], Sampling(1, **fields, extra=extra))
    )[0]
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=VOCABULARY).double()
    assert counts[expected == 0].sum() == 0
    common = expected * count >= 5
    rare = (counts[~common].sum(), count * expected[~common].sum())
    statistic = ((counts - count * expected)[common] ** 2 / (count * expected[common])).sum()
    cells = int(common.sum())
    if rare[1] >= 5:
        statistic, cells = statistic + (rare[0] - rare[1]) ** 2 / rare[1], cells + 1
    assert statistic < CRITICAL[cells - 1]
    assert cells > 2


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_pairs_of_tokens_follow_generates_distribution(name):
    # The second token comes out of the shared cache: its distribution is generate's, given the first one.
    model, (prompt,), count = tiny(name), prompts(9), 3000
    first = generates_distribution(model, prompt.ids)
    likely = [token for token in first.argsort(descending=True).tolist() if token != EOS][:4]
    drawn = tokens(shared(model).generate([Request(prompt, count, 1)], Sampling(2)))[0]
    for token in likely:
        expected = generates_distribution(model, [*prompt.ids, token])
        seconds = torch.tensor([ids[1] for ids in drawn if ids[0] == token])
        counts = torch.bincount(seconds, minlength=VOCABULARY).double()
        expected = expected * len(seconds)
        common = expected >= 5
        cells = torch.stack([counts[~common].sum(), expected[~common].sum()])
        statistic = ((counts - expected)[common] ** 2 / expected[common]).sum() + (
            cells[0] - cells[1]
        ) ** 2 / cells[1]
        assert int(common.sum()) > 2
        assert statistic < CRITICAL[int(common.sum())]


def test_inversion_takes_the_first_token_beyond_the_number():
    # Cumulative: 0.25, 0.25, 0.75, 1.0; token 1 is impossible.
    row = torch.tensor([0.25, 0.0, 0.5, 0.25])
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.999999], dtype=torch.float64)
    assert invert(row.expand(6, -1), numbers).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [3, 64, 100, 256, 1000, 49152])
def test_inversion_over_any_vocabulary_is_the_search_in_float64(size):
    generator = torch.Generator().manual_seed(size)
    rows = (3 * torch.randn(50, size, generator=generator)).softmax(-1)
    numbers = torch.rand(50, dtype=torch.float64, generator=generator)
    cumulative = rows.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, (numbers * cumulative[:, -1])[:, None], right=True)[
        :, 0
    ]
    # float32 sums of blocks round at 1e-7: a number that close to a token's edge may fall on either side.
    differs = invert(rows, numbers) != expected
    edge = (cumulative - (numbers * cumulative[:, -1])[:, None]).abs().min(-1).values
    assert (edge[differs] < 1e-6).all()
    assert differs.sum() <= 1


def test_inversion_never_takes_an_impossible_token():
    rows = torch.zeros(4, 130)
    rows[0, 129] = rows[1, 0] = rows[2, 64] = rows[3, 63] = 1e-30
    for number in (0.0, 0.5, 1 - 2**-53):
        got = invert(rows, torch.full((4,), number, dtype=torch.float64))
        assert got.tolist() == [129, 0, 64, 63]


def test_rows_of_unlike_lengths_are_processed_as_if_alone():
    # No padding reaches a processor: with a repetition penalty, a row's scores depend on its own tokens only.
    model, pair = tiny(), prompts(3, 9)
    config = sampling_config(Sampling(4, repetition_penalty=2.0), (EOS,))
    sampler = Sampler(model, config, device=torch.device("cpu"))
    rows = [new_sequences(Request(prompt, 1, 0))[0] for prompt in pair]
    rows[0].ids += [5, 6]
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0))
    got = sampler._processed(logits, rows)
    for row, scores, raw in zip(rows, got, logits, strict=True):
        seen = torch.zeros(VOCABULARY, dtype=torch.bool)
        seen[torch.tensor(row.request.prompt.ids + row.ids)] = True
        penalised = torch.where(raw > 0, raw / 2, raw * 2)
        torch.testing.assert_close(scores, torch.where(seen, penalised, raw))


def test_settings_become_sampling():
    settings = RolloutSettings(
        max_completion_length=7, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.2,
        generation_kwargs={"typical_p": 0.5},
    )  # fmt: skip
    assert sampling_from(settings) == Sampling(7, 0.5, 0.9, 3, 0.1, 1.2, {"typical_p": 0.5})
    assert sampling_from(settings, greedy=True).temperature == 0.0


def test_unknown_options_are_refused_by_name():
    with pytest.raises(
        ValueError, match="generation_kwargs has num_beams, temprature, which can't act"
    ):
        sampling_config(Sampling(4, extra={"temprature": 1.0, "num_beams": 2}), (EOS,))
