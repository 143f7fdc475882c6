"""One vLLM server: what it is, and the routes that gmpo uses."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.http.channel import HOW_TO_START, Channel

SUPPORTED = "0.32."
INCOMPLETE = "gmpo-incomplete"  # the version of weights while they are being replaced


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a trainer must know of a server's engine."""

    backend: str  # of its weight transfer
    logprobs_mode: str
    longest: int  # tokens of a sequence
    dtype: str
    device: str
    workers: int
    takes_adapters: bool


class Client:
    """A vLLM server; a `Receiver` of weights.

    Args:
        channel: The way to it.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.address = channel.address

    # -- what is it? -----------------------------------------------------------------------------------------------

    def facts(self) -> EngineFacts:
        """What the server says of itself.

        Raises:
            VllmFault: Not vLLM, another version, a wrong token, or a server that can't be given weights.
        """
        answer = self.channel.get("/version")
        version = answer.get("version") if isinstance(answer, dict) else None
        if not isinstance(version, str):
            raise VllmError(f"What answers at {self.address} is not a vLLM server. {HOW_TO_START}.")
        if not version.startswith(SUPPORTED):
            raise VllmError(
                f"The server at {self.address} is vLLM {version}, and gmpo works with {SUPPORTED}x. Install that one."
            )
        self.channel.get("/v1/models")  # a server with vLLM's own --api-key asks for it here
        facts = self._facts_from_worker() or self._facts_from_config()
        if facts.backend not in ("gmpo", "nccl"):
            raise VllmError(
                f"The server at {self.address} can't be given weights (its weight transfer is {facts.backend!r}). "
                f"{HOW_TO_START}."
            )
        return facts

    def _facts_from_worker(self) -> EngineFacts | None:
        """From gmpo's worker extension; None: the server has none."""
        try:
            (described,) = self.channel.post("/collective_rpc", {"method": "gmpo_describe"})[
                "results"
            ][:1]
            return EngineFacts(**described)
        except VllmError as fault:
            if fault.lost:
                raise
        except (KeyError, TypeError, ValueError):
            pass
        return None

    def _facts_from_config(self) -> EngineFacts:
        """From vLLM's own account of its configuration, for which it examines the machine: 10 seconds and more."""
        try:
            config = self.channel.get("/server_info?config_format=json")["vllm_config"]
            model, transfer = config["model_config"], config["weight_transfer_config"] or {}
            return EngineFacts(
                backend=str(transfer.get("backend")),
                logprobs_mode=model["logprobs_mode"],
                longest=model["max_model_len"],
                dtype=model["dtype"].removeprefix("torch."),
                device=str(config["device_config"]["device"]).split(":")[0],
                workers=self.channel.get("/get_world_size")["world_size"],
                takes_adapters=config["lora_config"] is not None,
            )
        except VllmError as fault:
            if fault.lost:
                raise
            reason: Exception = fault
        except (KeyError, TypeError, AttributeError) as error:
            reason = error
        raise VllmError(
            f"The server at {self.address} can't be given weights ({reason}). {HOW_TO_START}."
        )

    # -- weights ---------------------------------------------------------------------------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.channel.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin an update.  Until it is finished the server generates nothing, and its version is none of ours."""
        self.channel.post("/pause?mode=abort")
        self.set_version(INCOMPLETE)
        try:
            self.channel.post("/start_weight_update")
        except VllmError as fault:
            if "already" not in str(fault):
                raise
            self.abandon()  # what a trainer has begun that is no more
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
        """End a broken update, so that the server takes a new one.  Its version stays INCOMPLETE."""
        with suppress(VllmError):
            self.update_weights({"abort": "the trainer has given it up"})

    def set_version(self, tag: str) -> None:
        self.channel.post("/update_weight_version", {"new_version": tag})

    def weight_version(self) -> str:
        """What was last given to `set_version`; vLLM's own word for it in a server that has just been started."""
        answer = self.channel.get("/weight_info")
        return str(answer.get("weight_version")) if isinstance(answer, dict) else str(answer)

    def reset_prefix_cache(self) -> None:
        answer = self.channel.post("/reset_prefix_cache")
        if not (isinstance(answer, dict) and answer.get("success")):
            raise VllmError(
                f"The server at {self.address} did not empty its prefix cache. Does somebody else use it, too?"
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
        """A call whose answer is a sentence, not JSON."""
        status, data = self.channel.exchange("POST", path, body)
        if status != 200:
            raise VllmError(
                f"POST {self.address}{path} was answered with {status}: {data[:400].decode('utf8', 'replace')}"
            )

    # -- completions -----------------------------------------------------------------------------------------------

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """vLLM's answer to a request for completions, with a list of "choices"."""
        answer = self.channel.post("/inference/v1/generate", body)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise VllmError(
                f"{self.address} was asked for completions and answered {str(answer)[:80]!r}."
            )
        return answer
