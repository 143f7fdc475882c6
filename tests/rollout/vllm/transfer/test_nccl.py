"""How trainer and workers meet in an NCCL group, with stand-ins for vLLM's part."""

import sys
import threading
import types
from dataclasses import dataclass

import pytest
import torch

from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.transfer.nccl import WeightSource, trainer_engine


@dataclass
class InitInfo:
    rank_offset: int
    world_size: int
    nccl_unique_id_b64: str
    packed: bool
    packed_buffer_size_bytes: int
    packed_num_buffers: int | None


class TrainerEngine:
    packed, packed_buffer_size_bytes, packed_num_buffers = True, 64, None

    def __init__(self, client, source, is_sender):
        self.model_update_group = None


class Library:
    def ncclGetUniqueId(self):
        return types.SimpleNamespace(internal=b"id")


@pytest.fixture
def meet(monkeypatch):
    """Put stand-ins in the place of vLLM; returns the group's two ends as events."""
    joined, closed = threading.Event(), threading.Event()

    def uid_init_process_group(identity, rank, world_size, device):
        while not joined.wait(0.1):
            if closed.is_set():
                return None
        return (identity, rank, world_size)

    root = "vllm.distributed"
    modules = {
        "vllm": {},
        root: {},
        f"{root}.device_communicators": {},
        f"{root}.device_communicators.pynccl_wrapper": {"NCCLLibrary": Library},
        f"{root}.weight_transfer": {},
        f"{root}.weight_transfer.nccl_common": {
            "NCCLWeightTransferInitInfo": InitInfo,
            "uid_init_process_group": uid_init_process_group,
        },
        f"{root}.weight_transfer.nccl_engine": {"NCCLTrainerWeightTransferEngine": TrainerEngine},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    yield joined
    closed.set()


def engine(join):
    source = WeightSource([], [])
    return trainer_engine(source, None, join=join, workers=2, host="10.0.0.1", port=51216)


def test_the_group_has_the_trainer_and_all_workers(meet):
    seen = {}

    def join(payload):
        seen.update(payload)
        meet.set()

    it = engine(join)
    assert it.model_update_group == (b"id", 0, 3)
    assert (seen["rank_offset"], seen["world_size"], seen["nccl_unique_id_b64"]) == (1, 3, "aWQ=")
    assert "packed_num_buffers" not in seen


def test_a_refusal_to_join_is_told_although_the_group_still_waits(meet):
    def join(payload):
        raise VllmError("This engine's model has 2 layers")

    with pytest.raises(VllmError, match="This engine's model has 2 layers"):
        engine(join)
