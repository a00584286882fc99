"""What mixers compute, beside their definitions written down without any of their tricks."""

import pytest
import torch

from effconvert.checkpoint.replaced import Replaced
from effconvert.families import FAMILIES
from effconvert.modeling.model import config_class, model_class
from tests.mixers.mixing import SAME, far, in_pieces, pair, run, stock_config, tokens
from tests.models import tiny

LONG = {"num_hidden_layers": 1, "max_position_embeddings": 256}  # one layer: keys and values are those of the tokens alone
GPT2 = {"n_layer": 1, "n_positions": 256}
KINDS = {
    "llama": LONG,
    "llama yarn": {  # whose angles are longer than 1
        **LONG,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen3": {**LONG, "num_key_value_heads": 2},
    "glm": {**LONG, "num_key_value_heads": 1},  # RoPE of pairs side by side, of half a head
    "gpt_neox": LONG,
    "gemma2": {**LONG, "layer_types": ["full_attention"], "attn_logit_softcapping": 2.0},
    "phi": LONG,
    "smollm3": {**LONG, "no_rope_layers": [0], "use_sliding_window": False},
    "cohere2": {**LONG, "layer_types": ["full_attention"]},
    "gpt2": GPT2,  # no RoPE
    "opt": LONG,
}
TEXT = 150  # tokens: more than the chunks that kernels take


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize(("window", "sinks"), [(6, 2), (6, 0), (4, 4), (70, 3)])
def test_streaming_is_the_original_on_the_first_and_the_last_tokens(case, window, sinks):
    """In a model of one layer: the original reads what is in the cache, each at its place there."""
    kind, changes = case.partition(" ")[0], KINDS[case]
    model, other = pair(kind, ("streaming", {"window": window, "sinks": sinks}), **changes) if sinks else with_mixer(kind, window, changes)
    model.set_attn_implementation("eager")
    ids = tokens(1, TEXT)
    whole, (pieces, _) = run(other, ids), in_pieces(other, ids, (100, 1, 1, 40, 8))
    for at in (0, 1, window - 1, window, window + sinks - 1, window + sinks, window + sinks + 1, 99, 100, 101, 130, TEXT - 1):
        seen = sorted({*range(min(sinks, at + 1)), *range(max(0, at - window + 1), at + 1)})
        place = torch.arange(len(seen))[None] if FAMILIES[kind].rope else torch.tensor([seen])
        expected = run(model, ids[:, seen], attention_mask=torch.ones_like(place), position_ids=place)[:, -1]  # a mask: one text, whatever the gaps
        assert far(whole[:, at], expected) <= 2 * SAME, at
        assert far(pieces[:, at], expected) <= 2 * SAME, at


def with_mixer(kind, window, changes):
    """Without sinks some families are written with a window of their own; the mixer is to be tried."""
    model = tiny(kind, **changes)
    config = stock_config(model).with_replaced(Replaced("streaming", {"window": window, "sinks": 0}, "scores", (0,)))
    made = model_class(type(model).__name__)(config_class(kind).from_dict(config.content)).eval()
    made.load_state_dict(model.state_dict())
    return model, made


def seen_by_mixer(model, ids):
    """What the only layer's mixer was called with, and what it gave."""
    found = []
    mixer = next(module for name, module in model.named_modules() if name.endswith("effconvert"))
    handle = mixer.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
    run(model, ids)
    handle.remove()
    return mixer, *found[0]


def features(feature, rows, weights, which):
    rows = rows.double()
    if feature == "elu":
        return torch.where(rows > 0, rows + 1, rows.exp())
    mapped = torch.einsum("bhtd,hmd->bhtm", rows, weights[f"{which}_map"])
    if feature == "t2r":
        return (mapped + weights[f"{which}_bias"][:, None]).clamp(min=0)
    return torch.cat([mapped.exp() / mapped.exp().sum(-1, keepdim=True), (-mapped).exp() / (-mapped).exp().sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize(("kind", "window"), [("qwen3", 0), ("qwen3", 1), ("qwen3", 6), ("qwen3", 70), ("gpt2", 0), ("gpt2", 6), ("bert", 0)])
@pytest.mark.parametrize("options", [{"feature": "hedgehog"}, {"feature": "t2r", "features": 5}, {"feature": "elu"}], ids=lambda options: options["feature"])
def test_linear_is_its_formula(kind, options, window):
    """LoLCATs' eq. 6: one normaliser for softmax in the window and features of what is older."""
    _, model = pair(kind, ("linear", {**options, "window": window}), **KINDS.get(kind, LONG))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".effconvert." in name:
                value += 0.5 * torch.randn(value.shape, generator=draw)
    mixer, call, made = seen_by_mixer(model, tokens(2, TEXT))
    weights = {name: value.detach().double() for name, value in mixer.named_parameters()}
    shared = call.query.shape[1] // call.key.shape[1]
    query, key = (features(options["feature"], rows, weights, which) for rows, which in ((call.query, "query"), (call.key, "key")))
    key, value, plain = (rows.repeat_interleave(shared, 1) for rows in (key, call.value.double(), call.key.double()))
    age = torch.arange(TEXT)[:, None] - torch.arange(TEXT)
    old = torch.ones(TEXT, TEXT, dtype=torch.bool) if kind == "bert" else age >= window
    scores = query @ key.mT * old
    if window:
        near = (age >= 0) & (age < window)
        soft = (call.query.double() @ plain.mT * call.scaling).masked_fill(~near, -torch.inf)
        scores = scores + weights["share"].sigmoid()[:, None, None] * (soft - soft.amax(-1, keepdim=True)).exp()
    alive = scores.sum(-1) > 1e-9  # of t2r all features may be zero, and then there is nothing to mix
    assert alive.float().mean() > 0.9
    expected = scores @ value / scores.sum(-1, keepdim=True).clamp(min=1e-9)
    assert far(made.double()[alive], expected[alive]) <= SAME


def test_what_nothing_is_left_of_is_zero_and_no_number_is_lost():
    """Features of t2r may all be zero."""
    _, model = pair("llama", ("linear", {"feature": "t2r", "features": 3}), **LONG)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("_bias"):
                value.fill_(-100.0)
    _, _, made = seen_by_mixer(model, tokens())
    assert not made.any()


def test_a_linear_mixer_begins_as_its_papers_say():
    _, model = pair("llama", ("linear", {"window": 6}), **LONG)
    weights = {name.rpartition(".")[2]: value.detach() for name, value in model.named_parameters() if ".effconvert." in name}
    assert all(torch.equal(weights[f"{which}_map"], torch.eye(8).expand(4, 8, 8)) for which in ("query", "key"))
    assert torch.allclose(weights["share"].sigmoid(), torch.tensor(0.1), atol=1e-4)
    _, model = pair("llama", ("linear", {"feature": "t2r"}), **{**LONG, "num_hidden_layers": 2})
    weights = {name: value.detach() for name, value in model.named_parameters() if ".effconvert." in name}
    for name, value in weights.items():
        if name.endswith("_map"):
            assert value.shape == (4, 32, 8)
            assert torch.allclose(value.norm(dim=-1), torch.ones(4, 32))
        else:
            assert not value.any()
    assert not torch.equal(*(weights[f"model.layers.{index}.self_attn.effconvert.query_map"] for index in (0, 1)))
