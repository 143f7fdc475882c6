"""What must hold for every member of the family, whatever the rows: searched for counterexamples by hypothesis."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmpo.objective.objective import Objective, objective_from
from gmpo.objective.settings import CORRECTION_MODES, ObjectiveSettings
from gmpo.objective.types import Denominators, ObjectiveInputs

SEQUENCE = {"importance_sampling_level": "sequence"}
MEMBERS = {
    "gmpo": ("gmpo", {"epsilon": 0.4, "epsilon_high": 0.6}),
    "gmpo delta": ("gmpo", {"epsilon": 0.4, "delta": 1.0}),
    "gmpo sequence": ("gmpo", {"epsilon": 0.4, **SEQUENCE}),
    "gmpo harmonic": ("gmpo", {"epsilon": 0.4, "mean_power": -1.0}),
    "gmpo arithmetic": ("gmpo", {"epsilon": 0.4, "mean_power": 1.0}),
    "grpo": ("grpo", {"loss_type": "grpo"}),
    "gspo": ("grpo", {"loss_type": "grpo", **SEQUENCE}),
    "bnpo": ("grpo", {"loss_type": "bnpo"}),
    "dr_grpo": ("grpo", {"loss_type": "dr_grpo"}),
    "dapo": ("grpo", {"loss_type": "dapo", "delta": 3.0}),
    "luspo": ("grpo", {"loss_type": "luspo", **SEQUENCE}),
    "cispo": ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0}),
    "sapo": ("grpo", {"loss_type": "sapo"}),
    "vespo": ("grpo", {"loss_type": "vespo"}),
}
EXTRAS = {"beta": 0.1, "use_bias_correction_kl": True, "off_policy_mask_threshold": 0.5}
UNCORRECTED = {"vllm_importance_sampling_correction": False}
every_member = st.sampled_from(sorted(MEMBERS))
searched = settings(deadline=None, derandomize=True, max_examples=60)


def build(name: str, **options) -> Objective:
    algorithm, own = MEMBERS[name]
    return objective_from(ObjectiveSettings(**own, **options), algorithm=algorithm)


@st.composite
def objectives(draw) -> Objective:
    """Any member with reference, bias correction, off-policy mask and any sampler/trainer correction it takes."""
    name = draw(every_member)
    modes = [
        mode for mode in CORRECTION_MODES if not (name == "vespo" and mode.startswith("geometric"))
    ]
    return build(name, **EXTRAS, vllm_importance_sampling_mode=draw(st.sampled_from(modes)))


@st.composite
def rows(draw, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> ObjectiveInputs:
    """Up to 5 rows of up to 6 tokens, some masked, unselected or unreported by the sampler; rows may be empty."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    size, length = draw(st.integers(1, 5)), draw(st.integers(1, 6))

    def normal(scale: float, width: int = length) -> Tensor:
        return scale * torch.randn(size, width, generator=generator, dtype=torch.float64)

    def chance(probability: float) -> Tensor:
        return torch.rand(size, length, generator=generator) < probability

    logps = -normal(1.0).abs() - 0.1
    old_logps = logps - normal(spread)
    mask = chance(0.8)
    x = ObjectiveInputs(
        logps=logps,
        old_logps=old_logps,
        advantages=normal(1.0, 1).round(decimals=1),
        mask=mask,
        select=mask & chance(0.8),
        sampler_logps=torch.where(chance(0.2), torch.nan, old_logps + normal(0.3)),
        ref_logps=logps + normal(0.5),
        entropy=normal(1.0).abs(),
    )
    return mapped(x, lambda value: value.to(dtype) if value.is_floating_point() else value)


def mapped(x: ObjectiveInputs, change) -> ObjectiveInputs:
    """The same with `change` applied to every field."""
    return dataclasses.replace(
        x, **{f.name: change(getattr(x, f.name)) for f in dataclasses.fields(x)}
    )


def per_token(x: ObjectiveInputs, change) -> ObjectiveInputs:
    """The same with `change` applied to every field of shape [B, T]."""
    fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.name != "advantages"}
    return dataclasses.replace(x, **{name: change(value) for name, value in fields.items()})


def counts(x: ObjectiveInputs) -> Denominators:
    """As if `x` were a part of a larger optimizer batch, so that no denominator comes out right by chance."""
    return Denominators(7.0, 31.0, 13.0, 3.0, 9)


def outcome(
    objective: Objective, x: ObjectiveInputs, entropy_coef: float = 0.05
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients in log-probs and entropy."""
    leaves = dataclasses.replace(
        x, logps=x.logps.detach().requires_grad_(), entropy=x.entropy.detach().requires_grad_()
    )
    loss, _ = objective.loss(leaves, counts(x), entropy_coef=entropy_coef)
    gradients = torch.autograd.grad(
        loss, (leaves.logps, leaves.entropy), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), *gradients


def same(actual, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=tolerance, atol=tolerance)


@searched
@given(objectives(), rows(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(objective, x, random):
    order = torch.tensor(random.sample(range(len(x.mask)), len(x.mask)))
    loss, *gradients = outcome(objective, x)
    same(
        outcome(objective, mapped(x, lambda value: value[order])),
        (loss, *(g[order] for g in gradients)),
    )


@searched
@given(objectives(), rows(), st.integers(1, 4))
def test_padding_columns_change_nothing(objective, x, width):
    def padded(value: Tensor) -> Tensor:
        fill = False if value.dtype == torch.bool else torch.nan
        return torch.nn.functional.pad(value, (0, width), value=fill)

    loss, *gradients = outcome(objective, x)
    same(
        outcome(objective, per_token(x, padded)),
        (loss, *(torch.nn.functional.pad(g, (0, width)) for g in gradients)),
    )


@searched
@given(objectives(), rows(), st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
def test_nothing_outside_of_the_mask_is_seen(objective, x, garbage):
    def soiled(value: Tensor) -> Tensor:
        return value if value.dtype == torch.bool else torch.where(x.mask, value, garbage)

    expected = outcome(objective, x)
    same(outcome(objective, per_token(x, soiled)), expected)
    assert not expected[1][~x.mask].any() and not expected[2][~x.mask].any()


@searched
@given(objectives(), rows(), st.data())
def test_chunks_add_up_to_the_whole(objective, x, data):
    cut = data.draw(st.integers(0, len(x.mask)))
    chunks = [mapped(x, lambda value, p=part: value[p]) for part in (slice(cut), slice(cut, None))]
    parts = [outcome(objective, chunk) for chunk in chunks if len(chunk.mask)]
    losses, *gradients = zip(*parts, strict=True)
    same((sum(losses), *(torch.cat(g) for g in gradients)), outcome(objective, x))


@searched
@given(objectives(), rows())
def test_a_chunk_without_counted_tokens_is_worth_nothing(objective, x):
    nothing = torch.zeros_like(x.mask)
    for loss_or_gradient in outcome(
        objective, dataclasses.replace(x, mask=nothing, select=nothing)
    ):
        assert not loss_or_gradient.any()


@searched
@given(every_member, rows())
def test_zero_advantage_gives_no_gradient(name, x):
    objective = build(name)
    _, gradient, _ = outcome(
        objective, dataclasses.replace(x, advantages=0 * x.advantages), entropy_coef=0.0
    )
    assert not gradient.any()


@searched
@given(st.sampled_from([name for name in sorted(MEMBERS) if name not in ("gspo", "luspo")]), rows())
def test_unselected_tokens_get_no_gradient_unless_they_share_a_ratio_over_all_counted_ones(name, x):
    _, gradient, _ = outcome(build(name), x, entropy_coef=0.0)
    assert not gradient[~x.select].any()


@searched
@given(
    rows(),
    st.sampled_from([name for name in MEMBERS if name.startswith("gmpo")] + ["gspo", "sapo"]),
)
def test_an_unmoved_policy_has_the_gradient_of_grpo(x, name):
    unmoved = dataclasses.replace(x, old_logps=x.logps, select=x.mask)
    _, expected, _ = outcome(build("grpo", **UNCORRECTED), unmoved, entropy_coef=0.0)
    _, gradient, _ = outcome(build(name, **UNCORRECTED), unmoved, entropy_coef=0.0)
    same([gradient], [expected])


@searched
@given(every_member, rows(), st.floats(0.01, 100.0))
def test_the_gradient_is_in_proportion_to_the_advantage(name, x, factor):
    _, once, _ = outcome(build(name), x, entropy_coef=0.0)
    _, scaled, _ = outcome(
        build(name), dataclasses.replace(x, advantages=factor * x.advantages), entropy_coef=0.0
    )
    same([scaled / factor], [once])


@searched
@given(objectives(), rows())
def test_only_log_probs_and_entropy_get_a_gradient(objective, x):
    constants = ("old_logps", "advantages", "sampler_logps", "ref_logps")
    leaves = {name: getattr(x, name).requires_grad_() for name in constants}
    leaves["logps"] = x.logps.clone().requires_grad_()
    loss, _ = objective.loss(dataclasses.replace(x, **leaves), counts(x))
    loss.backward()
    assert leaves["logps"].grad is not None
    assert all(leaves[name].grad is None for name in constants)


@searched
@given(every_member, rows())
def test_the_reported_ratio_is_one_number_per_row_without_a_gradient(name, x):
    objective = build(name)
    terms = objective.terms(dataclasses.replace(x, logps=x.logps.requires_grad_()))
    ratio = objective.member.surrogate(terms, **objective.options).ratio
    assert ratio.shape == (len(x.mask), 1) and not ratio.requires_grad and (ratio >= 0).all()


@searched
@given(rows(spread=2.0), st.sampled_from(["gmpo", "gmpo delta", "gmpo sequence"]))
def test_rho_stays_in_its_window(x, name):
    objective = build(name, **UNCORRECTED)
    ratio = objective.member.surrogate(objective.terms(x), **objective.options).ratio
    positive = x.advantages >= 0
    assert (
        ratio[positive] <= torch.tensor(objective.options["epsilon_high"]).double().exp() + 1e-6
    ).all()
    if name != "gmpo sequence":
        assert (
            ratio[~positive] >= torch.tensor(-objective.options["epsilon"]).double().exp() - 1e-6
        ).all()


@searched
@given(st.data(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([50.0, 200.0]))
def test_extreme_log_ratios_stay_finite(data, dtype, spread):
    """Bounds hold before anything is exponentiated.  A < 0 is unbounded in some members: those see A >= 0 only."""
    name = data.draw(every_member)
    x = data.draw(rows(spread=spread, dtype=dtype))
    bounded = "delta" in MEMBERS[name][1] or name in ("cispo", "sapo", "vespo")
    x = dataclasses.replace(x, advantages=x.advantages if bounded else x.advantages.abs())
    for loss_or_gradient in outcome(build(name), x):
        assert loss_or_gradient.isfinite().all()


@searched
@given(objectives(), rows(dtype=torch.bfloat16))
def test_low_precision_inputs_are_computed_in_float32(objective, x):
    loss, gradient, _ = outcome(objective, x)
    exact, exact_gradient, _ = outcome(
        objective, mapped(x, lambda v: v.double() if v.is_floating_point() else v)
    )
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    same([loss.double()], [exact], 1e-4)
    same([gradient.double()], [exact_gradient], 1e-2)


@searched
@given(objectives(), rows(), st.data())
def test_statistics_of_chunks_add_up_to_those_of_the_whole(objective, x, data):
    cut = data.draw(st.integers(0, len(x.mask) - 1))
    _, whole = objective.loss(x, counts(x))
    _, parts = objective.loss(mapped(x, lambda value: value[cut:]), counts(x))
    if cut:
        parts.update(objective.loss(mapped(x, lambda value: value[:cut]), counts(x))[1])
    for kind in ("means", "minima", "maxima"):
        expected, actual = getattr(whole, kind), getattr(parts, kind)
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(
                torch.as_tensor(actual[name]), torch.as_tensor(expected[name]), msg=name
            )


@pytest.mark.parametrize("name", MEMBERS)
def test_no_value_is_read_back_from_the_device(name):
    """On the meta device `.item()`, a branch on a tensor or a boolean index would raise."""
    objective = build(name, **EXTRAS)
    shape = (3, 4)
    logps, mask = (
        torch.zeros(shape, device="meta"),
        torch.ones(shape, dtype=torch.bool, device="meta"),
    )
    x = ObjectiveInputs(logps, logps, logps[:, :1], mask, mask, logps, logps, logps)
    loss, _ = objective.loss(x, counts(x), entropy_coef=0.1)
    assert loss.shape == () and loss.device.type == "meta"
