"""Keys and values of rows that share prompts, and attention over them.

A row attends to its prompt, which it shares with the other completions of its group, and to the tokens that it wrote
itself.  The two parts are computed apart and merged by their log-sum-exps, which is exact:

    o = (e^a o_prompt + e^b o_own) / (e^a + e^b),    a, b = log-sum-exp of the scores of either part

So a prompt's keys and values are stored and read once for its whole group, by one matrix product instead of one
matrix-vector product per row.

transformers' models come here through two doors: `SharedPrefixCache.update`, and the attention function that
`attention_over` puts in place.  Every forward pass is one row of tokens, [1, N]: N tokens of several prompts one after
another (prefill), or one new token of each of N completions (decode).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "gmpo_shared_prefix"
COLUMNS = 64  # tokens by which the store of a row grows, at least
QUERIES = 512  # tokens of a prompt whose scores are held at a time, where they have to be
HIDDEN = -1e30  # score of a position that is not seen; finite, so that a row that sees nothing of a part stays finite


@dataclass(slots=True)
class Store:
    """Keys and values of one layer: [rows or prompts, key heads, tokens, head size]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, count: int, tokens: int) -> "Store":
        """An empty store; zeros, because what is not seen is still multiplied by 0."""
        return cls(
            *(
                part.new_zeros(count, part.shape[1], tokens, part.shape[-1])
                for part in (keys, values)
            )
        )

    def grown(self, count: int, tokens: int, *, live: int, span: slice) -> "Store":
        """A store of another size with the tokens `span` of the first `live` entries at its beginning."""
        new = Store.like(self.keys, self.values, count, tokens)
        size = span.stop - span.start
        new.keys[:live, :, :size] = self.keys[:live, :, span]
        new.values[:live, :, :size] = self.values[:live, :, span]
        return new

    def move(self, target: Tensor, source: Tensor, span: slice) -> None:
        for part in (self.keys, self.values):
            part[target, :, span] = part[source, :, span]


@dataclass(slots=True)
class Grouping:
    """Which row belongs to which prompt: indices that bring rows into a rectangle [prompts, width] and back."""

    num_prompts: int
    width: int  # most rows of one prompt
    row: (
        Tensor | None
    )  # [num_prompts * width] row at each place, 0 where there is none; None: rows stand like that
    prompt: Tensor  # [R] prompt of each row
    place: Tensor  # [R] place of each row among those of its prompt


class SharedPrefixCache(Cache):
    """The state between forward passes.

    Rows write one column of their store per decode step, all of them the same one: column c holds what the rows wrote
    at one moment.  A row that entered at column e sees columns e and later.

    Args:
        num_layers: Of the model.
        device: Where the model is.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.device = device
        self.prompts: list[Store | None] = [None] * num_layers
        self.own: list[Store | None] = [None] * num_layers
        self.prompt_lengths: list[int] = []
        self.prompt_of: list[int] = []  # per row
        self.entries: list[int] = []  # per row, the column at which it entered
        self.column = 0  # next to be written
        self._capacity = (0, 0)  # rows and columns of `own`
        self._grouping: Grouping | None = None
        self._prefill: list[tuple[int, int]] | None = (
            None  # while prompts are read: their tokens in the pass
        )
        self._biases: dict[Any, Any] = {}  # of this pass
        self.softcaps = True  # whether the model's own attention function bounds its scores

    def __len__(self) -> int:
        return len(self.own)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Nothing but what was given: `attend` stores it."""
        return key_states, value_states

    # -- prompts and rows come and go ---------------------------------------------------------------------------------

    @contextmanager
    def reading(self, lengths: Sequence[int]) -> Iterator[None]:
        """Within the block, the one forward pass is over new prompts of these lengths, one after another."""
        old = len(self.prompt_lengths)
        keep = max(self.prompt_lengths, default=0)
        self.prompt_lengths += lengths
        size = max(self.prompt_lengths)
        for layer, store in enumerate(self.prompts):
            if store is not None:
                self.prompts[layer] = store.grown(
                    len(self.prompt_lengths), size, live=old, span=slice(0, keep)
                )
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self._prefill = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self._changed()
        yield
        self._prefill = None
        self._biases.clear()

    def enter(self, prompts: Sequence[int]) -> None:
        """Add a row for each of these prompts, given by their numbers (reading order, as changed by `forget`)."""
        self.prompt_of += prompts
        self.entries += [self.column] * len(prompts)
        self._changed()

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Remove rows; the last ones take their places.

        Returns:
            For each remaining row, its number before.
        """
        order = after_removal(len(self.entries), rows)
        self._move(self.own, order, slice(self.first, self.column))
        self.prompt_of = [self.prompt_of[row] for row in order]
        self.entries = [self.entries[row] for row in order]
        self._changed()
        return order

    def forget(self, prompts: Sequence[int]) -> list[int]:
        """Remove prompts that no row needs any more; the last ones take their places.

        Returns:
            For each remaining prompt, its number before.
        """
        order = after_removal(len(self.prompt_lengths), prompts)
        self._move(self.prompts, order, slice(0, max(self.prompt_lengths)))
        self.prompt_lengths = [self.prompt_lengths[prompt] for prompt in order]
        now = {before: number for number, before in enumerate(order)}
        self.prompt_of = [now[prompt] for prompt in self.prompt_of]
        self._changed()
        return order

    @property
    def first(self) -> int:
        """The first column that some row sees."""
        return min(self.entries, default=self.column)

    def _move(self, stores: list[Store | None], order: list[int], span: slice) -> None:
        moved = [(target, source) for target, source in enumerate(order) if target != source]
        if moved and span.stop > span.start:
            target, source = torch.tensor(moved, device=self.device).T
            for store in stores:
                if store is not None:
                    store.move(target, source, span)

    def _changed(self) -> None:
        self._grouping = None
        self._biases.clear()

    # -- a decode step ------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Call before the forward pass over one new token of each row."""
        rows, columns = self._capacity
        if self.column == columns or len(self.entries) > rows:
            self._make_room()
        if self._grouping is None:
            self._grouping = grouping(self.prompt_of, len(self.prompt_lengths), self.device)

    def end_step(self) -> None:
        self.column += 1
        self._biases.clear()

    def _make_room(self) -> None:
        first, live = self.first, self.column - self.first
        rows = max(self._capacity[0], len(self.entries))
        columns = live + max(COLUMNS, live // 2)
        for layer, store in enumerate(self.own):
            if store is not None:
                self.own[layer] = store.grown(
                    rows,
                    columns,
                    live=min(len(self.entries), self._capacity[0]),
                    span=slice(first, self.column),
                )
        self._capacity = (rows, columns)
        self.entries = [entry - first for entry in self.entries]
        self.column = live

    # -- attention ----------------------------------------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        how: "AttentionParams",
    ) -> Tensor:
        """Store keys and values, and attend to all that each token sees.

        Args:
            query: [1, Hq, N, D].
            key, value: [1, Hk, N, D], Hk divides Hq.
            window: Tokens that are seen, itself included; None: all.
            how: Scale and the like.

        Returns:
            [1, N, Hq, D].
        """
        query, key = (
            query.to(value.dtype),
            key.to(value.dtype),
        )  # rotary embeddings are wider under autocast
        work = self._decode if self._prefill is None else self._read
        return work(layer, query, key, value, window, how)[None]

    def _read(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        how: "AttentionParams",
    ) -> Tensor:
        """Prefill: every prompt attends to itself, causally.  [N, Hq, D]."""
        assert self._prefill is not None
        store = self.prompts[layer]
        if store is None:
            store = Store.like(key, value, len(self.prompt_lengths), max(self.prompt_lengths))
            self.prompts[layer] = store
        outputs = []
        for prompt, (start, end) in enumerate(
            self._prefill, len(self.prompt_lengths) - len(self._prefill)
        ):
            q, k, v = (part[:, :, start:end] for part in (query, key, value))
            store.keys[prompt, :, : end - start] = k[0]
            store.values[prompt, :, : end - start] = v[0]
            repeats = query.shape[1] // key.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            outputs.append(causal_attention(q, k, v, window, how)[0].transpose(0, 1))
        return torch.cat(outputs)

    def _decode(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        how: "AttentionParams",
    ) -> Tensor:
        """One new token per row.  [R, Hq, D]."""
        rows, heads = key.shape[2], key.shape[1]
        store = self.own[layer]
        if store is None:
            store = self.own[layer] = Store.like(key, value, *self._capacity)
        store.keys[:rows, :, self.column] = key[0].transpose(0, 1)
        store.values[:rows, :, self.column] = value[0].transpose(0, 1)
        query = (
            query[0].transpose(0, 1).reshape(rows, heads, -1, query.shape[-1])
        )  # [R, Hk, Hq / Hk, D]
        start, bias = self._own_bias(window, query)
        seen = slice(start, self.column + 1)
        output, lse = part_of_attention(
            query, store.keys[:rows, :, seen], store.values[:rows, :, seen], bias, how
        )
        span, bias = self._prompt_bias(window, query)
        if span.stop > span.start:
            other, other_lse = self._prompt_part(layer, query, span, bias, how)
            output = torch.lerp(
                other, output, torch.sigmoid(lse - other_lse)[..., None].to(output.dtype)
            )
            lse = lse if how.sinks is None else torch.logaddexp(lse, other_lse)
        return how.drained(output.reshape(rows, -1, output.shape[-1]), lse.reshape(rows, -1))

    def _prompt_part(
        self, layer: int, query: Tensor, span: slice, bias: Tensor | None, how: "AttentionParams"
    ) -> tuple[Tensor, Tensor]:
        """Attention of [R, Hk, r, D] queries to their prompts: the rows of a prompt form one matrix per head."""
        store, groups = self.prompts[layer], self._grouping
        assert store is not None and groups is not None
        _, heads, repeats, size = query.shape
        shape = (groups.num_prompts, groups.width, heads, repeats)
        stacked = query if groups.row is None else query[groups.row]
        stacked = stacked.view(*shape, size).transpose(1, 2).reshape(shape[0], heads, -1, size)
        keys, values = store.keys[: shape[0], :, span], store.values[: shape[0], :, span]
        output, lse = part_of_attention(stacked, keys, values, bias, how)
        output = output.view(shape[0], heads, groups.width, repeats, -1).transpose(1, 2)
        lse = lse.view(shape[0], heads, groups.width, repeats).transpose(1, 2)
        if groups.row is None:
            return output.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])
        return output[groups.prompt, groups.place], lse[groups.prompt, groups.place]

    def _own_bias(self, window: int | None, query: Tensor) -> tuple[int, Tensor | None]:
        """The first column that any row sees, and [R, 1, r, L] of what to add to the scores."""
        key = ("own", window, query.shape[2])
        if key not in self._biases:
            start = self.first if window is None else max(self.first, self.column - window + 1)
            bias = None
            if max(self.entries) > start:
                column = torch.arange(start, self.column + 1, device=self.device)
                entry = torch.tensor(self.entries, device=self.device)
                bias = bias_of(column >= entry[:, None], query.dtype)[:, None, None]
                bias = bias.expand(-1, 1, query.shape[2], -1)
            self._biases[key] = (start, bias)
        return self._biases[key]

    def _prompt_bias(self, window: int | None, query: Tensor) -> tuple[slice, Tensor | None]:
        """The tokens of the prompts that any row sees, and [prompts, 1, rows of one * r, P] of what to add."""
        key = ("prompt", window, query.shape[2])
        if key not in self._biases:
            lengths = self.prompt_lengths
            # A row's token stands at position length + age, and sees positions above length + age - window.
            ages = [self.column - entry for entry in self.entries]
            hidden = [0] * len(ages)
            if window is not None:
                hidden = [
                    lengths[p] + age - window + 1
                    for p, age in zip(self.prompt_of, ages, strict=True)
                ]
            span = slice(min(max(0, min(hidden)), max(lengths)), max(lengths))
            alike = (
                min(lengths) == max(lengths) and max(hidden) <= span.start
            ) or span.start == span.stop
            self._biases[key] = (span, None if alike else self._ragged_bias(span, hidden, query))
        return self._biases[key]

    def _ragged_bias(self, span: slice, hidden: list[int], query: Tensor) -> Tensor:
        groups = self._grouping
        assert groups is not None
        position = torch.arange(span.start, span.stop, device=self.device)
        lengths = torch.tensor(self.prompt_lengths, device=self.device)
        seen = position < lengths[:, None]  # [prompts, P]
        if max(hidden) <= span.start:
            return bias_of(seen, query.dtype)[:, None, None].expand(
                -1, 1, groups.width * query.shape[2], -1
            )
        first = torch.zeros(groups.num_prompts, groups.width, dtype=torch.int64, device=self.device)
        first[groups.prompt, groups.place] = torch.tensor(hidden, device=self.device)
        seen = seen[:, None] & (position >= first[..., None])  # [prompts, width, P]
        bias = bias_of(seen, query.dtype)[:, :, None].expand(-1, -1, query.shape[2], -1)
        return bias.reshape(groups.num_prompts, 1, -1, len(position))


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """How a layer weighs what it sees."""

    scale: float
    softcap: float | None = None  # bound of the scores
    sinks: Tensor | None = None  # [Hq] score of a position without a value that every token sees

    def drained(self, output: Tensor, lse: Tensor) -> Tensor:
        """Attention output [..., Hq, D] less the weight that goes to the sinks; `lse` is [..., Hq]."""
        if self.sinks is None:
            return output
        return output * torch.sigmoid(lse - self.sinks.float())[..., None].to(output.dtype)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, how: AttentionParams
) -> Tensor:
    """Attention of a text to itself, all of [1, H, N, D]."""
    length = query.shape[2]
    plain = window is None or window >= length
    if plain and how.softcap is None and how.sinks is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=how.scale)
    position = torch.arange(length, device=query.device)
    outputs = []
    for start in range(0, length, QUERIES):  # bounds the memory of scores and mask
        rows = slice(start, min(start + QUERIES, length))
        columns = slice(0 if window is None else max(0, start - window + 1), rows.stop)
        distance = position[rows, None] - position[columns]
        bias = bias_of((distance >= 0) & (distance < (window or length)), query.dtype)[None, None]
        output, lse = part_of_attention(
            query[:, :, rows], key[:, :, columns], value[:, :, columns], bias, how
        )
        outputs.append(how.drained(output.transpose(1, 2), lse.transpose(1, 2)).transpose(1, 2))
    return torch.cat(outputs, dim=2)


def part_of_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, how: AttentionParams
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its scores.

    Args:
        query: [n, h, q, D].
        key, value: [n, h, k, D].
        bias: [n or 1, 1, q, k] of the dtype of query, to be added to the scores; None: 0.

    Returns:
        [n, h, q, D], and [n, h, q] float32.
    """
    if query.device.type == "cpu" and how.softcap is None and query.shape[-1] == value.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=how.scale
        )
    scores = (query @ key.transpose(-1, -2)).float() * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, else a large negative number."""
    hidden = max(HIDDEN, torch.finfo(dtype).min / 2)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, hidden)


def grouping(prompt_of: Sequence[int], num_prompts: int, device: torch.device) -> Grouping:
    members: list[list[int]] = [[] for _ in range(num_prompts)]
    place = []
    for row, prompt in enumerate(prompt_of):
        place.append(len(members[prompt]))
        members[prompt].append(row)
    width = max(map(len, members))
    rectangle = [row for rows in members for row in rows + [0] * (width - len(rows))]
    in_place = rectangle == list(range(len(prompt_of)))
    return Grouping(
        num_prompts=num_prompts,
        width=width,
        row=None if in_place else torch.tensor(rectangle, device=device),
        prompt=torch.tensor(prompt_of, device=device),
        place=torch.tensor(place, device=device),
    )


def after_removal(count: int, removed: Sequence[int]) -> list[int]:
    """Old number of each entry that remains, when the last ones fill the gaps.

    >>> after_removal(6, [1, 4])
    [0, 5, 2, 3]
    """
    gone = set(removed)
    remaining = count - len(gone)
    movers = iter([entry for entry in range(remaining, count) if entry not in gone])
    return [next(movers) if entry in gone else entry for entry in range(remaining)]


# -- the door through which a model comes here -------------------------------------------------------------------------

_active: ContextVar[SharedPrefixCache] = ContextVar("active")


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in the place of its own attention functions."""
    cache = _active.get()
    output = cache.attend(
        module.layer_idx,
        query,
        key,
        value,
        kwargs["sliding_window"] if "sliding_window" in kwargs else configured_window(module),
        AttentionParams(
            scaling, kwargs.get("softcap") if cache.softcaps else None, kwargs.get("s_aux")
        ),
    )
    return output, None


ALL_ATTENTION_FUNCTIONS.register(NAME, shared_prefix_attention)


def configured_window(module: Any) -> int | None:
    """The window of a layer that tells it to its mask alone, as Qwen2-MoE's and Phi-MoE's do."""
    if not hasattr(sys.modules[type(module).__module__], "create_sliding_window_causal_mask"):
        return None  # the config may have a window all the same, which the model leaves alone
    kinds = getattr(module.config, "layer_types", None)
    slides = kinds is None or kinds[module.layer_idx] == "sliding_attention"
    return getattr(module.config, "sliding_window", None) if slides else None


@contextmanager
def attention_over(model: Any, cache: SharedPrefixCache) -> Iterator[None]:
    """Within the block, the model's attention layers store into `cache` and attend to it."""
    configs = {
        id(config): config
        for m in model.modules()
        if (config := getattr(m, "config", None)) is not None
    }
    before = {number: config._attn_implementation_internal for number, config in configs.items()}
    cache.softcaps = (
        "sdpa" not in before.values()
    )  # transformers' sdpa leaves them out, and so does the trainer then
    token = _active.set(cache)
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        _active.reset(token)
        for number, config in configs.items():
            config._attn_implementation_internal = before[number]
