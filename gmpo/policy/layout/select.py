"""The layout that a model gets: one line if it attends by segments as it should, else padded."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gmpo.policy.layout.attention import attention_dropout, differently_rounded_attention
from gmpo.policy.layout.chunks import TokensOf
from gmpo.policy.layout.layout import Placement, packed, padded, shared_prefix, sizes
from gmpo.policy.settings import PolicySettings
from gmpo.types import Batch
from gmpo.unwrap import unwrap

# Log-probs [B, T] of a batch in a layout, and the dtype in which the model computed them.
LogpsOf = Callable[[Batch, Placement], tuple[Tensor, torch.dtype]]

# Kinds of layers that attend; the others keep a state, which would run on from row to row.
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}

# Largest mean difference, in nats, between log-probs of two layouts that compute the same: by the
# dtype of the model.  Wrong segments are off by 0.01 and more, also in small random models.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Where one rounding of each attention layer's output moves log-probs, a layout may differ by so
# many times as much, but not by more than LARGEST.
NOISE_FACTOR = 2.0
LARGEST = 0.2

CHECK_TOKENS = 1024  # of a prompt, and of a completion, in the rows of the check


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the check of a kind of model."""

    reason: str | None  # why it can't attend by segments; None if it can


class LayoutSelector:
    """Chooses layouts; remembers which kinds of models attend by segments."""

    def __init__(self, settings: PolicySettings):
        self.settings = settings
        self.verdicts: dict[str, Verdict] = {}

    def choose(
        self, model: nn.Module, batch: Batch, logps_of: LogpsOf, *, last_token: bool
    ) -> Placement:
        """Return the placement of `batch` for `model`, which is checked the first time.

        Args:
            logps_of: Log-probs of a batch in a layout, for the check.

        Raises:
            ValueError: If the settings name a layout that the model does not support.
        """
        wanted = self.settings.batch_layout
        if wanted == "padded":
            return self._place(batch, "padded", last_token)

        key = kind_of(model)
        if key not in self.verdicts:
            self.verdicts[key] = Verdict(self._check(model, batch, logps_of))
            self._announce(key)

        reason = self.verdicts[key].reason
        if reason is not None and wanted != "auto":
            raise ValueError(
                f"batch_layout={wanted!r} does not work for {key}: {reason}. "
                "Use 'auto' or 'padded'."
            )
        return self._place(batch, self._kind(self.verdicts[key]), last_token)

    def tokens_of(self, batch: Batch) -> TokensOf:
        """Return a function from rows of `batch` to their tokens after layout.

        They are counted for the models seen so far, and as a padded rectangle before any was seen.
        """
        last_token = self.settings.router_aux_loss_coef > 0
        prompts, branches = sizes(batch, last_token=last_token)
        kinds = {self._kind(verdict) for verdict in self.verdicts.values()} or {"padded"}

        def tokens(rows: list[int]) -> int:
            if not rows:
                return 1
            written = [branches[row] for row in rows]
            each_prompt = [prompts[row] for row in rows]
            shared = {id(batch.prompt_ids[row]): prompts[row] for row in rows}
            longest = max(map(sum, zip(each_prompt, written, strict=True)))
            multiple = self.settings.pad_to_multiple_of or 1
            by_kind = {
                "padded": len(rows) * -(-longest // multiple) * multiple,
                "packed": sum(each_prompt) + sum(written),
                "shared_prefix": sum(shared.values()) + sum(written),
            }
            return max(by_kind[kind] for kind in kinds)

        return tokens

    def state_dict(self) -> dict[str, Any]:
        """Return the verdicts, of the models that were checked and of no other."""
        return {key: dataclasses.asdict(verdict) for key, verdict in self.verdicts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the verdicts of an earlier run."""
        self.verdicts = {key: Verdict(**verdict) for key, verdict in state.items()}

    def _kind(self, verdict: Verdict) -> str:
        if verdict.reason is not None:
            return "padded"
        return "packed" if self.settings.batch_layout == "packed" else "shared_prefix"

    def _place(self, batch: Batch, kind: str, last_token: bool) -> Placement:
        ways = {
            "padded": partial(padded, multiple_of=self.settings.pad_to_multiple_of),
            "packed": packed,
            "shared_prefix": shared_prefix,
        }
        return ways[kind](batch, last_token=last_token)

    def _check(self, model: nn.Module, batch: Batch, logps_of: LogpsOf) -> str | None:
        """Return why `model` can't attend by segments, or None if it can.

        Each rank judges by its own rows, after the same number of forward passes on all of them.
        """
        reason = unsupported_reason(model)
        if reason is not None:
            return reason

        # The rectangle with attention that rounds differently shows how far rounding carries.
        rows = check_rows(batch)
        expected, dtype = logps_of(rows, padded(rows))
        with differently_rounded_attention(model):
            rounded, _ = logps_of(rows, padded(rows))

        try:
            found, _ = logps_of(rows, shared_prefix(rows))
        except Exception as error:  # a model may refuse in any way
            return f"the model fails with {type(error).__name__}: {error}"

        gap = mean_gap(found, expected, rows.mask)
        limit = tolerance(dtype, mean_gap(rounded, expected, rows.mask))
        if gap <= limit:
            return None
        return (
            f"its log-probs differ by {gap:.2g} nats from those of 'padded' on average, more than "
            f"{limit:.2g}"
        )

    def _announce(self, key: str) -> None:
        reason = self.verdicts[key].reason
        if self.settings.batch_layout == "auto" and reason is not None:
            warnings.warn(
                f"batch_layout='auto' leaves out 'shared_prefix' for {key}: {reason}.", stacklevel=2
            )


def kind_of(model: nn.Module) -> str:
    """Return what a verdict is valid for: a kind of model, where and in what it computes."""
    causal = unwrap(model)
    config = _text_config(causal)
    parameter = next(causal.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    return (
        f"{type(causal).__name__} with {config._attn_implementation} attention in {dtype} on "
        f"{parameter.device.type} with torch {torch.__version__}"
    )


def unsupported_reason(model: nn.Module) -> str | None:
    """Return why `model` can run the rectangle only; None if nothing speaks against others."""
    causal = unwrap(model)
    config = _text_config(causal)
    if "position_ids" not in inspect.signature(causal.forward).parameters:
        return "the model takes no position_ids"

    recurrent = set(getattr(config, "layer_types", None) or ()) - ATTENDING
    if recurrent:
        return f"its layers of type {', '.join(sorted(recurrent))} do not attend"

    dropout = attention_dropout(causal)
    if dropout:
        return f"its attention drops weights at the rate {dropout:g} (see disable_dropout)"

    adapters = (getattr(module, "peft_config", None) for module in model.modules())
    described = [each for found in adapters if isinstance(found, dict) for each in found.values()]
    if any(getattr(each, "is_prompt_learning", False) for each in described):
        return "its adapter puts virtual tokens before each row"
    return None


def _text_config(causal: PreTrainedModel) -> PreTrainedConfig:
    return causal.config.get_text_config()


def check_rows(batch: Batch) -> Batch:
    """Return four rows to compare layouts on.

    They are two prompts of `batch` with two of its completions each, the longest.  Prompts and
    completions are crossed, because a batch may hold no group, and cut to `CHECK_TOKENS`.  What
    is missing in a small batch is made up of the tokens that it has.
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


def mean_gap(found: Tensor, expected: Tensor, mask: Tensor) -> float:
    """Return the mean absolute difference over the tokens of `mask`, in nats."""
    gap = torch.where(mask, found - expected, 0.0).abs().sum()
    return gap.item() / int(mask.sum())


def tolerance(dtype: torch.dtype, noise: float) -> float:
    """Return the largest mean difference that a layout may make.

    Args:
        dtype: In which the model computes.
        noise: Mean difference that rounding makes.

    Example:
        float32, noise 1e-6 -> 3e-4; bfloat16, noise 0.04 -> 0.08; bfloat16, noise 0.3 -> 0.2
    """
    uses_tf32 = torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32
    if dtype == torch.float32 and uses_tf32:
        dtype = torch.float16  # TF32 keeps as many digits
    usual = TOLERANCE.get(dtype, max(TOLERANCE.values()))
    return max(usual, min(NOISE_FACTOR * noise, LARGEST))
