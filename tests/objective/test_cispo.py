"""CISPO by hand.  The cases' log-probs are -1, -1.25, -1.5 along the tokens."""

from tests.objective.cases import equal, inputs, log, loss_and_gradient, objective, surrogate_of


def test_every_token_keeps_its_gradient_times_a_capped_ratio():
    x = inputs([[log(0.5), log(2.0), log(9.0)]], [2.0])
    loss, gradient = loss_and_gradient(objective(loss_type="cispo", epsilon_high=5.0), x)
    equal(loss, 2 * (0.5 * 1 + 2 * 1.25 + 5 * 1.5) / 3)  # -w A logp, over 3 tokens
    equal(gradient, [[-2 * 0.5 / 3, -2 * 2 / 3, -2 * 5 / 3]])


def test_only_ratios_over_the_cap_are_marked():
    surrogate = surrogate_of(
        objective(loss_type="cispo", epsilon_high=5.0),
        inputs([[log(0.1), log(4.9), log(5.5)]], [1.0]),
    )
    assert surrogate.capped_high.tolist() == [[False, False, True]]
    assert not surrogate.capped_low.any()
    equal(surrogate.ratio, [[(0.1 + 4.9 + 5) / 3]])


def test_the_cap_holds_where_the_ratio_overflows():
    loss, gradient = loss_and_gradient(
        objective(loss_type="cispo", epsilon_high=5.0), inputs([[1000.0]], [-1.0])
    )
    equal(loss, -5.0)
    equal(gradient, [[5.0]])


def test_the_sequence_level_weighs_all_tokens_by_the_geometric_mean():
    x = inputs([[log(2.0) + 3, log(2.0) - 3]], [1.0])
    loss, gradient = loss_and_gradient(
        objective(loss_type="cispo", epsilon_high=5.0, importance_sampling_level="sequence"), x
    )
    equal(loss, 2 * (1 + 1.25) / 2)
    equal(gradient, [[-1.0, -1.0]])
