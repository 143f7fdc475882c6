"""Whole parameters and models out of the shards of FSDP2 and ZeRO-3."""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

# Names of torch's wrappers in the module tree
WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")

HOLDER = "gmpo"  # stands where DeepSpeed puts the number of a module that is being run


def sharded(model: nn.Module) -> bool:
    """Return whether forward passes of `model` meet those of other ranks.

    Then every rank must make as many.
    """
    return any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a parameter without its sharding, on every rank.  Every rank must call."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor().detach()  # pyright: ignore[reportAttributeAccessIssue] (a DTensor)
    if hasattr(tensor, "ds_id"):
        with full_parameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


@contextmanager
def full_parameters(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Make parameters that ZeRO-3 has sharded whole within the block, on every rank.

    Others are left as they are.
    """
    in_shards = [p for p in parameters if hasattr(p, "ds_id")]
    if not in_shards:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(in_shards):
        yield


@contextmanager
def full_model(model: nn.Module, *, inner: bool = True) -> Iterator[None]:
    """Let forward passes of `model`, or of a part of it, meet no other rank within the block.

    Every rank must enter.  ZeRO-3 and FSDP2 shard parameters again after each forward pass; here
    they stay whole until the end.

    Args:
        model: Any, sharded or not.
        inner: False leaves the layers sharded.  Their passes still meet other ranks, but a part of
            the model may be called instead of the whole, to whose forward pass FSDP2 binds the
            parameters that no layer holds.
    """
    with ExitStack() as stack:
        if inner:
            stack.enter_context(_held_whole([p for p in model.parameters() if hasattr(p, "ds_id")]))
        for module in _fsdp2_modules(model)[: None if inner else 1]:
            stack.enter_context(_unsharded(module))
        yield


def resharded(model: nn.Module) -> nn.Module:
    """Return `model` after FSDP2 has dropped parameters that a forward pass made whole.

    Nothing may have written to them since.
    """
    for module in _fsdp2_wrapped(model):
        module.reshard()
    return model


@contextmanager
def _held_whole(parameters: list[Any]) -> Iterator[None]:
    """Gather ZeRO-3 parameters and mark them in use, so that DeepSpeed does not release them."""
    with full_parameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(HOLDER)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(HOLDER)


def _fsdp2_wrapped(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 shards one by one, the root first."""
    return [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]


def _fsdp2_modules(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 shards one by one, ready for a part of them to be called."""
    modules = _fsdp2_wrapped(model)
    # FSDP2 must know its root before a part of it is called.
    if modules:
        modules[0]._get_fsdp_state()._lazy_init()
    return modules


@contextmanager
def _unsharded(module: Any) -> Iterator[None]:
    """Keep the parameters of a module of FSDP2 whole, also after its forward pass."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        groups = state._fsdp_param_groups
    else:
        groups = [state._fsdp_param_group]
    groups = [group for group in groups if group is not None]

    # Private state of FSDP2: without a mesh to shard over after the forward pass, it does not.
    meshes = [group.post_forward_mesh_info for group in groups]
    module.unshard()
    try:
        for group in groups:
            group.post_forward_mesh_info = None
        yield
    finally:
        for group, mesh in zip(groups, meshes, strict=True):
            group.post_forward_mesh_info = mesh
        module.reshard()


def keep_sums_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 round neither a module's output nor sums of gradients to the layers' dtype."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.is_fsdp2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )
