"""Samples, as the parts of a streamed answer add to them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gmpo.rollout.engine import Completion
from gmpo.rollout.vllm.sampling import completion


@dataclass(slots=True)
class StreamedSample:
    """A sample that a server is writing."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    kept: list[list[int]] = field(default_factory=list)  # the tokens that each was drawn from
    versions: set[str] = field(default_factory=set)  # of the weights that wrote it

    def add(self, part: dict[str, Any]) -> None:
        """Add what one event brings.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: It is malformed.
        """
        ids = part["token_ids"]
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"token_ids={str(ids)[:80]}")
        if any(token < 0 for token in ids):
            raise ValueError(f"token_ids={str(ids)[:80]}")
        steps = part["logprobs"]["content"] if ids else []
        if [step["token_id"] for step in steps] != ids:
            raise ValueError("its log-probs are of other tokens")

        self.ids += ids
        self.logps += [float(step["logprob"]) for step in steps]
        self.kept += part.get("sampling_mask") or []
        self.versions |= {span["version"] for span in part.get("weight_versions") or []}
        self.finish_reason = part.get("finish_reason")

    def finished(self, *, report: bool, token_sets: bool) -> Completion:
        """Return the completion.

        Args:
            report: With its log-probs.
            token_sets: And the tokens that each of its tokens was drawn from.

        Raises:
            ValueError: vLLM gave up on it, or it can't be trained on.
        """
        kept = self.kept if token_sets else None
        return completion(self.ids, self.finish_reason, self.logps, report=report, kept=kept)


def finished_samples(
    parts: Iterable[dict[str, Any]], count: int
) -> Iterator[tuple[int, StreamedSample]]:
    """Yield the number of each sample and the sample, as soon as it is finished.

    Args:
        parts: Of all samples of a request, in the order in which they come.
        count: Of samples.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: A part is malformed, or samples are
            missing.
    """
    growing = {number: StreamedSample() for number in range(count)}
    for part in parts:
        number = part["index"]
        if number not in growing:
            raise ValueError(f"a part of sample {number!r} came, of {count}")
        sample = growing[number]
        sample.add(part)
        if sample.finish_reason is not None:
            del growing[number]
            yield number, sample

    if growing:
        raise ValueError(f"{count - len(growing)} completions came for {count}")
