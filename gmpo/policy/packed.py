"""Rows of the batch back to back, each seeing only itself."""

from gmpo.policy.layout import Cost, Plan, pack, plan
from gmpo.types import Batch


def packed(batch: Batch, cost: Cost, *, last_token: bool = False) -> Plan:
    """`batch` in the cheapest rectangle of whole rows."""
    trees = [[row] for row in range(len(batch))]
    return plan(batch, "packed", trees, lambda sizes: pack(sizes, cost), last_token=last_token)
