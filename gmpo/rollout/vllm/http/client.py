"""One vLLM server: what it is, and the routes that gmpo uses."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.http.channel import HOW_TO_START, Channel

SUPPORTED = "0.32."
GENERATE = "/inference/v1/generate"
COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")  # of GET /metrics
# Tokens of a sample that are sent together: one by one they cost the server more than they tell.
STREAM_INTERVAL = 32
METRICS_TIMEOUT = 10.0  # seconds
MAX_NUM_SEQS = 128  # of a server that does not say; vLLM's smallest default
INCOMPLETE = "gmpo-incomplete"  # the version of weights while they are being replaced


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Facts of a server's engine that a trainer must know."""

    backend: str  # of its weight transfer
    logprobs_mode: str
    longest: int  # tokens of a sequence
    dtype: str
    device: str
    workers: int
    takes_adapters: bool
    max_num_seqs: int  # completions at a time, and per request
    token_sets: bool = False  # it reports which tokens it drew from

    def fits(self, other: "EngineFacts") -> bool:
        """Return whether one trainer can use both engines at the same time."""
        names = ("backend", "dtype", "device", "logprobs_mode", "token_sets")
        return all(getattr(self, name) == getattr(other, name) for name in names)


class Client:
    """A vLLM server; a `Receiver` of weights.

    Args:
        channel: The connection to it.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.address = channel.address

    # -- what is it? -------------------------------------------------------------------------------

    def facts(self) -> EngineFacts:
        """Return what the server says of itself.

        Raises:
            VllmError: Not vLLM, another version, a wrong token, or a server that can't be given
                weights.
        """
        answer = self.channel.get("/version")
        version = answer.get("version") if isinstance(answer, dict) else None
        if not isinstance(version, str):
            raise VllmError(f"What answers at {self.address} is not a vLLM server. {HOW_TO_START}.")
        if not version.startswith(SUPPORTED):
            raise VllmError(
                f"The server at {self.address} is vLLM {version}, and gmpo works with "
                f"{SUPPORTED}x. Install that one."
            )
        self.channel.get("/v1/models")  # a server with vLLM's own --api-key asks for it here
        facts = self._facts_from_worker() or self._facts_from_config()
        if facts.backend not in ("gmpo", "nccl"):
            raise VllmError(
                f"The server at {self.address} can't be given weights (its weight transfer is "
                f"{facts.backend!r}). {HOW_TO_START}."
            )
        return facts

    def _facts_from_worker(self) -> EngineFacts | None:
        """Return the facts from gmpo's worker extension, or None if the server has no such."""
        try:
            answer = self.channel.post("/collective_rpc", {"method": "gmpo_describe"})
            described = answer["results"][0]  # all workers say the same
            return EngineFacts(**described)
        except VllmError as error:
            if error.lost:
                raise
        except (KeyError, TypeError, ValueError, IndexError):
            pass
        return None

    def _facts_from_config(self) -> EngineFacts:
        """Return the facts from vLLM's own account of its configuration.

        It takes 10 seconds and more, since vLLM examines the machine for it.
        """
        try:
            config = self.channel.get("/server_info?config_format=json")["vllm_config"]
            model, transfer = config["model_config"], config["weight_transfer_config"] or {}
            scheduler = config.get("scheduler_config") or {}
            return EngineFacts(
                backend=str(transfer.get("backend")),
                logprobs_mode=model["logprobs_mode"],
                longest=model["max_model_len"],
                dtype=model["dtype"].removeprefix("torch."),
                device=str(config["device_config"]["device"]).split(":")[0],
                workers=self.channel.get("/get_world_size")["world_size"],
                takes_adapters=config["lora_config"] is not None,
                max_num_seqs=scheduler.get("max_num_seqs", MAX_NUM_SEQS),
                token_sets=bool(model.get("return_sampling_mask")),
            )
        except VllmError as error:
            if error.lost:
                raise
            reason: Exception = error
        except (KeyError, TypeError, AttributeError) as error:
            reason = error
        raise VllmError(
            f"The server at {self.address} can't be given weights ({reason}). {HOW_TO_START}."
        )

    # -- weights -----------------------------------------------------------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.channel.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin an update.

        Until it is finished the server generates nothing, and its version is INCOMPLETE.
        """
        self.channel.post("/pause?mode=abort")
        self.set_version(INCOMPLETE)
        try:
            self.channel.post("/start_weight_update")
        except VllmError as error:
            if "already" not in str(error):
                raise
            self.abandon()  # a trainer that has died since began it
            self.channel.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.channel.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.channel.post("/finish_weight_update", {})
        self.channel.post("/resume")
        self.reset_prefix_cache()
        if weight_version is not None:
            self.set_version(weight_version)

    def abandon(self) -> None:
        """End a broken update, so that the server takes a new one; its version stays INCOMPLETE."""
        with suppress(VllmError):
            self.update_weights({"abort": "the trainer has given it up"})

    def set_version(self, tag: str) -> None:
        self.channel.post("/update_weight_version", {"new_version": tag})

    def weight_version(self) -> str:
        """Return the last value of `set_version`, or vLLM's own if there was none."""
        answer = self.channel.get("/weight_info")
        return str(answer.get("weight_version")) if isinstance(answer, dict) else str(answer)

    def reset_prefix_cache(self) -> None:
        answer = self.channel.post("/reset_prefix_cache")
        if not (isinstance(answer, dict) and answer.get("success")):
            raise VllmError(
                f"The server at {self.address} did not empty its prefix cache. Does somebody else "
                "use it, too?"
            )

    def zero_weights(self) -> None:
        """Forget all weights, so that what a publication leaves out can't go unnoticed."""
        self.set_version(INCOMPLETE)
        self.channel.post("/weight_checker", {"action": "reset"})

    def load_adapter(self, name: str, folder: str) -> None:
        self._told("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload_adapter(self, name: str) -> None:
        self._told("/v1/unload_lora_adapter", {"lora_name": name})

    def _told(self, path: str, body: dict[str, Any]) -> None:
        """Make a call whose answer is a sentence, not JSON."""
        status, data = self.channel.exchange("POST", path, body)
        if status != 200:
            sentence = data[:400].decode("utf8", "replace")
            raise VllmError(f"POST {self.address}{path} was answered with {status}: {sentence}")

    # -- completions -------------------------------------------------------------------------------

    def complete(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield what is added to the completions of a request, a part of one sample at a time.

        Waits as long as the server works, on this request or on others that came before it.

        Raises:
            VllmError: The server is lost, or refuses the request.
        """
        counts: list[float | None] = [None]

        def works() -> bool:
            counts.append(self.tokens_processed())
            return counts[-1] is not None and counts[-1] != counts[-2]

        sampling = {**body["sampling_params"], "stream_interval": STREAM_INTERVAL}
        body = {**body, "sampling_params": sampling, "stream": True}
        events = self.channel.stream(GENERATE, body, works=works)
        for event in events:
            if not isinstance(event, dict) or not isinstance(event.get("choices"), list):
                raise VllmError(
                    f"{self.address} was asked for completions and answered {str(event)[:80]!r}."
                )
            yield from event["choices"]

    def tokens_processed(self) -> float | None:
        """Return how many tokens the server has read and written, or None if it does not tell."""
        try:
            status, data = self.channel.exchange("GET", "/metrics", timeout=METRICS_TIMEOUT)
        except VllmError:
            return None
        if status != 200:
            return None

        lines = data.decode("utf8", "replace").splitlines()
        values = [line.rpartition(" ")[2] for line in lines if line.startswith(COUNTERS)]
        try:
            return sum(map(float, values)) if values else None
        except ValueError:
            return None

    def prompt_logprobs(self, ids: list[int], *, adapter: str | None, **params: float) -> list[Any]:
        """Return vLLM's report of each token of a text: a table from token to report, or None.

        Args:
            ids: The text.
            adapter: Name of the adapter to apply; None for the model's own weights.
            params: Further sampling options.
        """
        sampling = {"max_tokens": 1, "prompt_logprobs": 0, **params}
        answer = self.channel.post(
            GENERATE, {"token_ids": ids, "model": adapter, "sampling_params": sampling}
        )
        reports = answer.get("prompt_logprobs") if isinstance(answer, dict) else None
        if not isinstance(reports, list) or len(reports) != len(ids):
            raise VllmError(
                f"{self.address} was asked for log-probs and answered {str(answer)[:80]!r}."
            )
        return reports
