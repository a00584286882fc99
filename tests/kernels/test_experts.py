"""Experts of few tokens: the kernels in Triton's interpreter against float64, and their compilation for a GPU that is not there."""

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

pytest.importorskip("triton")

from effconvert.kernels.experts import ACTIVATIONS, EXPERTS, TOKENS, cost, experts, experts_reference, uncovered
from tests.kernels.compiling import SHARED
from tests.kernels.launches import launched

LEAST = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # the interpreter cuts bfloat16 off where a GPU rounds
DRAW = torch.Generator()


def rows(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=DRAW.manual_seed(seed), dtype=torch.float64).to(dtype)


def given(tokens=3, width=40, inner=24, count=6, choices=2, dtype=torch.float32):
    """Tokens, matrices, choices and weights."""
    chosen = torch.stack([torch.randperm(count, generator=DRAW.manual_seed(token))[:choices] for token in range(tokens)])
    weights = rows(tokens, choices, seed=3).softmax(-1).to(dtype)
    matrices = [rows(count, *shape, dtype=dtype, seed=seed) * shape[1] ** -0.5 for seed, shape in enumerate([(2 * inner, width), (width, inner)])]
    return rows(tokens, width, dtype=dtype, seed=2), *matrices, chosen, weights


CASES = {
    "one token": ({"tokens": 1, "width": 64, "inner": 32, "count": 8, "choices": 2}, "silu"),
    "some": ({"tokens": 5, "width": 80, "inner": 48, "count": 6, "choices": 3}, "gelu"),
    "as many as there may be": ({"tokens": 16, "width": 33, "inner": 130, "count": 4, "choices": 1}, "gelu-tanh"),
    "wide": ({"tokens": 2, "width": 576, "inner": 192, "count": 6, "choices": 4}, "relu"),
}


def errors(case, dtype):
    """The largest errors of the kernel, and of PyTorch in the same type, of the largest output."""
    sizes, activation = CASES[case]
    inputs = given(**sizes, dtype=dtype)
    found, plain = (function(*inputs, activation) for function in (experts, experts_reference))
    exact = experts_reference(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs), activation)
    assert found.dtype == plain.dtype == dtype
    assert found.isfinite().all()
    return [float((some.double() - exact).abs().max() / exact.abs().max()) for some in (found, plain)]


@pytest.mark.few(4)
@pytest.mark.parametrize("dtype", LEAST, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case, dtype):
    error, theirs = errors(case, dtype)
    assert error <= max(2 * theirs, LEAST[dtype])


def test_the_formula_is_a_sum_over_choices():
    """The reference itself, a choice at a time."""
    hidden, gate_up, down, chosen, weights = (tensor.double() if tensor.is_floating_point() else tensor for tensor in given(tokens=2))
    functions = {"silu": silu, "gelu": gelu, "gelu-tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))), "relu": relu}
    assert functions.keys() == ACTIVATIONS.keys()
    for name, function in functions.items():
        found = experts_reference(hidden, gate_up, down, chosen, weights, name)
        for token, expected in enumerate(found):
            some = 0
            for expert, share in zip(chosen[token], weights[token], strict=True):
                gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
                some = some + share * (down[expert] @ (function(gate) * up))
            torch.testing.assert_close(some, expected)


def test_what_no_token_takes_may_be_anything():
    """Experts that nobody takes are not read, not even to be multiplied by 0; and what a token does not take is nothing to it, though others do."""
    hidden, gate_up, down, _, weights = given(tokens=3, count=5)
    chosen = torch.tensor([[1, 3], [3, 1], [3, 3]])  # twice the same expert counts twice
    expected = experts_reference(hidden, gate_up, down, chosen, weights)
    for matrices in (gate_up, down):
        matrices[[0, 2, 4]] = torch.nan
    torch.testing.assert_close(experts(hidden, gate_up, down, chosen, weights), expected)
    gate_up[3] = torch.nan
    found = experts(hidden, gate_up, down, torch.tensor([[1, 1], [3, 3], [1, 1]]), weights)
    assert found[[0, 2]].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize(("tokens", "width", "inner", "count", "choices"), [(1, 1, 1, 1, 1), (3, 17, 5, 3, 3), (2, 16, 40, 7, 5), (16, 24, 65, 2, 2)])
def test_odd_sizes(tokens, width, inner, count, choices):
    inputs = given(tokens, width, inner, count, choices)
    torch.testing.assert_close(experts(*inputs), experts_reference(*inputs))


def test_rows_with_gaps():
    hidden, gate_up, down, chosen, weights = given()
    wider = [torch.cat([tensor, tensor + (torch.nan if tensor.is_floating_point() else 1)], -1)[..., : tensor.shape[-1]] for tensor in (hidden, gate_up, down)]
    strided = [torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]] for tensor in (chosen.int(), weights.double())]
    torch.testing.assert_close(experts(*wider, *strided), experts_reference(hidden, gate_up, down, chosen, weights))
    assert experts(hidden[:0], gate_up, down, chosen[:0], weights[:0]).shape == (0, hidden.shape[1])


def test_compilers_see_an_operation():
    inputs = given()
    torch.library.opcheck(torch.ops.effconvert.experts.default, (*inputs, "silu"))
    step = torch.compile(lambda *rows: 2 * experts(*rows), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(*inputs), 2 * experts_reference(*inputs))


def test_its_cost_is_the_bytes_of_what_it_reads_and_writes():
    hidden, gate_up, down, chosen, weights = given(tokens=3, dtype=torch.float16)
    taken = len(chosen.unique())
    matrices = (gate_up.nbytes + down.nbytes) // len(gate_up) * taken
    middle = taken * 3 * 24 * 2
    found = cost(3, taken, 40, 24, 2)
    assert found.bytes == matrices + 2 * middle + hidden.nbytes + experts_reference(hidden, gate_up, down, chosen, weights).nbytes
    assert found.flops == 2 * 3 * 2 * 3 * 40 * 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": rows(1, 3, 40)}, r"hidden is \[1, 3, 40\], and it should have 2 dimensions"),
        ({"hidden": rows(3, 40).double()}, "hidden is torch.float64"),
        ({"hidden": rows(17, 40)}, "hidden has 17 tokens, and it should have at most 16"),
        ({"gate_up": rows(65, 48, 40), "down": rows(65, 40, 24)}, "gate_up has 65 experts, and it should have at most 64"),
        ({"hidden": rows(40, 3).T}, "hidden has a stride of 3"),
        ({"hidden": rows(3, 40).requires_grad_()}, "wants a gradient"),
        ({"gate_up": rows(6, 48, 39)}, r"gate_up is \[6, 48, 39\], and it should be \[6, 48, 40\]"),
        ({"gate_up": rows(6, 48, 40).half()}, "gate_up is torch.float16, and hidden torch.float32"),
        ({"gate_up": torch.zeros(6, 48, 40, device="meta")}, "gate_up is on meta, and hidden on cpu"),
        ({"down": rows(6, 41, 24)}, r"down is \[6, 41, 24\], and it should be \[6, 40, 24\]"),
        ({"chosen": torch.zeros(3, 0).long(), "weights": rows(3, 0)}, "chosen has no expert"),
        ({"chosen": rows(3, 2)}, "chosen is torch.float32, and it should be int32 or int64"),
        ({"chosen": torch.zeros(2, 2).long()}, r"chosen is \[2, 2\], and it should be \[3, 2\]"),
        ({"weights": rows(3, 3)}, r"weights is \[3, 3\], and it should be \[3, 2\]"),
        ({"weights": torch.ones(3, 2).long()}, "weights is torch.int64"),
        ({"activation": "tanh"}, "activation is tanh, and it should be one of silu, gelu, gelu-tanh, relu"),
    ],
)
def test_what_it_does_not_take_is_refused_before_a_launch(change, message):
    inputs = {**dict(zip(("hidden", "gate_up", "down", "chosen", "weights"), given(), strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        experts(**inputs)


def test_what_is_not_covered_has_a_reason():
    matrices = rows(EXPERTS, 12, 8), rows(EXPERTS, 8, 6)
    assert uncovered(rows(TOKENS, 8), *matrices, "silu") == ""
    assert "None" in uncovered(rows(1, 8), *matrices, None)
    assert "and hidden torch.float16" in uncovered(rows(1, 8).half(), *matrices, "silu")


SHIPPED = [  # tokens, M, F, experts, choices
    (1, 2048, 1408, 60, 4), (16, 2048, 1408, 60, 4), (4, 2048, 1408, 8, 2), (1, 2048, 1024, 8, 4), (16, 576, 192, 6, 2),
    (1, 4096, 14336, 8, 2), (16, 4096, 14336, 8, 2), (1, 2048, 768, 64, 8),
]  # fmt: skip


def launches():
    """The calls whose kernels are compiled: in bfloat16, and at last in float32. Nothing is written to the matrices, so they take no memory."""
    for number, (tokens, width, inner, count, choices) in enumerate([*SHIPPED, SHIPPED[1]]):
        dtype = torch.float32 if number == len(SHIPPED) else torch.bfloat16
        shapes = (tokens, width), (count, 2 * inner, width), (count, width, inner)
        choice = [torch.zeros(tokens, choices, dtype=kind) for kind in (torch.long, dtype)]
        inputs = [*(torch.empty(shape, dtype=dtype) for shape in shapes), *choice]
        yield lambda given=inputs: experts(*given)


def test_it_compiles_for_a_hopper_gpu_without_spills():
    made = launched(__name__)
    assert {found["kernel"] for found in made} == {"inner", "outer"}
    for found in made:
        assert found["shared"] <= SHARED, found
        assert found["stack"] == 0, found  # nothing is spilled
        assert found["copies"], found  # matrices come 16 bytes at a time, while others are multiplied
        if found["call"] < len(SHIPPED):
            assert found["mma"] or found["wgmma"], found
