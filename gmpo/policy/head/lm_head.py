"""The vocabulary head of a model: finding it, replacing it, and the transform that follows it.

The transform of a model's logits after the head (a scale, a soft cap) is found by sending known
numbers through the model, whatever its configuration calls it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmpo.policy.head.onednn import OneDnnLinear
from gmpo.unwrap import unwrap, without_ddp


@dataclass(frozen=True, slots=True)
class Transform:
    """The way from the output of a head to a logit of the sampled distribution.

        logit = cap * tanh(slope * output / cap) / temperature
                slope * output / temperature                      without a cap

    Example:
        slope 2, no cap, temperature 0.5: output 3 -> logit 12
    """

    slope: float = 1.0
    cap: float = math.inf
    temperature: float = 1.0

    def __call__(self, output: Tensor) -> Tensor:
        """Return the logits, in the shape of `output`."""
        if math.isinf(self.cap):
            return output * (self.slope / self.temperature)
        return torch.tanh(output * (self.slope / self.cap)) * (self.cap / self.temperature)


PLAIN = Transform()


class Float32Head(nn.Linear):
    """A linear head that computes in float32, whatever its weights, its input and autocast are."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., V] float32 logits of [..., H]."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


LINEAR = (nn.Linear, OneDnnLinear, Float32Head)  # matrix products and nothing else


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run `model` without dropout and gradients within the block.

    Its modules' modes and the random numbers are restored after it.
    """
    training = [module for module in model.modules() if module.training]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def find_head(model: nn.Module) -> nn.Module:
    """Return the module that turns hidden states into logits.

    Raises:
        ValueError: If the model has none.
    """
    causal: Any = unwrap(model)
    head = None
    if hasattr(causal, "get_output_embeddings"):
        head = causal.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(causal).__name__} has no output embeddings (get_output_embeddings() is None). "
            "Give a causal language model, such as AutoModelForCausalLM loads."
        )
    return head


def cast_head_to_float32(model: nn.Module) -> None:
    """Make the head of `model` compute in float32; an untied head also stores its weights so."""
    head = find_head(model)
    linear = getattr(head, "base_layer", head)
    if type(linear) not in LINEAR:
        raise ValueError(
            "cast_lm_head_to_fp32=True needs a linear head, and "
            f"{type(unwrap(model)).__name__} has a {type(linear).__name__}. Leave the option out."
        )

    # A tied head shares its weights with the input embedding, which keeps its dtype.
    causal: Any = unwrap(model)
    if getattr(causal.get_input_embeddings(), "weight", None) is not linear.weight:
        linear.float()

    # Warning: this swaps the class of the user's module.  It keeps its parameters, hooks and name,
    # so that checkpoints, optimizers and adapters see no difference.
    linear.__class__ = Float32Head


@contextmanager
def replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let calls of `head` run `forward` within the block.

    Its hooks, which gather sharded weights, run around it.
    """
    # Warning: this patches the module's forward; code that calls the head meets it too.
    before = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def find_transform(model: nn.Module, device: torch.device, temperature: float) -> Transform:
    """Return the scale and soft cap that `model` applies to its head's output.

    They are measured with one token.

    Raises:
        ValueError: If the model does something else to its logits, or does not call its head.
    """
    name = type(unwrap(model)).__name__
    head = Head(find_head(model))

    # Numbers of every size: near 0 they show the slope, the largest shows the cap.
    wide = torch.float32 if device.type == "mps" else torch.float64
    probe = torch.tensor(
        [0.0, 2**-30, -0.1, 0.5, -1.0, 3.0, -10.0, 30.0, -100.0, 1e3, 1e6],
        dtype=wide,
        device=device,
    )
    given: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        given.append(probe[None, :, None].repeat(1, 1, head.vocabulary))
        return given[0]

    with eval_mode(model), replaced(head.module, forward):
        token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        answer = without_ddp(model)(input_ids=token, use_cache=False).logits
    if not given:
        raise ValueError(
            f"{name} does not call its output embeddings to make logits, so its log-probs can't be "
            "computed."
        )

    # All columns got the same numbers, so a transform by element leaves them the same.
    if answer.shape == given[0].shape and torch.equal(answer, answer[..., :1].expand_as(answer)):
        answer = answer[0, :, 0].to(wide)
        slope, last = (answer[1] / probe[1]).item(), answer[-1].item()
        cap = last if last < 0.5 * slope * probe[-1].item() else math.inf
        if torch.allclose(Transform(slope, cap)(probe), answer, rtol=1e-5, atol=1e-9):
            return Transform(slope, cap, temperature)
    raise ValueError(
        f"{name} does something to its logits that is neither a scale nor a soft cap. "
        "Its log-probs can't be computed in tiles."
    )


class Head:
    """A head as it is now: `forward` stays its own while another one is put in its place."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        # A matrix product and nothing else: no adapter, no quantization, no patched forward.
        plain = type(module) in LINEAR and "forward" not in vars(module)
        self.linear = cast(nn.Linear, module) if plain else None

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        widths: list[int] = []
        for inner in self.module.modules():
            if hasattr(inner, "out_features"):
                widths.append(cast(int, inner.out_features))
        return max(widths or [len(parameter) for parameter in self.module.parameters()])


def computing_dtype(hidden: Tensor, head: nn.Linear) -> torch.dtype:
    """Return the dtype of the head's product: the module's own, under autocast too."""
    if isinstance(head, Float32Head):
        return torch.float32
    if torch.is_autocast_enabled(hidden.device.type):
        return working_dtype(hidden)
    return torch.promote_types(hidden.dtype, head.weight.dtype)


def working_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which products with `hidden` are computed, here and now."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype
