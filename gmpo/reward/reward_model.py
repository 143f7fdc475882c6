"""Reward models: sequence classifiers with one label, which score a prompt with its completion."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from gmpo.sharding import full_parameters
from gmpo.types import Rollout

if TYPE_CHECKING:
    from gmpo.reward.types import RewardCall

logger = logging.getLogger(__name__)

_UNLIMITED = 10**9  # tokenizers without a maximal length say 1e30
# Keywords of from_pretrained that are for the tokenizer too.
_ORIGIN = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclass(frozen=True, slots=True)
class RewardModelSettings:
    """Options that reward models are loaded and run with."""

    # For from_pretrained; the dtype is float32 if none is named.
    init_kwargs: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    # Where models without a device map go; with None they stay where they are.
    device: torch.device | str | None = None
    tokens_per_batch: int = 16384  # padded tokens of one forward pass; a longer row goes alone


@dataclass(slots=True, eq=False)
class ModelReward:
    """The first logit of a sequence classifier for prompt + completion.

    Conversations go through the tokenizer's chat template.  Plain text gets the tokenizer's special
    tokens, unless it brings them.  What is longer than the model allows is cut, where the
    tokenizer's `truncation_side` says: with a warning the first time, and the share of such rows as
    the metric rewards/{name}/truncated.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    options: RewardModelSettings = field(default_factory=RewardModelSettings)
    asynchronous: bool = field(default=False, init=False)
    _pad_id: int = field(init=False)
    _max_length: int | None = field(init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self):
        config: Any = self.model.config
        if config.num_labels != 1:
            raise ValueError(
                f"Reward model {self.name!r} has {config.num_labels} labels. A reward model gives "
                "one number: load or make it with num_labels=1."
            )
        check_vocabulary(self.name, self.model, self.tokenizer)

        pad_id = self.tokenizer.pad_token_id
        if pad_id is None:
            pad_id = self.tokenizer.eos_token_id
        if not isinstance(pad_id, int):
            raise ValueError(
                f"The tokenizer of reward model {self.name!r} has no pad and no eos token. Give it "
                "one."
            )
        # A causal classifier takes its score at the last token that is not the config's padding.
        self._pad_id = config.get_text_config().pad_token_id = pad_id
        self._max_length = max_input_length(self.model, self.tokenizer)

    @torch.no_grad()
    def score(self, call: "RewardCall") -> list[float]:
        """Return a score for each completion."""
        rows = [self._encode(rollout) for rollout in call.rollouts]
        if self._max_length is not None:
            rows = [self._cut(row, i, call) for i, row in enumerate(rows)]

        scores = [0.0] * len(rows)
        lengths = [len(row) for row in rows]
        self.model.eval()
        with full_parameters(self.model.parameters()):
            for batch in batches_by_length(lengths, self.options.tokens_per_batch):
                logits = self._logits([rows[i] for i in batch])
                for i, logit in zip(batch, logits.tolist(), strict=True):
                    scores[i] = logit
        return scores

    def _encode(self, rollout: Rollout, max_length: int | None = None) -> list[int]:
        text, special = self._text(rollout)
        cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
        encoded: Any = self.tokenizer(text, add_special_tokens=special, verbose=False, **cut)
        return encoded["input_ids"]

    def _text(self, rollout: Rollout) -> tuple[str, bool]:
        """Return what the model reads, and whether special tokens are still to be added."""
        source, completion = rollout.prompt.source, rollout.completion
        if isinstance(source, str):
            assert isinstance(completion, str)
            first = self.tokenizer.bos_token
            return source + completion, not (isinstance(first, str) and source.startswith(first))

        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"Reward model {self.name!r} gets conversations, but its tokenizer has no chat "
                "template. Pass one with a template in reward_processing_classes, or use prompts "
                "of plain text."
            )
        assert not isinstance(completion, str)
        conversation: Any = whole_conversation(source, completion, rollout.prompt.opened)
        keywords = self.options.chat_template_kwargs or {}
        text: Any = self.tokenizer.apply_chat_template(conversation, tokenize=False, **keywords)
        return text, False

    def _cut(self, row: list[int], i: int, call: "RewardCall") -> list[int]:
        assert self._max_length is not None
        too_long = len(row) > self._max_length
        call.log_metric(f"rewards/{self.name}/truncated", float(too_long))
        if not too_long:
            return row
        if not self._warned:
            self._warned = True
            logger.warning(
                "Reward model %r reads %d tokens at most, but a prompt with its completion has %d. "
                "Such rows are cut, and scored for what is left; rewards/%s/truncated is their "
                "share. Lower max_completion_length.",
                *(self.name, self._max_length, len(row), self.name),
            )
        return self._encode(call.rollouts[i], self._max_length)

    def _logits(self, rows: Sequence[list[int]]) -> Tensor:
        """Return [b] float32 for `rows`, padded on the right."""
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.full((len(rows), int(lengths.max())), self._pad_id)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        output = self.model(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)
        )
        return output.logits[:, 0].float()


def whole_conversation(
    prompt: Sequence[Mapping[str, Any]], completion: Sequence[Mapping[str, Any]], opened: str
) -> list[Mapping[str, Any]]:
    """Return the messages of prompt and completion, where the completion may go on with a message.

    Args:
        opened: What the prompt already holds of the model's turn: a prefilled beginning, or a tag
            that the policy's template opens.

    Example:
        prompt [user, assistant "It is"], completion [assistant " 4"] -> [user, assistant "It is 4"]
    """
    messages, answer = list(prompt), list(completion)
    if not answer or not isinstance(answer[0].get("content"), str):
        return [*messages, *answer]

    begun = opened
    if messages and messages[-1].get("role") == "assistant":
        begun = opened or str(messages[-1].get("content") or "")
        messages.pop()
    first = {**answer[0], "content": begun + answer[0]["content"]}
    return [*messages, first, *answer[1:]]


def check_vocabulary(name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if the tokenizer has tokens that the model has no embedding for."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    if size is not None and len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer of reward model {name!r} has {len(tokenizer)} tokens, but the model "
            f"has embeddings for {size}. Pass the tokenizer that the model was trained with."
        )


def load_model_reward(name: str, tokenizer: object, options: RewardModelSettings) -> ModelReward:
    """Return the reward model at the path or hub id `name`.

    Args:
        tokenizer: None takes the model's own.

    Raises:
        ValueError: If the checkpoint holds no classifier with one label: its score would be random.
    """
    keywords = dict(options.init_kwargs or {})
    if "torch_dtype" not in keywords:
        keywords.setdefault("dtype", torch.float32)
    keywords |= {"num_labels": 1, "trust_remote_code": options.trust_remote_code}
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **keywords
    )
    untrained = sorted({*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])})
    if untrained:
        raise ValueError(
            f"{name!r} is not a reward model: it has no weights of the right shape for "
            f"{', '.join(untrained[:3])}, which would be random. A reward model is a sequence "
            "classifier with num_labels=1."
        )
    return model_reward(model, tokenizer, options)


def model_reward(model: nn.Module, tokenizer: object, options: RewardModelSettings) -> ModelReward:
    """Return `model` as a source; with the tokenizer from where it came if none is given."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_labels"):
        raise ValueError(
            f"reward_funcs holds a {type(model).__name__}, which is not a sequence-classification "
            "model of transformers. Wrap another module in a function."
        )
    origin = getattr(config, "_name_or_path", "") or ""
    name = origin.rstrip("/").split("/")[-1] or type(model).__name__
    tokenizer = (
        _own_tokenizer(origin, name, options)
        if tokenizer is None
        else getattr(tokenizer, "tokenizer", tokenizer)
    )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"reward_processing_classes holds {tokenizer!r} ({type(tokenizer).__name__}) for "
            f"reward model {name!r}. Pass a tokenizer."
        )
    placed = getattr(model, "hf_device_map", None) is not None or getattr(
        model, "is_quantized", False
    )
    if options.device is not None and not placed:
        model.to(options.device)
    return ModelReward(name, model, tokenizer, options)


def max_input_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the tokens that both model and tokenizer allow; None if neither has a limit."""
    config: Any = model.config
    limits = (
        tokenizer.model_max_length,
        getattr(config.get_text_config(), "max_position_embeddings", None),
    )
    return min((limit for limit in limits if limit and limit < _UNLIMITED), default=None)


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield row indices, longest first, in batches of at most `tokens_per_batch` padded tokens.

    A longer row is a batch by itself.

    Example:
        lengths [3, 8, 4], 8 tokens -> [1], then [2, 0]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens_per_batch // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def _own_tokenizer(origin: str, name: str, options: RewardModelSettings) -> Any:
    if not origin:
        raise ValueError(
            f"Reward model {name!r} does not say where its tokenizer is. Pass it in "
            "reward_processing_classes."
        )
    keywords = {key: value for key, value in (options.init_kwargs or {}).items() if key in _ORIGIN}
    return AutoTokenizer.from_pretrained(
        origin, trust_remote_code=options.trust_remote_code, **keywords
    )
