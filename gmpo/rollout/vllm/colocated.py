"""vLLM in the training process: one engine per rank, or per group of ranks that share it."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo import distributed
from gmpo.distributed import raise_on_all_ranks
from gmpo.rollout.engine import Completion, Request, Sampling, Work
from gmpo.rollout.exactness import ExactnessCheck, prompt_logps
from gmpo.rollout.generation_mode import Autocast
from gmpo.rollout.sampling import sampling_from
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.llm import (
    RunOptions,
    engine_dtype,
    engine_kwargs,
    preserve_rng,
    start_engine,
    stop_engine,
)
from gmpo.rollout.vllm.sampling import (
    GRAMMAR,
    GREEDY,
    VllmSampling,
    check_room,
    completion,
    request_options,
    vllm_sampling,
)
from gmpo.rollout.vllm.transfer.carriers import ByReference
from gmpo.rollout.vllm.transfer.send import new_run, policy_weights, send
from gmpo.rollout.weights.adapters import (
    adapter_state,
    adapter_unsupported_reason,
    write_adapter,
)
from gmpo.rollout.weights.named import description

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams  # pyright: ignore[reportAttributeAccessIssue] (an extra)
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

REMEDY = "Raise vllm_max_model_length"


class ColocatedEngine:
    """Makes completions with vLLM in this process.

    The engine starts with random weights and gets all of its weights from the trainer, so that it
    never computes with others.  After the first publication, its log-probs are compared with the
    trainer's.

    Args:
        settings: The vllm_* options.
        policy: Gives the trainer's model as it is now, without wrappers but PEFT's.
        tokenizer: For stop strings, and regular expressions.
        eos: Tokens that end a completion.
        autocast: Makes the context of mixed precision, if the trainer computes in it.
        run_options: Options of other stages that the engine must share.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: vllm_tensor_parallel_size does not divide the ranks.
    """

    overlaps = False  # the engine and the trainer share a GPU, and vLLM rewires this process

    def __init__(
        self,
        settings: RolloutSettings,
        policy: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos: Sequence[int],
        autocast: Autocast | None = None,
        run_options: RunOptions | None = None,
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.eos = tuple(eos)
        self._folder = tempfile.TemporaryDirectory(prefix="gmpo-vllm-", ignore_cleanup_errors=True)
        self.folder = self._folder.name

        # If the ranks have a group already, it is the trainer's, and stays when the engine ends.
        self.joined_group = torch.distributed.is_initialized()
        self.dtype = engine_dtype(settings, policy(), autocast)
        # The engine is started for what the log-probs of training need.
        sampling = self._sampling(sampling_from(settings))
        self.reports = sampling.reports
        self.llm: LLM | None = start_engine(
            settings,
            policy(),
            tokenizer,
            run=run_options or RunOptions(),
            sampling=sampling,
            folder=self.folder,
            dtype=self.dtype,
        )

        self.run = new_run()
        self.version: int | None = None  # the engine's; None if its weights are of no use
        self.base_published = False
        self.adapter: LoRARequest | None = None
        self.takes_adapters = bool(engine_kwargs(settings).get("enable_lora"))
        self.sleeping: set[str] = set()  # parts of the engine's memory that are given away
        self.forgotten: int | None = None  # version of the weights that sleep has thrown away
        self.used_again = False  # the weights are those that sleep had thrown away
        self.scale = 1.0
        self.check: ExactnessCheck | None = ExactnessCheck(
            policy,
            tokenizer,
            autocast=autocast,
            tolerance=settings.vllm_publication_tolerance,
            longest=self.longest - 1,
        )
        self.receiver = LocalReceiver(self.llm)
        self.receiver.init_weight_transfer_engine({"model": description(policy())})

    @property
    def open_llm(self) -> "LLM":
        """Return vLLM's engine, which `close` takes away."""
        if self.llm is None:
            raise RuntimeError("This engine is closed. Make a new trainer.")
        return self.llm

    @property
    def longest(self) -> int:
        """Return how many tokens a sequence can have."""
        return self.open_llm.llm_engine.model_config.max_model_len

    # -- weights -----------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """Give the engine the policy's weights, if `version` is another than it has.

        Every rank must call.

        Raises:
            VllmError: On every rank, if it failed, or vLLM does not compute what is trained.
        """
        if version == self.version:
            return
        self.version = None
        self.used_again = version == self.forgotten
        with raise_on_all_ranks("wake the vLLM engine"):
            self._wake("weights")

        tag = f"{self.run}:{version}"
        if self.takes_adapters and adapter_unsupported_reason(self.policy()) is None:
            self._publish_adapter(tag, version)
        else:
            self._publish_weights(tag, merge=True)

        with raise_on_all_ranks("empty vLLM's prefix cache"):
            # Nothing is being generated, so nothing can hold on to it.
            assert self.open_llm.reset_prefix_cache(), "vLLM did not empty its prefix cache."
            if self.check is not None:
                self._wake("kv_cache")

        if self.check is not None:
            self.check.run([self._score], self.dtype)
            self.check = None
        self.version = version

    def _publish_weights(self, tag: str, *, merge: bool) -> None:
        weights = policy_weights(self.policy, merge=merge, dtype=self.dtype)
        send(ByReference(self.receiver), weights, tag=tag)

    def _publish_adapter(self, tag: str, version: int) -> None:
        if not self.base_published:
            self._publish_weights(tag, merge=False)
            self.base_published = True

        state = adapter_state(self.policy())
        with raise_on_all_ranks("publish the policy's adapter"):
            folder = os.path.join(self.folder, f"adapter-{version}")
            os.makedirs(folder)
            write_adapter(self.policy(), state, folder)
            self._exchange_adapter(tag, f"gmpo-{version}", folder)
            shutil.rmtree(folder)

    def _exchange_adapter(self, tag: str, name: str, folder: str) -> None:
        from vllm.lora.request import LoRARequest

        previous = self.adapter
        number = 1 if previous is None else previous.lora_int_id + 1
        adapter = LoRARequest(name, number, folder)
        self.open_llm.llm_engine.add_lora(adapter)
        self.open_llm.update_weight_version(tag)
        self.adapter = adapter
        if previous is not None:
            self.open_llm.llm_engine.remove_lora(previous.lora_int_id)

    def _score(self, ids: list[int]) -> list[float]:
        from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue] (an extra)

        wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, **GREEDY)
        (output,) = self._run([ids], [wanted])
        assert output.prompt_logprobs is not None
        return prompt_logps(output.prompt_logprobs, ids, lambda report: report.logprob)

    # -- completions -------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Return `count` completions for each request; each prompt is read once.

        Every rank must call.
        """
        mine, everything = self._requests_of_group(requests)
        options = self._sampling(sampling)
        check_room(everything, options.options, self.longest, remedy=REMEDY)

        self._wake("weights", "kv_cache")
        self._scale_logits(options.logits_scale)
        outputs: list[RequestOutput] = []
        if everything:
            prompts = [request.context for request in everything]
            outputs = self._run(prompts, self._params(everything, options))
        if self.settings.vllm_enable_sleep_mode:
            self._sleep()

        report, token_sets = self._reported(options)
        return [
            checked_completions(output, report=report, token_sets=token_sets)
            for output in outputs[mine]
        ]

    def serve(self, work: Work, sampling: Sampling) -> None:
        """Serve until there is no more work.  Samples join vLLM's batch and leave it one by one.

        Raises:
            VllmError: vLLM gave up on a sample, or it can't be trained on.
            ValueError: A request does not fit, or ranks share this engine.
        """
        if self.settings.vllm_tensor_parallel_size > 1:
            raise ValueError(
                "Ranks that share an engine (vllm_tensor_parallel_size > 1) must all know what is "
                "asked for, and can't serve requests as they come. Use vllm_mode='server'."
            )
        options = self._sampling(sampling)
        self._wake("weights", "kv_cache")
        self._scale_logits(options.logits_scale)
        batch = Batch(self.open_llm.llm_engine, self.adapter)
        try:
            self._serve(work, options, batch)
        finally:
            batch.abort()
            if self.settings.vllm_enable_sleep_mode:
                self._sleep()

    def _serve(self, work: Work, options: VllmSampling, batch: "Batch") -> None:
        llm_engine = self.open_llm.llm_engine
        most = llm_engine.vllm_config.scheduler_config.max_num_seqs
        report, token_sets = self._reported(options)
        over = False
        while batch.samples or not over:
            room = most - len(batch.samples)
            if room > 0 and not over:
                taken = work.take(room, wait=not batch.samples)
                over = taken is None
                for request in taken or ():
                    check_room([request], options.options, self.longest, remedy=REMEDY)
                    batch.add(request, self._params(single_samples(request), options))

            for request, number, output in batch.step():
                (completion,) = checked_completions(output, report=report, token_sets=token_sets)
                work.give(request, number, completion)

    def close(self) -> None:
        """Free what the engine holds."""
        if self.llm is not None:
            stop_engine(self.llm, keep_group=self.joined_group)
            self.llm = None
        self._folder.cleanup()

    def _sampling(self, sampling: Sampling) -> VllmSampling:
        regex = self.settings.vllm_structured_outputs_regex
        return vllm_sampling(sampling, eos=self.eos, regex=regex)

    def _reported(self, options: VllmSampling) -> tuple[bool, bool]:
        """Return whether to use the engine's log-probs, and its sets of tokens."""
        token_sets = self.reports["return_sampling_mask"]
        report = options.is_reported(self.reports["logprobs_mode"], token_sets=token_sets)
        return report, token_sets and report

    def _params(
        self, requests: Sequence[Request], sampling: VllmSampling
    ) -> list["SamplingParams"]:
        token_sets = self.reports["return_sampling_mask"]
        options = sampling.for_engine(scaled_logits=True, token_sets=token_sets)
        return sampling_params(requests, options)

    def _run(
        self, prompts: Iterable[list[int]], params: Sequence["SamplingParams"]
    ) -> list["RequestOutput"]:
        """Complete prompts of token ids, in their order."""
        inputs: Any = [{"prompt_token_ids": ids} for ids in prompts]
        with preserve_rng():
            return self.open_llm.generate(inputs, params, use_tqdm=False, lora_request=self.adapter)

    def _requests_of_group(self, requests: Sequence[Request]) -> tuple[slice, list[Request]]:
        """Return which requests are this rank's, among those of all ranks that share its engine.

        Example:
            Engines for 2 ranks each.  Ranks 2 and 3 have requests [a] and [b, c]: rank 2 gets
            slice(0, 1) of [a, b, c], and rank 3 slice(1, 3).
        """
        size = self.settings.vllm_tensor_parallel_size
        if size == 1:
            return slice(None), list(requests)

        leader = distributed.rank() // size * size
        lists = distributed.all_gather_objects(list(requests))[leader : leader + size]
        before = sum(len(part) for part in lists[: distributed.rank() - leader])
        everything = [request for part in lists for request in part]
        return slice(before, before + len(requests)), everything

    def _scale_logits(self, scale: float) -> None:
        if scale != self.scale:
            self.receiver.init_weight_transfer_engine({"logits_scale": scale})
            self.scale = scale

    # -- sleep -------------------------------------------------------------------------------------

    def _sleep(self) -> None:
        """Give the engine's memory to the trainer.

        Whole weights are thrown away, since they are published again anyway, unless they were used
        again before, as in an evaluation of many batches.  Those below adapters are kept, too.
        """
        kept = self.adapter is not None or self.used_again
        self.open_llm.sleep(level=1 if kept else 2)
        self.sleeping = {"weights", "kv_cache"}
        if not kept:
            self.forgotten, self.version = self.version, None

    def _wake(self, *parts: str) -> None:
        due = [part for part in parts if part in self.sleeping]
        if due:
            self.open_llm.wake_up(tags=due)
            self.sleeping -= set(due)


class LocalReceiver:
    """vLLM's LLM as a receiver of weights."""

    def __init__(self, llm: "LLM") -> None:
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


# -- requests and answers, in vLLM's words ---------------------------------------------------------


def sampling_params(requests: Sequence[Request], options: dict[str, Any]) -> list["SamplingParams"]:
    """Return vLLM's options for each request.

    Args:
        requests: For counts and seeds.
        options: What they share.
    """
    from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue] (an extra)
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    # One answer for each request, when all of its samples are finished.
    options = {**options, "output_kind": RequestOutputKind.FINAL_ONLY}
    grammar = options.get(GRAMMAR)
    if isinstance(grammar, dict):
        options[GRAMMAR] = StructuredOutputsParams(**grammar)

    return [SamplingParams(**request_options(request, options)) for request in requests]


def single_samples(request: Request) -> list[Request]:
    """Return a request for each sample, with the seed that it has among the others."""
    return [
        replace(request, count=1, first=request.first + number) for number in range(request.count)
    ]


class Batch:
    """The samples that vLLM is writing.

    Args:
        llm_engine: vLLM's.
        adapter: The adapter that writes them.
    """

    def __init__(self, llm_engine: "LLMEngine", adapter: "LoRARequest | None") -> None:
        self.llm_engine = llm_engine
        self.adapter = adapter
        self.samples: dict[str, tuple[Request, int]] = {}  # by vLLM's name for them
        self.names = itertools.count()

    def add(self, request: Request, params: Sequence["SamplingParams"]) -> None:
        """Let the samples of a request join, each with its own options."""
        prompt: Any = {"prompt_token_ids": request.context}
        with preserve_rng():
            for number, own in enumerate(params):
                name = f"gmpo-{next(self.names)}"
                self.llm_engine.add_request(name, prompt, own, lora_request=self.adapter)
                self.samples[name] = (request, number)

    def step(self) -> list[tuple[Request, int, "RequestOutput"]]:
        """Write a token of each sample, and return those that are finished by it."""
        if not self.samples:
            return []
        with preserve_rng():
            outputs: list[Any] = self.llm_engine.step()
        finished = [output for output in outputs if output.finished]
        return [(*self.samples.pop(output.request_id), output) for output in finished]

    def abort(self) -> None:
        """End the samples that are left."""
        if self.samples:
            self.llm_engine.abort_request(list(self.samples))
            self.samples = {}


def checked_completions(
    output: "RequestOutput", *, report: bool, token_sets: bool
) -> list[Completion]:
    """Return the samples of one request.

    Raises:
        VllmError: One can't be trained on.
    """
    try:
        return completions(output, report=report, token_sets=token_sets)
    except ValueError as error:
        raise VllmError(f"vLLM returned a malformed completion: {error}.") from None


def completions(output: "RequestOutput", *, report: bool, token_sets: bool) -> list[Completion]:
    """Return the samples of one request, in their order.

    Args:
        output: vLLM's.
        report: With the log-probs that vLLM gives.
        token_sets: And the tokens that each token was drawn from.

    Raises:
        ValueError: One can't be trained on.
    """
    result = []
    for sample in sorted(output.outputs, key=lambda sample: sample.index):
        steps = zip(sample.logprobs or (), sample.token_ids, strict=True)
        logps = [step[token].logprob for step, token in steps]
        kept = None
        if token_sets:
            kept = [] if sample.sampling_mask is None else sample.sampling_mask.token_ids
        result.append(
            completion(sample.token_ids, sample.finish_reason, logps, report=report, kept=kept)
        )
    return result
