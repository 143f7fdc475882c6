"""The plain rectangle: one row of the batch per row, padded on the right, for every model there is."""

from gmpo.policy.layout import Plan, plan
from gmpo.types import Batch


def padded(batch: Batch, *, last_token: bool = False, multiple_of: int | None = None) -> Plan:
    """`batch` as it is.  Padding comes last, where no real token sees it, whatever a model makes of its mask."""
    trees = [[row] for row in range(len(batch))]
    return plan(
        batch,
        "padded",
        trees,
        lambda sizes: trees,
        last_token=last_token,
        multiple_of=multiple_of or 1,
    )
