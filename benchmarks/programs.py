"""The programs of the benchmarks, in a process per side: the same code with another import line.

Started by `benchmarks.peer.Worker`, in gmpo's own environment or in the peer's.
"""

import contextlib
import functools
import hashlib
import importlib
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

MODULES = {"gmpo": "gmpo", "peer": "trl.experimental.gmpo"}
PARTS = {  # where a step's time goes: (path from the trainer to what is called, part); inner calls count for themselves
    "gmpo": (
        ("stages.engine.generate", "generate"),
        ("stages.logprobs.compute_without_grad", "old log-probs"),
        ("training_step", "learn"),
        ("accelerator.clip_grad_norm_", "optimizer"),
    ),
    "peer": (
        ("_generate_single_turn", "generate"),
        ("_generate_and_score_completions", "other"),
        ("_get_per_token_logps_and_entropies", "log-probs"),
        ("training_step", "learn"),
        ("accelerator.clip_grad_norm_", "optimizer"),
    ),
}


def make_trainer(
    side: str, *, model: str, prompts: list[Any], reward: Callable[..., Any], options: dict
) -> Any:
    """Return the side's GMPOTrainer, in a scratch folder, with nothing logged or saved."""
    from datasets import Dataset

    warnings.filterwarnings("ignore")
    module = importlib.import_module(MODULES[side])
    settings = {
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "shuffle_dataset": False,  # the same prompts in the same order on both sides
        "max_steps": 1_000_000,
        **options,
    }
    return module.GMPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward,
        args=module.GMPOConfig(tempfile.mkdtemp(prefix="gmpo-benchmark-"), **settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )


# -- whole steps -------------------------------------------------------------------------------------------------------


class Parts:
    """Seconds by part.  What is timed inside of something else counts for itself alone."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # seconds of finished calls, one entry per open call

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, adding the seconds that it takes to `part`."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            name = part
            if part == "log-probs":
                name = "learn" if torch.is_grad_enabled() else "old log-probs"
            start = clock()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken = clock() - start
                own = taken - self._inner.pop()
                self._inner[-1] += taken
                self.seconds[name] = self.seconds.get(name, 0.0) + own

        return wrapper

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time a method of an object from now on."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))

    def drain(self, total: float) -> dict[str, float]:
        """Return the parts of `total` seconds, and start to count again."""
        parts, self.seconds, self._inner = self.seconds, {}, [0.0]
        other = total - sum(seconds for part, seconds in parts.items() if part != "other")
        return {**parts, "other": other}


def steps(
    channel: Any,
    *,
    side: str,
    model: str,
    prompts: list[Any],
    options: dict[str, Any],
    updates: int = 1,
) -> None:
    """Make `updates` optimizer steps per message, with the collection before them; tell what it took."""
    counts, parts = {"tokens": 0, "longest": 0}, Parts()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Return numbers that are never all equal, so that every group has something to learn."""
        counts["tokens"] += sum(map(len, completion_ids))
        counts["longest"] = max(counts["longest"], *map(len, completion_ids))
        return [hashlib.sha256(str(ids).encode()).digest()[0] / 255 for ids in completion_ids]

    trainer = make_trainer(
        side, model=model, prompts=prompts, reward=parts.timed("reward", reward), options=options
    )
    watch_parts(trainer, side, parts)
    trainer.add_callback(Paced(channel, counts, parts, updates))
    trainer.train()


def watch_parts(trainer: Any, side: str, parts: Parts) -> None:
    """Time all parts of a trainer's steps but its optimizer, which is not there yet."""
    for path, part in PARTS[side]:
        *owners, name = path.split(".")
        parts.watch(functools.reduce(getattr, owners, trainer), name, part)


class Paced(TrainerCallback):
    """Lets a trainer make its next steps when a message comes, and ends the training when none will come."""

    def __init__(self, channel: Any, counts: dict[str, int], parts: Parts, updates: int):
        self.channel, self.counts, self.parts, self.updates = channel, counts, parts, updates
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.parts.watch(kwargs["optimizer"], "step", "optimizer")
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates:
            return
        taken = clock() - self.start
        self.channel.send(
            seconds=taken, peak_bytes=peak_bytes(), parts=self.parts.drain(taken), **self.counts
        )
        self.counts.update(tokens=0, longest=0)
        self._wait(control)

    def _wait(self, control: Any) -> None:
        if self.channel.receive() is None:
            control.should_training_stop = True
        self.start = clock()


# -- the learner alone -------------------------------------------------------------------------------------------------


def learner(channel: Any, *, side: str, model: str, batch: str, options: dict[str, Any]) -> None:
    """Take loss and gradient of one batch per message; tell what it took.

    Args:
        batch: Safetensors file: "prompts" [1, P], "completions" [B, T] padded with 0, "lengths" [B], "advantages" [B].
    """
    trainer = make_trainer(
        side,
        model=model,
        prompts=["a"],
        reward=lambda prompts, **_: [0.0] * len(prompts),
        options=options,
    )
    trainer.current_gradient_accumulation_steps = 1
    wrapped = trainer.accelerator.prepare_model(trainer.model)
    wrapped.train()
    inputs = INPUTS[side](
        {name: value.to(trainer.args.device) for name, value in load_file(batch).items()}
    )
    while channel.receive() is not None:
        start = clock()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(wrapped, inputs)
        trainer.accelerator.backward(loss)
        seconds = clock() - start
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in wrapped.parameters() if p.grad is not None]
        )
        wrapped.zero_grad()
        channel.send(
            seconds=seconds, peak_bytes=peak_bytes(), loss=loss.item(), gradient_norm=norm.item()
        )


def collection(channel: Any, *, model: str, batch: str, options: dict[str, Any], rows: int) -> None:
    """Take the gradient of a collection, `rows` rows in a micro-batch, by gmpo's training step; once per message.

    Args:
        batch: Safetensors file: "prompts" [groups, P], "completions" [B, T] padded with 0, "lengths" [B], "advantages"
            [B]; rows of a group are contiguous.
    """
    from gmpo.data.micro_batches import has_signal, pack_signal_rows
    from gmpo.learn import MicroBatch

    trainer = make_trainer(
        "gmpo", model=model, prompts=["a"], reward=lambda **_: [], options=options
    )
    trainer.current_gradient_accumulation_steps = 1
    wrapped = trainer.accelerator.prepare_model(trainer.model)
    whole = gmpo_inputs(
        {name: value.to(trainer.args.device) for name, value in load_file(batch).items()}
    )
    micro_batches = list(torch.arange(len(whole.batch)).split(rows))
    if (
        trainer.args.zero_signal_groups != "keep"
    ):  # as the trainer does between collecting and learning
        signal = has_signal(whole.batch)
        micro_batches = pack_signal_rows(micro_batches, signal, first=len(micro_batches), window=1)
    parts = [MicroBatch(whole.batch.rows(index), whole.denominators) for index in micro_batches]
    while channel.receive() is not None:
        start = clock()
        loss = sum(trainer.training_step(wrapped, part) for part in parts)
        seconds = clock() - start
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in wrapped.parameters() if p.grad is not None]
        )
        wrapped.zero_grad()
        channel.send(
            seconds=seconds, peak_bytes=peak_bytes(), loss=float(loss), gradient_norm=norm.item()
        )


def gmpo_inputs(rows: dict[str, Tensor]) -> Any:
    from gmpo.learn import MicroBatch
    from gmpo.objective.types import Denominators
    from gmpo.types import Batch

    lengths, completions = rows["lengths"], rows["completions"]
    group = torch.arange(len(rows["prompts"]), device=lengths.device).repeat_interleave(
        len(lengths) // len(rows["prompts"])
    )
    prompts = list(rows["prompts"])
    batch = Batch(
        prompt_ids=[prompts[number] for number in group.tolist()],
        completion_ids=completions,
        lengths=lengths,
        mask=torch.arange(completions.shape[1], device=lengths.device) < lengths[:, None],
        num_completion_tokens=lengths,
        advantages=rows["advantages"],
        group=group,
    )
    tokens = float(lengths.sum())
    return MicroBatch(batch, Denominators(len(lengths), tokens, tokens, 1, completions.shape[1]))


def peer_inputs(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    lengths, completions = rows["lengths"], rows["completions"]
    prompts = rows["prompts"].expand(len(lengths), -1)  # a single group
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": (
            torch.arange(completions.shape[1], device=lengths.device) < lengths[:, None]
        ).long(),
        "advantages": rows["advantages"],
        "num_items_in_batch": lengths.sum(),
    }


INPUTS = {"gmpo": gmpo_inputs, "peer": peer_inputs}


# -- the vocabulary head alone -----------------------------------------------------------------------------------------


def head(
    channel: Any, *, side: str, rows: int, hidden: int, vocabulary: int, completion: int
) -> None:
    """Take log-probs, entropies, and the gradients of a weighted sum of the log-probs, once per message."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    linear = torch.nn.Linear(hidden, vocabulary, bias=False, device=device)
    states = torch.randn(rows, hidden, device=device, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    weights = torch.randn(rows, device=device)
    while channel.receive() is not None:
        states.grad = linear.weight.grad = None
        before = reset_peak()
        start = clock()
        HEADS[side](states, linear, targets, weights, completion).backward()
        seconds = clock() - start
        extra = peak_bytes() - before - linear.weight.nbytes - states.nbytes  # less the gradients
        channel.send(
            seconds=seconds, extra_bytes=extra, gradient_norm=linear.weight.grad.norm().item()
        )


def gmpo_head(
    states: Tensor, linear: Any, targets: Tensor, weights: Tensor, completion: int
) -> Tensor:
    """Compute in tiles of as many whole completions as fit."""
    from gmpo.policy.head.chunked import tile_rows
    from gmpo.policy.head.fused import fused_loss

    size = max(1, tile_rows(len(linear.weight), 4, states.device) // completion) * completion
    parts = weights.split(size)
    return fused_loss(
        states,
        linear,
        targets,
        list(torch.arange(len(parts))),
        [len(part) for part in parts],
        lambda tile, logps, _: logps @ parts[int(tile)],
    )


def two_passes(
    states: Tensor, linear: Any, targets: Tensor, weights: Tensor, completion: int
) -> Tensor:
    from gmpo.policy.head.chunked import token_logps
    from gmpo.policy.head.lm_head import Head

    return token_logps(states, Head(linear), targets, want_entropy_grad=False)[0] @ weights


def peer_head(
    states: Tensor, linear: Any, targets: Tensor, weights: Tensor, completion: int
) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    wanted = ("log_probs", "entropy")
    scores = ChunkedLogProbFunction.apply(
        states, linear.weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, wanted
    )
    return scores[0] @ weights


HEADS = {"gmpo": gmpo_head, "two passes": two_passes, "peer": peer_head}


# -- clock and memory --------------------------------------------------------------------------------------------------


def clock() -> float:
    """Return the time in seconds, when everything asked of the device so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """Return the most memory so far: allocated on the GPU, or resident of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        return memory_line("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # a system without /proc


def reset_peak() -> int:
    """Let `peak_bytes` count from now on (on Linux and CUDA); what is taken now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return memory_line("VmRSS")


def memory_line(name: str) -> int:
    """Return the bytes of a line in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
