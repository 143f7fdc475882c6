"""Where ranks exchange tensors: NCCL takes only those on GPUs."""

import pytest
import torch

from gmpo import distributed


class Met(Exception):
    pass


@pytest.mark.parametrize("call", [distributed.all_reduce, distributed.all_gather])
def test_what_ranks_exchange_lies_where_they_meet(monkeypatch, call):
    def meet(*tensors, **options):
        raise Met({tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)})

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "collective_device", lambda: torch.device("meta"))
    monkeypatch.setattr(distributed.dist, "all_reduce", meet)
    monkeypatch.setattr(distributed.dist, "all_gather", meet)
    with pytest.raises(Met) as caught:
        call(torch.ones(3))
    assert caught.value.args[0] == {"meta"}
