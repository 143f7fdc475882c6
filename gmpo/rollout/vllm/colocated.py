"""vLLM in the training process: one engine per rank, or per group of ranks that share it by tensor parallelism."""

import dataclasses
import inspect
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gmpo import distributed
from gmpo.option import advice
from gmpo.rollout.engine import Completion, Request, Sampling
from gmpo.rollout.exactness import ExactnessCheck, computing_dtype, prompt_logps
from gmpo.rollout.generation_mode import Autocast
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.inside.worker import CPU_BLOCK, NAME, register
from gmpo.rollout.vllm.sampling import (
    VllmSampling,
    check_room,
    completion,
    engine_seed,
    vllm_sampling,
)
from gmpo.rollout.vllm.transfer.send import ByReference, new_run, policy_weights, send
from gmpo.rollout.weights.adapters import adapter_unsupported_reason, write_adapter
from gmpo.rollout.weights.named import description
from gmpo.unwrap import without_adapter


class ColocatedEngine:
    """Makes completions with vLLM in this process.

    The engine starts with random weights and gets all of its own from the trainer, so that it never computes with
    others; after the first publication, its log-probs are compared with the trainer's.

    Args:
        settings: vllm_* options; `seed`, `trust_remote_code` and `cast_lm_head_to_fp32` are read if there.
        policy: Gives the trainer's model as it is now, without wrappers but PEFT's.
        tokenizer: For stop strings, and regular expressions.
        eos: Tokens that end a completion.
        autocast: Makes the context of mixed precision, if the trainer computes in it.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: vllm_tensor_parallel_size does not divide the ranks.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        policy: Callable[[], Any],
        tokenizer: Any,
        *,
        eos: Sequence[int],
        autocast: Autocast | None = None,
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.eos = tuple(eos)
        self._folder = tempfile.TemporaryDirectory(prefix="gmpo-vllm-", ignore_cleanup_errors=True)
        self.folder = self._folder.name
        self.joined_group = (
            torch.distributed.is_initialized()
        )  # then the group of all ranks is the trainer's
        self.dtype = engine_dtype(settings, policy(), autocast)
        self.llm: Any = start(settings, policy(), tokenizer, folder=self.folder, dtype=self.dtype)
        self.run = new_run()
        self.version: int | None = None  # that the engine has; None: none that is of use
        self.base_published = False
        self.adapter: Any = None  # a LoRARequest
        self.takes_adapters = bool(self.engine_kwargs.get("enable_lora"))
        self.sleeping: set[str] = set()  # which parts of the engine's memory are given away
        self.scale = 1.0
        self.check: ExactnessCheck | None = ExactnessCheck(
            policy,
            tokenizer,
            autocast=autocast,
            tolerance=settings.vllm_publication_tolerance,
            longest=self.longest - 1,
        )
        self.receiver: Any = LocalReceiver(self.llm)
        self.receiver.init_weight_transfer_engine({"model": description(policy())})

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        return dict(self.settings.vllm_engine_kwargs or {})  # pyright: ignore

    @property
    def longest(self) -> int:
        return self.llm.llm_engine.model_config.max_model_len

    # -- weights ---------------------------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """Give the engine the policy's weights, if `version` is another than it has.  Every rank must call.

        Raises:
            VllmFault: On every rank, if it failed, or vLLM does not compute what is trained.
        """
        if version == self.version:
            return
        self._wake("weights")
        self.version = None
        tag = f"{self.run}:{version}"
        if self.takes_adapters and adapter_unsupported_reason(self.policy()) is None:
            self._publish_adapter(tag, version)
        else:
            self._publish_weights(tag, merge=True)
        if not self.llm.reset_prefix_cache():
            raise AssertionError(
                "vLLM holds on to its prefix cache although nothing is being generated."
            )
        if self.check is not None:
            self._wake("kv_cache")
            self.check.run([self._score], self.dtype)
            self.check = None
        self.version = version

    def _publish_weights(self, tag: str, *, merge: bool) -> None:
        weights = policy_weights(self.policy, merge=merge, dtype=self.dtype)
        send(ByReference(self.receiver), weights, tag=tag)

    def _publish_adapter(self, tag: str, version: int) -> None:
        from vllm.lora.request import LoRARequest

        if not self.base_published:
            self._publish_weights(tag, merge=False)
            self.base_published = True
        previous = self.adapter
        folder = os.path.join(self.folder, f"adapter-{version}")
        os.makedirs(folder)
        write_adapter(self.policy(), folder)
        number = 1 if previous is None else previous.lora_int_id + 1
        self.adapter = LoRARequest(f"gmpo-{version}", number, folder)
        self.llm.llm_engine.add_lora(self.adapter)
        self.llm.update_weight_version(tag)
        if previous is not None:
            self.llm.llm_engine.remove_lora(previous.lora_int_id)
        shutil.rmtree(folder)

    def _score(self, ids: list[int]) -> list[float]:
        from vllm import SamplingParams

        wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        (output,) = self._run([{"prompt_token_ids": ids}], [wanted])
        return prompt_logps(output.prompt_logprobs, ids, lambda report: report.logprob)

    # -- completions -----------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`count` completions for each request; each prompt is read once.  Every rank must call."""
        options = vllm_sampling(
            sampling, eos=self.eos, regex=self.settings.vllm_structured_outputs_regex
        )
        self._wake("weights", "kv_cache")
        mine, everything = self._requests_of_group(requests)
        check_room(everything, options.options, self.longest, remedy="Raise vllm_max_model_length")
        self._scale_logits(options.logits_scale)
        prompts = [{"prompt_token_ids": request.prompt.ids} for request in everything]
        outputs = self._run(prompts, sampling_params(everything, options)) if everything else []
        if self.settings.vllm_enable_sleep_mode:
            self._sleep()
        return [completions(output, report=not options.restricted) for output in outputs[mine]]

    def close(self) -> None:
        """Free what the engine holds."""
        if self.llm is not None:
            stop(self.llm, keep_group=self.joined_group)
            self.llm = None
            self.receiver = None
        self._folder.cleanup()

    def _run(self, prompts: list[Any], params: list[Any]) -> list[Any]:
        with preserve_rng():
            return self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.adapter)

    def _requests_of_group(self, requests: Sequence[Request]) -> tuple[slice, list[Request]]:
        """All requests of the ranks that share this engine, and which of them are this rank's."""
        size = self.settings.vllm_tensor_parallel_size
        if size == 1:
            return slice(None), list(requests)
        first = distributed.rank() // size * size
        lists = distributed.all_gather_objects(list(requests))[first : first + size]
        before = sum(len(part) for part in lists[: distributed.rank() - first])
        return slice(before, before + len(requests)), [
            request for part in lists for request in part
        ]

    def _scale_logits(self, scale: float) -> None:
        if scale != self.scale:
            self.receiver.init_weight_transfer_engine({"logits_scale": scale})
            self.scale = scale

    # -- sleep -----------------------------------------------------------------------------------------------------

    def _sleep(self) -> None:
        """Give the engine's memory to the trainer.  Whole weights come anew anyway; those below adapters are kept."""
        kept = self.adapter is not None
        self.llm.sleep(level=1 if kept else 2)
        self.sleeping = {"weights", "kv_cache"}
        if not kept:
            self.version = None

    def _wake(self, *parts: str) -> None:
        due = [part for part in parts if part in self.sleeping]
        if due:
            self.llm.wake_up(tags=due)
            self.sleeping -= set(due)


class LocalReceiver:
    """vLLM's LLM as a receiver of weights."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)

    def abandon(self) -> None:
        self.update_weights({"abort": "it failed"})


# -- starting and stopping vLLM --------------------------------------------------------------------------------------

ON_CPUS = {
    "enable_chunked_prefill": False,  # read in parts, a prompt makes vLLM take back random numbers, which fails there
    "block_size": CPU_BLOCK,
}
OURS = (
    "model",
    "tokenizer",
    "load_format",
    "weight_transfer_config",
    "logprobs_mode",
    "distributed_executor_backend",
)
OPTIONS = {  # vLLM's name -> ours
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "max_model_len": "vllm_max_model_length",
    "enable_sleep_mode": "vllm_enable_sleep_mode",
    "model_impl": "vllm_model_impl",
}


def start(
    settings: RolloutSettings, policy: Any, tokenizer: Any, *, folder: str, dtype: torch.dtype
) -> Any:
    """A vLLM engine in this process, for the architecture of `policy`, with random weights.

    Args:
        folder: Gets the model's config and tokenizer, which is all that vLLM reads from disk.
    """
    check_ranks(settings.vllm_tensor_parallel_size)
    without_adapter(policy).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, not in one of its own
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with preserve_rng():
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                f"use_vllm=True needs vLLM: pip install 'gmpo[vllm]' ({error})."
            ) from None

        check_known(settings.vllm_engine_kwargs or {}, LLM)  # pyright: ignore[reportArgumentType]
        register()
        return LLM(**engine_arguments(settings, policy, folder=folder, dtype=dtype))


def check_known(options: dict[str, Any], llm: Any) -> None:
    """Raise a ValueError for an engine option that vLLM does not have."""
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)} | {
        *inspect.signature(llm).parameters
    }
    for name in options:
        if name not in known:
            raise ValueError(
                f"vllm_engine_kwargs has {name!r}, which vLLM does not know.{advice(name, known)}"
            )


def check_ranks(tensor_parallel_size: int) -> None:
    if distributed.world_size() % tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size={tensor_parallel_size} does not divide the {distributed.world_size()} ranks "
            "that train. Use a divisor of their number."
        )


def engine_arguments(
    settings: RolloutSettings, policy: Any, *, folder: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Keywords for vLLM's LLM; vllm_engine_kwargs wins.

    Raises:
        ValueError: vllm_engine_kwargs has something that gmpo sets itself, or that another option says.
    """
    extra: dict[str, Any] = dict(settings.vllm_engine_kwargs or {})  # pyright: ignore
    for name in extra:
        if name in OURS:
            raise ValueError(f"vllm_engine_kwargs has {name!r}, which gmpo sets itself. Remove it.")
        if name in OPTIONS:
            raise ValueError(
                f"vllm_engine_kwargs has {name!r}: use the option {OPTIONS[name]} for it."
            )
    overrides = dict(extra.pop("hf_overrides", {}))
    if getattr(settings, "cast_lm_head_to_fp32", False):
        overrides.setdefault("head_dtype", "float32")
    on_cpu = without_adapter(policy).device.type == "cpu"
    return {
        **(ON_CPUS if on_cpu else {}),
        **{name: getattr(settings, ours) for name, ours in OPTIONS.items()},
        "model": folder,
        "load_format": "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "weight_transfer_config": {"backend": NAME},
        "logprobs_mode": "raw_logprobs",
        "distributed_executor_backend": "external_launcher"
        if distributed.world_size() > 1
        else "uni",
        "trust_remote_code": getattr(settings, "trust_remote_code", False),
        "seed": getattr(settings, "seed", 0),
        "hf_overrides": overrides,
        **extra,
    }


def engine_dtype(settings: RolloutSettings, policy: Any, autocast: Autocast | None) -> torch.dtype:
    """What the engine computes in: what the user says, else what the trainer computes in."""
    wanted = (settings.vllm_engine_kwargs or {}).get("dtype", "auto")  # pyright: ignore
    if wanted == "auto":
        return computing_dtype(policy, autocast)
    return {"half": torch.float16, "float": torch.float32}.get(wanted) or getattr(torch, wanted)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Within the block vLLM may seed and rewire what it likes; the trainer's random numbers and threads stay."""
    threads, python, array = torch.set_num_threads, random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    torch.set_num_threads = threads
    random.setstate(python)
    np.random.set_state(array)


def stop(llm: Any, *, keep_group: bool) -> None:
    """End the engine and the groups of ranks that it made; the group of all ranks too, unless it is to be kept."""
    destroy = torch.distributed.destroy_process_group
    if keep_group:
        torch.distributed.destroy_process_group = lambda group=None: (
            None if group is None else destroy(group)
        )
    try:
        llm.llm_engine.engine_core.shutdown()
    finally:
        torch.distributed.destroy_process_group = destroy


# -- requests and answers, in vLLM's words ---------------------------------------------------------------------------


def sampling_params(requests: Sequence[Request], sampling: VllmSampling) -> list[Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    options = sampling.on_scaled_logits()
    if isinstance(options.get("structured_outputs"), dict):
        options["structured_outputs"] = StructuredOutputsParams(**options["structured_outputs"])
    report = None if sampling.restricted else 0
    return [
        SamplingParams(**options, n=request.count, seed=engine_seed(request), logprobs=report)
        for request in requests
    ]


def completions(output: Any, *, report: bool) -> list[Completion]:
    return [
        completion(
            sample.token_ids,
            sample.finish_reason,
            [
                step[token].logprob
                for step, token in zip(sample.logprobs, sample.token_ids, strict=True)
            ]
            if report
            else None,
        )
        for sample in sorted(output.outputs, key=lambda sample: sample.index)
    ]
