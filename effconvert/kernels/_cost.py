"""What operations cost, whatever computes them."""

from typing import NamedTuple


class Cost(NamedTuple):
    """What a call moves and computes at least."""

    bytes: int
    flops: int
