"""Pairs of a head's dimensions are those that RoPE turns together, and go back to where they were."""

import pytest
import torch

from effconvert.surgery._rope import join_pairs, split_pairs

PAIRS = {"halves": [(0, 3), (1, 4), (2, 5)], "interleaved": [(0, 1), (2, 3), (4, 5)]}  # of the first six of eight dimensions


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("dim", [-1, -2])
def test_pairs_are_those_of_the_layout(layout, dim):
    rows = torch.arange(8.0).expand(2, 3, 8)
    rows = rows if dim == -1 else rows.mT
    parts = split_pairs(rows, 6, layout, dim)
    first, second, still = (part.movedim(dim, -1)[0, 0].tolist() for part in parts)
    assert list(zip(first, second, strict=True)) == PAIRS[layout]
    assert still == [6, 7]
    assert torch.equal(join_pairs(*parts, layout, dim), rows)


@pytest.mark.parametrize("layout", ["", *PAIRS])
def test_a_head_that_is_not_turned_stands_still(layout):
    rows = torch.arange(8.0).expand(2, 8)
    first, second, still = split_pairs(rows, 0, layout)
    assert (first.shape, second.shape) == ((2, 0), (2, 0))
    assert torch.equal(still, rows)
    assert torch.equal(join_pairs(first, second, still, layout), rows)
