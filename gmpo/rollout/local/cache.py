"""Keys and values of rows that share prompts, and attention over them.

A row attends to its prompt, which it shares with the other completions of its group, and to the
tokens that it wrote itself.  The two parts are computed apart and merged by their log-sum-exps
(`attention/`).  So a prompt's keys and values are stored and read once for its whole group, by one
matrix product instead of one matrix-vector product per row.

transformers' models come here through two doors: `SharedPrefixCache.update`, and the attention
function that `attention_over` puts in place.  Every forward pass is one row of tokens, [1, N]: N
tokens of several prompts one after another (prefill), or one new token of each of N completions
(decode).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gmpo.attention.attend import attend
from gmpo.attention.door import reach_of, switched
from gmpo.attention.kernels import AttentionParams, attend_to, bias_of
from gmpo.attention.merge import drain, merge
from gmpo.attention.segments import Reach, Segments, Tree

NAME = "gmpo_shared_prefix"
COLUMNS = 64  # tokens by which the store of a row grows, at least

_BiasKey = tuple[int | None, int]


@dataclass(slots=True)
class Store:
    """Keys and values of one layer: [rows or prompts, key heads, tokens, head size]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, count: int, tokens: int) -> "Store":
        """Return an empty store; zeros, because what is not seen is still multiplied by 0."""

        def empty(part: Tensor) -> Tensor:
            return part.new_zeros(count, part.shape[1], tokens, part.shape[-1])

        return cls(empty(keys), empty(values))

    def grown(self, count: int, tokens: int, *, live: int, span: slice) -> "Store":
        """Return a store of another size that begins with `span` of the first `live` entries."""
        new = Store.like(self.keys, self.values, count, tokens)
        size = span.stop - span.start
        new.keys[:live, :, :size] = self.keys[:live, :, span]
        new.values[:live, :, :size] = self.values[:live, :, span]
        return new

    def move(self, target: Tensor, source: Tensor, span: slice) -> None:
        """Copy the tokens `span` of the entries `source` to the entries `target`."""
        for part in (self.keys, self.values):
            part[target, :, span] = part[source, :, span]


@dataclass(slots=True)
class Grouping:
    """The prompt of each row: indices of rows in a rectangle [prompts, width], and back."""

    num_prompts: int
    width: int  # most rows of one prompt
    # [num_prompts * width] row at each place, 0 where there is none; None if rows stand like that
    row: Tensor | None
    prompt: Tensor  # [R] prompt of each row
    place: Tensor  # [R] place of each row among those of its prompt


class SharedPrefixCache(Cache):
    """The state between forward passes.

    Rows write one column of their store per decode step, all of them the same one: column c holds
    what the rows wrote at one moment.  A row that entered at column e sees columns e and later.

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
        self._prefill: Segments | None = None  # while prompts are read: the prompts of the pass
        # Of this pass, by window and number of queries.
        self._own_biases: dict[_BiasKey, tuple[int, Tensor | None]] = {}
        self._prompt_biases: dict[_BiasKey, tuple[slice, Tensor | None]] = {}
        self.softcaps = True  # whether the model's own attention function bounds its scores

    def __len__(self) -> int:
        return len(self.own)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what was given: `attend` stores it."""
        return key_states, value_states

    # -- prompts and rows come and go ------------------------------------------------------------

    @contextmanager
    def reading(self, lengths: Sequence[int]) -> Iterator[None]:
        """Read prompts of these lengths, one after another, in the one pass of the block."""
        old = len(self.prompt_lengths)
        keep = max(self.prompt_lengths, default=0)
        self.prompt_lengths += lengths
        size = max(self.prompt_lengths)
        for layer, store in enumerate(self.prompts):
            if store is not None:
                self.prompts[layer] = store.grown(
                    len(self.prompt_lengths), size, live=old, span=slice(0, keep)
                )
        self._prefill = Segments(tuple(Tree(length) for length in lengths), self.device)
        self._changed()
        yield
        self._prefill = None
        self._changed()

    def enter(self, prompts: Sequence[int]) -> None:
        """Add a row for each of these prompts.

        Args:
            prompts: Their numbers, in the order of reading, as changed by `forget`.
        """
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
        self._forget_biases()

    def _forget_biases(self) -> None:
        self._own_biases.clear()
        self._prompt_biases.clear()

    # -- a decode step ---------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Call before the forward pass over one new token of each row."""
        rows, columns = self._capacity
        if self.column == columns or len(self.entries) > rows:
            self._make_room()
        if self._grouping is None:
            self._grouping = grouping(self.prompt_of, len(self.prompt_lengths), self.device)

    def end_step(self) -> None:
        """Call after it."""
        self.column += 1
        self._forget_biases()

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

    # -- attention -------------------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        reach: Reach,
        params: AttentionParams,
    ) -> Tensor:
        """Store keys and values, and attend to all that each token sees.

        Args:
            query: [1, Hq, N, D].
            key, value: [1, Hk, N, D], Hk divides Hq.

        Returns:
            [1, N, Hq, D].
        """
        # Rotary embeddings are wider under autocast.
        query, key = query.to(value.dtype), key.to(value.dtype)
        work = self._decode if self._prefill is None else self._read
        return work(layer, query, key, value, reach, params)[None]

    def _read(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        reach: Reach,
        params: AttentionParams,
    ) -> Tensor:
        """Attend causally from every prompt to itself (prefill).  Return [N, Hq, D]."""
        assert self._prefill is not None
        store = self.prompts[layer]
        if store is None:
            store = Store.like(key, value, len(self.prompt_lengths), max(self.prompt_lengths))
            self.prompts[layer] = store

        first = len(self.prompt_lengths) - len(self._prefill.trees)
        start = 0
        for number, tree in enumerate(self._prefill.trees, first):
            store.keys[number, :, : tree.prompt] = key[0, :, start : start + tree.prompt]
            store.values[number, :, : tree.prompt] = value[0, :, start : start + tree.prompt]
            start += tree.prompt

        return attend(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            self._prefill,
            reach,
            params,
        )

    def _decode(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        reach: Reach,
        params: AttentionParams,
    ) -> Tensor:
        """Attend from one new token per row.  Return [R, Hq, D]."""
        rows, heads = key.shape[2], key.shape[1]
        store = self.own[layer]
        if store is None:
            store = self.own[layer] = Store.like(key, value, *self._capacity)
        store.keys[:rows, :, self.column] = key[0].transpose(0, 1)
        store.values[:rows, :, self.column] = value[0].transpose(0, 1)

        # Query heads that share a key head take the place of the query tokens.
        query = query[0].transpose(0, 1).reshape(rows, heads, -1, query.shape[-1])  # [R, Hk, r, D]
        start, bias = self._own_bias(reach.window, query)
        seen = slice(start, self.column + 1)
        output, lse = attend_to(
            query, store.keys[:rows, :, seen], store.values[:rows, :, seen], params, bias=bias
        )

        span, bias = self._prompt_bias(reach.window, query)
        if span.stop > span.start:
            other, other_lse = self._prompt_part(layer, query, span, bias, params)
            output, lse = merge(output, lse, other, other_lse)

        output, lse = output.reshape(rows, -1, output.shape[-1]), lse.reshape(rows, -1)
        return output if params.sinks is None else drain(output, lse, params.sinks)[0]

    def _prompt_part(
        self, layer: int, query: Tensor, span: slice, bias: Tensor | None, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        """Attend with [R, Hk, r, D] queries to their prompts: a matrix per prompt and head."""
        store, groups = self.prompts[layer], self._grouping
        assert store is not None and groups is not None
        _, heads, repeats, size = query.shape
        shape = (groups.num_prompts, groups.width, heads, repeats)
        stacked = query if groups.row is None else query[groups.row]
        stacked = stacked.view(*shape, size).transpose(1, 2).reshape(shape[0], heads, -1, size)
        keys, values = store.keys[: shape[0], :, span], store.values[: shape[0], :, span]
        output, lse = attend_to(stacked, keys, values, params, bias=bias)
        output = output.view(shape[0], heads, groups.width, repeats, -1).transpose(1, 2)
        lse = lse.view(shape[0], heads, groups.width, repeats).transpose(1, 2)
        if groups.row is None:
            return output.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])
        return output[groups.prompt, groups.place], lse[groups.prompt, groups.place]

    def _own_bias(self, window: int | None, query: Tensor) -> tuple[int, Tensor | None]:
        """Return the first column that any row sees, and the bias of scores, [R, 1, r, L]."""
        key = (window, query.shape[2])
        if key not in self._own_biases:
            start = self.first if window is None else max(self.first, self.column - window + 1)
            bias = None
            if max(self.entries) > start:
                column = torch.arange(start, self.column + 1, device=self.device)
                entry = torch.tensor(self.entries, device=self.device)
                bias = bias_of(column >= entry[:, None], query.dtype)[:, None, None]
                bias = bias.expand(-1, 1, query.shape[2], -1)
            self._own_biases[key] = (start, bias)
        return self._own_biases[key]

    def _prompt_bias(self, window: int | None, query: Tensor) -> tuple[slice, Tensor | None]:
        """Return the prompt tokens that any row sees, and the bias, [prompts, 1, width * r, P]."""
        key = (window, query.shape[2])
        if key not in self._prompt_biases:
            lengths = self.prompt_lengths
            # A row's token stands at position length + age, and sees positions above
            # length + age - window.
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
            bias = None if alike else self._ragged_bias(span, hidden, query)
            self._prompt_biases[key] = (span, bias)
        return self._prompt_biases[key]

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


def grouping(prompt_of: Sequence[int], num_prompts: int, device: torch.device) -> Grouping:
    """Return which row belongs to which prompt.

    Example:
        prompt_of [1, 0, 1] of 2 prompts -> width 2, row [1, 0 (none), 0, 2], place [0, 0, 1]
    """
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
    """Return the old number of each entry that remains, when the last ones fill the gaps.

    >>> after_removal(6, [1, 4])
    [0, 5, 2, 3]
    """
    gone = set(removed)
    remaining = count - len(gone)
    movers = iter([entry for entry in range(remaining, count) if entry not in gone])
    return [next(movers) if entry in gone else entry for entry in range(remaining)]


# -- the door through which a model comes here ---------------------------------------------------

_active: ContextVar[SharedPrefixCache] = ContextVar("active")


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Return attention over the active cache, as transformers calls attention functions."""
    cache = _active.get()
    params = AttentionParams(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=keywords.get("softcap") if cache.softcaps else None,
        sinks=keywords.get("s_aux"),
    )
    reach = reach_of(module, keywords)
    return cache.attend(module.layer_idx, query, key, value, reach, params), None


ALL_ATTENTION_FUNCTIONS.register(NAME, shared_prefix_attention)


@contextmanager
def attention_over(model: nn.Module, cache: SharedPrefixCache) -> Iterator[None]:
    """Let the model's attention layers store into `cache` and attend to it, within the block."""
    token = _active.set(cache)
    try:
        with switched(model, NAME) as names:
            # transformers' sdpa leaves soft caps out, and so does the trainer then.
            cache.softcaps = "sdpa" not in names
            yield
    finally:
        _active.reset(token)
