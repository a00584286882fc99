"""Decoders that attend both ways, as text embedders do: what transformers makes of their config decides, and verification holds both models to it."""

from pathlib import Path

import pytest
import torch
import transformers

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.convert.run import convert
from effconvert.errors import EffconvertError, ModelError
from effconvert.eval.quality.perplexity import sees_later
from effconvert.families import FAMILIES
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.mixing.fnet import Fnet
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.mixing.nystrom import Nystrom
from effconvert.surgery.mixing.retnet import Retnet
from effconvert.surgery.mixing.streaming import Streaming
from tests.models import DECODERS, save, tiny

pytestmark = pytest.mark.families  # all of them, each time

ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


def put(kind, **changes):
    """Write the bare model, as embedders are."""
    model = tiny(kind, **changes)
    model.base_model.config.architectures = [type(model.base_model).__name__]
    return save(model.base_model, Path("model"))


def to(*steps):
    return convert("model", steps, RunOptions(output=Path("out"), tokens=64, context=32))


def opened(folder="out"):
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral", "gpt_neox"])
def test_such_a_model_is_the_encoder_that_it_is(kind):
    put(kind, is_causal=False)
    assert not open_checkpoint(Path("model")).config.decoder
    outcome = to(Gqa(groups=2, pool="mean"))
    assert outcome.plan.after.kv_bytes == 0
    assert sees_later(opened(), torch.arange(3, 20))


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if "is_causal" not in FAMILIES[kind].refused])
def test_which_tokens_see_which_is_read_as_its_class_reads_it(kind):
    model = tiny(kind, is_causal=False)
    assert read_config(save(model, Path("model"))).decoder is not sees_later(model, torch.arange(3, 20))


@pytest.mark.parametrize("step", [Linear(), Nystrom(landmarks=4), Fnet()])
def test_mixers_of_encoders_see_later_tokens_too(step):
    put("qwen2", is_causal=False)
    to(step)
    assert sees_later(opened(), torch.arange(3, 20))
    padded = torch.arange(3, 13)[None].repeat(2, 1)
    mask = torch.ones_like(padded)
    mask[1, 7:] = 0
    alone = opened()(padded[1:, :7]).last_hidden_state
    torch.testing.assert_close(opened()(padded, attention_mask=mask).last_hidden_state[1:, :7], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("step", [Retnet(), Streaming(window=4)])
def test_mixers_of_decoders_are_refused(step):
    put("qwen2", is_causal=False)
    with pytest.raises(EffconvertError, match="qwen2 is an encoder"):
        to(step)
    assert not Path("out").exists()


def test_a_window_on_both_sides_is_half_as_long():
    put("gemma3_text", use_bidirectional_attention=True, **ALTERNATING)
    config = open_checkpoint(Path("model")).config
    assert not config.decoder
    assert config.windows() == [5, None]
    assert opened("model").config.sliding_window == 5
    to(Gqa(groups=2, pool="mean"))
    assert opened().config.sliding_window == 5
    assert sees_later(opened(), torch.arange(3, 20))


@pytest.mark.parametrize("kind", ["gptj", "codegen", "bloom", "falcon", "gpt_neo"])
def test_layers_are_dropped_of_those_that_attend_by_themselves(kind):
    layers = {"attention_types": [[["global", "local", "global"], 1]]} if kind == "gpt_neo" else {}
    put(kind, is_causal=False, **{FAMILIES[kind].layers_key: 3}, **layers)
    outcome = to(PruneLayers(layers="1"))
    assert sees_later(opened(), torch.arange(3, 20)) is (kind != "gpt_neo")  # whose class does not heed it
    assert (outcome.plan.after.kv_bytes > 0) is (kind == "gpt_neo")


def test_two_implementations_of_attention_that_differ_are_no_model_to_convert():
    model, ids = tiny("nemotron", is_causal=False), torch.arange(3, 20)
    seen = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        seen.append(sees_later(model, ids))
    assert seen == [True, False]
    put("nemotron", is_causal=False)
    with pytest.raises(ModelError, match=r"says is_causal = False, and its class attends both ways in one implementation .*; set it to true"):
        to(Gqa(groups=2, pool="mean"))


def test_a_class_that_cannot_run_with_it_is_refused():
    put("mpt", is_causal=False)
    with pytest.raises(AttributeError):
        transformers.AutoModel.from_pretrained("model")(torch.arange(3, 20)[None])
    with pytest.raises(ModelError, match="says is_causal = False, and its class cannot run with it; set it to true"):
        to(PruneLayers(layers="1"))


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_class_that_heeds_it_in_one_implementation_only_is_refused(kind):
    put(kind, use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="says use_bidirectional_attention = True, and its class attends both ways in one implementation"):
        to(Gqa(groups=2, pool="mean"))


def test_a_technique_that_sees_what_the_original_does_not_is_found_out(monkeypatch):
    save(tiny("llama"), Path("model"))
    real, sides = sees_later, iter([False, True])
    monkeypatch.setattr("effconvert.eval.quality.perplexity.sees_later", lambda *given: real(*given) or next(sides))
    with pytest.raises(ModelError, match="tokens see later ones in the converted model, and not in the original"):
        to(Gqa(groups=2, pool="mean"))
