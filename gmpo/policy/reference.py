"""The frozen policy that the KL term measures from, and its slow move toward the policy."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gmpo.sharding import WRAPPERS, full_parameters, full_tensor, resharded
from gmpo.unwrap import find_adapter, is_adapted, unwrap


class Reference(Protocol):
    """Gives the module whose log-probs are the reference's."""

    def active(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """Within the block, the module to score with.  `policy` is the policy as it runs, wrapped or not."""
        ...


def make_reference(
    policy: nn.Module, beta: float, *, sync: bool = False
) -> "FrozenCopy | BaseOfAdapter | AdapterCopy | None":
    """The reference of `policy` as it is now; None if `beta` is 0.

    A full model is copied, never loaded again by its name.  Under adapters there is no second model: the reference is
    the policy with its adapters off or, where it moves (`sync`), the same model with an older copy of what is trained.
    """
    if beta == 0:
        return None
    if not is_adapted(policy):
        return FrozenCopy(policy)
    return AdapterCopy(policy) if sync else BaseOfAdapter()


class FrozenCopy:
    """A copy of the whole model.  `model` may be replaced by what wraps it (accelerate, DeepSpeed)."""

    def __init__(self, policy: nn.Module):
        loaded_in_shards = [p for p in policy.parameters() if hasattr(p, "ds_id")]
        memo: dict[int, Any] = {
            id(p): nn.Parameter(full_tensor(p).cpu(), requires_grad=False) for p in loaded_in_shards
        }
        self.model: Any = copy.deepcopy(policy, memo).eval().requires_grad_(False)

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self.model

    def pairs(self, policy: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        """(name, the reference's tensor, the policy's) of every parameter."""
        mine, theirs = (
            named_parameters(unwrap(resharded(model))) for model in (self.model, policy)
        )
        return [(name, tensor, theirs[name]) for name, tensor in mine.items()]


def prepared_reference(model: nn.Module, accelerator: Any, *, rows: int) -> nn.Module:
    """A frozen copy as the accelerator keeps the policy: ZeRO-3's or FSDP2's shards, or whole, on the right device.

    Args:
        rows: Of a forward pass, which DeepSpeed wants to know.
    """
    if accelerator.is_fsdp2:
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return accelerator.prepare_model(model, evaluation_mode=True)
    import deepspeed  # pyright: ignore

    config = {
        name: plugin.deepspeed_config[name]
        for name in ("bf16", "fp16")
        if name in plugin.deepspeed_config
    }
    zero = {
        "stage": 3,
        "offload_param": plugin.deepspeed_config["zero_optimization"].get("offload_param"),
    }
    config |= {"zero_optimization": zero, "train_micro_batch_size_per_gpu": rows}
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    return engine


class BaseOfAdapter:
    """The policy with its adapters off."""

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        # PEFT marks what is trained on the parameters that it finds: on FSDP2's shards, not on what a pass made whole
        with find_adapter(resharded(policy)).disable_adapter():  # pyright: ignore
            try:
                yield policy
            finally:
                resharded(policy)


class AdapterCopy:
    """The policy with an older copy of its trained tensors, which are swapped in while it scores."""

    def __init__(self, policy: nn.Module):
        self.tensors = {
            name: full_tensor(p).clone()
            for name, p in find_adapter(policy).named_parameters()
            if p.requires_grad
        }

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        self._swap(policy)
        try:
            yield policy
        finally:
            self._swap(policy)

    def pairs(self, policy: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        trained = named_parameters(find_adapter(resharded(policy)))
        self.tensors = {
            name: _sharded_like(trained[name], tensor) for name, tensor in self.tensors.items()
        }
        return [(name, tensor, trained[name]) for name, tensor in self.tensors.items()]

    @torch.no_grad()
    def _swap(self, policy: nn.Module) -> None:
        for _, mine, theirs in self.pairs(policy):
            with _changing(theirs):
                held = theirs.detach().clone()
                theirs.copy_(mine)
                mine.copy_(held)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By the names that they have without what compiles modules or recomputes their activations around them."""
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): parameter
        for name, parameter in model.named_parameters()
    }


class ReferenceSync:
    """reference = (1 - alpha) * reference + alpha * policy, every `steps` optimizer steps."""

    def __init__(self, reference: FrozenCopy | AdapterCopy, *, alpha: float, steps: int):
        self.reference, self.alpha, self.steps = reference, alpha, steps

    def after_step(self, policy: nn.Module, global_step: int) -> bool:
        """Move the reference if `global_step` (counted from 1) is a multiple of `steps`.  Every rank must call.

        Returns:
            Whether it moved.
        """
        if global_step % self.steps:
            return False
        with torch.no_grad():
            for _, mine, theirs in self.reference.pairs(policy):
                _move(mine, theirs, self.alpha)
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """The reference's tensors by name, on the CPU."""
        if isinstance(self.reference, AdapterCopy):
            return {
                name: full_tensor(tensor).cpu() for name, tensor in self.reference.tensors.items()
            }
        parameters = unwrap(resharded(self.reference.model)).named_parameters()
        return {name: full_tensor(parameter).cpu().clone() for name, parameter in parameters}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if isinstance(self.reference, AdapterCopy):
            self.reference.tensors = {name: tensor.clone() for name, tensor in state.items()}
            return
        with torch.no_grad():
            for name, parameter in unwrap(resharded(self.reference.model)).named_parameters():
                _load(parameter, state[name])


def _move(mine: Tensor, theirs: Tensor, alpha: float) -> None:
    with _changing(mine), full_parameters([theirs]):
        mine.lerp_(theirs.detach().to(mine.dtype), alpha)


def _load(mine: Tensor, value: Tensor) -> None:
    """Set a parameter, sharded or not, to a whole value."""
    with _changing(mine):
        mine.copy_(_sharded_like(mine, value))


def _sharded_like(parameter: Any, value: Tensor) -> Tensor:
    """A value where the parameter is, cut as FSDP2 has cut it."""
    if not hasattr(parameter, "device_mesh") or hasattr(value, "device_mesh"):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def _changing(parameter: Tensor) -> AbstractContextManager[Any]:
    """Within the block a parameter of ZeRO-3 is whole; what the first rank makes of it is kept."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed  # pyright: ignore

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
