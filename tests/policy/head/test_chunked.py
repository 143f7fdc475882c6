"""Log-probs and entropies out of tiles are those of log_softmax over all rows, in value and gradient."""

import pytest
import torch
from torch import nn

from gmpo.policy.head import chunked as tiles
from gmpo.policy.head.chunked import ChunkedHead, token_logps
from gmpo.policy.head.fused import fused_loss
from gmpo.policy.head.lm_head import Float32Head, Head, Transform

ROWS, HIDDEN, VOCABULARY = 23, 6, 17
TRANSFORMS = {
    "plain": Transform(),
    "temperature": Transform(temperature=0.6),
    "scale": Transform(slope=0.3, temperature=1.5),
    "soft cap": Transform(cap=2.0, temperature=0.7),
    "scale and soft cap": Transform(slope=3.0, cap=1.5),
}


@pytest.fixture(params=[4, 100], ids=["tiles of 4 rows", "one tile"])
def tile_size(request, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", request.param * VOCABULARY * 8)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    into_logps, into_entropy = torch.randn(2, ROWS, dtype=torch.float64)
    return hidden, targets, into_logps, into_entropy


def linear(bias):
    torch.manual_seed(1)
    return nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=torch.float64)


def expected_scores(hidden, head, targets, transform):
    """All logits at once, the soft cap as the Gemma 2 report has it: cap * tanh(logits / cap)."""
    logits = nn.functional.linear(hidden, head.weight, head.bias) * transform.slope
    if transform.cap < float("inf"):
        logits = transform.cap * torch.tanh(logits / transform.cap)
    every = torch.log_softmax(logits / transform.temperature, -1)
    return every[torch.arange(ROWS), targets], torch.distributions.Categorical(
        logits=every
    ).entropy()


def weighed(pair, weights):
    return pair[0] @ weights[0] + pair[1] @ weights[1]


def grads_of(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(problem, bias, transform, tile_size):
    hidden, targets, into_logps, into_entropy = problem
    head = linear(bias)
    logps, entropy = token_logps(hidden, Head(head), targets, transform)
    expected = expected_scores(hidden, head, targets, transform)
    torch.testing.assert_close((logps, entropy), expected, rtol=1e-12, atol=1e-12)
    for in_logps, in_entropy in ((1, 0), (0, 1), (1, 1)):
        weights = (in_logps * into_logps, in_entropy * into_entropy)
        found = token_logps(hidden, Head(head), targets, transform)
        expected = expected_scores(hidden, head, targets, transform)
        torch.testing.assert_close(
            grads_of(weighed(found, weights), hidden, head),
            grads_of(weighed(expected, weights), hidden, head),
            rtol=1e-11,
            atol=1e-11,
        )


def numbered(sizes):
    """Tiles of one row each, whose number tells which tile it is."""
    return list(torch.arange(len(sizes)))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_loss_has_the_value_and_gradients_of_the_whole(problem, bias, transform):
    hidden, targets, into_logps, into_entropy = problem
    head, sizes = linear(bias), [5, 9, 0, 9]
    starts = [0, 5, 14, 14]

    def loss_of(tile, logps, entropy):
        number = int(tile)
        rows = slice(starts[number], starts[number] + sizes[number])
        return (logps.square() @ into_logps[rows]) + (entropy.exp() @ into_entropy[rows])

    logps, entropy = expected_scores(hidden, head, targets, transform)
    expected = (logps.square() @ into_logps) + (entropy.exp() @ into_entropy)
    loss = fused_loss(hidden, head, targets, numbered(sizes), sizes, loss_of, transform)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found = grads_of(3.0 * loss, hidden, head)
    torch.testing.assert_close(
        found, grads_of(3.0 * expected, hidden, head), rtol=1e-11, atol=1e-11
    )


def test_a_fused_tile_without_a_gradient_adds_its_value_alone(problem):
    hidden, targets, *_ = problem
    head = linear(False)
    loss = fused_loss(
        hidden,
        head,
        targets,
        numbered([10, 13]),
        [10, 13],
        lambda tile, logps, entropy: (logps if tile else logps * 0 + 2).sum(),
    )
    every = expected_scores(hidden, head, targets, Transform())[0]
    torch.testing.assert_close(loss, every[10:].sum() + 20.0)
    constant = fused_loss(
        hidden,
        head,
        targets,
        numbered([ROWS]),
        [ROWS],
        lambda tile, logps, entropy: logps.new_tensor(7.0),
    )
    assert constant == 7.0
    assert all((gradient == 0).all() for gradient in grads_of(constant, hidden, head))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_frozen_head_passes_gradients_on_to_the_hidden_states(problem, transform, tile_size):
    hidden, targets, into_logps, _ = problem
    head = linear(True).requires_grad_(False)
    logps, entropy = token_logps(hidden, Head(head), targets, transform, want_entropy_grad=False)
    expected, _ = expected_scores(hidden, head, targets, transform)
    assert not entropy.requires_grad
    found = torch.autograd.grad(logps @ into_logps, hidden)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected @ into_logps, hidden), rtol=1e-11, atol=1e-11
    )


class Doubled(nn.Linear):
    """A head that is not a plain matrix product."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_any_module_can_be_the_head(problem, tile_size):
    hidden, targets, into_logps, into_entropy = problem
    head = Doubled(HIDDEN, VOCABULARY, dtype=torch.float64)
    logps, entropy = token_logps(hidden, Head(head), targets, Transform(temperature=0.6))
    expected = expected_scores(hidden, head, targets, Transform(slope=2.0, temperature=0.6))
    torch.testing.assert_close((logps, entropy), expected, rtol=1e-12, atol=1e-12)
    found = grads_of(logps @ into_logps + entropy @ into_entropy, hidden, head)
    wanted = grads_of(expected[0] @ into_logps + expected[1] @ into_entropy, hidden, head)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_a_head_cast_to_float32_ignores_autocast(problem):
    hidden, targets, *_ = problem
    head = linear(False).float()
    head.__class__ = Float32Head
    expected, _ = expected_scores(hidden, head.double(), targets, Transform())
    head.float()
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = token_logps(hidden.float(), Head(head), targets)
        outputs = head(hidden.bfloat16())
    torch.testing.assert_close(logps, expected.float(), rtol=1e-5, atol=1e-5)
    assert outputs.dtype == torch.float32


def test_no_rows_give_no_scores_and_zero_gradients():
    head, hidden = linear(True), torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    logps, entropy = token_logps(hidden, Head(head), torch.zeros(0, dtype=torch.int64))
    assert logps.shape == entropy.shape == (0,)
    found = grads_of(logps.sum() + entropy.sum(), hidden, head)
    assert all((gradient == 0).all() for gradient in found)


# -- 16 bits ----------------------------------------------------------------------------------------------------------

SIZES_OF_GRADIENTS = {  # of the log-probs; of a mean over many tokens, and of tokens that matter differently
    "all tiny": lambda: torch.full((ROWS,), 1e-6),
    "tiny beside large": lambda: torch.logspace(0, -8, ROWS),
}


def sixteen_bit_gradients(path, hidden, head, targets, into_logps):
    if path == "fused":
        loss = fused_loss(
            hidden,
            head,
            targets,
            numbered([ROWS]),
            [ROWS],
            lambda tile, logps, entropy: (logps * into_logps).sum(),
        )
    else:
        logps, _ = token_logps(hidden, Head(head), targets, want_entropy_grad=path == "scores")
        loss = (logps * into_logps).sum()
    return torch.autograd.grad(loss, [hidden, *(p for p in head.parameters() if p.requires_grad)])


@pytest.mark.parametrize("sizes", SIZES_OF_GRADIENTS.values(), ids=SIZES_OF_GRADIENTS)
@pytest.mark.parametrize("mixed", [False, True], ids=["16-bit weights", "autocast"])
@pytest.mark.parametrize("path", ["scores", "frozen", "fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_heads_keep_gradients_that_are_too_small_for_sixteen_bits(
    dtype, path, mixed, sizes
):
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY).to(dtype).float()
    hidden, targets, into_logps = (
        torch.randn(ROWS, HIDDEN).to(dtype),
        torch.arange(ROWS) % VOCABULARY,
        sizes(),
    )
    exact = hidden.float().requires_grad_()
    every = torch.log_softmax(nn.functional.linear(exact, head.weight, head.bias), -1)
    expected = grads_of((every[torch.arange(ROWS), targets] * into_logps).sum(), exact, head)

    hidden = (hidden.float() if mixed else hidden).requires_grad_()
    head = (
        head.requires_grad_(path != "frozen")
        if mixed
        else head.to(dtype).requires_grad_(path != "frozen")
    )
    with torch.autocast("cpu", dtype, enabled=mixed):
        found = sixteen_bit_gradients(path, hidden, head, targets, into_logps)
    # What is given back in 16 bits is rounded to them; nothing else may be lost.
    rounding = 0.0 if mixed else torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    relative = 8 * torch.finfo(dtype).eps
    for row, wanted in zip(found[0].float(), expected[0], strict=True):
        assert (row - wanted).norm() <= relative * wanted.norm() + rounding * HIDDEN
    for values, wanted in zip(found[1:], expected[1:], strict=False):
        assert (
            values.float() - wanted
        ).norm() <= relative * wanted.norm() + rounding * values.numel() ** 0.5


def test_a_16_bit_tile_of_rows_without_gradient_adds_nothing():
    head = ChunkedHead(torch.randn(16, 8).bfloat16(), None, torch.bfloat16, Transform())
    tile = head.evaluate(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64))
    into_weight = torch.zeros(16, 8)
    into_hidden = tile.gradients(torch.zeros(4), None, into_weight, None)
    assert not into_weight.any() and not into_hidden.any()  # NaN is something


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("want_entropy_grad", [False, True])
def test_logits_of_16_bit_products_are_not_rounded(dtype, want_entropy_grad):
    """Products are summed in float32; rounded, logits of about 30 would be off by up to 0.06."""
    torch.manual_seed(0)
    head = nn.Linear(64, 300, bias=False)
    nn.init.normal_(head.weight, std=2.0)
    head, hidden = head.to(dtype), (2 * torch.randn(40, 64)).to(dtype)
    targets = torch.randint(0, 300, (40,))

    logits = hidden.double() @ head.weight.double().T
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    rounded = logits.to(dtype).double().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    found, _ = token_logps(hidden, Head(head), targets, want_entropy_grad=want_entropy_grad)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4
    assert (rounded - expected).abs().max() > (1e-2 if dtype == torch.float16 else 5e-2)


def test_the_fused_loss_of_16_bit_products_is_not_rounded():
    torch.manual_seed(0)
    head = nn.Linear(64, 300, bias=False)
    nn.init.normal_(head.weight, std=2.0)
    head, hidden = head.bfloat16(), (2 * torch.randn(40, 64)).bfloat16()
    targets = torch.randint(0, 300, (40,))
    every = (hidden.double() @ head.weight.double().T).log_softmax(-1)
    expected = every.gather(-1, targets[:, None]).sum()
    found = fused_loss(
        hidden,
        head,
        targets,
        list(torch.arange(2)),
        [15, 25],
        lambda rows, logps, entropy: logps.sum(),
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
