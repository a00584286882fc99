"""The rows of the distillation loss: the kernel in Triton's interpreter against float64, its gradient, and its compilation for a GPU that is not there."""

import pytest
import torch

pytest.importorskip("triton")

from effconvert.heal import _objective
from effconvert.heal._objective import Head, Objective
from effconvert.kernels import _rows
from effconvert.kernels import divergence as operation
from effconvert.kernels._kinds import KINDS
from effconvert.kernels.choice import runs_triton
from effconvert.kernels.divergence import cost, divergence, divergence_reference
from tests.kernels.compiling import SHARED, compiled

C, V = 6, 37


def logits(rows=C, columns=V, seed=0, dtype=torch.float64, scale=3.0):
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, columns, generator=draw, dtype=torch.float64)).to(dtype)


def labels(rows=C):
    found = torch.arange(rows) * 5 % V
    found[1], found[3] = -100, -1  # any that is negative
    return found


def both(function, student, teacher, *more):
    student = student.detach().requires_grad_()  # with its strides, which a clone has not
    losses = function(student, teacher, labels(len(student)), *more)
    (losses * torch.arange(1, 1 + len(losses)).to(losses)).sum().backward()
    return losses.detach().double(), student.grad.double()


LEAST = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # the interpreter cuts bfloat16 off where a GPU rounds
WEIGHTS = [(1.0, 1.0, 0.0), (2.0, 0.75, 0.25)]  # temperature, weight, ce


def errors(kind, dtype, temperature, weight, ce):
    """Yield the largest errors of the kernel, and of PyTorch in the same type, of the largest number: of losses, and of the gradient."""
    student, teacher = logits(dtype=dtype), logits(seed=1, dtype=dtype)
    exact = both(divergence_reference, student.double(), teacher.double(), kind, temperature, weight, ce)
    eager = both(divergence_reference, student, teacher, kind, temperature, weight, ce)
    for found, expected, other in zip(both(divergence, student, teacher, kind, temperature, weight, ce), exact, eager, strict=True):
        assert not found.isnan().any()
        yield [float((some - expected).abs().max() / expected.abs().max()) for some in (found, other)]


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", LEAST, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_it_is_the_formula(kind, dtype, weights):
    for error, theirs in errors(kind, dtype, *weights):
        assert error <= max(2 * theirs, LEAST[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_is_that_of_its_loss(kind):
    student, teacher = logits(2, 7).requires_grad_(), logits(2, 7, seed=1)
    targets = torch.tensor([4, -100])
    assert torch.autograd.gradcheck(lambda some: divergence(some, teacher, targets, kind, 2.0, 0.75, 0.25), student)


@pytest.mark.few(4)
@pytest.mark.parametrize(("columns", "theirs", "block"), [(37, 37, 16), (37, 30, 16), (30, 37, 16), (1, 1, 16), (64, 64, 32), (33, 17, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes_blocks_and_padded_vocabularies(columns, theirs, block, kind, monkeypatch):
    monkeypatch.setattr(operation, "BLOCK", block)
    student, teacher = logits(3, columns), logits(3, theirs, seed=1)
    targets = torch.tensor([0, -100, columns - 1])
    found, expected = ([], [])
    for function, into in ((divergence, found), (divergence_reference, expected)):
        given = student.clone().requires_grad_()
        losses = function(given, teacher, targets, kind, 1.0, 1.0, 0.5)
        losses.sum().backward()
        into.extend([losses.detach(), given.grad])
    for ours, theirs_ in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs_)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(kind):
    student = logits(dtype=torch.float32)
    losses, gradient = both(divergence, student, student.clone(), kind)
    assert losses.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


def test_ids_without_probability_and_rows_of_a_larger_tensor():
    whole = logits(C, 2 * V)
    student, teacher = whole[:, :V], logits(seed=1)  # rows are further apart than they are long
    teacher[:, 3], student[0, 5] = -torch.inf, 60.0
    for found, expected in zip(*(both(function, student, teacher, "kl") for function in (divergence, divergence_reference)), strict=True):
        torch.testing.assert_close(found, expected)
    assert divergence(student[:0], teacher[:0], labels()[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tv"}, "kind is 'tv', and there are kl, reverse-kl, jsd"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"student": logits()[0]}, r"student is torch.float64 \[37\], and it should be logits"),
        ({"student": logits().long()}, "student is torch.int64"),
        ({"teacher": logits(5)}, r"teacher is \[5, 37\], and it should be \[6, U\]"),
        ({"teacher": logits().float()}, "teacher is torch.float32, and student torch.float64"),
        ({"labels": torch.zeros(5).long()}, r"labels is \[5\]"),
        ({"labels": torch.zeros(6)}, "labels is torch.float32"),
        ({"labels": torch.zeros(6, device="meta").long()}, "labels is on meta"),
        ({"student": logits(V, C).T}, "student has a stride of 6 between columns"),
    ],
)
def test_what_it_does_not_take_is_refused_before_a_launch(change, message):
    with pytest.raises(ValueError, match=message):
        divergence(**{"student": logits(), "teacher": logits(seed=1), "labels": labels(), **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_knows_it_as_an_operation(dtype):
    for wanted in (True, False):
        given = (logits(dtype=dtype).requires_grad_(wanted), logits(seed=1, dtype=dtype), labels(), "jsd", 2.0, 0.75, 0.25, wanted)
        torch.library.opcheck(torch.ops.effconvert.divergence.default, given)


def test_of_its_gradient_there_is_none():
    student = logits().requires_grad_()
    (slope,) = torch.autograd.grad(divergence(student, logits(seed=1), labels()).square().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_its_cost_is_what_it_reads_and_writes():
    student, teacher = logits(dtype=torch.bfloat16).requires_grad_(), logits(columns=V - 2, seed=1, dtype=torch.bfloat16)
    losses = divergence(student, teacher, labels())
    assert cost(C, V, V - 2).bytes == sum(some.nbytes for some in (student, student, teacher, labels(), losses))


def cases():
    """What `compiled` needs to compile the kernel as it is launched."""
    pointers = {"student": "*{}", "teacher": "*{}", "labels": "*i64", "losses": "*fp32", "gradient": "*{}"}
    numbers = dict.fromkeys(("s_stride", "t_stride", "g_stride", "V", "K"), "i32") | dict.fromkeys(("sharpness", "weight", "ce"), "fp32")
    return [
        {
            "kernel": "effconvert.kernels.divergence:_rows",
            "signature": {name: kind.format(dtype) for name, kind in (pointers | numbers).items()},
            "fixed": {"KIND": kind, "CE": True, "GRADIENT": True, "BLOCK": operation.BLOCK, "ACC": "fp32"},
            "aligned": [*pointers, "s_stride", "t_stride", "g_stride", "V", "K"],  # a vocabulary is a multiple of 16
            "warps": _rows.WARPS,
        }
        for kind in range(len(KINDS))
        for dtype in ("bf16", "fp32")
    ]


def test_it_compiles_for_a_hopper_gpu_without_spills():
    for made in compiled(cases()):
        assert made["shared"] <= SHARED
        assert made["stack"] == 0  # nothing is spilled
        assert made["registers"] <= 128
        assert made["wide_loads"]
        assert made["wide_stores"]


def test_the_objective_runs_it_where_it_is_asked_to(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(40, 8, generator=draw) for _ in range(2))
    own, other = (torch.randn(V, 8, generator=draw) for _ in range(2))
    found = []
    for chosen in (False, True):
        monkeypatch.setattr(_objective, "runs_triton", lambda *_, chosen=chosen: chosen)
        given, weights = hidden.clone().requires_grad_(), own.clone().requires_grad_()
        heads = Head(lambda part, w=weights: part @ w.T, lambda w=weights: [w]), Head(lambda part: part @ other.T)
        loss = Objective("jsd", 2.0, 0.25)(given, heads[0], theirs, heads[1], torch.arange(40) % V)
        loss.backward()
        found.append((loss.detach(), given.grad, weights.grad))
    for reference, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, reference)


@pytest.mark.parametrize(("value", "message"), [("fast", "should be one of auto, triton, reference"), ("triton", "not on cpu; unset it")])
def test_what_the_variable_cannot_be(value, message, monkeypatch):
    monkeypatch.setenv("EFFCONVERT_KERNELS", value)
    with pytest.raises(ValueError, match=message):
        runs_triton(torch.device("cpu"), "divergence")
