"""The loss towards samples, or the likeliest ids: the kernel in Triton's interpreter against float64, its gradient, and its compilation for a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from effconvert.heal import _kept
from effconvert.heal._kept import KINDS, KeptObjective
from effconvert.heal._objective import Head, Objective
from effconvert.kernels import _rows
from effconvert.kernels import sparse_divergence as operation
from effconvert.kernels._divergences import outcomes
from effconvert.kernels._kinds import SPARSE_KINDS
from effconvert.kernels.divergence import divergence
from effconvert.kernels.sparse_divergence import cost, sparse_divergence, sparse_divergence_reference
from tests.kernels.compiling import SHARED, compiled
from tests.kernels.test_divergence import LEAST, WEIGHTS, C, V, labels, logits

K = 5


def kept(kind, rows=C, vocabulary=V, count=K, temperature=1.0):
    """Ids and numbers of a teacher, as a cache has them."""
    log_probs = (logits(rows, vocabulary, seed=1).float() / temperature).log_softmax(-1)
    way = KINDS["samples" if kind == "samples" else "topk"](count, vocabulary)
    return way.unpack(way.pack(*way.keep(log_probs, torch.Generator().manual_seed(2))))


def both(function, student, ids, numbers, *more, targets=None):
    """The losses, and the gradient of a weighted sum of them."""
    given = student.detach().requires_grad_()  # with its strides, which a clone has not
    losses = function(given, ids, numbers, labels(len(student)) if targets is None else targets, *more)
    (losses * torch.arange(1, 1 + len(losses)).to(losses)).sum().backward()
    return losses.detach().double(), given.grad.double()


def errors(kind, dtype, temperature, weight, ce):
    """Yield the largest errors of the kernel, and of PyTorch in the same type, of the largest number: of losses, and of the gradient."""
    student, known, how = logits(dtype=dtype), kept(kind, temperature=temperature), (kind, V - 2, temperature, weight, ce)
    ids = known[0].clamp(max=V - 3)
    exact = both(sparse_divergence_reference, student.double(), ids, known[1].double(), *how)
    results = [both(function, student, ids, known[1], *how) for function in (sparse_divergence, sparse_divergence_reference)]
    for found, other, expected in zip(*results, exact, strict=True):
        assert not found.isnan().any()
        yield [float((some - expected).abs().max() / expected.abs().max()) for some in (found, other)]


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", SPARSE_KINDS)
@pytest.mark.parametrize("dtype", LEAST, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_it_is_the_formula(kind, dtype, weights):
    for error, theirs in errors(kind, dtype, *weights):
        assert error <= max(2 * theirs, LEAST[dtype])


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_its_gradient_is_that_of_its_loss(kind):
    ids, numbers = kept(kind, 2, 4, 2)
    targets = torch.tensor([4, -100])
    student = logits(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda some: sparse_divergence(some, ids, numbers, targets, kind, 4, 2.0, 0.75, 0.25), student)


SIZES = [  # columns, of which belong to the vocabulary, ids kept, columns at a time, ids at a time
    (37, 37, 5, 16, 4),
    (37, 30, 16, 16, 16),
    (37, 30, 30, 16, 8),  # all of them: no tail
    (64, 64, 63, 32, 32),
    (33, 33, 1, 16, 1),
    (1, 1, 1, 16, 4),
]


@pytest.mark.few(4)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_odd_sizes_blocks_and_padded_vocabularies(sizes, kind, monkeypatch):
    columns, vocabulary, count, block, size = sizes
    monkeypatch.setattr(operation, "BLOCK", block)
    monkeypatch.setattr(operation, "SIZE", size)
    ids, numbers = kept(kind, 3, vocabulary, count)
    targets = torch.tensor([0, -100, columns - 1])
    given = (logits(3, columns), ids, numbers.double(), kind, vocabulary, 1.5, 1.0, 0.5)
    for found, expected in zip(*(both(function, *given, targets=targets) for function in (sparse_divergence, sparse_divergence_reference)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", SPARSE_KINDS[:-1])
def test_all_ids_are_the_whole_distribution_and_a_student_that_is_its_teacher_has_no_loss(kind):
    student, teacher = logits(), logits(seed=1)
    ids = torch.arange(V).expand(C, -1)
    given = student.clone().requires_grad_()
    whole = divergence(given, teacher, labels(), kind, 2.0, 0.7, 0.3)
    (slope,) = torch.autograd.grad((whole * torch.arange(1, C + 1)).sum(), given)
    found = both(sparse_divergence, student, ids, teacher / 2, kind, V, 2.0, 0.7, 0.3)
    torch.testing.assert_close(found, (whole.detach(), slope))
    known = student.topk(K).indices
    for some in both(sparse_divergence, student.float(), known, outcomes(student.float().log_softmax(-1), known), kind):
        assert some.abs().max() < 2e-6


@pytest.mark.parametrize("kind", SPARSE_KINDS[:-1])
def test_a_tail_of_almost_nothing_has_a_value_and_a_gradient(kind):
    student = torch.tensor([[30.0, 0.0, 0.0, -3.0]])  # one less the largest probability is 0 in float32
    ids, numbers = torch.tensor([[0]]), outcomes(torch.tensor([[20.0, 1.0, 0.0, 0.0]]).log_softmax(-1), torch.tensor([[0]]))
    how = (kind, None, 1.0, 1e6)
    found = both(sparse_divergence, student, ids, numbers, *how, targets=torch.tensor([-100]))
    exact = both(sparse_divergence_reference, student.double(), ids, numbers.double(), *how, targets=torch.tensor([-100]))
    torch.testing.assert_close(found[0], exact[0], rtol=1e-4, atol=0.1)
    torch.testing.assert_close(found[1][:, 1:], exact[1][:, 1:], rtol=1e-4, atol=0.0)
    assert found[1][:, 1:].abs().min() > 0


def test_ids_without_probability_rows_of_a_larger_tensor_and_places_that_are_filled_up():
    whole = logits(C, 2 * V)
    student = whole[:, :V]  # rows are further apart than they are long
    student[0, 5] = 60.0
    ids, numbers = kept("samples")
    ids[:, -2:], numbers[:, -2:] = 0, 0.0  # as a cache fills up rows, and id 0 is one that was drawn
    ids[2, 0], numbers[2, 0] = 0, 0.5
    more = [("samples", (ids, numbers)), ("kl", kept("kl"))]
    more[1][1][1][:, -1] = -torch.inf  # a teacher without a tail
    for kind, known in more:
        results = [both(function, student, *known, kind) for function in (sparse_divergence, sparse_divergence_reference)]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert sparse_divergence(student[:0], ids[:0], numbers[:0], labels()[:0], "samples").shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tv"}, "kind is 'tv', and there are kl, reverse-kl, jsd, samples"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"student": logits().long()}, "student is torch.int64"),
        ({"student": logits(V, C).T}, "student has a stride of 6 between columns"),
        ({"vocabulary": 38}, "vocabulary is 38, and it should be from 1 to the student's 37"),
        ({"ids": torch.zeros(5, K).long()}, r"ids is \[5, 5\], and it should be \[6, K\] with K from 1 to 37"),
        ({"ids": torch.zeros(C, V + 1).long()}, r"ids is \[6, 38\]"),
        ({"ids": torch.zeros(C, K)}, "ids is torch.float32"),
        ({"numbers": torch.zeros(C, K)}, r"numbers is \[6, 5\], and it should be \[6, 6\]"),
        ({"kind": "samples"}, r"numbers is \[6, 6\], and it should be \[6, 5\]"),
        ({"numbers": torch.zeros(C, K + 1).half()}, "numbers is torch.float16"),
        ({"numbers": torch.zeros(C, K + 1, device="meta")}, "numbers is on meta"),
        ({"labels": torch.zeros(5).long()}, r"labels is \[5\]"),
    ],
)
def test_what_it_does_not_take_is_refused_before_a_launch(change, message):
    ids, numbers = kept("kl")
    with pytest.raises(ValueError, match=message):
        sparse_divergence(**{"student": logits(), "ids": ids, "numbers": numbers, "labels": labels(), **change})


@pytest.mark.parametrize("kind", ["kl", "samples"])
def test_torch_knows_it_as_an_operation(kind):
    ids, numbers = kept(kind)
    for dtype, wanted in ((torch.float32, True), (torch.bfloat16, False)):
        given = (logits(dtype=dtype).requires_grad_(wanted), ids, numbers, labels(), kind, V, 1.0, 1.0, 0.1, wanted)
        torch.library.opcheck(torch.ops.effconvert.sparse_divergence.default, given)


@pytest.mark.parametrize("kind", ["kl", "samples"])
def test_its_cost_is_what_it_reads_and_writes(kind):
    ids, numbers = kept(kind)
    student = logits(dtype=torch.bfloat16).requires_grad_()
    losses = sparse_divergence(student, ids, numbers, labels(), kind)
    mask = 0 if kind == "samples" else 2 * C * V
    assert cost(C, V, K, kind != "samples").bytes == sum(some.nbytes for some in (student, student, ids, numbers, labels(), losses)) + mask


def cases(dtypes=("bf16", "fp32")):
    """What `compiled` needs to compile the kernel as it is launched."""
    numbers = dict.fromkeys(("s_stride", "g_stride", "V", "U", "K"), "i32") | dict.fromkeys(("sharpness", "weight", "ce"), "fp32")
    for kind in SPARSE_KINDS:
        for dtype in dtypes:
            pointers = {"student": f"*{dtype}", "ids": "*i64", "numbers": "*fp32", "kept": "*i64" if kind == "samples" else "*u8", "labels": "*i64"}
            pointers |= {"losses": "*fp32", "gradient": f"*{dtype}"}
            fixed = {"KIND": SPARSE_KINDS.index(kind), "TAIL": int(kind != "samples"), "CE": True, "GRADIENT": True, "ACC": "fp32"}
            yield {
                "kernel": "effconvert.kernels.sparse_divergence:_sparse_rows",
                "signature": pointers | numbers,
                "fixed": {**fixed, "SIZE": 64 if kind == "samples" else 128, "BLOCK": operation.BLOCK},  # of 64 ids and a tail
                "aligned": [*pointers, "s_stride", "g_stride", "V", "U", "K"],  # a vocabulary is a multiple of 16
                "warps": _rows.WARPS,
            }


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_it_compiles_for_a_hopper_gpu_without_spills(dtype):
    for made in compiled([*cases([dtype])]):
        assert made["shared"] <= SHARED
        assert made["stack"] == 0  # nothing is spilled
        assert made["registers"] <= 128
        assert made["wide_loads"]
        assert made["wide_stores"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_cache_runs_it_where_it_is_asked_to(kind, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    hidden, own = torch.randn(40, 8, generator=draw), torch.randn(V, 8, generator=draw)
    way = KINDS[kind](K, V)
    known, found = kept("samples" if kind == "samples" else "jsd", 40), []
    for chosen in (False, True):
        monkeypatch.setattr(_kept, "runs_triton", lambda *_, chosen=chosen: chosen)
        given, weights = hidden.clone().requires_grad_(), own.clone().requires_grad_()
        objective = Objective("kl" if kind == "samples" else "jsd", 2.0, 0.25)
        loss = KeptObjective(objective, way)(given, Head(lambda part, w=weights: part @ w.T, lambda w=weights: [w]), *known, torch.arange(40) % V)
        loss.backward()
        found.append((loss.detach(), given.grad, weights.grad))
    for reference, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, reference)
