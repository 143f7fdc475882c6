"""vLLM's LLM in this process: what it is started with, and how it is ended."""

import copy
import dataclasses
import inspect
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo import distributed
from gmpo.option import advice
from gmpo.rollout.exactness import computing_dtype
from gmpo.rollout.generation_mode import Autocast
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.inside.names import BACKEND, CPU_BLOCK
from gmpo.rollout.vllm.inside.worker import register
from gmpo.rollout.vllm.sampling import GRAMMAR, VllmSampling
from gmpo.rollout.weights.named import check_publishable
from gmpo.unwrap import without_adapter

if TYPE_CHECKING:
    from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue] (an extra)

# Options that gmpo sets itself.
OURS = (
    "model",
    "tokenizer",
    "load_format",
    "weight_transfer_config",
    "logprobs_mode",
    "return_sampling_mask",
    "distributed_executor_backend",
)
OPTIONS = {  # vLLM's name -> ours
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "max_model_len": "vllm_max_model_length",
    "enable_sleep_mode": "vllm_enable_sleep_mode",
    "model_impl": "vllm_model_impl",
}
# Read in parts, a prompt makes vLLM take back random numbers, which fails on CPUs.
ON_CPUS = {"enable_chunked_prefill": False, "block_size": CPU_BLOCK}


@dataclasses.dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of other stages that an engine in this process must share."""

    seed: int = 0
    trust_remote_code: bool = False
    float32_head: bool = False  # the trainer computes logits in float32


def start_engine(
    settings: RolloutSettings,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    run: RunOptions,
    sampling: VllmSampling,
    folder: str,
    dtype: torch.dtype,
) -> "LLM":
    """Start vLLM in this process, for the architecture of `policy`, with random weights.

    Args:
        settings: The vllm_* options.
        policy: For its architecture.
        tokenizer: For stop strings, and regular expressions.
        run: Options of other stages.
        sampling: For what the engine must report.
        folder: Gets the model's config and tokenizer, which is all that vLLM reads from disk.
        dtype: The precision of the engine.
    """
    check_ranks(settings.vllm_tensor_parallel_size)
    with distributed.raise_on_all_ranks("prepare a vLLM engine"):
        check_publishable(policy)
        save_config(policy, folder)
        tokenizer.save_pretrained(folder)

    # vLLM reads these when it is imported: the engine must run in this process, not in another.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with preserve_rng():
        try:
            from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue] (an extra)
        except ImportError as error:
            raise ImportError(
                f"use_vllm=True needs vLLM: pip install 'gmpo[vllm]' ({error})."
            ) from None

        extra = engine_kwargs(settings)
        check_known(extra, LLM)
        check_values(sampling)
        register()
        arguments = engine_arguments(
            settings, policy, run=run, sampling=sampling, folder=folder, dtype=dtype
        )
        return LLM(**arguments)


def save_config(policy: PreTrainedModel, folder: str) -> None:
    """Save the policy's config as the config of a model with the weights to be published.

    They are dequantised, so that vLLM must not expect quantised ones.
    """
    config = copy.deepcopy(without_adapter(policy).config)
    vars(config).pop("quantization_config", None)
    config.save_pretrained(folder)


def engine_kwargs(settings: RolloutSettings) -> dict[str, Any]:
    """Return the user's further keywords of vLLM's LLM."""
    given = settings.vllm_engine_kwargs
    assert not isinstance(given, str)  # the config has parsed it
    return dict(given or {})


def check_known(options: dict[str, Any], llm: Callable[..., Any]) -> None:
    """Raise a ValueError for an engine option that vLLM does not have."""
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    known |= set(inspect.signature(llm).parameters)
    for name in options:
        if name not in known:
            raise ValueError(
                f"vllm_engine_kwargs has {name!r}, which vLLM does not know.{advice(name, known)}"
            )


def check_values(sampling: VllmSampling) -> None:
    """Raise a ValueError for a sampling option that vLLM refuses, before it is started."""
    from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue] (an extra)

    options = {name: value for name, value in sampling.options.items() if name != GRAMMAR}
    try:
        SamplingParams(**options)
    except Exception as error:  # vLLM has its own kinds
        raise ValueError(
            f"vLLM refuses the sampling options {options}: {error} Change generation_kwargs."
        ) from None


def check_ranks(tensor_parallel_size: int) -> None:
    """Raise a ValueError if groups of this size don't use up the ranks."""
    ranks = distributed.world_size()
    if ranks % tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size={tensor_parallel_size} does not divide the {ranks} ranks "
            "that train. Use a divisor of their number."
        )


def engine_arguments(
    settings: RolloutSettings,
    policy: PreTrainedModel,
    *,
    run: RunOptions,
    sampling: VllmSampling,
    folder: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the keywords for vLLM's LLM; vllm_engine_kwargs wins.

    Raises:
        ValueError: vllm_engine_kwargs has something that gmpo sets itself, or that another option
            says.
    """
    extra = engine_kwargs(settings)
    for name in extra:
        if name in OURS:
            raise ValueError(f"vllm_engine_kwargs has {name!r}, which gmpo sets itself. Remove it.")
        if name in OPTIONS:
            raise ValueError(
                f"vllm_engine_kwargs has {name!r}: use the option {OPTIONS[name]} for it."
            )

    overrides = dict(extra.pop("hf_overrides", {}))
    if run.float32_head:
        overrides.setdefault("head_dtype", "float32")

    several_ranks = distributed.world_size() > 1
    on_cpu = without_adapter(policy).device.type == "cpu"
    return {
        **(ON_CPUS if on_cpu else {}),
        **{name: getattr(settings, ours) for name, ours in OPTIONS.items()},
        "model": folder,
        "load_format": "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "weight_transfer_config": {"backend": BACKEND},
        **sampling.reports,
        "distributed_executor_backend": "external_launcher" if several_ranks else "uni",
        "trust_remote_code": run.trust_remote_code,
        "seed": run.seed,
        "hf_overrides": overrides,
        **extra,
    }


def engine_dtype(
    settings: RolloutSettings, policy: PreTrainedModel, autocast: Autocast | None
) -> torch.dtype:
    """Return the engine's precision: as the user says, else as the trainer computes."""
    wanted = engine_kwargs(settings).get("dtype", "auto")
    if wanted == "auto":
        return computing_dtype(policy, autocast)
    return {"half": torch.float16, "float": torch.float32}.get(wanted) or getattr(torch, wanted)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Keep the trainer's random numbers and threads, whatever vLLM seeds and rewires."""
    threads, python, array = torch.set_num_threads, random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_num_threads = threads  # vLLM puts its own function in the place of torch's
        random.setstate(python)
        np.random.set_state(array)


def stop_engine(llm: "LLM", *, keep_group: bool) -> None:
    """End the engine and the groups of ranks that it made.

    Args:
        keep_group: Keep the group of all ranks, which vLLM would destroy, too.
    """
    destroy = torch.distributed.destroy_process_group

    def destroy_others(group: torch.distributed.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    # vLLM destroys the default group, which is the trainer's: torch's function is replaced.
    if keep_group:
        torch.distributed.destroy_process_group = destroy_others
    try:
        llm.llm_engine.engine_core.shutdown()
    finally:
        torch.distributed.destroy_process_group = destroy
