"""What is sampled: against transformers' own distribution, and against probabilities by hand."""

import math

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process

from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.local.cuts import Cuts, cut
from gmpo.rollout.local.draw import invert
from gmpo.rollout.local.generation_options import sampling_config
from gmpo.rollout.local.sampler import Sampler
from gmpo.rollout.local.sequence import new_sequences
from gmpo.rollout.sampling import sampling_from
from gmpo.rollout.settings import RolloutSettings
from gmpo.token_sets import TokenSets
from gmpo.types import Prompt
from tests.rollout.cases import ENGINES, EOS, VOCABULARY, prompts, shared, tiny, tokens

# 1e-4 quantile from above of the chi-square distribution, by Wilson and Hilferty's cube root
# approximation.
CRITICAL = {
    df: df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3
    for df in range(1, VOCABULARY)
}


def generates_distribution(model, prompt: list[int], **options) -> torch.Tensor:
    """Return [V] probabilities of the first token, as transformers' generate draws from them."""
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
    # The second token comes out of the shared cache: its distribution is generate's, given the
    # first one.
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
    # float32 sums of blocks round at 1e-7: a number that close to a token's edge may fall on either
    # side.
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
    # No padding reaches a processor: with a repetition penalty, a row's scores depend on its own
    # tokens only.
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
        max_completion_length=7, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1,
        repetition_penalty=1.2, generation_kwargs={"typical_p": 0.5},
    )  # fmt: skip
    assert sampling_from(settings) == Sampling(7, 0.5, 0.9, 3, 0.1, 1.2, {"typical_p": 0.5})
    assert sampling_from(settings, greedy=True).temperature == 0.0


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_penalty_of_rows_that_come_and_go_is_transformers(penalty):
    """The seen tokens are kept from step to step, for rows in any company and order."""
    pair = prompts(3, 9, 5)
    config = sampling_config(Sampling(4, repetition_penalty=penalty), (EOS,))
    sampler = Sampler(tiny(), config, device=torch.device("cpu"))
    rows = [new_sequences(Request(prompt, 1, 0))[0] for prompt in pair]
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    generator = torch.Generator().manual_seed(0)
    for present in ([0, 1], [1, 0], [0, 1, 2], [2], [2, 0]):
        logits = torch.randn(len(present), VOCABULARY, generator=generator)
        got = sampler._processed(logits, [rows[number] for number in present])
        for place, number in enumerate(present):
            ids = torch.tensor([rows[number].tokens_from(0)])
            expected = processor(ids, logits[place : place + 1].clone())
            torch.testing.assert_close(got[place], expected[0])
            rows[number].ids.append(int(torch.randint(VOCABULARY, (1,), generator=generator)))


# -- cuts ------------------------------------------------------------------------------------------

CUTS = [
    Cuts(top_k=7),
    Cuts(top_k=100_000),
    Cuts(top_p=0.9),
    Cuts(top_p=0.999),
    Cuts(min_p=0.05),
    Cuts(top_k=50, top_p=0.8),
    Cuts(top_p=0.95, min_p=0.01),
    Cuts(top_k=50, top_p=0.9, min_p=0.1),
]


def by_transformers(scores: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """[R, V] scores after transformers' warpers."""
    nothing = torch.empty(len(scores), 0, dtype=torch.int64)
    if cuts.top_k:
        scores = logits_process.TopKLogitsWarper(cuts.top_k)(nothing, scores)
    if cuts.top_p < 1:
        scores = logits_process.TopPLogitsWarper(cuts.top_p)(nothing, scores)
    if cuts.min_p:
        scores = logits_process.MinPLogitsWarper(cuts.min_p)(nothing, scores)
    return scores


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
def test_cuts_leave_the_sets_and_scores_of_transformers(cuts, spread):
    # Rows from nearly flat to nearly certain, one with tokens that are masked already.
    generator = torch.Generator().manual_seed(0)
    scores = (spread * torch.randn(6, 5000, generator=generator)).double().float()
    scores[1] *= 3
    scores[2, ::2] = -torch.inf
    expected = by_transformers(scores, cuts)

    columns = cut(scores, cuts)
    got = torch.full_like(scores, -torch.inf)
    for row in range(len(scores)):
        kept = columns.scores[row] > -torch.inf
        got[row, columns.ids[row, kept]] = columns.scores[row, kept]

    # transformers adds up in float32: a token at the very edge of the nucleus may fall either side.
    differs = (got != expected).sum(-1)
    allowed = (
        0 if cuts.top_p == 1.0 else max(1, int(1e-3 * float((expected > -torch.inf).sum(-1).max())))
    )
    assert int(differs.max()) <= allowed


def test_the_nucleus_by_hand():
    # 0.6 is enough for 0.59; 0.6 + 0.25 for 0.8; 0.1 besides for 0.86.
    scores = torch.tensor([[0.1, 0.6, 0.05, 0.25]]).log()
    for top_p, expected in ((0.8, [1, 3]), (0.59, [1]), (0.86, [0, 1, 3])):
        columns = cut(scores, Cuts(top_p=top_p))
        assert columns.ids[columns.scores > -torch.inf].tolist() == expected


def test_scores_that_equal_the_last_of_top_k_stay_as_in_transformers():
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert cut(scores, Cuts(top_k=2)).ids.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("cuts", [Cuts(top_p=0.9), Cuts(top_k=3), Cuts(top_k=5000, min_p=1e-9)])
def test_lists_of_what_is_left_name_the_members_or_the_others(cuts):
    scores = torch.linspace(0, 3, 64)[None]
    kept = cut(scores, cuts)
    (found,) = kept.token_lists(64)
    expected = by_transformers(scores, cuts)[0] > -torch.inf
    if found is None:
        assert expected.all()
    else:
        sets = TokenSets.of([found])
        assert torch.equal(sets.members(64)[0], expected)
        assert len(found[0]) <= 32


# -- logits that leave nothing to draw -------------------------------------------------------------


@pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES.keys())
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}, {"repetition_penalty": 1.3}])
def test_logits_of_nan_stop_and_name_their_prompts(make, options):
    model = tiny()
    model.lm_head.weight.data.fill_(torch.nan)
    asked = [Request(Prompt([5, 6], "the prompt that did it"), 2, 0)]
    with pytest.raises(
        FloatingPointError, match=r"2 of 2 completions.*NaN.*the prompt that did it"
    ):
        make(model).generate(asked, Sampling(3, **options))


@pytest.mark.parametrize("support", ["sampled", "full"])
def test_a_mask_of_all_tokens_stops(support):
    sampling = Sampling(
        3, extra={"suppress_tokens": list(range(VOCABULARY))}, logps_support=support
    )
    with pytest.raises(FloatingPointError, match="masks every token"):
        shared(tiny()).generate([Request(prompts(4)[0], 1, 0)], sampling)
