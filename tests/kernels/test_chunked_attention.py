"""Linear attention in chunks: the kernels in Triton's interpreter against float64, their gradients, what mixers give them, and their compilation for Hopper."""

import pytest
import torch

pytest.importorskip("triton")

from effconvert.kernels.chunked_attention import chunked_attention, chunked_attention_reference, cost, uncovered
from effconvert.kernels.linear_attention import Window
from effconvert.surgery.mixing import _features
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.mixing.performer import Performer
from effconvert.surgery.mixing.retnet import Retnet
from tests.kernels.compiling import SHARED
from tests.kernels.launches import launched

LOLCATS, LINEAR, RETENTION, PERFORMER = ({"window": 20}, {}, {"decay": 2, "norm": False}, {"decay": 1})
FORMS = pytest.mark.parametrize("form", [LOLCATS, LINEAR, RETENTION, PERFORMER], ids=["lolcats", "linear", "retention", "performer"])
LEAST = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # half a unit in the last place, and a little more in float32
MIXED = 1e-5  # of float32 in a call whose values are shorter: weights are two factors of 8 bits or more, which leaves 2^-17 of each
CHUNK = 32


def given(window=0, decay=0, norm=True, tokens=40, before=None, batch=1, groups=2, shared=2, features=20, width=24, dtype=torch.float64):
    """Return the arguments of the operation. `decay` is the number of states for a KV head; the first texts of a batch begin with padding."""
    draw = torch.Generator().manual_seed(0)
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape, kind=precise):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(kind)

    before = (window if before is None else before) if window else 0
    some = {
        "query": random(batch, groups, shared, tokens, features).abs(),
        "key": random(batch, groups, tokens, features).abs(),
        "value": random(batch, groups, before + tokens, width, kind=dtype),
        "state": random(batch, groups, max(1, decay), features, width + norm).abs(),
        "fall": -random(batch, groups, decay, tokens).abs() if decay else None,
        "least": 1e-30 if norm else None,
        "chunk": CHUNK,
    }
    if window:
        live = torch.rand(batch, before + tokens, generator=draw) > 0.2
        live[0, : before + tokens // 3] = False
        live[:, -1] = True
        rows = [random(batch, groups, *count, width, kind=dtype) for count in ((shared, tokens), (before + tokens,))]
        some["window"] = Window(*rows, live, random(groups, shared).sigmoid(), window, 0.4)
    return some


def weights(some):
    """Different weights of a loss, eighths, which all types have exactly: it has to be the same loss in each."""
    return ((8 * torch.arange(some.numel(), dtype=torch.float64).cos()).round() / 8).to(some.dtype).view(some.shape)


def run(function, arguments, back=True, kind=None):
    """Return outputs in a type, the state, and gradients of all tensors, with a loss that weighs each number differently."""
    copies = {name: some.detach().clone().requires_grad_() if isinstance(some, torch.Tensor) else some for name, some in arguments.items()}
    leaves = [some for some in copies.values() if isinstance(some, torch.Tensor)]
    if window := copies.get("window"):
        rows = [some.detach().clone().requires_grad_() for some in (window.query, window.key, window.share)]
        leaves += rows
        copies["window"] = Window(rows[0], rows[1], window.live, rows[2], *window[4:])
    out, state = function(**copies)
    assert out.dtype == state.dtype == arguments["state"].dtype
    out = out.to(kind or out.dtype)
    if back:
        sum((some * weights(some)).sum() for some in (out, state)).backward()
    return [some.detach() for some in (out, state, *(leaf.grad for leaf in leaves if back))]


def doubled(arguments):
    def double(some):
        return some.double() if isinstance(some, torch.Tensor) and some.is_floating_point() else some

    window = arguments.get("window")
    return {name: double(some) for name, some in arguments.items()} | ({"window": Window(*map(double, window))} if window else {})


def assert_same(arguments, back=True):
    """Equal in float64, to rounding, as are their gradients."""
    for found, expected in zip(*(run(function, arguments, back) for function in (chunked_attention, chunked_attention_reference)), strict=True):
        assert float((found - expected).abs().max()) <= 1e-13 * float(expected.abs().max().clamp_min(1))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (LOLCATS, torch.float32),
        (LOLCATS, torch.float16),
        (LOLCATS, torch.bfloat16),
        (LINEAR, torch.bfloat16),
        (RETENTION, torch.float32),
        (PERFORMER, torch.bfloat16),
    ],
)
def test_it_is_at_most_twice_as_far_from_the_formula_as_pytorch(form, dtype):
    arguments = given(**form, groups=1, tokens=38, dtype=dtype)
    exact = run(chunked_attention_reference, doubled(arguments))
    for found, eager, expected in zip(*(run(some, arguments, kind=dtype) for some in (chunked_attention, chunked_attention_reference)), exact, strict=True):
        assert found.dtype == eager.dtype
        assert not found.isnan().any()
        error, theirs = (float((some.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)) for some in (found, eager))
        assert error <= max(2 * theirs, MIXED if found.dtype == torch.float32 != dtype else LEAST[found.dtype])


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "form",
    [
        {**LOLCATS, "batch": 2, "groups": 1, "shared": 1},
        {**LOLCATS, "tokens": 33, "window": 50, "before": 33, "shared": 3, "groups": 1},  # the first call, without a state
        {**LOLCATS, "tokens": 5, "window": 1, "width": 3, "features": 1},
        {**LOLCATS, "tokens": 17, "features": 70, "width": 70, "groups": 1},  # several blocks of features and of columns
        {**LOLCATS, "tokens": 1},
        {**LINEAR, "tokens": 65, "groups": 1},
        {**RETENTION, "tokens": 65, "groups": 1},
        {**PERFORMER, "tokens": 33, "features": 40},
    ],
    ids=str,
)
def test_it_is_the_reference_at_odd_sizes(form):
    assert_same(given(**form))


@pytest.mark.parametrize("form", [LOLCATS, RETENTION], ids=["lolcats", "retention"])
def test_gradients_are_those_of_what_it_computes(form):
    arguments = given(**{**form, "window": 2} if "window" in form else form, tokens=3, groups=1, features=2, width=2)
    names = [name for name, some in arguments.items() if isinstance(some, torch.Tensor)]
    window, leaves = arguments.pop("window", None), [arguments.pop(name).requires_grad_() for name in names]
    rows = [some.requires_grad_() for some in (window.query, window.key, window.share)] if window else []

    def function(*tensors):
        near = {"window": Window(tensors[-3], tensors[-2], window.live, tensors[-1], *window[4:])} if window else {}
        return chunked_attention(**dict(zip(names, tensors, strict=False)), **arguments, **near)

    assert torch.autograd.gradcheck(function, [*leaves, *rows], fast_mode=True)


@FORMS
@pytest.mark.parametrize("before", [None, 1])
def test_a_token_without_a_gradient_is_a_kernel_of_its_own(form, before):
    for sizes in ({"shared": 3}, {"features": 70, "width": 40}):
        arguments = given(**{**form, **({} if form == RETENTION else sizes)}, tokens=1, before=before)
        with torch.no_grad():
            assert_same(arguments, back=False)


def test_rows_with_gaps_and_several_calls_change_nothing():
    """Queries, keys and values as views of [B, T, H, D]; and two calls with the state between them."""
    arguments = given(**LOLCATS, tokens=50)
    window, expected = arguments["window"], run(chunked_attention_reference, arguments, back=False)

    def by_token(rows):
        return rows.movedim(-2, 1).contiguous().movedim(1, -2)

    near = Window(by_token(window.query), by_token(window.key), *window[2:])
    views = {**arguments, "window": near, **{name: by_token(arguments[name]) for name in ("query", "key", "value")}}
    for found, wanted in zip(chunked_attention(**views), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    outs, state = [], arguments["state"]
    for rows in (slice(0, 33), slice(33, 50)):
        known = slice(rows.start, rows.stop + 20)
        near = Window(window.query[..., rows, :], window.key[:, :, known], window.live[:, known], *window[3:])
        part = {"query": arguments["query"][..., rows, :], "key": arguments["key"][:, :, rows], "value": arguments["value"][:, :, known], "window": near}
        out, state = chunked_attention(**{**arguments, **part, "state": state})
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, -2), expected[0])
    torch.testing.assert_close(state, expected[1])


def test_tokens_that_see_nothing_have_neither_outputs_nor_gradients():
    arguments = given(**LOLCATS, tokens=20)
    arguments["key"], arguments["state"] = arguments["key"] * 0, arguments["state"] * 0
    arguments["window"] = arguments["window"]._replace(live=torch.zeros_like(arguments["window"].live))
    out, _, query, *_ = run(chunked_attention, arguments)
    assert not out.any()
    assert not query.any()


def test_compilers_see_operations():
    arguments = given(**LINEAR, tokens=2, groups=1, dtype=torch.float32)
    step = torch.compile(lambda **some: chunked_attention(**some), backend="aot_eager", fullgraph=True)
    for found, expected in zip(*(run(function, arguments) for function in (step, chunked_attention_reference)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    arguments = given(**LOLCATS, tokens=1, groups=1, dtype=torch.float32)
    flat = (*(arguments[name] for name in ("query", "key", "value", "state", "fall")), *arguments["window"], 1e-30)
    torch.library.opcheck(torch.ops.effconvert.chunked_attention_step.default, flat)
    torch.library.opcheck(torch.ops.effconvert.chunked_attention.default, (*flat, CHUNK), test_utils=("test_schema", "test_faketensor"))


def test_its_cost_is_the_bytes_of_what_it_reads_and_writes():
    arguments = given(**LOLCATS, tokens=64, dtype=torch.bfloat16)
    window = arguments["window"]
    moved = sum(some.nbytes for some in (arguments["query"], arguments["key"], window.query, *(rows[:, :, 20:] for rows in (arguments["value"], window.key))))
    out, state = arguments["query"].shape[:-1].numel() * 24 * 4, arguments["state"].nbytes
    assert cost(1, 2, 2, 64, 20, 24, window=20, chunk=32).bytes == moved + out + 2 * 3 * state
    assert cost(1, 2, 2, 64, 20, 24, window=20, chunk=32).flops == 2 * 4 * 64 * (20 * 24 + 32 * 44 + 2 * 20 * 24) + 2 * 2 * 64 * 20 * 24
    step = cost(1, 2, 2, 1, 20, 24)
    assert step.bytes == 2 * state + (4 + 2) * 20 * 4 + 2 * 24 * 2 + 4 * 24 * 4
    assert step.flops == 2 * (4 + 2) * 20 * 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 2, 40, 20)}, r"query is \[2, 2, 40, 20\], and it should have 5 dimensions"),
        ({"query": torch.zeros(1, 2, 2, 0, 20)}, "query has no token"),
        ({"query": torch.zeros(1, 2, 2, 40, 20).long()}, "query is torch.int64"),
        ({"key": torch.zeros(1, 2, 40, 21)}, r"key is \[1, 2, 40, 21\], and it should be \[1, 2, 40, 20\]"),
        ({"key": torch.zeros(1, 2, 40, 20).half()}, "key is torch.float16, and it should be torch.float32"),
        ({"key": torch.zeros(1, 2, 20, 40).mT}, "key has a stride of 40"),
        ({"value": torch.zeros(1, 2, 39, 24)}, "value has 39 tokens, and it should have the 40 of the queries, and at most 20 before them"),
        ({"value": torch.zeros(1, 2, 60, 300)}, "value is 300 wide, and it should be at most 256"),
        ({"value": torch.zeros(1, 2, 60, 24, device="meta")}, "value is on meta, and query on cpu"),
        ({"state": torch.zeros(1, 2, 1, 20, 24)}, r"state is \[1, 2, 1, 20, 24\], and it should be \[1, 2, 1, 20, 25\]"),
        ({"state": torch.zeros(1, 2, 1, 20, 25).half()}, "state is torch.float16"),
        ({"fall": torch.zeros(1, 2, 3, 40)}, "fall is for 3 heads, and it should be for 1 or 2"),
        ({"least": None}, "least is None, and a window needs a normaliser"),
        ({"least": 0.0}, "least is 0.0"),
        ({"chunk": 48}, "chunk is 48"),
        ({"size": 0}, "window.size is 0"),
        ({"size": -4}, "window.size is -4"),
        ({"live": torch.ones(1, 60)}, "window.live is torch.float32"),
        ({"share": torch.ones(4)}, r"window.share is \[4\], and it should be \[2, 2\]"),
    ],
)
def test_what_it_does_not_take_is_refused_before_a_launch(change, message):
    arguments = given(**LOLCATS, dtype=torch.float32)
    near = {name: change.pop(name) for name in list(change) if name in Window._fields and name not in arguments}
    arguments["window"] = arguments["window"]._replace(**near)
    with pytest.raises(ValueError, match=message):
        chunked_attention(**{**arguments, **change})


def test_what_is_not_covered_has_a_reason():
    assert uncovered(torch.zeros(1, 1, 1, 1, 4), torch.zeros(1, 1, 1, 8)) == ""
    assert "complex" in uncovered(torch.zeros(1, 1, 1, 1, 4).cfloat(), torch.zeros(1, 1, 1, 8))


@pytest.mark.parametrize(
    ("mixer", "weights"),
    [
        (Linear(window=6), {"query_map": (4, 8, 8), "key_map": (2, 8, 8), "share": (4,)}),
        (Linear(feature="t2r", features=5), {"query_map": (4, 5, 8), "key_map": (2, 5, 8), "query_bias": (4, 5), "key_bias": (2, 5)}),
        (Retnet(), {"decay": (4,), "gain": (4, 8), "gate": (32, 32), "gate_bias": (32,)}),
        (Performer(features=12), {"omega": (12, 8)}),
    ],
    ids=["lolcats", "t2r", "retnet", "performer"],
)
def test_mixers_give_the_same_by_kernels(mixer, weights, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in weights.items()}
    rows = {"query": torch.randn(2, 4, 20, 8, generator=draw), **{name: torch.randn(2, 2, 20, 8, generator=draw) for name in ("key", "value")}}
    live = torch.arange(20).expand(2, -1) >= torch.tensor([[7], [0]])
    found = []
    for chosen in (False, True):
        monkeypatch.setattr(_features, "runs_triton", lambda *_, chosen=chosen: chosen)
        some = {name: value.clone().requires_grad_() for name, value in rows.items()}
        own = {name: value.clone().requires_grad_(name != "omega") for name, value in weights.items()}
        call = Call(**some, scaling=0.3, live=live, causal=True, state=None, hidden=torch.ones(2, 20, 32), rotation=None, padded=True)
        out = mixer.mix(own, call).movedim(2, 1)[live]
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in (*some.values(), *own.values()) if leaf.requires_grad)])
    for kernel, reference in zip(*found[::-1], strict=True):
        torch.testing.assert_close(kernel, reference, rtol=2e-4, atol=2e-4 * float(reference.abs().max()))


SHIPPED = {  # KV heads, query heads that share one, width, features, window, states, and types of values and features
    "hedgehog, 64 wide": (3, 3, 64, 128, 64, 0, torch.bfloat16, torch.float32),
    "retention, 64 wide": (3, 3, 64, 64, 0, 3, torch.float32, torch.float32),
    "hedgehog, 128 wide": (2, 4, 128, 256, 64, 0, torch.bfloat16, torch.float32),
    "hedgehog, 256 wide": (1, 4, 256, 512, 64, 0, torch.bfloat16, torch.float32),
    "hedgehog in float32": (3, 3, 64, 128, 64, 0, torch.float32, torch.float32),
    "hedgehog, features in bfloat16": (2, 4, 128, 256, 64, 0, torch.bfloat16, torch.bfloat16),
    "T2R, 64 wide": (3, 3, 64, 32, 64, 0, torch.bfloat16, torch.float32),
    "retention, 128 wide": (2, 4, 128, 128, 0, 4, torch.float32, torch.float32),
    "performer, 256 features": (3, 3, 64, 256, 0, 1, torch.bfloat16, torch.float32),
}


def launches(*names):
    """Yield functions that launch all kernels, for `launched`: a pass with gradients, and a decoding step."""
    for name in names:
        groups, shared, width, features, window, states, dtype, of_features = SHIPPED[name]
        form = {"window": window, "decay": states, "norm": not (states > 1), "groups": groups, "shared": shared, "features": features, "width": width}

        def passes(form=form, dtype=dtype, of_features=of_features):
            arguments = given(**form, tokens=128, dtype=dtype) | {"chunk": 64}
            arguments |= {which: arguments[which].to(of_features) for which in ("query", "key")}
            run(chunked_attention, arguments, kind=dtype)
            arguments = given(**form, tokens=1, dtype=dtype)
            arguments |= {which: arguments[which].to(of_features) for which in ("query", "key")}
            with torch.no_grad():
                chunked_attention(**arguments)

        yield passes


@pytest.mark.parametrize("names", [list(SHIPPED)[:1], pytest.param(list(SHIPPED)[1:], marks=pytest.mark.slow)], ids=["one configuration", "the others"])
def test_they_compile_for_a_hopper_gpu_without_spills(names):
    for made in launched(__name__, *names):
        what = made["kernel"], names[made["call"]], made
        assert made["shared"] <= SHARED, what
        assert made["stack"] == 0, what  # nothing is spilled
        if made["kernel"] == "_totals":
            continue
        assert made["wgmma"] or made["mma"], what
        small = made["kernel"] == "_step" or "256 wide" in what[1] or (made["kernel"] == "_scan" and "T2R" in what[1])
        assert made["wgmma"] or small, what  # where a tile has 64 rows
        assert made["copies"] or made["kernel"] in ("_query_features", "_key_features", "_step"), what  # their loops over 64 columns are a single pass
