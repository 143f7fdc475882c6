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
_ORIGIN = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
)  # the tokenizer's keywords too


@dataclass(frozen=True, slots=True)
class RewardModelSettings:
    """How reward models are loaded and run."""

    init_kwargs: Mapping[str, Any] | None = (
        None  # for from_pretrained; float32 if it names no dtype
    )
    trust_remote_code: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    device: torch.device | str | None = (
        None  # models that have no device map go there; None: they stay
    )
    tokens_per_batch: int = 16384  # padded tokens of one forward pass; a longer row goes alone


@dataclass(slots=True, eq=False)
class ModelReward:
    """The first logit of a sequence classifier for prompt + completion.

    Conversations go through the tokenizer's chat template.  Plain text gets the tokenizer's special tokens, unless it
    brings them.  What is longer than the model allows is cut, where the tokenizer's `truncation_side` says: with a
    warning the first time, and the share of such rows as the metric rewards/{name}/truncated.
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
                f"Reward model {self.name!r} has {config.num_labels} labels. A reward model gives one number: load or "
                "make it with num_labels=1."
            )
        pad_id = (
            self.tokenizer.eos_token_id
            if self.tokenizer.pad_token_id is None
            else self.tokenizer.pad_token_id
        )
        if not isinstance(pad_id, int):
            raise ValueError(
                f"The tokenizer of reward model {self.name!r} has no pad and no eos token. Give it one."
            )
        # A causal classifier takes its score at the last token that is not the config's padding.
        self._pad_id = config.get_text_config().pad_token_id = pad_id
        self._max_length = max_input_length(self.model, self.tokenizer)

    @torch.no_grad()
    def score(self, call: "RewardCall") -> list[float]:
        rows = [self._encode(rollout) for rollout in call.rollouts]
        if self._max_length is not None:
            rows = [self._cut(row, i, call) for i, row in enumerate(rows)]
        scores = [0.0] * len(rows)
        self.model.eval()
        with full_parameters(self.model.parameters()):
            for batch in batches_by_length(
                [len(row) for row in rows], self.options.tokens_per_batch
            ):
                logits = self._logits([rows[i] for i in batch])
                for i, logit in zip(batch, logits.tolist(), strict=True):
                    scores[i] = logit
        return scores

    def _encode(self, rollout: Rollout, max_length: int | None = None) -> list[int]:
        text, special = self._text(rollout)
        cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
        return self.tokenizer(text, add_special_tokens=special, verbose=False, **cut)["input_ids"]  # pyright: ignore

    def _text(self, rollout: Rollout) -> tuple[str, bool]:
        """What the model reads, and whether special tokens are still to be added."""
        source, completion = rollout.prompt.source, rollout.completion
        if isinstance(source, str):
            assert isinstance(completion, str)
            first = self.tokenizer.bos_token
            return source + completion, not (isinstance(first, str) and source.startswith(first))
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"Reward model {self.name!r} gets conversations, but its tokenizer has no chat template. Pass one with "
                "a template in reward_processing_classes, or use prompts of plain text."
            )
        conversation: Any = [*source, *completion]
        template_kwargs = self.options.chat_template_kwargs or {}
        return self.tokenizer.apply_chat_template(
            conversation, tokenize=False, **template_kwargs
        ), False  # pyright: ignore

    def _cut(self, row: list[int], i: int, call: "RewardCall") -> list[int]:
        assert self._max_length is not None
        too_long = len(row) > self._max_length
        call.log_metric(f"rewards/{self.name}/truncated", float(too_long))
        if not too_long:
            return row
        if not self._warned:
            self._warned = True
            logger.warning(
                "Reward model %r reads %d tokens at most, but a prompt with its completion has %d. Such rows are cut, "
                "and scored for what is left; rewards/%s/truncated is their share. Lower max_completion_length.",
                *(self.name, self._max_length, len(row), self.name),
            )
        return self._encode(call.rollouts[i], self._max_length)

    def _logits(self, rows: Sequence[list[int]]) -> Tensor:
        """[b] float32 for `rows`, padded on the right."""
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


def load_model_reward(name: str, tokenizer: Any, options: RewardModelSettings) -> ModelReward:
    """The reward model at the path or hub id `name`; its own tokenizer where `tokenizer` is None.

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
            f"{name!r} is no reward model: it has no weights of the right shape for {', '.join(untrained[:3])}, which "
            "would be random. A reward model is a sequence classifier with num_labels=1."
        )
    return model_reward(model, tokenizer, options)


def model_reward(model: nn.Module, tokenizer: Any, options: RewardModelSettings) -> ModelReward:
    """`model` as a source; its own tokenizer, from where the model came, where `tokenizer` is None."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_labels"):
        raise ValueError(
            f"reward_funcs holds a {type(model).__name__}, which is no sequence-classification model of transformers. "
            "Wrap another module in a function."
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
            f"reward_processing_classes holds {tokenizer!r} ({type(tokenizer).__name__}) for reward model {name!r}. "
            "Pass a tokenizer."
        )
    placed = getattr(model, "hf_device_map", None) is not None or getattr(
        model, "is_quantized", False
    )
    if options.device is not None and not placed:
        model.to(options.device)
    return ModelReward(name, model, tokenizer, options)


def max_input_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that both model and tokenizer allow; None: neither has a limit."""
    config: Any = model.config
    limits = (
        tokenizer.model_max_length,
        getattr(config.get_text_config(), "max_position_embeddings", None),
    )
    return min((limit for limit in limits if limit and limit < _UNLIMITED), default=None)


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Row indices, longest first, in batches whose rectangle holds at most `tokens_per_batch` tokens (or one row)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens_per_batch // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def _own_tokenizer(origin: str, name: str, options: RewardModelSettings) -> Any:
    if not origin:
        raise ValueError(
            f"Reward model {name!r} does not say where its tokenizer is. Pass it in reward_processing_classes."
        )
    keywords = {key: value for key, value in (options.init_kwargs or {}).items() if key in _ORIGIN}
    return AutoTokenizer.from_pretrained(
        origin, trust_remote_code=options.trust_remote_code, **keywords
    )
