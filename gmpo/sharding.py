"""Whole parameters and models out of the shards of FSDP2 and ZeRO-3."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def sharded(model: nn.Module) -> bool:
    """Whether forward passes of `model` meet those of other ranks, so that every rank must make as many."""
    return any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """A parameter without its sharding, on every rank.  Every rank must call."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor().detach()  # pyright: ignore
    if hasattr(tensor, "ds_id"):
        with full_parameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


@contextmanager
def full_parameters(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the block, parameters that ZeRO-3 has sharded are whole on every rank.  Others are left as they are."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


@contextmanager
def full_model(model: nn.Module, *, inner: bool = True) -> Iterator[None]:
    """Within the block, forward passes of `model`, or of a part of it, meet no other rank.  Every rank must enter.

    ZeRO-3 and FSDP2 shard parameters again after each forward pass; here they stay whole until the end.

    Args:
        inner: False leaves the layers sharded.  Their passes still meet other ranks, but a part of the model may be
            called instead of the whole, to whose forward pass FSDP2 binds the parameters that no layer holds.
    """
    with ExitStack() as stack:
        if inner:
            stack.enter_context(_held_whole([p for p in model.parameters() if hasattr(p, "ds_id")]))
        for module in _fsdp2_modules(model)[: None if inner else 1]:
            stack.enter_context(_unsharded(module))
        yield


def resharded(model: nn.Module) -> nn.Module:
    """`model`, in which FSDP2 has no parameters left that a forward pass made whole, and nothing wrote to since."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # pyright: ignore
    return model


@contextmanager
def _held_whole(parameters: list[Any]) -> Iterator[None]:
    """ZeRO-3's parameters, whole, and held so: it keeps those that it thinks are in use."""
    with full_parameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(HOLDER)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(HOLDER)


WRAPPERS = (
    "_checkpoint_wrapped_module",
    "_orig_mod",
)  # names of what torch wraps, in the module tree


HOLDER = "gmpo"  # stands where DeepSpeed puts the number of a module that is being run


def _fsdp2_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 shards one by one, the root first; it must know its root before a part of it is called."""
    modules: list[Any] = [
        module for module in model.modules() if hasattr(module, "_get_fsdp_state")
    ]
    if modules:
        modules[0]._get_fsdp_state()._lazy_init()
    return modules


@contextmanager
def _unsharded(module: Any) -> Iterator[None]:
    """A module of FSDP2 whose parameters are whole, also after its forward pass."""
    state = module._get_fsdp_state()
    groups = (
        state._fsdp_param_groups
        if hasattr(state, "_fsdp_param_groups")
        else [state._fsdp_param_group]
    )
    groups = [group for group in groups if group is not None]
    own = [group.post_forward_mesh_info for group in groups]
    module.unshard()
    try:
        for group in groups:
            group.post_forward_mesh_info = None
        yield
    finally:
        for group, mesh in zip(groups, own, strict=True):
            group.post_forward_mesh_info = mesh
        module.reshard()
