"""Several vLLM servers as one receiver of weights."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.http.channel import Channel
from gmpo.rollout.vllm.http.client import Client, EngineFacts
from gmpo.rollout.vllm.http.tokens import find_token

Result = TypeVar("Result")


class Fleet:
    """Servers that serve the same model in the same way.

    Args:
        clients: At least one.
    """

    def __init__(self, clients: Sequence[Client]) -> None:
        self.clients = list(clients)
        self.facts: list[EngineFacts] = []
        self.tag: str | None = None  # the name of a finished update, if its caller does not say

    @classmethod
    def of(cls, settings: RolloutSettings) -> "Fleet":
        """Return the servers that the settings name."""
        timeout = settings.vllm_server_timeout
        channels = [
            Channel(address, token=None, timeout=timeout) for address in addresses(settings)
        ]
        return cls([Client(channel) for channel in channels])

    def connect(self, seconds: float) -> None:
        """Wait for all servers and see that they can be used together.

        Raises:
            VllmError: A server does not come, can't be given weights, or differs from the others.
        """
        self.each(lambda client: client.channel.wait(seconds))

        # Look for tokens now: a server that was started again has another.
        for client in self.clients:
            client.channel.token = find_token(client.address)

        self.facts = self.each(lambda client: client.facts())
        first = self.facts[0]
        for client, facts in zip(self.clients, self.facts, strict=True):
            if not facts.fits(first):
                raise VllmError(
                    f"The servers differ: {self.clients[0].address} is {first}, {client.address} "
                    f"is {facts}. Start all of them alike."
                )

    @property
    def longest(self) -> int:
        """Return how many tokens a sequence can have on every server."""
        return min(facts.longest for facts in self.facts)

    @property
    def max_num_seqs(self) -> int:
        """Return how many samples every server takes per request."""
        return min(facts.max_num_seqs for facts in self.facts)

    @property
    def is_ours(self) -> bool:
        """Return whether the servers load weights with gmpo's backend, not vLLM's NCCL one."""
        return self.facts[0].backend == "gmpo"

    def each(self, work: Callable[[Client], Result]) -> list[Result]:
        """Run `work` on all servers at the same time.

        Raises:
            Exception: The first failure, after all have ended.
        """
        if len(self.clients) == 1:
            return [work(self.clients[0])]
        with ThreadPoolExecutor(max_workers=len(self.clients)) as pool:
            futures = [pool.submit(work, client) for client in self.clients]
            return [future.result() for future in futures]

    # -- a Receiver --------------------------------------------------------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.each(lambda client: client.init_weight_transfer_engine(init_info))

    def join_nccl(self, payload: dict[str, Any]) -> None:
        """Let the workers of all servers join an NCCL group, one server's after another's.

        Example:
            Servers of 2 and 4 workers, payload["rank_offset"] 1 (the trainer is rank 0): the first
            server's workers are ranks 1 and 2, the second's 3 to 6.
        """
        infos: dict[Client, dict[str, Any]] = {}
        offset = payload["rank_offset"]
        for client, facts in zip(self.clients, self.facts, strict=True):
            info = {**payload, "rank_offset": offset}
            infos[client] = {"nccl": info} if self.is_ours else info
            offset += facts.workers

        self.each(lambda client: client.init_weight_transfer_engine(infos[client]))

    def start_weight_update(self) -> None:
        self.each(lambda client: client.start_weight_update())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.each(lambda client: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.each(lambda client: client.finish_weight_update(weight_version or self.tag))

    def abandon(self) -> None:
        self.each(lambda client: client.abandon())


def addresses(settings: RolloutSettings) -> list[str]:
    """Return the addresses of the servers that the settings name."""
    if settings.vllm_server_addresses:
        return list(settings.vllm_server_addresses)
    if settings.vllm_server_base_url is not None:
        return [settings.vllm_server_base_url]
    host = "127.0.0.1" if settings.vllm_server_host == "0.0.0.0" else settings.vllm_server_host
    return [f"http://{host}:{settings.vllm_server_port}"]
