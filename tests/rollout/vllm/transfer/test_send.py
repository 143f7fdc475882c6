"""Buckets, failures on the way, and the thread that talks NCCL."""

import threading
import time

import pytest
import torch

from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.transfer.carriers import ByNccl, ByReference
from gmpo.rollout.vllm.transfer.send import buckets, send

WEIGHTS = [(str(number), torch.full((4,), float(number))) for number in range(5)]  # 16 bytes each


class Receiver:
    def __init__(self, fails_at=None):
        self.calls = []
        self.fails_at = fails_at

    def _note(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self.fails_at:
            raise VllmError(f"{name} failed")

    def start_weight_update(self):
        self._note("start")

    def update_weights(self, update_info):
        self._note("update", [name for name, _ in update_info["weights"]])

    def finish_weight_update(self, weight_version=None):
        self._note("finish", weight_version)

    def abandon(self):
        self._note("abandon")


def test_buckets_hold_every_tensor_once_in_order():
    assert [[name for name, _ in bucket] for bucket in buckets(WEIGHTS, size=32)] == [
        ["0", "1"],
        ["2", "3"],
        ["4"],
    ]
    assert list(buckets([], size=32)) == []


def test_an_update_starts_carries_and_finishes():
    receiver = Receiver()
    send(ByReference(receiver), WEIGHTS, tag="run:1")
    assert receiver.calls == [("start",), ("update", list("01234")), ("finish", "run:1")]


@pytest.mark.parametrize("step", ["start", "update", "finish"])
def test_after_a_failure_the_weights_are_still_gathered_to_the_end(step):
    """The other ranks wait in the collectives that make weights whole."""
    gathered = []

    def weights():
        for name, tensor in WEIGHTS:
            gathered.append(name)
            yield name, tensor

    receiver = Receiver(fails_at=step)
    with pytest.raises(VllmError, match=f"{step} failed") as fault:
        send(ByReference(receiver), weights(), tag="run:1")
    assert gathered == list("01234")
    assert fault.value.raised_on_all_ranks
    assert receiver.calls[-2][0] == step and receiver.calls[-1] == ("abandon",)


def test_the_engine_hears_of_weights_that_can_not_be_made():
    """Else it would wait for the rest, and refuse the next update."""

    def weights():
        yield WEIGHTS[0]
        raise ValueError("no such shard")

    receiver = Receiver()
    with pytest.raises(ValueError, match="no such shard") as error:
        send(ByReference(receiver), weights(), tag="run:1")
    assert receiver.calls == [("start",), ("abandon",)]
    assert error.value.raised_on_all_ranks


def test_a_rank_that_does_not_send_only_gathers():
    weights = iter(WEIGHTS)
    send(None, weights, tag="run:1")
    assert next(weights, None) is None


class Engine:
    """Stands for vLLM's NCCL trainer engine: sends all that its source gives."""

    def __init__(self, source, *, fails=None, hangs_after=None):
        self.source = source
        self.sent = []
        self.fails = fails
        self.hangs_after = hangs_after
        self.rounds = 0

    def send_weights(self):
        self.rounds += 1
        for name, _ in self.source:
            self.sent.append(name)
            if self.fails == name:
                raise RuntimeError("NCCL error 3")
            if self.hangs_after == name:
                threading.Event().wait(30)


def nccl(timeout=1.0, **options):
    engines = []

    def make(source):
        engines.append(Engine(source, **options))
        return engines[-1]

    return ByNccl(make, timeout=timeout), engines


def test_nccl_sends_everything_and_keeps_its_group():
    carrier, engines = nccl()
    send(carrier, WEIGHTS, tag="run:1")
    send(carrier, WEIGHTS, tag="run:2")
    (engine,) = engines
    assert engine.sent == list("0123401234") and engine.rounds == 2


def test_nccl_tells_what_failed_and_makes_a_new_group():
    carrier, _ = nccl(fails="1")
    with pytest.raises(VllmError, match="Sending weights over NCCL failed: NCCL error 3"):
        send(carrier, WEIGHTS, tag="run:1")
    assert carrier.engine is None


@pytest.mark.parametrize("name", ["0", "4"])
def test_nccl_does_not_wait_for_a_lost_peer_for_ever(name):
    many = [(str(number), torch.zeros(1)) for number in range(50)] if name == "0" else WEIGHTS
    carrier, _ = nccl(hangs_after=name)
    began = time.monotonic()
    with pytest.raises(VllmError, match="did not move on for 1 seconds"):
        send(carrier, many, tag="run:1")
    assert time.monotonic() - began < 15


def test_nccl_tells_at_once_why_nobody_joined():
    """The queue is full by then: the trainer used to wait for the timeout, and say only that."""
    many = [(str(number), torch.zeros(1)) for number in range(50)]

    def make(source):
        time.sleep(1.0)
        raise VllmError("the trainer's model has 3 layers")

    began = time.monotonic()
    with pytest.raises(VllmError, match="Sending weights over NCCL failed: the trainer's model"):
        send(ByNccl(make, timeout=100.0), many, tag="run:1")
    assert time.monotonic() - began < 50.0
