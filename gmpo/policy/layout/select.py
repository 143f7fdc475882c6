"""Which layout a batch gets: the cheapest that the model supports, checked against the plain rectangle."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gmpo.policy.layout.layout import Cost, Placement, packed, padded, shared_prefix
from gmpo.policy.layout.masks import FORMS, VISIBILITY, layer_kinds
from gmpo.policy.settings import PolicySettings
from gmpo.types import Batch
from gmpo.unwrap import unwrap

LogpsOf = Callable[
    [Batch, Placement], tuple[Tensor, torch.dtype]
]  # log-probs [B, T], and how the model computed
OTHERS = ("packed", "shared_prefix")

# Largest mean difference in nats between the log-probs of two layouts that compute the same: by the dtype of the model.
# Wrong masks are off by 0.01 and more, also in small random models.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

CHECK_TOKENS = 1024  # of a prompt, and of a completion, in the rows of the check


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a kind of model."""

    refused: dict[str, str]  # why not, by layout
    hidden_size: int


class LayoutSelector:
    """Chooses layouts; remembers what each kind of model supports."""

    def __init__(self, settings: PolicySettings):
        self.settings = settings
        self.verdicts: dict[str, Verdict] = {}

    def choose(
        self, model: nn.Module, batch: Batch, logps_of: LogpsOf, *, last_token: bool
    ) -> Placement:
        """The cheapest layout of `batch` that `model` supports.  The first call for a kind of model checks it.

        Args:
            logps_of: Log-probs of a batch in a layout, for the check.

        Raises:
            ValueError: If the settings name a layout that the model does not support.
        """
        if self.settings.batch_layout == "padded":
            return self._cheapest(batch, ["padded"], 1, last_token)
        causal = unwrap(model)
        config: Any = causal.config.get_text_config()  # pyright: ignore
        key = f"{type(causal).__name__} with {config._attn_implementation} attention"
        if key not in self.verdicts:
            self.verdicts[key] = Verdict(self._check(model, batch, logps_of), config.hidden_size)
            self._announce(key)
        kinds = self._kinds(self.verdicts[key])
        if not kinds:
            wanted = self.settings.batch_layout
            raise ValueError(
                f"batch_layout={wanted!r} does not work for {key}: {self.verdicts[key].refused[wanted]}. "
                "Use 'auto' or 'padded'."
            )
        return self._cheapest(batch, kinds, self.verdicts[key].hidden_size, last_token)

    def tokens(self, batch: Batch) -> int:
        """Tokens of `batch` after layout, for the models seen so far; as a padded rectangle before any was seen."""
        last_token = self.settings.router_aux_loss_coef > 0
        sizes = [
            len(chosen.rows) * chosen.columns
            for verdict in self.verdicts.values() or [Verdict(dict.fromkeys(OTHERS, ""), 1)]
            for chosen in [
                self._cheapest(
                    batch, self._kinds(verdict) or ["padded"], verdict.hidden_size, last_token
                )
            ]
        ]
        return max(sizes)

    def state_dict(self) -> dict[str, Any]:
        return {key: dataclasses.asdict(verdict) for key, verdict in self.verdicts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.verdicts = {key: Verdict(**verdict) for key, verdict in state.items()}

    def _kinds(self, verdict: Verdict) -> list[str]:
        """Layouts to choose from, those first that win a tie."""
        wanted = (
            ("padded", *OTHERS)
            if self.settings.batch_layout == "auto"
            else (self.settings.batch_layout,)
        )
        return [kind for kind in wanted if kind not in verdict.refused]

    def _cheapest(
        self, batch: Batch, kinds: list[str], hidden_size: int, last_token: bool
    ) -> Placement:
        cost = cost_of(hidden_size)
        ways = {
            "padded": partial(padded, multiple_of=self.settings.pad_to_multiple_of),
            "packed": partial(packed, cost=cost),
            "shared_prefix": partial(shared_prefix, cost=cost),
        }
        plans = [ways[kind](batch, last_token=last_token) for kind in kinds]
        return min(plans, key=lambda placement: cost(len(placement.rows), placement.columns))

    def _check(self, model: nn.Module, batch: Batch, logps_of: LogpsOf) -> dict[str, str]:
        """Why not, for each layout in question that `model` does not support.

        Each rank judges by its own rows, after the same number of forward passes on all of them.
        """
        kinds = OTHERS if self.settings.batch_layout == "auto" else (self.settings.batch_layout,)
        reason = unsupported_reason(model)
        if reason is not None:
            return dict.fromkeys(kinds, reason)
        rows = check_rows(batch)
        one_row = lambda rows, columns: rows  # noqa: E731
        candidates = {
            "packed": packed(rows, one_row),
            "shared_prefix": shared_prefix(rows, one_row),
        }
        expected, dtype = logps_of(rows, padded(rows))
        refused = {}
        for kind in kinds:
            fault = _fault(
                expected,
                lambda kind=kind: logps_of(rows, candidates[kind])[0],
                rows.mask,
                tolerance(dtype),
            )
            if fault is not None:
                refused[kind] = fault
        return refused

    def _announce(self, key: str) -> None:
        if self.settings.batch_layout == "auto":
            for kind, reason in self.verdicts[key].refused.items():
                warnings.warn(
                    f"batch_layout='auto' leaves out '{kind}' for {key}: {reason}.", stacklevel=2
                )


def _fault(
    expected: Tensor, compute: Callable[[], Tensor], mask: Tensor, limit: float
) -> str | None:
    """What is wrong with the log-probs that `compute` gives; None if nothing is."""
    try:
        found = compute()
    except Exception as error:  # a model may refuse our masks in any way
        return f"the model fails with {type(error).__name__}: {error}"
    gap = torch.where(mask, found - expected, 0.0).abs().sum().item() / int(mask.sum())
    if gap <= limit:
        return None
    return f"its log-probs differ by {gap:.2g} nats from those of 'padded' on average, more than {limit:g}"


def unsupported_reason(model: nn.Module) -> str | None:
    """Why `model` can't run anything but the plain rectangle; None if nothing speaks against it."""
    causal = unwrap(model)
    config: Any = causal.config.get_text_config()  # pyright: ignore
    if "position_ids" not in inspect.signature(causal.forward).parameters:
        return "the model takes no position_ids"
    if config._attn_implementation not in FORMS:
        return f"its attention '{config._attn_implementation}' takes no mask of ours; use one of {', '.join(FORMS)}"
    recurrent = layer_kinds(config) - set(VISIBILITY)
    if recurrent:
        return f"its layers of type {', '.join(sorted(recurrent))} take no mask"
    adapters = (getattr(module, "peft_config", None) for module in model.modules())
    described = [each for found in adapters if isinstance(found, dict) for each in found.values()]
    if any(getattr(each, "is_prompt_learning", False) for each in described):
        return "its adapter puts virtual tokens before each row"
    return None


def cost_of(hidden_size: int) -> Cost:
    """Cost of a rectangle, in tokens without attention.

    A layer takes about 12 H^2 multiplications for a token and 2 H for a pair of tokens; those of a pair cost about
    three times as much as those of a matrix product, so attention costs as much as the rest at 2 H columns.
    """
    return lambda rows, columns: rows * columns * (1 + columns / (2 * hidden_size))


def check_rows(batch: Batch) -> Batch:
    """Four rows to compare layouts on: two prompts of `batch` with two of its completions each, the longest.

    Prompts and completions are crossed, because a batch may hold no group, and cut to `CHECK_TOKENS`.  What is missing
    in a small batch is made up of the tokens that it has.
    """
    device = batch.completion_ids.device
    prompts = list({id(prompt): prompt for prompt in batch.prompt_ids}.values())
    prompts = [prompt[-CHECK_TOKENS:] for prompt in sorted(prompts, key=len, reverse=True)[:2]]
    order = batch.lengths.argsort(descending=True)[:2].tolist()
    completions = [
        batch.completion_ids[row, : int(batch.lengths[row])][:CHECK_TOKENS] for row in order
    ]
    spare = torch.arange(3, device=device)
    prompts += [spare + 1, spare + 2][len(prompts) :]
    completions += [completions[0].flip(0) if completions else spare] * (2 - len(completions))
    completions = [ids if len(ids) else spare for ids in completions]

    lengths = torch.tensor([len(ids) for ids in completions], device=device).repeat(2)
    ids = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True).repeat(2, 1)
    return Batch(
        prompt_ids=[prompts[0], prompts[0], prompts[1], prompts[1]],
        completion_ids=ids,
        lengths=lengths,
        mask=torch.arange(ids.shape[1], device=device) < lengths[:, None],
        num_completion_tokens=lengths,
        advantages=torch.zeros(4, device=device),
        group=torch.tensor([0, 0, 1, 1], device=device),
    )


def tolerance(dtype: torch.dtype) -> float:
    """`TOLERANCE` for a model that computes in `dtype`."""
    if (
        dtype == torch.float32
        and torch.cuda.is_available()
        and torch.backends.cuda.matmul.allow_tf32
    ):
        dtype = torch.float16  # TF32 keeps as many digits
    return TOLERANCE.get(dtype, max(TOLERANCE.values()))
