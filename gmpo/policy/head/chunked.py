"""Log-probs and entropies out of hidden states: the vocabulary head, a tile of rows at a time.

[N, V] logits never exist for more than one tile.  A tile's logits stay in the dtype in which the head computes them;
what is made of them is made in float32 (float64 for float64), a few rows at a time, so that passes stay in the cache.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gmpo.policy.head.lm_head import PLAIN, Head, Transform, computing_dtype
from gmpo.policy.head.logits_shaping import Shaping
from gmpo.policy.head.onednn import add_product, product, product_into

TILE_BYTES = 256 * 2**20  # of the logits of one tile on a CPU
TILE_SHARE = 0.03  # of the memory of an accelerator
LEAST = 1e-18  # added to the size of a row's gradient: 0 divides nothing then, and its square still is a float32
SOME_VOCABULARY = 8192  # columns of a 16-bit weight gradient that are added up at once


def token_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    transform: Transform = PLAIN,
    *,
    shaping: Shaping | None = None,
    want_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution.

    The backward pass computes the logits of a tile again, unless the head is frozen: then the forward pass keeps, for
    each row, the direction in the space of hidden states in which its log-prob grows.

    Args:
        hidden: [N, H] what the head gets.
        head: Maps [n, H] to [n, V], row by row.
        targets: [N] int64.
        shaping: [N] what the sampler did to the logits; None: nothing.  Targets are among the tokens it could draw.
        want_entropy_grad: Whether the entropies carry gradients too.

    Returns:
        logps, entropy: [N] nats, in float32, or in float64 for float64 logits.
    """
    if head.linear is not None:
        weight, bias, dtype = (
            head.linear.weight,
            head.linear.bias,
            computing_dtype(hidden, head.linear),
        )
        trained = any(p is not None and p.requires_grad for p in (weight, bias))
        how = (
            _LinearLogProbs
            if trained or want_entropy_grad or not torch.is_grad_enabled()
            else _FrozenLogProbs
        )
        logps, entropy = how.apply(hidden, weight, bias, targets, dtype, transform, shaping)
    else:
        rows = tile_rows(head.vocabulary, 4, hidden.device)
        parts = [
            checkpoint(
                _module_logps,
                head,
                hidden[part],
                targets[part],
                transform,
                shaped,
                use_reentrant=False,
            )
            for part, shaped in pieces(len(hidden), rows, shaping)
        ]
        logps, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
    return logps, entropy if want_entropy_grad else entropy.detach()


def tile_rows(vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Rows of logits in a tile."""
    size = TILE_BYTES
    if device.type == "cuda":
        size = max(size, int(TILE_SHARE * torch.cuda.get_device_properties(device).total_memory))
    return max(1, size // (vocabulary * itemsize))


def pieces(
    length: int, rows: int, shaping: Shaping | None
) -> Iterator[tuple[slice, Shaping | None]]:
    """`rows` of `length` rows at a time, with their shaping; at least one piece."""
    for start in range(0, max(1, length), rows):
        part = slice(start, start + rows)
        yield part, None if shaping is None else shaping[part]


def _module_logps(
    head: Head, hidden: Tensor, targets: Tensor, transform: Transform, shaping: Shaping | None
) -> tuple[Tensor, Tensor]:
    output = head.forward(hidden)
    logits = transform(output if output.dtype == torch.float64 else output.float())
    every = (logits if shaping is None else shaping.apply_(logits)).log_softmax(-1)
    logps = every.gather(-1, targets[:, None]).squeeze(-1)
    return logps, -(every.exp() * every).sum(-1)


class ChunkedHead:
    """Scores of tiles of rows under a linear head and, right after, the gradients of the tile that was scored last."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, transform: Transform
    ):
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.narrow = dtype != self.wide
        self.weight = weight.to(dtype)  # [V, H]
        self.bias = None if bias is None else bias.to(self.wide)  # [V]
        self.transform = transform
        self.rows = tile_rows(len(weight), dtype.itemsize, weight.device)
        self._buffer = self.weight.new_empty((0, len(weight)))

    def logps_and_entropy(
        self, hidden: Tensor, targets: Tensor, shaping: Shaping | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets and entropies, [r], of r hidden states [r, H]."""
        self.hidden, self.targets, self.shaping = (
            hidden.to(self.weight.dtype),
            targets[:, None],
            shaping,
        )
        if len(self._buffer) < len(hidden):
            self._buffer = self.weight.new_empty((len(hidden), len(self.weight)))
        self.outputs = product_into(self._buffer[: len(hidden)], self.hidden, self.weight)
        self.normalizer = self.weight.new_empty((len(hidden), 1), dtype=self.wide)
        self.entropy, logps = torch.empty_like(self.normalizer), torch.empty_like(self.normalizer)
        for rows in self._runs():
            logits = self._logits(rows)
            if shaping is not None:
                shaping[rows].apply_(logits)
            target = logits.gather(-1, self.targets[rows])
            peak = logits.amax(-1, keepdim=True)
            shares = logits.sub_(peak).exp()
            total = shares.sum(-1, keepdim=True)
            log_total = total.log()
            self.normalizer[rows] = peak + log_total
            self.entropy[rows] = log_total - shares.mul_(logits).sum(-1, keepdim=True) / total
            logps[rows] = target - self.normalizer[rows]
        return logps.squeeze(-1), self.entropy.squeeze(-1)

    def gradients(
        self,
        into_logps: Tensor,
        into_entropy: Tensor | None,
        into_weight: Tensor | None,
        into_bias: Tensor | None,
    ) -> Tensor:
        """Carry gradients on from log-probs and entropies ([r]) of the last tile, whose logits are used up.

        Args:
            into_weight, into_bias: [V, H] and [V] in the wide dtype, to which theirs are added; None: frozen.

        Returns:
            [r, H] with respect to the hidden states, in the wide dtype.
        """
        if self.narrow:
            return self._narrow_gradients(into_logps, into_entropy, into_weight, into_bias)
        self._outputs_to_gradient(into_logps, into_entropy)
        if into_bias is not None:
            into_bias.add_(self.outputs.sum(0))
        if into_weight is not None:
            add_product(into_weight, self.outputs, self.hidden)
        return product(self.outputs, self.weight)

    def _narrow_gradients(
        self,
        into_logps: Tensor,
        into_entropy: Tensor | None,
        into_weight: Tensor | None,
        into_bias: Tensor | None,
    ) -> Tensor:
        """As `gradients`; 16-bit floats lose what is small, so every row goes through them at a size of about 1.

        What is left to lose are gradients that go back to the caller in 16 bits: for those there are loss scalers.
        """
        scale = (
            into_logps.abs() + LEAST
            if into_entropy is None
            else into_logps.abs() + into_entropy.abs() + LEAST
        )
        into_entropy = None if into_entropy is None else into_entropy / scale
        self._outputs_to_gradient(into_logps / scale, into_entropy)
        size = (
            scale.norm()
        )  # between what would let the sum of all rows overflow and what would let one vanish
        hidden = (self.hidden * (scale / size)[:, None]).to(self.hidden.dtype)
        trained = into_weight is not None or into_bias is not None
        for start in range(0, len(self.weight) if trained else 0, SOME_VOCABULARY):
            columns = slice(start, start + SOME_VOCABULARY)
            if into_bias is not None:
                into_bias[columns] += scale @ self.outputs[:, columns].to(self.wide)
            if into_weight is not None:
                into_weight[columns] += (self.outputs[:, columns].T @ hidden).to(self.wide) * size
        return (self.outputs @ self.weight).to(self.wide) * scale[:, None]

    def _outputs_to_gradient(self, into_logps: Tensor, into_entropy: Tensor | None) -> None:
        """Turn the outputs of the head into the gradients with respect to them.

        d logp / d logit_j = [j is the target] - p_j;   d entropy / d logit_j = -p_j (log p_j + entropy)
        """
        for rows in self._runs():
            log_p = self._logits(rows)
            slope = self._slope(log_p)
            if self.shaping is not None:
                shaping = self.shaping[rows]
                penalty = shaping.slope(log_p)
                slope = slope if penalty is None else penalty.mul_(slope)
                shaping.apply_(log_p)
            log_p -= self.normalizer[rows]
            gradient = log_p.exp()
            if into_entropy is None:
                gradient *= -into_logps[rows, None]
            else:
                weight = into_entropy[rows, None]
                gradient *= (
                    log_p.add_(self.entropy[rows]).mul_(weight).add_(into_logps[rows, None]).neg_()
                )
            gradient.scatter_add_(-1, self.targets[rows], into_logps[rows, None])
            self.outputs[rows] = (
                gradient.mul_(slope) if isinstance(slope, Tensor) or slope != 1.0 else gradient
            )

    def _logits(self, rows: slice) -> Tensor:
        """Scaled by the temperature, from the outputs of the head; a copy."""
        outputs = self.outputs[rows]
        outputs = outputs.to(self.wide, copy=True) if self.bias is None else outputs + self.bias
        scale = self.transform.slope / self.transform.temperature
        if math.isinf(self.transform.cap):
            return outputs.mul_(scale) if scale != 1.0 else outputs
        outputs.mul_(self.transform.slope / self.transform.cap).tanh_()
        return outputs.mul_(self.transform.cap / self.transform.temperature)

    def _slope(self, logits: Tensor) -> Tensor | float:
        """d logit / d output."""
        scale = self.transform.slope / self.transform.temperature
        if math.isinf(self.transform.cap):
            return scale
        tanh = logits * (self.transform.temperature / self.transform.cap)
        return tanh.square_().neg_().add_(1.0).mul_(scale)

    def _runs(self) -> list[slice]:
        """Rows of the tile to treat at once."""
        size = 4 * 2**20 if self.weight.device.type == "cpu" else 64 * 2**20
        step = max(1, size // (len(self.weight) * self.wide.itemsize))
        return [slice(start, start + step) for start in range(0, len(self.hidden), step)]


class _LinearLogProbs(torch.autograd.Function):
    """Forward: tiles of logits, thrown away.  Backward: the same tiles again, turned into their gradients in place."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, transform, shaping):
        ctx.set_materialize_grads(False)
        ctx.options, ctx.shaping = (dtype, transform), shaping
        ctx.save_for_backward(hidden, weight, bias, targets)
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = ChunkedHead(weight, bias, dtype, transform)
            parts = pieces(len(hidden), tiles.rows, shaping)
            found = [
                tiles.logps_and_entropy(hidden[rows], targets[rows], shaped)
                for rows, shaped in parts
            ]
        logps, entropies = zip(*found, strict=True)
        return torch.cat(logps), torch.cat(entropies)

    @staticmethod
    def backward(ctx, *grad_outputs):
        hidden, weight, bias, targets = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = ChunkedHead(weight, bias, *ctx.options)
            into_weight = (
                torch.zeros_like(weight, dtype=tiles.wide) if ctx.needs_input_grad[1] else None
            )
            into_bias = (
                torch.zeros_like(bias, dtype=tiles.wide) if ctx.needs_input_grad[2] else None
            )
            into_hidden = torch.empty_like(hidden)
            for rows, shaped in pieces(len(hidden), tiles.rows, ctx.shaping):
                tiles.logps_and_entropy(hidden[rows], targets[rows], shaped)
                into_logps, into_entropy = (
                    None if grad is None else grad[rows] for grad in grad_outputs
                )
                if into_logps is None:
                    into_logps = torch.zeros_like(tiles.entropy).squeeze(-1)
                into_hidden[rows] = tiles.gradients(
                    into_logps, into_entropy, into_weight, into_bias
                )
        into_weight = None if into_weight is None else into_weight.to(weight.dtype)
        into_bias = None if into_bias is None else into_bias.to(bias.dtype)
        return into_hidden, into_weight, into_bias, None, None, None, None


class _FrozenLogProbs(torch.autograd.Function):
    """Forward: for each row, the direction in which its log-prob grows.  Backward: that times its gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, transform, shaping):
        logps, entropies, directions = [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = ChunkedHead(weight, bias, dtype, transform)
            for rows, shaped in pieces(len(hidden), tiles.rows, shaping):
                logp, entropy = tiles.logps_and_entropy(hidden[rows], targets[rows], shaped)
                directions.append(tiles.gradients(torch.ones_like(logp), None, None, None))
                logps.append(logp)
                entropies.append(entropy)
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        ctx.directions, ctx.dtype = torch.cat(directions), hidden.dtype
        return torch.cat(logps), entropy

    @staticmethod
    def backward(ctx, *grad_outputs):
        into_hidden = ctx.directions * grad_outputs[0][:, None]
        return into_hidden.to(ctx.dtype), None, None, None, None, None, None
