"""A decoding step: the kernels in Triton's interpreter against float64, and their compilation for a GPU that is not there."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from effconvert.kernels._decode import SPLITS, splits_for, tiles
from effconvert.kernels.decode_attention import cost, decode_attention, decode_attention_reference, uncovered
from tests.kernels.compiling import SHARED, compiled

LEAST = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # the interpreter cuts bfloat16 off where a GPU rounds
DRAW = torch.Generator()


def rows(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=DRAW.manual_seed(seed), dtype=torch.float64).to(dtype)


def given(batch=2, heads=6, kv_heads=2, keys=50, width=16, value_width=16, tokens=1, dtype=torch.float32):
    """Queries, keys and values."""
    shapes = (heads, tokens, width), (kv_heads, keys, width), (kv_heads, keys, value_width)
    return [rows(batch, *shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def holes(tokens, keys):
    """A causal mask with padding before, between and behind, and a text of which nothing is seen."""
    mask = torch.ones(3, tokens, keys, dtype=torch.bool).tril(keys - tokens)
    mask[0, :, :9], mask[0, :, 30:33], mask[1, :, 41:], mask[2] = False, False, False, False
    return mask


CASES = {
    "three heads a KV head": ({"batch": 2, "heads": 9, "kv_heads": 3, "keys": 260, "width": 64, "value_width": 64}, {}),
    "one narrow head for all": ({"batch": 1, "heads": 36, "kv_heads": 1, "keys": 300, "width": 96, "value_width": 48}, {"processors": 8}),
    "latents": ({"batch": 1, "heads": 40, "kv_heads": 1, "keys": 40, "width": 288, "value_width": 272}, {"scaling": 0.3}),
    "window, sinks and lengths": (
        {"batch": 2, "heads": 12, "kv_heads": 2, "keys": 300, "width": 80, "value_width": 80, "tokens": 3},
        {"window": 140, "sinks": 4, "start": torch.tensor([7, 0]), "stop": torch.tensor([290, 17]), "processors": 8},
    ),
    "sinks by text, with queries of their own": (
        {"batch": 3, "heads": 6, "kv_heads": 2, "keys": 120, "width": 32, "value_width": 32},
        {"window": 100, "sinks": torch.tensor([5, 0, 2]), "start": torch.tensor([0, 60, 0], dtype=torch.int32), "sink_query": True},
    ),
    "a mask, and a soft-cap": (
        {"batch": 3, "heads": 6, "kv_heads": 2, "keys": 150, "width": 20, "value_width": 12, "tokens": 2},
        {"mask": holes(2, 150), "softcap": 2.0, "scaling": 0.7, "processors": 8},
    ),
}


def errors(case, dtype):
    """The largest errors of the kernel, and of PyTorch in the same type, of the largest output."""
    sizes, options = CASES[case]
    options = dict(options)
    inputs = given(**sizes, dtype=dtype)
    if "sink_query" in options:
        options["sink_query"] = rows(*inputs[0].shape, dtype=dtype, seed=7)
    found = decode_attention(*inputs, **options)
    options.pop("processors", None)
    plain = decode_attention_reference(*inputs, **options)
    if "sink_query" in options:
        options["sink_query"] = options["sink_query"].double()
    exact = decode_attention_reference(*(tensor.double() for tensor in inputs), **options)
    assert found.dtype == dtype
    assert found.isfinite().all()
    return [float((some.double() - exact).abs().max() / exact.abs().max()) for some in (found, plain)]


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", LEAST, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case, dtype):
    error, theirs = errors(case, dtype)
    assert error <= max(2 * theirs, LEAST[dtype])


def test_the_formula_is_softmax_over_what_is_seen():
    """The reference itself, a key at a time."""
    query, key, value = (tensor.double() for tensor in given(batch=1, heads=2, kv_heads=1, keys=9, tokens=2))
    found = decode_attention_reference(query, key, value, torch.tensor([1]), torch.tensor([8]), window=3, sinks=2, scaling=0.5, softcap=1.5)
    for head, token in itertools.product(range(2), range(2)):
        at = 6 + token
        seen = [1, 2, *range(at - 2, at + 1)]
        scores = torch.stack([1.5 * torch.tanh(0.5 * (query[0, head, token] * key[0, 0, j]).sum() / 1.5) for j in seen])
        torch.testing.assert_close(found[0, head, token], (scores.softmax(0)[:, None] * value[0, 0, seen]).sum(0))


def test_what_nobody_sees_may_be_anything():
    """Nothing behind the end of a cache, before the first token or outside the window is read, not even to be multiplied by 0."""
    query, key, value = given(keys=90)
    limits = {"start": torch.tensor([3, 40]), "stop": torch.tensor([80, 61]), "window": 20, "sinks": 2}
    for options in (limits, {"mask": torch.arange(90) % 7 == torch.tensor([[[2]], [[3]]])}):
        even = [torch.zeros_like(rows_[..., :1]) for rows_ in (query, key)]  # all that is seen is of one weight
        seen = decode_attention_reference(*even, torch.eye(90).expand(2, 2, -1, -1), **options)[:, :1, 0] > 0
        wild = [torch.where(seen[..., None], tensor, torch.nan) for tensor in (key, value)]
        torch.testing.assert_close(decode_attention(query, *wild, **options), decode_attention_reference(query, key, value, **options))
    nothing = decode_attention(query, key, value, start=torch.tensor([0, 50]), stop=torch.tensor([90, 50]))
    assert not nothing[1].any()
    assert nothing[0].any()


@pytest.mark.parametrize(("keys", "width", "value_width", "tokens"), [(1, 1, 1, 1), (17, 3, 33, 1), (5, 16, 1, 4), (129, 24, 7, 2)])
def test_odd_sizes(keys, width, value_width, tokens):
    inputs = given(1, 3, 1, keys, width, value_width, min(tokens, keys))
    torch.testing.assert_close(decode_attention(*inputs), decode_attention_reference(*inputs))


def test_views_of_caches_and_any_order():
    """Rows with gaps, as of a static cache and of [B, S, Hk, D]; a ring, in which the newest token stands anywhere; and splits change nothing."""
    query, key, value = given(keys=200)
    expected = decode_attention_reference(query, key, value)
    longer = [torch.cat([rows_, rows_ + torch.nan], 2)[:, :, :200] for rows_ in (key, value)]
    by_token = [rows_.transpose(1, 2).contiguous().transpose(1, 2) for rows_ in (key, value)]
    ring = [rows_.roll(77, 2) for rows_ in (key, value)]
    fused = torch.cat([query, query, query], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, 6:12]
    for given_query, pair in ((query, longer), (fused, by_token), (query, ring)):
        torch.testing.assert_close(decode_attention(given_query, *pair), expected)
    for processors in (1, 3):
        torch.testing.assert_close(decode_attention(query, key, value, processors=processors), expected)
    assert decode_attention(query, key, value).transpose(1, 2).is_contiguous()


def test_a_text_is_split_where_programs_are_few():
    assert [splits_for(programs, 64, 132) for programs in (8, 128, 264, 512, 5000)] == [29, 2, 1, 1, 1]
    assert splits_for(8, 3, 132) == 3
    assert splits_for(1, 0, 132) == 1


def test_compilers_see_an_operation():
    inputs = given(1, 3, 1, 20)
    arguments = (*inputs, None, None, 8, 2, None, None, 0.25, 0.0, None, 132)
    torch.library.opcheck(torch.ops.effconvert.decode_attention.default, arguments)
    step = torch.compile(lambda *rows: 2 * decode_attention(*rows, window=8, sinks=2, scaling=0.25), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(*inputs), 2 * decode_attention_reference(*inputs, window=8, sinks=2, scaling=0.25))


def test_its_cost_is_the_bytes_of_what_it_reads_and_writes():
    query, key, value = given(3, 6, 2, 40, 16, 24, 2, torch.float16)
    moved = sum(tensor.nbytes for tensor in (query, key, value, decode_attention_reference(query, key, value)))
    found = cost(3, 6, 2, 40, 16, 24, 2)
    assert found.bytes == moved
    assert found.flops == 2 * 3 * 6 * 2 * 40 * (16 + 24)
    assert cost(3, 6, 2, 40, 16, 24, 2, splits=4).bytes == moved + 2 * 4 * 3 * 6 * 2 * 4 * 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": rows(2, 6, 16)}, r"query is \[2, 6, 16\], and it should have four dimensions"),
        ({"query": rows(2, 5, 1, 16)}, "query has 5 heads, and key 2"),
        ({"query": rows(2, 6, 1, 16).double()}, "query is torch.float64"),
        ({"key": rows(2, 2, 50, 8)}, r"key is \[2, 2, 50, 8\], and it should be \[2, 2, 50, 16\]"),
        ({"key": rows(2, 2, 0, 16), "value": rows(2, 2, 0, 16)}, "key has no token"),
        ({"key": rows(2, 2, 16, 50).mT}, "key has a stride of 50"),
        ({"value": rows(2, 2, 49, 16)}, r"value is \[2, 2, 49, 16\]"),
        ({"value": rows(2, 2, 50, 16).half()}, "value is torch.float16, and query torch.float32"),
        ({"value": rows(2, 2, 50, 600)}, "value is 600 wide, and it should be at most 512 in torch.float32"),
        ({"value": torch.zeros(2, 2, 50, 16, device="meta")}, "value is on meta, and query on cpu"),
        ({"query": rows(2, 6, 1, 16).requires_grad_()}, "wants a gradient"),
        ({"window": 0}, "window is 0"),
        ({"window": -3}, "window is -3"),
        ({"sinks": -1}, "sinks is -1"),
        ({"sinks": torch.zeros(3).long()}, r"sinks is torch.int64 \[3\], and it should be int32 or int64 \[2\]"),
        ({"start": torch.zeros(2)}, "start is torch.float32"),
        ({"stop": torch.zeros(2, 1).long()}, "stop is torch.int64"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"mask": torch.ones(2, 1, 50)}, "mask is torch.float32"),
        ({"mask": torch.ones(2, 1, 50).bool(), "window": 3}, "mask stands in place"),
        ({"sink_query": rows(2, 6, 1, 16)}, "sink_query is for one token with a window"),
    ],
)
def test_what_it_does_not_take_is_refused_before_a_launch(change, message):
    inputs = {**dict(zip(("query", "key", "value"), given(), strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        decode_attention(**inputs)


def test_what_is_not_covered_has_a_reason():
    assert uncovered(*given()) == ""
    assert "float64" in uncovered(*(tensor.double() for tensor in given()))


SHIPPED = [  # G, T, widths of keys and values, and what else
    (3, 1, 64, 64, {}),
    (6, 1, 128, 128, {"MASKED": True}),
    (9, 1, 64, 64, {"WINDOW": True, "SINKS": True, "FAR": True}),
    (36, 1, 128, 128, {}),
    (12, 4, 64, 64, {"MASKED": True}),
    (9, 1, 256, 256, {"CAPPED": True}),
    (9, 1, 96, 48, {}),
    (32, 1, 576, 512, {}),
    (32, 1, 1024, 1024, {}),
]
STRIDES = ("q_b", "q_h", "q_t", "f_b", "f_h", "f_t", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s")
FLAGS = ("MASKED", "WINDOW", "SINKS", "FAR", "CAPPED", "ALONE")


def case(group, tokens, width, value_width, flags, dtype="bf16", itemsize=2):
    """What `compiled` needs to compile the first kernel as it is launched."""
    cut = tiles(group * tokens, width, value_width, itemsize)
    pointers = {**dict.fromkeys(("query", "far", "key", "value"), f"*{dtype}"), "mask": "*u8", **dict.fromkeys(("parts", "norms"), "*fp32")}
    counts = dict.fromkeys(("start", "counts"), "*i64") if flags.get("SINKS") else {}
    numbers = dict.fromkeys((*STRIDES, "m_b", "m_t", "S", "splits", "window", "sinks"), "i32") | {"sharpness": "fp32", "cap": "fp32"}
    sizes = {"HK": 8, "G": group, "T": tokens, "D": width, "V": value_width, "ROWS": cut.rows, "BLOCKS": -(-group * tokens // cut.rows), "BLOCK": cut.block}
    widths = dict(zip(("D1", "D2", "V1", "V2"), (*cut.widths, *cut.value_widths), strict=True))
    absent = dict.fromkeys({"start", "stop", "counts"} - counts.keys())
    return {
        "kernel": "effconvert.kernels._decode:part",
        "signature": pointers | counts | numbers,
        "fixed": {**dict.fromkeys(FLAGS, False), **flags, **sizes, **widths, **absent},
        "aligned": [*pointers, *counts, *STRIDES],
        "warps": cut.warps,
        "stages": cut.stages,
    }


def sums(width):
    """The same of the second kernel."""
    signature = {"parts": "*fp32", "norms": "*fp32", "out": "*bf16", "splits": "i32"}
    fixed = {"V": width, "PARTS": SPLITS, "COLUMNS": 64}
    return {"kernel": "effconvert.kernels._decode:add_up", "signature": signature, "fixed": fixed, "aligned": [*signature][:3], "warps": 4}


WHOLE = [(3, 1, 64, 64, {}), (9, 1, 512, 512, {})]  # in float32


def test_it_compiles_for_a_hopper_gpu_without_spills():
    parts = [*(case(*shape) for shape in SHIPPED), *(case(*shape, "fp32", 4) for shape in WHOLE)]
    made = compiled([*parts, sums(64), sums(96)])
    for shape, found in zip([*SHIPPED, *WHOLE, "sum", "sum"], made, strict=True):
        assert found["shared"] <= SHARED, shape
        assert found["stack"] == 0, shape  # nothing is spilled
    for found in made[: len(parts)]:
        assert found["copies"]  # keys and values come 16 bytes at a time, while others are multiplied
    for found in made[: len(SHIPPED)]:
        assert found["tensor_cores"]
