"""Log-probs and losses of a batch: lay it out, run the model around our own head, and take what comes out."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gmpo.policy.head.chunked import tile_rows, token_scores
from gmpo.policy.head.fused import fused_loss
from gmpo.policy.head.lm_head import (
    Head,
    Transform,
    alone,
    computing_dtype,
    find_head,
    find_transform,
    replaced,
    undisturbed,
    unwrapped,
    working_dtype,
)
from gmpo.policy.head.logits_shaping import Shaping, shaping_of
from gmpo.policy.layout.chunks import cut
from gmpo.policy.layout.layout import Layout, Plan, lay_out, spread
from gmpo.policy.layout.masks import attention_masks
from gmpo.policy.layout.select import Layouts
from gmpo.policy.moe import is_mixture, load_balancing_loss, recorded_routers
from gmpo.policy.settings import PolicySettings
from gmpo.types import Batch, Scores

LossOf = Callable[[Scores, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Run:
    """One forward pass: what the stand-in for the head needs."""

    batch: Batch
    layout: Layout
    head: Head
    transform: Transform
    shaping: Shaping | None = None  # [B, T]


class Scorer:
    """Scores batches with any model: the policy, wrapped or not, or the reference.

    The model is called as it is given, so that what wraps it (DDP, FSDP, DeepSpeed, autocast) does its work, and its
    head is replaced meanwhile: it gets hidden states, and gives log-probs or a loss instead of logits.
    """

    def __init__(
        self, settings: PolicySettings, *, temperature: float = 1.0, repetition_penalty: float = 1.0
    ):
        self.settings, self.temperature, self.repetition_penalty = (
            settings,
            temperature,
            repetition_penalty,
        )
        self._layouts = Layouts(settings)
        self._transforms: WeakKeyDictionary[nn.Module, Transform] = WeakKeyDictionary()

    def scores(self, model: nn.Module, batch: Batch, *, want_entropy_grad: bool = False) -> Scores:
        """Log-probs and entropies of the trained tokens (`batch.mask`) of all rows; with gradients where grad is on.

        `router_loss` comes with them for mixtures of experts, where grad is on and its coefficient is not 0.
        """
        run = self._prepare(model, batch)
        values, router_loss = _call(
            model,
            run,
            lambda hidden: torch.cat(_all_scores(run, hidden, want_entropy_grad)),
            routed=run.layout.weight if self._routed(model) else None,
        )
        logps, entropy = values.chunk(2)
        if not want_entropy_grad:
            entropy = entropy.detach()
        return Scores(_spread(logps, batch.mask), _spread(entropy, batch.mask), router_loss)

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        loss_of: LossOf,
        *,
        router_of: Callable[[Tensor], Tensor] | None = None,
        want_entropy_grad: bool = True,
    ) -> Tensor:
        """The sum of what `loss_of` says of the rows of `batch`, a scalar.

        Logits are computed once, and never kept: see `fused.py`.

        Args:
            loss_of: Gets the scores of some rows, as wide as `batch.rows(rows)`, and `rows`, their indices in `batch`
                ([b] int64), and gives their share in the loss, a scalar.  Called for every row once, for several rows
                at a time.
            router_of: Gets the load-balancing loss of a mixture of experts, and gives its share in the loss.
            want_entropy_grad: Whether `loss_of` may use the gradient of the entropy.
        """
        run = self._prepare(model, batch)
        routed = run.layout.weight if router_of is not None and self._routed(model) else None
        value, router_loss = _call(
            model,
            run,
            lambda hidden: _loss(run, hidden, loss_of, want_entropy_grad)[None],
            routed=routed,
        )
        total = value.squeeze(0)
        return total if router_loss is None or router_of is None else total + router_of(router_loss)

    def chunks(self, batch: Batch, max_tokens: int | None) -> list[Tensor]:
        """Cut `batch` into sets of rows ([b] int64 each), of at most `max_tokens` tokens after layout.

        Whole groups stay together where they fit, and the sets have about the same size.  A single row may be larger
        than `max_tokens`; it is alone then.

        Args:
            max_tokens: None for all rows at once.
        """
        chunks = [list(range(len(batch)))]
        if max_tokens is not None and len(batch):
            chunks = cut(
                batch, lambda rows: self._layouts.tokens(batch.rows(torch.tensor(rows))), max_tokens
            )
        return [
            torch.tensor(chunk, dtype=torch.int64, device=batch.lengths.device) for chunk in chunks
        ]

    def tokens(self, batch: Batch) -> int:
        """Tokens of `batch` after layout."""
        return self._layouts.tokens(batch)

    def state_dict(self) -> dict[str, Any]:
        """What the check of the layouts found, so that a resumed run lays out its batches as before."""
        return self._layouts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._layouts.load_state_dict(state)

    def _prepare(self, model: nn.Module, batch: Batch) -> _Run:
        transform = self._transform(model, batch.completion_ids.device)
        head = Head(find_head(model))

        def logps_of(rows: Batch, plan: Plan) -> tuple[Tensor, torch.dtype]:
            run = _Run(rows, lay_out(rows, plan), head, transform)
            dtypes = []

            def compute(hidden: Tensor) -> Tensor:
                dtypes.append(working_dtype(hidden))
                return _all_scores(run, hidden, False)[0]

            with undisturbed(model):
                values, _ = _call(alone(model), run, compute)
            return _spread(values, rows.mask), dtypes[0]

        plan = self._layouts.plan(model, batch, logps_of, last_token=self._routed(model))
        return _Run(
            batch, lay_out(batch, plan), head, transform, shaping_of(batch, self.repetition_penalty)
        )

    def _transform(self, model: nn.Module, device: torch.device) -> Transform:
        causal = unwrapped(model)
        if causal not in self._transforms:
            self._transforms[causal] = find_transform(model, device, self.temperature)
        return self._transforms[causal]

    def _routed(self, model: nn.Module) -> bool:
        return (
            self.settings.router_aux_loss_coef > 0 and torch.is_grad_enabled() and is_mixture(model)
        )


def _call(
    model: nn.Module,
    run: _Run,
    compute: Callable[[Tensor], Tensor],
    *,
    routed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Call `model` with `compute` (hidden states [R * L, H] -> [K]) in the place of its head.

    Gradients take the model's own way out, through its `logits`, because wrappers look there for what they must
    synchronise.  What the model does to logits would change the values, so these go round it: the head gives zeros,
    which a scale and a soft cap leave as they are, with the gradient of the values.

    Args:
        routed: [R, L] weights of the tokens in the load-balancing loss; None: it is not wanted.

    Returns:
        [K], and the load-balancing loss.
    """
    results: list[Tensor] = []

    @torch.compiler.disable  # a compiled model goes on after it
    def forward(hidden: Tensor) -> Tensor:
        columns = run.layout.input_ids.shape[1]  # virtual tokens of an adapter come before them
        values = compute(hidden[:, -columns:].flatten(0, 1))
        if routed is not None:
            router_loss = load_balancing_loss(routers, routed.flatten(), _experts_per_token(model))
            _check_router_gradient(model, router_loss)
            values = torch.cat([values, router_loss[None].to(values.dtype)])
        results.append(values.detach())
        return _Zeros.apply(values)

    recording = nullcontext([]) if routed is None else recorded_routers(model)
    with replaced(run.head.module, cast(Any, forward)), recording as routers:
        logits = model(**_model_inputs(model, run.layout), use_cache=False).logits
    values = results[0]
    if torch.is_grad_enabled():
        values = values + logits.flatten() / run.transform.slope
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
    causal = unwrapped(model)
    inputs: dict[str, Any] = {"input_ids": layout.input_ids}
    if "position_ids" in inspect.signature(causal.forward).parameters:
        inputs["position_ids"] = layout.position_ids
    if layout.kind == "padded":
        inputs["attention_mask"] = (layout.tree >= 0).long()
    else:
        inputs["attention_mask"] = attention_masks(
            layout, causal.config.get_text_config(), causal.dtype
        )  # pyright: ignore
    return inputs


def _all_scores(run: _Run, hidden: Tensor, want_entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all trained tokens, [M] each, in the order of the mask."""
    picked, targets, shaping = _picked(run, hidden, list(range(len(run.batch))))
    return token_scores(
        picked,
        run.head,
        targets,
        run.transform,
        shaping=shaping,
        want_entropy_grad=want_entropy_grad,
    )


def _loss(run: _Run, hidden: Tensor, loss_of: LossOf, want_entropy_grad: bool) -> Tensor:
    """The loss of all rows, a scalar: fused where whole rows fit into tiles, else out of their scores."""
    batch = run.batch
    fused, others = _tiles(
        batch.mask.sum(1).tolist(), _capacity(run.head, hidden, want_entropy_grad)
    )
    lengths = batch.lengths.tolist()

    def share(rows: list[int], logps: Tensor, entropy: Tensor) -> Tensor:
        index = torch.tensor(rows, device=batch.mask.device)
        mask = batch.mask[index, : max(1, *(lengths[row] for row in rows))]
        return loss_of(Scores(_spread(logps, mask), _spread(entropy, mask)), index)

    total = hidden.new_zeros(())
    if others or not fused:
        picked, targets, shaping = _picked(run, hidden, others)
        scores = token_scores(
            picked,
            run.head,
            targets,
            run.transform,
            shaping=shaping,
            want_entropy_grad=want_entropy_grad,
        )
        total = share(others, *scores) if others else scores[0].sum()
    if fused:
        picked, targets, shaping = _picked(run, hidden, [row for rows in fused for row in rows])
        sizes = [int(batch.mask[rows].sum()) for rows in fused]
        assert run.head.linear is not None
        total = total + fused_loss(
            picked,
            run.head.linear,
            targets,
            sizes,
            lambda tile, *scores: share(fused[tile], *scores),
            run.transform,
            shaping=shaping,
        )
    return total


def _capacity(head: Head, hidden: Tensor, want_entropy_grad: bool) -> int:
    """Tokens of a tile of the fused loss; -1 where computing scores first costs no more."""
    if head.linear is None or not torch.is_grad_enabled():
        return -1
    if not head.linear.weight.requires_grad and not want_entropy_grad:
        return -1
    return tile_rows(head.vocabulary, computing_dtype(hidden, head.linear).itemsize, hidden.device)


def _tiles(counts: list[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """Rows with `counts` tokens in few tiles of at most `capacity` tokens, and the rows that are too long for one."""
    fitting = [row for row, count in enumerate(counts) if count <= capacity]
    others = [row for row, count in enumerate(counts) if count > capacity]
    sizes = [counts[row] for row in fitting]
    for number in range(max(1, -(-sum(sizes) // max(1, capacity))), len(fitting)):
        tiles = spread(sizes, number)
        if all(sum(sizes[item] for item in tile) <= capacity for tile in tiles):
            return [[fitting[item] for item in tile] for tile in tiles], others
    return [[row] for row in fitting], others


def _picked(run: _Run, hidden: Tensor, rows: list[int]) -> tuple[Tensor, Tensor, Shaping | None]:
    """Hidden states, targets and shaping of the trained tokens of `rows`, one row after another."""
    index = torch.tensor(rows, dtype=torch.int64, device=run.batch.mask.device)
    mask = run.batch.mask[index]
    shaping = None if run.shaping is None else run.shaping[index][mask]
    return (
        hidden.index_select(0, run.layout.source[index][mask]),
        run.batch.completion_ids[index][mask],
        shaping,
    )


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """[M] values to where `mask` [B, T] is true, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask, values
    )


def _check_router_gradient(model: nn.Module, router_loss: Tensor) -> None:
    if not router_loss.requires_grad and getattr(
        unwrapped(model), "is_gradient_checkpointing", False
    ):
        raise ValueError(
            "router_aux_loss_coef > 0 has no effect under reentrant checkpointing, which hides the routers' gradients. "
            "Set gradient_checkpointing_kwargs={'use_reentrant': False}, or router_aux_loss_coef=0."
        )


def _experts_per_token(model: nn.Module) -> int:
    return unwrapped(model).config.get_text_config().num_experts_per_tok  # pyright: ignore
