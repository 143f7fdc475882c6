"""The frozen policy that the KL term measures from, and its slow move toward the policy."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gmpo.sharding import WRAPPERS, full_parameters, full_tensor, resharded
from gmpo.unwrap import find_adapter, is_adapted, unwrap


class Reference(Protocol):
    """A frozen policy whose log-probs are the reference's."""

    def active(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """Give the module to compute log-probs with, within the block.

        Args:
            policy: The policy as it runs, wrapped or not.
        """
        ...


def make_reference(
    policy: nn.Module, beta: float, *, sync: bool = False
) -> "FrozenCopy | BaseOfAdapter | AdapterCopy | None":
    """Return the reference of `policy`: the policy as it is now.  None if `beta` is 0.

    A full model is copied, never loaded again by its name.  Under adapters there is no second
    model.  Where they do nothing yet, the reference is the policy with its adapters off.  Where
    they do something from the start (a trained adapter, PiSSA, OLoRA, ...), or where the reference
    moves (`sync`), it is the same model with a copy of the trained tensors.
    """
    if beta == 0:
        return None
    if not is_adapted(policy):
        return FrozenCopy(policy)
    return BaseOfAdapter() if not sync and adapters_do_nothing(policy) else AdapterCopy(policy)


# PEFT's names of LoRA's matrices, and of those that are 0 where LoRA does nothing yet.
LORA = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
LORA_AT_ZERO = {"lora_B", "lora_embedding_A"}


def adapters_do_nothing(policy: nn.Module) -> bool:
    """Return whether the policy is, as it is now, the model without its adapters.

    It is known of a single LoRA one of whose two matrices is 0 everywhere.  Everything else is
    taken to do something: several adapters, other kinds, modules that are saved whole.  Every rank
    must call.
    """
    adapter = find_adapter(policy)
    kinds = [config.peft_type for config in adapter.peft_config.values()]
    if kinds != ["LORA"]:
        return False

    for name, parameter in adapter.named_parameters():
        parts = set(name.split("."))
        if parameter.requires_grad and not parts & LORA:
            return False
        if parts & LORA_AT_ZERO and bool(full_tensor(parameter).any()):
            return False
    return True


class FrozenCopy:
    """A copy of the whole model; `model` may be replaced by its wrapper (accelerate, DeepSpeed)."""

    def __init__(self, policy: nn.Module) -> None:
        loaded_in_shards = [p for p in policy.parameters() if hasattr(p, "ds_id")]
        memo: dict[int, Any] = {
            id(p): nn.Parameter(full_tensor(p).cpu(), requires_grad=False) for p in loaded_in_shards
        }
        self.model: nn.Module = copy.deepcopy(policy, memo).eval().requires_grad_(False)

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Give the copy."""
        yield self.model

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters by name; sharded ones stay sharded."""
        return dict(unwrap(resharded(self.model)).named_parameters())

    def pairs(self, policy: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, the reference's tensor, the policy's) of every parameter."""
        mine = named_parameters(unwrap(resharded(self.model)))
        theirs = named_parameters(unwrap(resharded(policy)))
        return [(name, tensor, theirs[name]) for name, tensor in mine.items()]

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take whole tensors by name."""
        with torch.no_grad():
            for name, parameter in self.tensors().items():
                _load(parameter, state[name])


def prepared_reference(model: nn.Module, accelerator: Accelerator, *, rows: int) -> nn.Module:
    """Return a frozen copy in the form in which the accelerator keeps the policy.

    That is in ZeRO-3's or FSDP2's shards, or whole on the right device.

    Args:
        model: The copy.
        accelerator: The Trainer's own.
        rows: Of a forward pass, which DeepSpeed wants to know.
    """
    if accelerator.is_fsdp2:
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)

    plugin: Any = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return accelerator.prepare_model(model, evaluation_mode=True)
    return _with_zero3(model, plugin.deepspeed_config, rows)


def _with_zero3(model: nn.Module, of_policy: Mapping[str, Any], rows: int) -> nn.Module:
    import deepspeed

    config: dict[str, Any] = {
        name: of_policy[name] for name in ("bf16", "fp16") if name in of_policy
    }
    config["zero_optimization"] = {
        "stage": 3,
        "offload_param": of_policy["zero_optimization"].get("offload_param"),
    }
    config["train_micro_batch_size_per_gpu"] = rows
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    return engine


class BaseOfAdapter:
    """The policy with its adapters off."""

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Turn the adapters off."""
        # PEFT marks trained parameters by `requires_grad` on those that it finds: they must be
        # FSDP2's shards, not the whole ones of an earlier pass.
        with find_adapter(resharded(policy)).disable_adapter():
            try:
                yield policy
            finally:
                resharded(policy)


class AdapterCopy:
    """The policy with an older copy of its trained tensors, swapped in while it is used."""

    def __init__(self, policy: nn.Module) -> None:
        trained = {n: p for n, p in find_adapter(policy).named_parameters() if p.requires_grad}
        self.copies = {name: full_tensor(p).clone() for name, p in trained.items()}

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Swap the copy in."""
        self._swap(policy)
        try:
            yield policy
        finally:
            self._swap(policy)

    def tensors(self) -> dict[str, Tensor]:
        """Return the copies by name; sharded ones stay sharded."""
        return self.copies

    def pairs(self, policy: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, the reference's tensor, the policy's) of every trained tensor."""
        trained = named_parameters(find_adapter(resharded(policy)))
        for name, tensor in self.copies.items():
            self.copies[name] = _sharded_like(trained[name], tensor)
        return [(name, tensor, trained[name]) for name, tensor in self.copies.items()]

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take whole tensors by name."""
        self.copies = {name: tensor.clone() for name, tensor in state.items()}

    @torch.no_grad()
    def _swap(self, policy: nn.Module) -> None:
        for _, mine, theirs in self.pairs(policy):
            with _changing(theirs):
                held = theirs.detach().clone()
                theirs.copy_(mine)
                mine.copy_(held)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their names without wrappers.

    Wrappers are what compiles modules or recomputes their activations.
    """
    named = {}
    for name, parameter in model.named_parameters():
        named[".".join(part for part in name.split(".") if part not in WRAPPERS)] = parameter
    return named


class ReferenceState:
    """The tensors of a reference that no checkpoint of the policy holds, for checkpoints.

    Args:
        reference: The one to save and restore.
        keep: This rank writes checkpoints.  Only it holds on to the whole tensors.
    """

    def __init__(self, reference: FrozenCopy | AdapterCopy, *, keep: bool = True) -> None:
        self.reference = reference
        self.keep = keep

    def state_dict(self) -> dict[str, Tensor]:
        """Return whole tensors by name, on the CPU; nothing on ranks that do not write.

        They are gathered one at a time.  Every rank must call.
        """
        kept = {}
        for name, tensor in self.reference.tensors().items():
            whole = full_tensor(tensor)
            if self.keep:
                # `cpu()` gives CPU tensors back as they are, and they go on to change.
                kept[name] = whole.clone() if whole.device.type == "cpu" else whole.cpu()
        return kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        self.reference.load(state)


class ReferenceSync:
    """The move reference = (1 - alpha) * reference + alpha * policy, every `steps` optimizer steps.

    Example:
        alpha 0.25, a weight of 1 in the reference and of 2 in the policy -> 1.25
    """

    def __init__(self, reference: FrozenCopy | AdapterCopy, *, alpha: float, steps: int) -> None:
        self.reference = reference
        self.alpha = alpha
        self.steps = steps

    def after_step(self, policy: nn.Module, global_step: int) -> bool:
        """Move the reference if `global_step` (counted from 1) is a multiple of `steps`.

        Every rank must call.

        Returns:
            True if it moved.
        """
        if global_step % self.steps:
            return False
        with torch.no_grad():
            for _, mine, theirs in self.reference.pairs(policy):
                _move(mine, theirs, self.alpha)
        return True


def _move(mine: Tensor, theirs: Tensor, alpha: float) -> None:
    with _changing(mine), full_parameters([theirs]):
        mine.lerp_(theirs.detach().to(mine.dtype), alpha)


def _load(mine: Tensor, value: Tensor) -> None:
    """Set a parameter, sharded or not, to a whole value."""
    with _changing(mine):
        mine.copy_(_sharded_like(mine, value))


def _sharded_like(parameter: Any, value: Tensor) -> Tensor:
    """Return a value on the parameter's device, cut as FSDP2 has cut the parameter."""
    if not hasattr(parameter, "device_mesh") or hasattr(value, "device_mesh"):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def _changing(parameter: Tensor) -> AbstractContextManager[Any]:
    """Make a parameter of ZeRO-3 whole within the block; the first rank's changes are kept."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
