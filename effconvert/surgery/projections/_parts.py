"""The projections of a layer: their names, which have one input, and how large two thin matrices are."""
# O = outputs of a projection, I = its inputs, K = rank.

from math import ceil, sqrt

SAME_INPUT = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # in the order in which a layer computes them
PARTS = tuple(part for group in SAME_INPUT for part in group)
FACTORED = ("low-rank", "recursive")  # techniques with two thin factors at a projection: in its place, or added to it
GROUPS = {"attention": PARTS[:4], "mlp": PARTS[4:], "all": PARTS}


def thin_size(out: int, inner: int, rank: int, pivoted: bool) -> int:
    """Return the parameters of two factors of a matrix [O, I]; pivoted ones have an identity [K, K] that is not stored."""
    return rank * (out + inner - (rank if pivoted else 0))


def equal_rank(out: int, inner: int, ratio: float, pivoted: bool) -> int:
    """Return the greatest rank at which two factors have no more than this share of a matrix's parameters, at least 1."""
    budget, sides = int(ratio * out * inner), out + inner
    rank = (sides - ceil(sqrt(sides**2 - 4 * budget))) // 2 if pivoted else budget // sides
    return max(1, rank)
