"""vLLM behind one or several servers."""

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo import distributed
from gmpo.distributed import RankError, raise_on_all_ranks
from gmpo.rollout.engine import Completion, Request, Sampling, Work
from gmpo.rollout.exactness import ExactnessCheck, prompt_logps
from gmpo.rollout.generation_mode import Autocast
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.http.client import Client
from gmpo.rollout.vllm.http.fleet import Fleet
from gmpo.rollout.vllm.http.pull import Homes, Puller
from gmpo.rollout.vllm.http.samples import finished_samples
from gmpo.rollout.vllm.sampling import (
    GREEDY,
    VllmSampling,
    check_room,
    request_options,
    vllm_sampling,
)
from gmpo.rollout.vllm.transfer.carriers import (
    ByFile,
    ByNccl,
    Carrier,
    NamedTensor,
    TrainerEngine,
)
from gmpo.rollout.vllm.transfer.folder import ExchangeFolder
from gmpo.rollout.vllm.transfer.nccl import WeightSource, own_host, trainer_engine
from gmpo.rollout.vllm.transfer.send import new_run, policy_weights, send
from gmpo.rollout.weights.adapters import (
    adapter_state,
    adapter_unsupported_reason,
    write_adapter,
)
from gmpo.rollout.weights.named import check_publishable, description

logger = logging.getLogger(__name__)

AT_A_TIME = 64  # requests of one rank
INCIDENTS = 3  # losses of a server in one collection that are waited for

Samples = list[list[Completion | None]]  # by request; None for a sample that has not come


class ServerEngine:
    """Makes completions with vLLM servers, to which every rank sends its requests.

    Rank 0 gives the servers their weights.  The first time it makes them forget what they have, and
    compares their log-probs with the trainer's afterwards.  Every answer says which weights wrote
    it.

    Args:
        settings: The vllm_* options.
        policy: Gives the trainer's model as it is now, without wrappers but PEFT's.
        tokenizer: For the text of the check.
        eos: Tokens that end a completion.
        autocast: Makes the context of mixed precision, if the trainer computes in it.

    Raises:
        VllmError: On every rank, if a server does not come within vllm_server_timeout, or can't be
            used.
    """

    overlaps = True  # the servers have copies of the weights, and this process only waits

    def __init__(
        self,
        settings: RolloutSettings,
        policy: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos: Sequence[int],
        autocast: Autocast | None = None,
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.eos = tuple(eos)
        self.leads = distributed.rank() == 0
        self.run = distributed.all_gather_objects(new_run())[0]
        self.fleet = Fleet.of(settings)
        self.folder = ExchangeFolder(settings.vllm_weight_folder)
        self.wanted = 0  # version of the weights that the next completions must come from
        self._connect(settings.vllm_server_timeout)
        self.check = partial(
            ExactnessCheck,
            policy,
            tokenizer,
            autocast=autocast,
            tolerance=settings.vllm_publication_tolerance,
        )

    def _connect(self, seconds: float) -> None:
        """Find the servers; they have no weights of ours then.  Every rank must call."""
        with raise_on_all_ranks("reach the vLLM server"):
            check_publishable(self.policy())
            self.fleet.connect(seconds)
            if self.leads and self.fleet.is_ours:
                self.fleet.init_weight_transfer_engine(
                    {"model": description(self.policy()), "logits_scale": 1.0}
                )

        self.version: int | None = None  # the servers' own
        self.checked = False  # they compute what is trained
        self.scale = 1.0
        self.base_published = False
        self.adapter: str | None = None  # its name on the servers
        self.adapter_folder: Path | None = None
        self.carrier: Carrier | None = None

    # -- weights -----------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """Give the servers the policy's weights, if `version` is another than they have.

        Every rank must call.

        Raises:
            VllmError: On every rank, if it failed, or vLLM does not compute what is trained.
        """
        self.wanted = version
        self._persist(lambda: None)

    def _persist(self, work: Callable[[], None]) -> None:
        """Run `work` on servers that have the wanted weights.

        If a server is lost and reconnects, publish the weights again and retry.  Every rank must
        call.
        """
        for incident in range(INCIDENTS + 1):
            try:
                if self.version != self.wanted:
                    self._publish(self.wanted)
                return work()
            except (VllmError, RankError) as error:
                patience = self.settings.vllm_server_reconnect
                if not error.lost or not patience or incident == INCIDENTS:
                    raise
                logger.warning("%s Waiting up to %g seconds.", error, patience)

            self.close()
            self._connect(self.settings.vllm_server_reconnect)
            logger.warning("The vLLM server is back.")

    def _publish(self, version: int) -> None:
        if self.version is not None:
            self._see_that_they_are_the_same()
        self.version = None

        tag = f"{self.run}:{version}"
        if not self.checked:
            self._forget()
        if self.fleet.facts[0].takes_adapters and adapter_unsupported_reason(self.policy()) is None:
            self._publish_adapter(tag, version)
        else:
            self._publish_weights(tag, merge=True)

        if not self.checked:
            clients = self.fleet.clients if self.leads else []
            check = self.check(longest=self.fleet.longest - 1)
            check.run([partial(self._score, client) for client in clients], self.dtype)
            self.checked = True
        self.version = version

    @property
    def dtype(self) -> torch.dtype:
        """Return the servers' precision."""
        return getattr(torch, self.fleet.facts[0].dtype)

    @property
    def tag(self) -> str:
        """Return the servers' name for the weights that they have."""
        return f"{self.run}:{self.version}"

    def _see_that_they_are_the_same(self) -> None:
        """Raise a VllmError if a server was started again.

        It has lost more than its weights: the scale of its logits, the base model.
        """
        with raise_on_all_ranks("find the vLLM servers as they were"):
            if self.leads:
                self.fleet.each(
                    lambda client: self._check_version(client, {client.weight_version()})
                )

    def _forget(self) -> None:
        with raise_on_all_ranks("make the vLLM server forget its weights"):
            if self.leads:
                self.fleet.each(lambda client: client.zero_weights())

    def _publish_weights(self, tag: str, *, merge: bool) -> None:
        if self.carrier is None:
            self.carrier = self._make_carrier(merge)
        self.fleet.tag = tag
        weights = policy_weights(self.policy, merge=merge, dtype=self.dtype)
        send(self.carrier if self.leads else None, weights, tag=tag)

    def _make_carrier(self, merge: bool) -> Carrier:
        """Choose how weights travel.  Every rank must call, since NCCL must know all shapes."""
        on_gpus = torch.cuda.is_available() and self.fleet.facts[0].device == "cuda"
        over_nccl = self.settings.vllm_weight_transfer == "nccl" or not self.fleet.is_ours
        if not (over_nccl or (self.settings.vllm_weight_transfer == "auto" and on_gpus)):
            return ByFile(self.fleet, self.folder)
        if not on_gpus:
            raise VllmError(
                "Weights travel over NCCL from a GPU to GPUs. Set vllm_weight_transfer='file'."
            )

        weights = policy_weights(self.policy, merge=merge, dtype=self.dtype)
        names = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]

        def make(tensors: Iterable[NamedTensor]) -> TrainerEngine:
            return trainer_engine(
                WeightSource(names, tensors),
                receiver=self.fleet,
                join=self.fleet.join_nccl,
                workers=sum(facts.workers for facts in self.fleet.facts),
                host=own_host(self.fleet.clients[0].address),
                port=self.settings.vllm_group_port,
            )

        return ByNccl(make, timeout=self.settings.vllm_server_timeout)

    def _publish_adapter(self, tag: str, version: int) -> None:
        if not self.base_published:
            self._publish_weights(f"{tag}:base", merge=False)
            self.base_published = True

        state = adapter_state(self.policy())
        name = f"{self.run}-{version}"
        with raise_on_all_ranks("publish the policy's adapter"):
            if self.leads:
                folder = self.folder.subfolder(f"adapter-{version}")
                write_adapter(self.policy(), state, str(folder))
                self.folder.share(folder)
                self._exchange_adapter(name, folder, tag)
        self.adapter = name

    def _exchange_adapter(self, name: str, folder: Path, tag: str) -> None:
        previous = self.adapter

        def exchange(client: Client) -> None:
            client.load_adapter(name, str(folder))
            if previous is not None:
                client.unload_adapter(previous)
            client.set_version(tag)

        self.fleet.each(exchange)
        if self.adapter_folder is not None:
            shutil.rmtree(self.adapter_folder, ignore_errors=True)
        self.adapter_folder = folder  # a server may read it again

    def _score(self, client: Client, ids: list[int]) -> list[float]:
        reports = client.prompt_logprobs(ids, adapter=self.adapter, **GREEDY)
        tokens = [str(token) for token in ids]
        return prompt_logps(reports, tokens, lambda report: float(report["logprob"]))

    # -- completions -------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Return `count` completions for each request; each prompt is read once.

        Every rank must call.

        Raises:
            VllmError: On every rank, if a server failed, or answered from other weights than were
                published.
            ValueError: On every rank, if a request of this rank can't be asked for.
        """
        options = self._sampling(sampling)
        work = MissingSamples(requests)
        homes = Homes(self.fleet.clients, start=distributed.rank())

        def ask_for_missing() -> None:
            with raise_on_all_ranks("get completions from the vLLM server"):
                remedy = "Serve with a larger --max-model-len"
                check_room(requests, options.options, self.fleet.longest, remedy=remedy)
                work.look_again()
                self._pull(work, options, homes)

        self._persist(ask_for_missing)
        return work.completions()

    def serve(self, work: Work, sampling: Sampling) -> None:
        """Serve until there is no more work.

        Requests join as they come; those of one group go to one server, which keeps what it has
        read of them.  Holds no collective: it may run in a thread while the trainer learns.

        Raises:
            VllmError: A server failed, or answered from other weights than were published.
            ValueError: A request can't be asked for.
        """
        homes = Homes(self.fleet.clients, start=distributed.rank())
        self._pull(work, self._sampling(sampling), homes)

    def _sampling(self, sampling: Sampling) -> VllmSampling:
        regex = self.settings.vllm_structured_outputs_regex
        return vllm_sampling(sampling, eos=self.eos, regex=regex)

    def _scale_logits(self, options: VllmSampling) -> None:
        """Set the servers' logit scale (see `sampling`).

        Every rank sets the same one, so that no rank must wait for another to do it.
        """
        if self.fleet.is_ours and options.logits_scale != self.scale:
            self.fleet.init_weight_transfer_engine({"logits_scale": options.logits_scale})
            self.scale = options.logits_scale

    def _pull(self, work: Work, options: VllmSampling, homes: Homes) -> None:
        self._params(options)  # raises what is wrong with them before anything is asked for
        self._scale_logits(options)
        puller = Puller(
            work,
            partial(self._complete, options),
            homes,
            at_a_time=AT_A_TIME,
            samples_per_request=self.fleet.max_num_seqs,
        )
        puller.run(on_error=self._end_others)

    def _end_others(self, error: BaseException) -> None:
        """End the requests that still wait, unless their samples will be of use."""
        lost = getattr(error, "lost", False)
        if not lost or not self.settings.vllm_server_reconnect:
            for client in self.fleet.clients:
                client.channel.hang_up()

    def _params(self, options: VllmSampling) -> tuple[dict[str, Any], bool]:
        """Return the sampling options for these servers, and whether to use their log-probs.

        Raises:
            ValueError: The trainer needs log-probs that these servers don't report.
        """
        facts, ours = self.fleet.facts[0], self.fleet.is_ours
        params = options.for_engine(scaled_logits=ours, token_sets=facts.token_sets)
        report = options.is_reported(facts.logprobs_mode, token_sets=facts.token_sets)
        # Raw log-probs are from before the temperature, unless the logits are scaled for it.
        if not ours and facts.logprobs_mode == "raw_logprobs":
            report = report and options.temperature in (0.0, 1.0)
        return params, report

    def _complete(
        self, options: VllmSampling, client: Client, request: Request
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the number of each sample of a request, and the sample."""
        check_room(
            [request],
            options.options,
            self.fleet.longest,
            remedy="Serve with a larger --max-model-len",
        )
        params, report = self._params(options)
        token_sets = report and options.reports["return_sampling_mask"]
        parts = client.complete(
            {
                "token_ids": request.context,
                "model": self.adapter,
                "sampling_params": request_options(request, params),
            }
        )
        try:
            for number, sample in finished_samples(parts, request.count):
                completion = sample.finished(report=report, token_sets=token_sets)
                if sample.ids:
                    self._check_version(client, sample.versions)
                yield number, completion
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VllmError(
                f"{client.address} returned a malformed completion: {error!r}."
            ) from None

    def _check_version(self, client: Client, seen: set[str]) -> None:
        if seen != {self.tag}:
            raise VllmError(
                f"{client.address} answered from the weights {sorted(seen)}, not from "
                f"{self.tag!r}, which were published. Was it restarted, or does another run give "
                "it weights, too?",
                lost=True,
            )

    def close(self) -> None:
        """Leave the servers as they are."""
        self.folder.close()


class MissingSamples:
    """The samples of some requests that have not come yet, as work.

    Args:
        requests: All of them.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.samples: Samples = [[None] * request.count for request in requests]
        # Requests for what is missing, with the places where their samples belong.
        self.waiting: deque[Request] = deque()
        self.places: dict[int, tuple[list[Completion | None], int]] = {}

    def look_again(self) -> None:
        """Make requests for the samples that are missing now."""
        self.places = {}
        self.waiting = deque()
        for samples, request in zip(self.samples, self.requests, strict=True):
            for start, part in missing_parts(samples, request):
                self.waiting.append(part)
                self.places[id(part)] = (samples, start)

    def take(self, room: int, *, wait: bool) -> list[Request] | None:
        if not self.waiting:
            return None
        return [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]

    def give(self, request: Request, number: int, completion: Completion) -> None:
        samples, start = self.places[id(request)]
        samples[start + number] = completion

    def completions(self) -> list[list[Completion]]:
        """Return the samples of each request."""
        return [[sample for sample in samples if sample is not None] for samples in self.samples]


def missing_parts(
    samples: Sequence[Completion | None], request: Request
) -> Iterator[tuple[int, Request]]:
    """Yield requests for the samples that are missing, each with the place of its first one.

    Args:
        samples: Of the request, None where one is missing.
        request: For all of them.

    Example:
        A request for 6 samples from number 8 on, of which the third has come: (0, 2 from 8 on) and
        (3, 3 from 11 on).
    """
    start = 0
    while start < len(samples):
        end = start
        while end < len(samples) and samples[end] is None:
            end += 1
        if end > start:
            yield start, replace(request, count=end - start, first=request.first + start)
        start = end + 1
