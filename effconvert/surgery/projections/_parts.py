"""The projections of a layer: their names, which have one input, and the rank at which two thin matrices have a given size."""

SAME_INPUT = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # in the order in which a layer computes them
PARTS = tuple(part for group in SAME_INPUT for part in group)
FACTORED = ("low-rank", "recursive")  # techniques with two thin factors at a projection: in its place, or added to it
GROUPS = {"attention": PARTS[:4], "mlp": PARTS[4:], "all": PARTS}


def equal_rank(out: int, inner: int, ratio: float) -> int:
    """Return the rank at which two matrices have this share of a matrix's parameters, at least 1."""
    return max(1, int(ratio * out * inner / (out + inner)))
