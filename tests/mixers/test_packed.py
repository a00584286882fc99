"""Several texts in one row: each is read as if it were alone, in every decoder, by every mixer."""

import pytest
import torch

from effconvert.modeling.model import cache_for
from effconvert.modeling.packed import Packing
from tests.mixers.mixing import FORMS, ROWS, SAME, cache_of, far, pair, run, small, stock_config, tokens, wide, with_cache
from tests.models import DECODERS, tiny

PACKS = [(name, kind) for name, kind in FORMS if kind in DECODERS and kind != "opt"]
LENGTHS = ((12, 1, 7), (5, 15))  # of the texts in each row


def positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


def packed():
    """Two rows of texts, and the positions that say so."""
    return tokens(), torch.stack([positions(lengths) for lengths in LENGTHS])


def alone(model, ids):
    """Logits of each text by itself, in the places of its tokens."""
    return torch.stack([torch.cat([run(model, text[None])[0] for text in row.split(lengths)]) for row, lengths in zip(ids, LENGTHS, strict=True)])


@pytest.mark.parametrize(("name", "kind"), PACKS)
def test_each_text_is_read_as_if_it_were_alone(name, kind):
    """Beside softmax layers, whose mask is transformers' own: the second, or those with a window, which some mixers leave alone."""
    windowed = stock_config(tiny(kind, **wide(kind))).windows()[0]
    _, model = pair(kind, (name, {**small(name, kind), **({} if windowed else {"layers": "0"})}))
    ids, places = packed()
    made = run(model, ids, position_ids=places)
    assert far(made, alone(model, ids)) <= SAME
    assert far(made, run(model, ids)) > 10 * SAME  # one text would give something else
    with torch.no_grad():
        again = model(ids, position_ids=places)  # a cache is not asked for, and not made
    assert cache_of(again) is None
    assert far(again.logits, made) <= SAME


@pytest.mark.few(4)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "llama" in row.kinds])
def test_gradients_are_those_of_the_texts_alone(name):
    _, model = pair("llama", (name, small(name, "llama")))
    model.train()
    ids, places = packed()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weight = torch.randn(*ids.shape, 128, generator=torch.Generator().manual_seed(1))
    together = torch.autograd.grad((model(ids, position_ids=places).logits * weight).sum(), parameters, allow_unused=True)
    one_by_one = 0
    for row, lengths, factors in zip(ids, LENGTHS, weight, strict=True):
        for text, factor in zip(row.split(lengths), factors.split(lengths), strict=True):
            one_by_one = one_by_one + (model(text[None]).logits[0] * factor).sum()
    alone_each = torch.autograd.grad(one_by_one, parameters, allow_unused=True)
    largest = max(float(wanted.abs().max()) for wanted in alone_each if wanted is not None)
    for made, wanted in zip(together, alone_each, strict=True):
        assert (made is None) == (wanted is None)
        if wanted is not None:  # what changes nothing, as a bias of all keys in rwkv --version 4, has rounding for a gradient
            torch.testing.assert_close(made, wanted, rtol=1e-4, atol=max(1e-5 * float(wanted.abs().max()), 1e-7 * largest))


def test_a_family_with_a_window_of_its_own_is_not_taken_for_packed():
    """A token past its window does not see the first ones either, and begins no text."""
    _, model = pair("gemma3_text", ("linear", {"window": 6, "layers": "0,1"}), sliding_window=8)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :3] = 0
    assert far(run(model, tokens(), attention_mask=mask)[0], run(model, tokens())[0]) <= SAME
    ids, places = packed()
    assert far(run(model, ids, position_ids=places), alone(model, ids)) <= SAME


def test_padding_within_a_text_does_not_end_it():
    _, model = pair("llama", ("linear", small("linear", "llama")))
    ids, mask = tokens(), torch.ones(2, 20, dtype=torch.long)
    mask[0, 8:11] = 0
    kept = mask[0].bool()
    expected = run(model, ids[:1, kept], attention_mask=torch.ones(1, 17, dtype=torch.long), position_ids=torch.arange(20)[None, kept])
    assert far(run(model, ids, attention_mask=mask)[:1, kept], expected) <= SAME


@pytest.mark.parametrize("kind", ["opt", "bert"])
def test_families_that_would_mix_them_are_refused(kind):
    _, model = pair(kind, ("performer", {"features": 32}))
    ids, places = packed()
    with pytest.raises(ValueError, match="several texts in one row"):
        model(ids, position_ids=places)


@pytest.mark.parametrize("given", ["cache", "use_cache"])
def test_a_cache_for_them_is_refused(given):
    _, model = pair("llama", ("streaming", small("streaming", "llama")))
    ids, places = packed()
    more = {"use_cache": True} if given == "use_cache" else with_cache(model, cache_for(model.config))
    with pytest.raises(ValueError, match="cannot be gone on with in a cache"):
        model(ids, position_ids=places, **more)


def test_texts_apart_and_together():
    begins = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    packing = Packing.from_starts(begins)
    rows = torch.arange(2 * 3 * 5 * 2).view(2, 3, 5, 2).float()
    texts = packing.split(rows)
    assert packing.live.tolist() == [[True, True, False, False, False], [True, True, True, False, False], [True] * 5]
    assert texts.shape == (3, 3, 5, 2)
    assert torch.equal(texts[0, :, :2], rows[0, :, :2])
    assert torch.equal(texts[1, :, :3], rows[0, :, 2:])
    assert torch.equal(texts[2], rows[1])
    assert torch.equal(texts[0, :, 2:], rows[0, :, 1:2].expand(-1, 3, -1))  # behind a text its last token, which is finite
    assert torch.equal(packing.join(texts), rows)
    assert torch.equal(packing.split(rows[:1])[2], rows[0])  # one row for all, as angles are
    assert Packing.from_starts(begins[1:]) is None
