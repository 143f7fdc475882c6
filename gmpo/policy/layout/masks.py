"""Who sees whom: the attention masks of a layout, one per kind of attention layer that a model has.

A mask of ours replaces the one that the model would make, so it must hold the model's window too.  Windows are counted
in positions, not in places: what a token sees in its tree has consecutive positions, as if its row were alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmpo.policy.layout.layout import Layout

Visible = Callable[
    [Any, Any, Tensor, Tensor], Tensor
]  # (row, head, query place, key place) -> whether it is seen


def attention_masks(layout: Layout, config: Any, dtype: torch.dtype) -> Any:
    """What to pass as `attention_mask`: one mask, or a dict of them by layer type where the model has several types.

    Args:
        config: Of the text model; its `_attn_implementation` decides the form of the mask.
        dtype: Of the hidden states, for additive masks.

    Raises:
        ValueError: If the model has layers that take no mask (recurrent ones), or an attention that takes none of ours.
    """
    form = FORMS.get(config._attn_implementation)
    if form is None:
        raise ValueError(f"attention '{config._attn_implementation}' takes no mask of its own")
    masks = {}
    for kind in layer_kinds(config):
        if kind not in VISIBILITY:
            raise ValueError(f"layers of type '{kind}' take no mask")
        masks[kind] = form(layout, VISIBILITY[kind](layout, config), dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def layer_kinds(config: Any) -> set[str]:
    """Types of attention layers in a model, by the names that transformers uses."""
    if getattr(config, "layer_types", None):
        return set(config.layer_types)
    if getattr(config, "sliding_window", None) is not None:
        return {"sliding_attention"}
    if getattr(config, "attention_chunk_size", None) is not None:
        return {"chunked_attention"}
    return {"full_attention"}


def in_tree(layout: Layout) -> Visible:
    """Earlier tokens of the same tree that are in the prompt or in the same completion.  Padding sees padding."""
    tree, branch = layout.tree, layout.branch

    def visible(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        same_tree = tree[row, query] == tree[row, key]
        on_path = (branch[row, key] == 0) | (branch[row, key] == branch[row, query])
        return same_tree & on_path & (key <= query)

    return visible


def in_window(layout: Layout, config: Any) -> Visible:
    """As `in_tree`, at most `sliding_window` - 1 positions back."""
    seen, position, window = in_tree(layout), layout.position_ids, config.sliding_window

    def visible(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return seen(row, head, query, key) & (position[row, key] > position[row, query] - window)

    return visible


def in_chunk(layout: Layout, config: Any) -> Visible:
    """As `in_tree`, within the same run of `attention_chunk_size` positions."""
    seen, position, size = in_tree(layout), layout.position_ids, config.attention_chunk_size

    def visible(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return seen(row, head, query, key) & (
            position[row, key] // size == position[row, query] // size
        )

    return visible


VISIBILITY = {
    "full_attention": lambda layout, config: in_tree(layout),
    "sliding_attention": in_window,
    "chunked_attention": in_chunk,
}


def boolean_mask(layout: Layout, visible: Visible, dtype: torch.dtype | None = None) -> Tensor:
    """[R, 1, L, L], true where the query may see the key."""
    rows, columns = layout.input_ids.shape
    place = torch.arange(columns, device=layout.input_ids.device)
    row = torch.arange(rows, device=place.device)[:, None, None]
    return visible(row, None, place[:, None], place[None, :])[:, None]


def additive_mask(layout: Layout, visible: Visible, dtype: torch.dtype) -> Tensor:
    """[R, 1, L, L], 0 where the query may see the key, else the lowest number of `dtype`."""
    mask = boolean_mask(layout, visible)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def block_mask(layout: Layout, visible: Visible, dtype: torch.dtype | None = None) -> Any:
    """The same for FlexAttention, which skips blocks in which nothing is seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, columns = layout.input_ids.shape
    return create_block_mask(
        visible, rows, None, columns, columns, device=str(layout.input_ids.device)
    )


FORMS = {"sdpa": boolean_mask, "eager": additive_mask, "flex_attention": block_mask}
