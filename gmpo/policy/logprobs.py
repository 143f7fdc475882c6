"""Log-probs and losses of a batch: lay it out, run the model around our own head, take what comes.

LogProbs.loss                   with gradients, fused with the vocabulary head: what training runs
LogProbs.compute                with gradients where grad is on, as [B, T] tensors
LogProbs.compute_without_grad   of all rows, in passes that fit into memory
"""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gmpo.distributed import pad_to_max_count
from gmpo.policy.head.chunked import tile_rows, token_logps
from gmpo.policy.head.fused import RowsLoss, fused_loss
from gmpo.policy.head.lm_head import (
    Head,
    Transform,
    computing_dtype,
    eval_mode,
    find_head,
    find_transform,
    replaced,
    working_dtype,
)
from gmpo.policy.head.logits_shaping import Shaping, shaping_of
from gmpo.policy.layout.attention import attention_by_segments
from gmpo.policy.layout.chunks import balance, cut
from gmpo.policy.layout.layout import Layout, Placement, lay_out
from gmpo.policy.layout.select import LayoutSelector
from gmpo.policy.memory import ChunkMemory, ChunkSize
from gmpo.policy.moe import is_mixture, load_balancing_loss, recorded_routers
from gmpo.policy.settings import PolicySettings
from gmpo.sharding import sharded
from gmpo.types import Batch, TokenLogProbs
from gmpo.unwrap import unwrap, without_ddp


@dataclass(frozen=True, slots=True)
class _ForwardPass:
    """The facts of one forward pass that the stand-in for the head needs."""

    batch: Batch
    layout: Layout
    head: Head
    transform: Transform
    shaping: Shaping | None = None  # [B, T]


class LogProbs:
    """Log-probs under any model: the policy, wrapped or not, or the reference.

    The model is called as it is given, so that what wraps it (DDP, FSDP, DeepSpeed, autocast) does
    its work.  Its head is replaced meanwhile: it gets hidden states, and gives log-probs or a loss
    instead of logits.

    Args:
        settings: Of the policy stage.
        temperature: Of the distribution that is sampled from.
        repetition_penalty: Of the distribution that is sampled from; 1 for none.
        rows_per_pass: Rows of one forward pass of `compute_without_grad`; None for all of them.
        memory: The bound on the tokens of a pass; None for one that begins at the settings'.
    """

    def __init__(
        self,
        settings: PolicySettings,
        *,
        temperature: float = 1.0,
        repetition_penalty: float = 1.0,
        rows_per_pass: int | None = None,
        memory: ChunkMemory | None = None,
    ) -> None:
        self.settings = settings
        self.temperature = temperature
        self.repetition_penalty = repetition_penalty
        self.rows_per_pass = rows_per_pass
        self.memory = memory or ChunkMemory(settings.max_tokens_per_chunk)
        self._layouts = LayoutSelector(settings)
        self._transforms: WeakKeyDictionary[nn.Module, Transform] = WeakKeyDictionary()

    def compute(
        self, model: nn.Module, batch: Batch, *, want_entropy_grad: bool = False
    ) -> TokenLogProbs:
        """Return log-probs and entropies of the trained tokens (`batch.mask`) of all rows.

        They carry gradients where grad is on.  Then `router_loss` comes with them for mixtures of
        experts, if its coefficient is not 0.
        """
        forward = self._prepare(model, batch)
        values, router_loss = _call(
            model,
            forward,
            partial(_stacked_logps, forward, want_entropy_grad=want_entropy_grad),
            routed=forward.layout.weight if self._wants_router_loss(model) else None,
        )

        logps, entropy = values.chunk(2)
        if not want_entropy_grad:
            entropy = entropy.detach()
        return TokenLogProbs(scatter(logps, batch.mask), scatter(entropy, batch.mask), router_loss)

    @torch.no_grad()
    def compute_without_grad(self, model: nn.Module, batch: Batch) -> TokenLogProbs:
        """Return log-probs and entropies of all rows, [B, T], chunk by chunk.

        The model is in evaluation mode meanwhile.  Every rank must call where it is sharded.
        """
        found: list[tuple[Tensor, TokenLogProbs]] = []

        def compute(rows: Tensor) -> None:
            found.append((rows, self.compute(model, batch.rows(rows))))

        def cut_for_passes(rows: Tensor) -> list[Tensor]:
            chunks: list[Tensor] = []
            for some in rows.split(self.rows_per_pass or max(1, len(rows))):
                chunks += self.chunks_that_fit(batch, some)
            return pad_to_max_count(chunks) if sharded(model) else chunks

        with eval_mode(model):
            self.memory.run(torch.arange(len(batch)), cut_for_passes, self.sizes_of(batch), compute)

        dtype = found[0][1].logps.dtype if found else torch.float32
        logps = torch.zeros(batch.mask.shape, dtype=dtype, device=batch.mask.device)
        entropy = torch.zeros_like(logps)
        for rows, of_pass in found:
            width = of_pass.logps.shape[1]
            logps[rows, :width] = of_pass.logps
            entropy[rows, :width] = of_pass.entropy
        return TokenLogProbs(logps=logps, entropy=entropy)

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        loss: RowsLoss,
        *,
        router_share: Callable[[Tensor], Tensor] | None = None,
        want_entropy_grad: bool = True,
    ) -> Tensor:
        """Return the sum of `loss` over the rows of `batch`, a scalar.

        Logits are computed once, and never kept: see `head/fused.py`.

        Args:
            loss: Called once for every row, for several rows at a time.
            router_share: Turns the load-balancing loss of a mixture of experts into its share in
                the loss; None to leave it out.
            want_entropy_grad: `loss` may use the gradient of the entropy.
        """
        forward = self._prepare(model, batch)
        wants_router_loss = router_share is not None and self._wants_router_loss(model)
        value, router_loss = _call(
            model,
            forward,
            partial(_tiled_loss, forward, loss=loss, want_entropy_grad=want_entropy_grad),
            routed=forward.layout.weight if wants_router_loss else None,
        )

        total = value.squeeze(0)
        if router_share is None or router_loss is None:
            return total
        return total + router_share(router_loss)

    def cut_batch(self, batch: Batch, max_tokens: int | None) -> list[Tensor]:
        """Cut `batch` into sets of rows ([b] int64 each) of at most `max_tokens` tokens each.

        Whole groups stay together where they fit, and the sets have about the same size.  A single
        row that is larger than `max_tokens` is a separate set.

        Args:
            max_tokens: None for all rows at once.
        """
        chunks = [list(range(len(batch)))]
        if max_tokens is not None and len(batch):
            chunks = cut(batch, self._layouts.tokens_of(batch), max_tokens)
        return [
            torch.tensor(chunk, dtype=torch.int64, device=batch.lengths.device) for chunk in chunks
        ]

    def chunks_that_fit(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        """Cut `rows` ([b] int64, on the CPU) of `batch` into chunks that keep to the bound."""
        if len(rows) == 0:
            return []
        chunks = self.cut_batch(batch.rows(rows), self.memory.max_tokens)
        return [rows[chunk.cpu()] for chunk in chunks]

    def sizes_of(self, batch: Batch) -> Callable[[Tensor], ChunkSize]:
        """Return what tells the size of a chunk of `batch`, given its rows."""
        tokens = self._layouts.tokens_of(batch)
        return lambda rows: ChunkSize(tokens(rows.tolist()) if len(rows) else 0, len(rows))

    def tokens(self, batch: Batch) -> int:
        """Return the number of tokens of `batch` after layout."""
        return self._layouts.tokens_of(batch)(list(range(len(batch))))

    def is_routed(self, model: nn.Module) -> bool:
        """Return whether a load-balancing loss of experts belongs to the loss of `model`."""
        return self.settings.router_aux_loss_coef > 0 and is_mixture(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the results of the layout self-check, for a resumed run to use the same."""
        return self._layouts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the results of an earlier self-check."""
        self._layouts.load_state_dict(state)

    def _wants_router_loss(self, model: nn.Module) -> bool:
        return torch.is_grad_enabled() and self.is_routed(model)

    def _prepare(self, model: nn.Module, batch: Batch) -> _ForwardPass:
        """Choose the layout of `batch` and put its tokens in place."""
        transform = self._transform(model, batch.completion_ids.device)
        head = Head(find_head(model))

        # The layout self-check compares log-probs of a few rows in two layouts.
        def logps_of(rows: Batch, placement: Placement) -> tuple[Tensor, torch.dtype]:
            forward = _ForwardPass(rows, lay_out(rows, placement), head, transform)
            dtypes = []

            def compute(hidden: Tensor) -> Tensor:
                dtypes.append(working_dtype(hidden))
                return _all_logps(forward, hidden, want_entropy_grad=False)[0]

            with eval_mode(model):
                values, _ = _call(without_ddp(model), forward, compute)
            return scatter(values, rows.mask), dtypes[0]

        placement = self._layouts.choose(
            model, batch, logps_of, last_token=self._wants_router_loss(model)
        )
        shaping = shaping_of(batch, self.repetition_penalty)
        return _ForwardPass(batch, lay_out(batch, placement), head, transform, shaping)

    def _transform(self, model: nn.Module, device: torch.device) -> Transform:
        causal = unwrap(model)
        if causal not in self._transforms:
            self._transforms[causal] = find_transform(model, device, self.temperature)
        return self._transforms[causal]


# -- the forward pass ----------------------------------------------------------------------------


def _call(
    model: nn.Module,
    forward: _ForwardPass,
    compute: Callable[[Tensor], Tensor],
    *,
    routed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Call `model` with `compute` (hidden states [R * L, H] -> [K]) in the place of its head.

    Gradients take the model's own way out, through its `logits`, because wrappers look there for
    what they must synchronise.  What the model does to logits would change the values, so these go
    round it: the head gives zeros, which a scale and a soft cap leave as they are, with the
    gradient of the values.

    Args:
        routed: [R, L] weights of the tokens in the load-balancing loss; None if it is not wanted.

    Returns:
        [K], and the load-balancing loss.
    """
    results: list[Tensor] = []

    @torch.compiler.disable  # a compiled model goes on after it
    def head_forward(hidden: Tensor) -> Tensor:
        columns = forward.layout.input_ids.shape[1]  # an adapter's virtual tokens come before them
        values = compute(hidden[:, -columns:].flatten(0, 1))
        if routed is not None:
            router_loss = load_balancing_loss(routers, routed.flatten(), _experts_per_token(model))
            _check_router_gradient(model, router_loss)
            values = torch.cat([values, router_loss[None].to(values.dtype)])
        results.append(values.detach())
        return _Zeros.apply(values)

    # The head's own forward is patched for the time of this call only; hooks around it still run.
    recording = nullcontext([]) if routed is None else recorded_routers(model)
    with (
        replaced(forward.head.module, cast(Any, head_forward)),
        recording as routers,
        _attending(model, forward.layout) as attention,
    ):
        inputs = _model_inputs(model, forward.layout)
        logits = model(**inputs, **attention, use_cache=False).logits

    values = results[0]
    if torch.is_grad_enabled():
        values = values + logits.flatten() / forward.transform.slope
    return (values, None) if routed is None else (values[:-1], values[-1])


class _Zeros(torch.autograd.Function):
    """[K] values as [1, K, 1] zeros that carry the gradient of the values."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return values.new_zeros((1, len(values), 1))

    @staticmethod
    def backward(ctx, *grad_outputs: Any) -> Any:
        return grad_outputs[0].flatten()


def _model_inputs(model: nn.Module, layout: Layout) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": layout.input_ids}
    if "position_ids" in inspect.signature(unwrap(model).forward).parameters:
        inputs["position_ids"] = layout.position_ids
    if layout.mask is not None:
        inputs["attention_mask"] = layout.mask
    return inputs


def _attending(model: nn.Module, layout: Layout) -> AbstractContextManager[dict[str, Any]]:
    """Return a block in which `model`, called with what it yields, attends as the layout asks."""
    if layout.segments is None:
        return nullcontext({})
    return attention_by_segments(unwrap(model), layout.segments)


# -- in the place of the head --------------------------------------------------------------------


def _all_logps(
    forward: _ForwardPass, hidden: Tensor, *, want_entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of all trained tokens, [M] each, in the order of the mask."""
    picked, targets, shaping = _pick(forward, hidden, list(range(len(forward.batch))))
    return token_logps(
        picked,
        forward.head,
        targets,
        forward.transform,
        shaping=shaping,
        want_entropy_grad=want_entropy_grad,
    )


def _stacked_logps(forward: _ForwardPass, hidden: Tensor, *, want_entropy_grad: bool) -> Tensor:
    """Return [2 M]: the log-probs of all trained tokens, then their entropies."""
    return torch.cat(_all_logps(forward, hidden, want_entropy_grad=want_entropy_grad))


def _tiled_loss(
    forward: _ForwardPass, hidden: Tensor, *, loss: RowsLoss, want_entropy_grad: bool
) -> Tensor:
    """Return the loss of all rows, [1]: fused where whole rows fit into tiles."""
    batch, device = forward.batch, forward.batch.mask.device
    capacity = _capacity(forward.head, hidden, want_entropy_grad)
    tiles, others = _tiles(batch.mask.sum(1).tolist(), capacity)
    total = hidden.new_zeros(())

    # Rows that are too long for a tile, or all of them where fusing saves nothing.
    if others or not tiles:
        picked, targets, shaping = _pick(forward, hidden, others)
        logps, entropy = token_logps(
            picked,
            forward.head,
            targets,
            forward.transform,
            shaping=shaping,
            want_entropy_grad=want_entropy_grad,
        )
        # Without rows, a 0 that hangs on the graph: other ranks wait for this one's backward pass.
        total = loss(torch.tensor(others, device=device), logps, entropy) if others else logps.sum()

    if tiles:
        picked, targets, shaping = _pick(forward, hidden, [row for rows in tiles for row in rows])
        assert forward.head.linear is not None
        total = total + fused_loss(
            picked,
            forward.head.linear,
            targets,
            [torch.tensor(rows, device=device) for rows in tiles],
            [int(batch.mask[rows].sum()) for rows in tiles],
            loss,
            forward.transform,
            shaping=shaping,
        )
    return total[None]


def _capacity(head: Head, hidden: Tensor, want_entropy_grad: bool) -> int:
    """Return the tokens of a tile of the fused loss; -1 where fusing saves nothing."""
    if head.linear is None or not torch.is_grad_enabled():
        return -1
    if not head.linear.weight.requires_grad and not want_entropy_grad:
        return -1
    # Logits have at least 32 bits, as in ChunkedHead.
    itemsize = max(4, computing_dtype(hidden, head.linear).itemsize)
    return tile_rows(head.vocabulary, itemsize, hidden.device)


def _tiles(counts: list[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """Put rows into few tiles of at most `capacity` tokens.

    Args:
        counts: Trained tokens of each row.

    Returns:
        The rows of each tile, and the rows that are too long for one.

    Example:
        counts [3, 9, 4, 2], capacity 6 -> [[2, 3], [0]] (4 + 2 and 3 tokens) and [1]
    """
    fitting = [row for row, count in enumerate(counts) if count <= capacity]
    others = [row for row, count in enumerate(counts) if count > capacity]
    sizes = [counts[row] for row in fitting]

    fewest = max(1, math.ceil(sum(sizes) / max(1, capacity)))
    for number in range(fewest, len(fitting)):
        tiles = balance(sizes, number)
        if all(sum(sizes[item] for item in tile) <= capacity for tile in tiles):
            return [[fitting[item] for item in tile] for tile in tiles], others
    return [[row] for row in fitting], others


def _pick(
    forward: _ForwardPass, hidden: Tensor, rows: list[int]
) -> tuple[Tensor, Tensor, Shaping | None]:
    """Return hidden states, targets and shaping of the trained tokens of `rows`, row by row."""
    batch = forward.batch
    index = torch.tensor(rows, dtype=torch.int64, device=batch.mask.device)
    mask = batch.mask[index]
    shaping = None if forward.shaping is None else forward.shaping[index][mask]
    states = hidden.index_select(0, forward.layout.source[index][mask])
    return states, batch.completion_ids[index][mask], shaping


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put [M] values where `mask` [B, T] is true, row by row; 0 elsewhere.

    Example:
        values [1, 2, 3], mask [[1, 0], [1, 1]] -> [[1, 0], [2, 3]]
    """
    zeros = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(mask, values)


def _check_router_gradient(model: nn.Module, router_loss: Tensor) -> None:
    if not router_loss.requires_grad and getattr(unwrap(model), "is_gradient_checkpointing", False):
        raise ValueError(
            "router_aux_loss_coef > 0 has no effect under reentrant checkpointing, which hides the "
            "routers' gradients. Set gradient_checkpointing_kwargs={'use_reentrant': False}, or "
            "router_aux_loss_coef=0."
        )


def _experts_per_token(model: nn.Module) -> int:
    return unwrap(model).config.get_text_config().num_experts_per_tok  # pyright: ignore[reportAttributeAccessIssue] (configs of mixtures have it)
