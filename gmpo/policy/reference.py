"""The frozen policy that the KL term measures from, and its slow move toward the policy."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from gmpo.distributed import whole_parameters
from gmpo.policy.head import unwrapped
from gmpo.policy.loading import is_adapted


class Reference(Protocol):
    """Gives the module whose log-probs are the reference's."""

    def scoring(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
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
        self.model = copy.deepcopy(policy).eval().requires_grad_(False)

    @contextmanager
    def scoring(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self.model

    def pairs(self, policy: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        """(name, the reference's tensor, the policy's) of every parameter."""
        mine, theirs = dict(unwrapped(self.model).named_parameters()), dict(unwrapped(policy).named_parameters())
        return [(name, tensor, theirs[name]) for name, tensor in mine.items()]


class BaseOfAdapter:
    """The policy with its adapters off."""

    @contextmanager
    def scoring(self, policy: nn.Module) -> Iterator[nn.Module]:
        with find_adapted(policy).disable_adapter():  # pyright: ignore
            yield policy


class AdapterCopy:
    """The policy with an older copy of its trained tensors, which are swapped in while it scores."""

    def __init__(self, policy: nn.Module):
        self.tensors = {
            name: p.detach().clone() for name, p in find_adapted(policy).named_parameters() if p.requires_grad
        }

    @contextmanager
    def scoring(self, policy: nn.Module) -> Iterator[nn.Module]:
        self._swap(policy)
        try:
            yield policy
        finally:
            self._swap(policy)

    def pairs(self, policy: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        trained = dict(find_adapted(policy).named_parameters())
        self.tensors = {name: tensor.to(trained[name].device) for name, tensor in self.tensors.items()}
        return [(name, tensor, trained[name]) for name, tensor in self.tensors.items()]

    @torch.no_grad()
    def _swap(self, policy: nn.Module) -> None:
        for _, mine, theirs in self.pairs(policy):
            held = theirs.detach().clone()
            theirs.copy_(mine)
            mine.copy_(held)


def find_adapted(model: nn.Module) -> nn.Module:
    """The PeftModel inside of what wraps it."""
    for module in model.modules():
        if is_adapted(module):
            return module
    raise ValueError(f"{type(model).__name__} holds no adapter.")


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
            return {name: tensor.detach().cpu() for name, tensor in self.reference.tensors.items()}
        state = {}
        for name, parameter in unwrapped(self.reference.model).named_parameters():
            with whole_parameters([parameter]):
                state[name] = parameter.detach().cpu().clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if isinstance(self.reference, AdapterCopy):
            self.reference.tensors = {name: tensor.clone() for name, tensor in state.items()}
            return
        with torch.no_grad():
            for name, parameter in unwrapped(self.reference.model).named_parameters():
                _shard_or_whole(parameter, state[name])


def _move(mine: Tensor, theirs: Tensor, alpha: float) -> None:
    both_sharded = hasattr(mine, "ds_tensor") and hasattr(theirs, "ds_tensor")
    if both_sharded:  # cut alike, so each rank moves its own part
        mine.ds_tensor.lerp_(theirs.ds_tensor.to(mine.ds_tensor.dtype), alpha)  # pyright: ignore
        return
    with whole_parameters([theirs]):
        mine.lerp_(theirs.detach().to(mine.dtype), alpha)


def _shard_or_whole(parameter: Tensor, value: Tensor) -> None:
    if not hasattr(parameter, "ds_tensor"):
        parameter.copy_(value)
        return
    import deepspeed  # pyright: ignore

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
