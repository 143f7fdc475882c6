"""Each prompt once, followed by its completions: every completion sees the prompt and itself."""

from gmpo.policy.layout import Cost, Plan, pack, plan
from gmpo.types import Batch


def shared_prefix(batch: Batch, cost: Cost, *, last_token: bool = False) -> Plan:
    """`batch` in the cheapest rectangle of whole groups: rows whose prompt is the same tensor object."""
    trees: dict[int, list[int]] = {}
    for row, prompt in enumerate(batch.prompt_ids):
        trees.setdefault(id(prompt), []).append(row)
    groups = list(trees.values())
    return plan(
        batch, "shared_prefix", groups, lambda sizes: pack(sizes, cost), last_token=last_token
    )
