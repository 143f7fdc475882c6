"""Log-probs and entropies out of hidden states: the vocabulary head, a tile of rows at a time.

[N, V] logits never exist for more than one tile.  They are in float32 (float64 for float64), also
where hidden states and weights have 16 bits: rounded to bfloat16, logits of 16 and more are off by
up to 0.06, which is most of the noise of a log-prob.  They are treated a few rows at a time, so
that passes stay in the cache.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gmpo.policy.head.lm_head import PLAIN, Head, Transform, computing_dtype
from gmpo.policy.head.logits_shaping import Shaping
from gmpo.policy.head.onednn import add_product, product, product_into, wide_product_into

TILE_BYTES = 256 * 2**20  # of the logits of one tile on a CPU
TILE_SHARE = 0.03  # of the memory of an accelerator
CACHE_BYTES = {"cpu": 4 * 2**20}  # of the rows of a tile that are treated at once
OTHER_CACHE_BYTES = 64 * 2**20  # on other devices
# Added to the size of a row's gradient: avoids division by zero; its square is still representable
# in float32.
LEAST = 1e-18
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
    """Return the log-prob of each target and the entropy of each distribution.

    The backward pass computes the logits of a tile again, unless the head is frozen: then the
    forward pass keeps, for each row, the direction in the space of hidden states in which its
    log-prob grows.

    Args:
        hidden: [N, H], the input of the head.
        head: Maps [n, H] to [n, V], row by row.
        targets: [N] int64.
        transform: From the output of the head to logits.
        shaping: [N], the sampler's changes to the logits; None for none.  Targets are among the
            tokens that it could draw.
        want_entropy_grad: The entropies carry gradients too.

    Returns:
        logps, entropy: [N] nats, in float32, or in float64 for float64 logits.
    """
    if head.linear is None:
        logps, entropy = _logps_of_module(hidden, head, targets, transform, shaping)
    else:
        weight, bias = head.linear.weight, head.linear.bias
        dtype = computing_dtype(hidden, head.linear)
        trained = any(p is not None and p.requires_grad for p in (weight, bias))
        again = trained or want_entropy_grad or not torch.is_grad_enabled()
        function = _LinearLogProbs if again else _FrozenLogProbs
        logps, entropy = function.apply(hidden, weight, bias, targets, dtype, transform, shaping)
    return logps, entropy if want_entropy_grad else entropy.detach()


def _logps_of_module(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    transform: Transform,
    shaping: Shaping | None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies under a head that is more than a matrix product."""
    found = []
    num_rows = tile_rows(head.vocabulary, 4, hidden.device)
    for rows, shaped in tiles_of(len(hidden), num_rows, shaping):
        found.append(
            checkpoint(
                _module_logps,
                head,
                hidden[rows],
                targets[rows],
                transform,
                shaped,
                use_reentrant=False,
            )
        )
    logps, entropies = zip(*found, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _module_logps(
    head: Head, hidden: Tensor, targets: Tensor, transform: Transform, shaping: Shaping | None
) -> tuple[Tensor, Tensor]:
    output = head.forward(hidden)
    logits = transform(output if output.dtype == torch.float64 else output.float())
    every = (logits if shaping is None else shaping.apply_(logits)).log_softmax(-1)
    logps = every.gather(-1, targets[:, None]).squeeze(-1)
    return logps, -(every.exp() * every).sum(-1)


def tile_rows(vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Return the number of rows of logits in a tile."""
    size = TILE_BYTES
    if device.type == "cuda":
        size = max(size, int(TILE_SHARE * torch.cuda.get_device_properties(device).total_memory))
    return max(1, size // (vocabulary * itemsize))


def tiles_of(
    length: int, num_rows: int, shaping: Shaping | None
) -> Iterator[tuple[slice, Shaping | None]]:
    """Yield the rows of each tile with their shaping; at least one tile.

    Example:
        length 7, num_rows 3 -> 0:3, 3:6, 6:9 (of 7 rows, the last slice holds one)
    """
    for start in range(0, max(1, length), num_rows):
        rows = slice(start, start + num_rows)
        yield rows, None if shaping is None else shaping[rows]


class ChunkedHead:
    """A linear head that evaluates a tile of rows at a time.

    All tiles share one buffer for their logits: evaluating the next tile overwrites it.

    Args:
        weight: [V, H].
        bias: [V], or None.
        dtype: Of the product.
        transform: From its output to logits.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, transform: Transform
    ) -> None:
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.narrow = dtype != self.wide
        self.weight = weight.to(dtype)  # [V, H]
        self.bias = None if bias is None else bias.to(self.wide)  # [V]
        self.transform = transform
        self.rows = tile_rows(len(weight), self.wide.itemsize, weight.device)
        self._buffer = self.weight.new_empty((0, len(weight)), dtype=self.wide)

    def evaluate(self, hidden: Tensor, targets: Tensor, shaping: Shaping | None = None) -> "Tile":
        """Return the log-probs and entropies of r hidden states [r, H] with targets [r]."""
        if len(self._buffer) < len(hidden):
            self._buffer = self._buffer.new_empty((len(hidden), len(self.weight)))
        hidden = hidden.to(self.weight.dtype)
        multiply = wide_product_into if self.narrow else product_into
        outputs = multiply(self._buffer[: len(hidden)], hidden, self.weight)
        return Tile(self, hidden, outputs, targets, shaping)


class Tile:
    """Log-probs and entropies of the rows of a tile; once asked, the gradients through them.

    Args:
        head: The head that evaluated it.
        hidden: [r, H], in the dtype of the product.
        outputs: [r, V] of the head; `gradients` uses them up.
        targets: [r] int64.
        shaping: [r], the sampler's changes to the logits.
    """

    def __init__(
        self,
        head: ChunkedHead,
        hidden: Tensor,
        outputs: Tensor,
        targets: Tensor,
        shaping: Shaping | None,
    ) -> None:
        self.head = head
        self.hidden = hidden
        self.outputs = outputs
        self.targets = targets[:, None]
        self.shaping = shaping

        self._normalizer = hidden.new_empty((len(hidden), 1), dtype=head.wide)
        self._entropy = torch.empty_like(self._normalizer)
        logps = torch.empty_like(self._normalizer)
        for rows in self._cached_rows():
            self._normalizer[rows], self._entropy[rows], logps[rows] = self._evaluate(rows)
        self.logps = logps.squeeze(-1)  # [r]
        self.entropy = self._entropy.squeeze(-1)  # [r]

    def gradients(
        self,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
    ) -> Tensor:
        """Carry gradients on from log-probs and entropies ([r]).  May be called once.

        Args:
            grad_logps: [r].
            grad_entropy: [r]; None for zeros.
            grad_weight: [V, H] in the wide dtype, to which the head's is added; None if frozen.
            grad_bias: [V], likewise.

        Returns:
            [r, H] with respect to the hidden states, in the wide dtype.
        """
        if self.head.narrow:
            return self._narrow_gradients(grad_logps, grad_entropy, grad_weight, grad_bias)

        self._outputs_to_gradient(grad_logps, grad_entropy)
        if grad_bias is not None:
            grad_bias.add_(self.outputs.sum(0))
        if grad_weight is not None:
            add_product(grad_weight, self.outputs, self.hidden)
        return product(self.outputs, self.head.weight)

    def _narrow_gradients(
        self,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
    ) -> Tensor:
        """Do as `gradients` for 16-bit weights.

        Each row is normalised before the 16-bit products, which would lose small numbers, and
        rescaled after them.  Gradients returned in 16 bits may still underflow; loss scaling is for
        those.
        """
        scale = grad_logps.abs() + LEAST
        if grad_entropy is not None:
            scale = grad_logps.abs() + grad_entropy.abs() + LEAST
            grad_entropy = grad_entropy / scale
        self._outputs_to_gradient(grad_logps / scale, grad_entropy)

        # Of all sizes between which the sum of all rows overflows and one row vanishes.
        size = scale.norm()
        hidden = (self.hidden * (scale / size)[:, None]).to(self.hidden.dtype)
        wide, weight = self.head.wide, self.head.weight
        outputs = self.outputs.to(weight.dtype)

        trained = grad_weight is not None or grad_bias is not None
        for start in range(0, len(weight) if trained else 0, SOME_VOCABULARY):
            columns = slice(start, start + SOME_VOCABULARY)
            if grad_bias is not None:
                grad_bias[columns] += scale @ outputs[:, columns].to(wide)
            if grad_weight is not None:
                grad_weight[columns] += (outputs[:, columns].T @ hidden).to(wide) * size
        return (outputs @ weight).to(wide) * scale[:, None]

    def _evaluate(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-normalizer, entropy and log-prob of the target, [n, 1] each."""
        logits = self._logits(rows)
        if self.shaping is not None:
            self.shaping[rows].apply_(logits)
        target = logits.gather(-1, self.targets[rows])

        # With z = logit - peak:  log sum e^z and  entropy = log sum e^z - (sum e^z z) / (sum e^z)
        peak = logits.amax(-1, keepdim=True)
        shares = logits.sub_(peak).exp()
        total = shares.sum(-1, keepdim=True)
        log_total = total.log()
        entropy = log_total - shares.mul_(logits).sum(-1, keepdim=True) / total
        normalizer = peak + log_total
        return normalizer, entropy, target - normalizer

    def _outputs_to_gradient(self, grad_logps: Tensor, grad_entropy: Tensor | None) -> None:
        """Turn the outputs of the head into the gradients with respect to them, in place.

            d logp / d logit_j    = [j is the target] - p_j
            d entropy / d logit_j = -p_j (log p_j + entropy)

        Example:
            p = [0.5, 0.5], target 0, grad_logps 2, no entropy, no scale: gradient [1, -1]
        """
        for rows in self._cached_rows():
            log_p = self._logits(rows)
            slope = self._slope(log_p)
            if self.shaping is not None:
                shaping = self.shaping[rows]
                penalty = shaping.slope(log_p)
                slope = slope if penalty is None else penalty.mul_(slope)
                shaping.apply_(log_p)

            log_p -= self._normalizer[rows]
            gradient = log_p.exp()
            if grad_entropy is None:
                gradient *= -grad_logps[rows, None]
            else:
                weighed = log_p.add_(self._entropy[rows]).mul_(grad_entropy[rows, None])
                gradient *= weighed.add_(grad_logps[rows, None]).neg_()
            gradient.scatter_add_(-1, self.targets[rows], grad_logps[rows, None])

            if isinstance(slope, Tensor) or slope != 1.0:
                gradient.mul_(slope)
            self.outputs[rows] = gradient

    def _logits(self, rows: slice) -> Tensor:
        """Return a copy of the logits, scaled by the temperature, [n, V] in the wide dtype."""
        head, transform = self.head, self.head.transform
        outputs = self.outputs[rows]
        outputs = outputs.to(head.wide, copy=True) if head.bias is None else outputs + head.bias

        scale = transform.slope / transform.temperature
        if math.isinf(transform.cap):
            return outputs.mul_(scale) if scale != 1.0 else outputs
        outputs.mul_(transform.slope / transform.cap).tanh_()
        return outputs.mul_(transform.cap / transform.temperature)

    def _slope(self, logits: Tensor) -> Tensor | float:
        """Return d logit / d output: a number, or [n, V] with a soft cap."""
        transform = self.head.transform
        scale = transform.slope / transform.temperature
        if math.isinf(transform.cap):
            return scale
        tanh = logits * (transform.temperature / transform.cap)
        return tanh.square_().neg_().add_(1.0).mul_(scale)

    def _cached_rows(self) -> list[slice]:
        """Return the rows of the tile in groups that the cache can hold."""
        size = CACHE_BYTES.get(self.outputs.device.type, OTHER_CACHE_BYTES)
        step = max(1, size // (len(self.head.weight) * self.head.wide.itemsize))
        return [slice(start, start + step) for start in range(0, len(self.hidden), step)]


class _LinearLogProbs(torch.autograd.Function):
    """Forward: tiles of logits, thrown away.  Backward: the same tiles, and their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        transform: Transform,
        shaping: Shaping | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.shaping = (dtype, transform), shaping
        ctx.save_for_backward(hidden, weight, bias, targets)

        logps, entropies = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(weight, bias, dtype, transform)
            for rows, shaped in tiles_of(len(hidden), head.rows, shaping):
                tile = head.evaluate(hidden[rows], targets[rows], shaped)
                logps.append(tile.logps)
                entropies.append(tile.entropy)
        return torch.cat(logps), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_logps, grad_entropy = grad_outputs

        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(weight, bias, *ctx.options)
            grad_weight = grad_bias = None
            if ctx.needs_input_grad[1]:
                grad_weight = torch.zeros_like(weight, dtype=head.wide)
            if ctx.needs_input_grad[2]:
                grad_bias = torch.zeros_like(bias, dtype=head.wide)

            grad_hidden = torch.empty_like(hidden)
            for rows, shaped in tiles_of(len(hidden), head.rows, ctx.shaping):
                tile = head.evaluate(hidden[rows], targets[rows], shaped)
                grad_hidden[rows] = tile.gradients(
                    torch.zeros_like(tile.logps) if grad_logps is None else grad_logps[rows],
                    None if grad_entropy is None else grad_entropy[rows],
                    grad_weight,
                    grad_bias,
                )

        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


class _FrozenLogProbs(torch.autograd.Function):
    """Forward: directions in which log-probs grow.  Backward: these, scaled by the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        transform: Transform,
        shaping: Shaping | None,
    ) -> tuple[Tensor, Tensor]:
        logps, entropies, directions = [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(weight, bias, dtype, transform)
            for rows, shaped in tiles_of(len(hidden), head.rows, shaping):
                tile = head.evaluate(hidden[rows], targets[rows], shaped)
                directions.append(tile.gradients(torch.ones_like(tile.logps), None, None, None))
                logps.append(tile.logps)
                entropies.append(tile.entropy)

        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        ctx.directions, ctx.dtype = torch.cat(directions), hidden.dtype
        return torch.cat(logps), entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden = ctx.directions * grad_outputs[0][:, None]
        return grad_hidden.to(ctx.dtype), None, None, None, None, None, None
