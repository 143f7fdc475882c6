"""What a server of ours takes from the wire."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gmpo.rollout.vllm.inside.worker import Backend, plain_name, read
from tests.tiny import tiny_model


class Config:
    """As much of vLLM's options as the backend reads."""

    class model_config:
        hf_config = tiny_model().config


def backend():
    return Backend(None, Config, torch.device("cpu"), nn.Linear(2, 2))


def test_weights_come_in_safetensors_files_alone(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / "w.safetensors")
    ((name, tensor),) = read(str(tmp_path / "w.safetensors"))
    assert name == "a" and tensor.tolist() == [0.0, 1.0, 2.0]
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match="safetensors files only"):
        read(str(tmp_path / "w.bin"))
    (tmp_path / "w.bin").rename(tmp_path / "renamed.safetensors")
    with pytest.raises(Exception, match=r"[Hh]eader"):
        read(str(tmp_path / "renamed.safetensors"))


def test_an_nccl_group_is_not_joined_by_a_store_that_holds_pickles():
    with pytest.raises(ValueError, match="nccl_unique_id_b64 only"):
        backend().init_transfer_engine(
            {"nccl": {"master_address": "10.0.0.1", "master_port": 1, "world_size": 2}}
        )


def test_another_model_is_refused():
    with pytest.raises(
        ValueError, match="trainer's model has vocab_size=17, this engine's model has 16"
    ):
        backend().init_transfer_engine({"model": {"vocab_size": 17}})


def test_an_adapters_wrapper_does_not_hide_a_weights_name():
    assert plain_name("model.q_proj.base_layer.weight") == "model.q_proj.weight"
