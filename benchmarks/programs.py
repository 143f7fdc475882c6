"""What the benchmarks run, in a process per side: the same code with another import line.

Started by `benchmarks.peer.Worker`, in gmpo's own environment or in the peer's.
"""

import functools
import hashlib
import importlib
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

MODULES = {"gmpo": "gmpo", "peer": "trl.experimental.gmpo"}
GENERATORS = {  # what makes the completions of a collection: (path to its owner, name)
    "gmpo": ("engine", "generate"),
    "peer": (None, "_generate_single_turn"),
}


def make_trainer(side: str, *, model: str, prompts: list[Any], reward: Callable[..., Any], options: dict) -> Any:
    """The side's GMPOTrainer, in a scratch folder, with nothing logged or saved."""
    from datasets import Dataset

    warnings.filterwarnings("ignore")
    module = importlib.import_module(MODULES[side])
    config = module.GMPOConfig(
        tempfile.mkdtemp(prefix="gmpo-benchmark-"),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_steps=1_000_000,
        **options,
    )
    return module.GMPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )


# -- whole steps -------------------------------------------------------------------------------------------------------


def steps(channel: Any, *, side: str, model: str, prompts: list[Any], options: dict[str, Any]) -> None:
    """Make one training step (generate, reward, learn) per message; tell what it took."""
    counts = {"tokens": 0, "generate": 0.0}

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Numbers that are never all equal, so that every group has something to learn."""
        counts["tokens"] += sum(map(len, completion_ids))
        return [hashlib.sha256(str(ids).encode()).digest()[0] / 255 for ids in completion_ids]

    trainer = make_trainer(side, model=model, prompts=prompts, reward=reward, options=options)
    path, name = GENERATORS[side]
    owner = trainer if path is None else getattr(trainer, path)
    setattr(owner, name, timed(getattr(owner, name), counts))
    trainer.add_callback(Paced(channel, counts))
    trainer.train()


def timed(function: Callable[..., Any], counts: dict[str, Any]) -> Callable[..., Any]:
    """`function`, adding the seconds it takes to counts["generate"]."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        result = function(*args, **kwargs)
        counts["generate"] += clock() - start
        return result

    return wrapper


class Paced(TrainerCallback):
    """Lets a trainer make its next step when a message comes, and ends the training when none will come."""

    def __init__(self, channel: Any, counts: dict[str, Any]):
        self.channel, self.counts = channel, counts
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.channel.send(seconds=clock() - self.start, peak_bytes=peak_bytes(), **self.counts)
        self.counts.update(tokens=0, generate=0.0)
        self._wait(control)

    def _wait(self, control: Any) -> None:
        if self.channel.receive() is None:
            control.should_training_stop = True
        self.start = clock()


# -- the learner alone -------------------------------------------------------------------------------------------------


def learner(channel: Any, *, side: str, model: str, batch: str, options: dict[str, Any]) -> None:
    """Take loss and gradient of one batch per message; tell what it took.

    Args:
        batch: Safetensors file: "prompt" [P], "completions" [B, T] padded with 0, "lengths" [B], "advantages" [B].
    """
    trainer = make_trainer(side, model=model, prompts=["a"], reward=lambda ids, **_: [0.0] * len(ids), options=options)
    trainer.current_gradient_accumulation_steps = 1
    wrapped = trainer.accelerator.prepare_model(trainer.model)
    wrapped.train()
    inputs = INPUTS[side]({name: value.to(trainer.args.device) for name, value in load_file(batch).items()})
    while channel.receive() is not None:
        start = clock()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(wrapped, inputs)
        trainer.accelerator.backward(loss)
        seconds = clock() - start
        norm = torch.nn.utils.get_total_norm([p.grad for p in wrapped.parameters() if p.grad is not None])
        wrapped.zero_grad()
        channel.send(seconds=seconds, peak_bytes=peak_bytes(), loss=loss.item(), gradient_norm=norm.item())


def gmpo_inputs(rows: dict[str, Tensor]) -> Any:
    from gmpo.objective.inputs import Denominators
    from gmpo.trainer import MicroBatch
    from gmpo.types import Batch

    lengths, completions = rows["lengths"], rows["completions"]
    batch = Batch(
        prompt_ids=[rows["prompt"]] * len(lengths),
        completion_ids=completions,
        lengths=lengths,
        mask=torch.arange(completions.shape[1], device=lengths.device) < lengths[:, None],
        num_written=lengths,
        advantages=rows["advantages"],
        group=torch.zeros_like(lengths),
    )
    tokens = float(lengths.sum())
    return MicroBatch(batch, Denominators(len(lengths), tokens, tokens, 1, completions.shape[1]))


def peer_inputs(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    lengths, completions = rows["lengths"], rows["completions"]
    prompts = rows["prompt"].expand(len(lengths), -1)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": (torch.arange(completions.shape[1], device=lengths.device) < lengths[:, None]).long(),
        "advantages": rows["advantages"],
        "num_items_in_batch": lengths.sum(),
    }


INPUTS = {"gmpo": gmpo_inputs, "peer": peer_inputs}


# -- clock and memory --------------------------------------------------------------------------------------------------


def clock() -> float:
    """Seconds, when everything asked of the device so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """The most memory so far: allocated on the GPU, or resident of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
