"""Models with an encoder and a decoder: the encoder is converted layer by layer, and the decoder is copied."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.convert.inspection import applicable
from effconvert.convert.plan import plan
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.families import ENCODER_DECODERS
from effconvert.heal._layerwise import LayerRunner
from effconvert.heal._tensors import outer_tensors, stored_tensors
from effconvert.heal.distill import Distill
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.hub.card_data import auto_class
from effconvert.modeling.stock import open_as_stock
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.embedding.factor_embed import FactorEmbed
from effconvert.surgery.ffn.share_ffn import ShareFfn
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.mixing.sparse import Sparse
from effconvert.surgery.projections.low_rank import LowRank
from effconvert.surgery.width.narrow import Narrow
from tests.heal.healing import opened, prose, put, run
from tests.models import on_disk, save, tiny

FEW = {"calibration_tokens": 256}
CLOSE = {"rtol": 0, "atol": 1e-5}
KINDS = [(kind, True) for kind in ENCODER_DECODERS] + [("bart", False), ("marian", False)]  # with the embedding tied, or not
STEPS = {  # one step for each layout
    "bart": (Gqa(groups=2), Refit()),
    "mbart": (Narrow(ffn=24),),
    "marian": (LowRank(ratio="0.5"),),
    "m2m_100": (PruneLayers(layers="1"), Sparse(pattern="strided", block=4)),
    "plbart": (Linear(), Transfer(epochs=1)),
}


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def pairs(length=9):
    """Token ids of sources and targets, the same on each call."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, 128, (2, length), generator=draw), torch.randint(3, 128, (2, 5), generator=draw)


@torch.inference_mode()
def logits(model):
    source, target = pairs()
    return model(source, decoder_input_ids=target).logits


def constants(model):
    """How many parameters are sines, which marian's class computes."""
    return 2 * 64 * 32 if model.config.model_type.endswith("marian") else 0


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_every_parameter_has_exactly_one_place(kind):
    family = ENCODER_DECODERS[kind]
    for name in dict(tiny(kind).named_parameters(remove_duplicate=False)):
        found = [part for part, module in family.parts.items() if re.fullmatch(rf"model\.encoder\.layers\.\d\.{re.escape(module)}\.(weight|bias)", name)]
        found += [part for part, module in family.outer.items() if name.startswith(f"model.{module}.")]
        found += [part for part, module in family.head.items() if name.startswith(f"{module}.")]
        assert len(found) == 1, name


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_what_a_row_says_of_a_config_is_what_transformers_says(kind):
    stock, family = transformers.AutoConfig.for_model(kind), ENCODER_DECODERS[kind]
    assert {key: getattr(stock, key) for key in family.defaults} == family.defaults
    usual = (stock.num_hidden_layers, stock.hidden_size, stock.num_attention_heads)
    assert usual == tuple(family.defaults[key] for key in (family.layers_key, family.hidden_key, family.heads_key))


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_the_encoder_computes_in_a_walk_what_it_computes_in_the_whole_model(kind, tied, tmp_path):
    model, (ids, _) = tiny(kind, tie_word_embeddings=tied), pairs(20)
    checkpoint, expected = open_as_stock(save(model, tmp_path)), []
    size = plan(checkpoint, ()).before
    assert (size.parameters, size.kv_bytes) == (model.num_parameters() - constants(model), 0)
    for layer in model.model.encoder.layers:
        layer.register_forward_hook(lambda _, __, out: expected.append(out))
    with torch.inference_mode():
        model.model.encoder(ids)
        runner = LayerRunner(checkpoint.config, outer_tensors(checkpoint.model("cpu").outer, [ids]), [ids], torch.device("cpu"))
        states = runner.begin()
        for index, out in enumerate(expected):
            weights = {name: numbers for name, (_, numbers, _) in stored_tensors(checkpoint.layer(index, "cpu")).items()}
            states = [look.out for look in runner.run(index, weights, states)]
            torch.testing.assert_close(states[0], out, **CLOSE)
    assert all(parameter.is_meta for name, parameter in runner.model.named_parameters() if name.startswith("decoder.layers"))


def test_copies_of_the_embedding_in_an_old_file_are_not_counted_again():
    model = tiny("bart")
    put("model", "bart")
    copies = {f"model.{side}.embed_tokens.weight": model.model.shared.weight.detach().clone() for side in ("encoder", "decoder")}
    save_file({**on_disk(Path("model")), **copies}, "model/model.safetensors", metadata={"format": "pt"})
    outcome = run("model", Narrow(ffn=24), verify=True, **FEW)
    assert outcome.plan.before.parameters == model.num_parameters()


def test_a_model_saved_without_its_head_opens(tmp_path):
    model = tiny("bart").base_model
    assert plan(open_as_stock(save(model, tmp_path)), ()).before.parameters == model.num_parameters()


@pytest.mark.parametrize("kind", STEPS)
def test_the_encoder_is_converted_and_the_decoder_stays_to_the_bit(kind):
    outcome = run(put("model", kind), *STEPS[kind], verify=True, **FEW)
    before, after = on_disk(Path("model")), on_disk(Path("out"))
    outside = {name for name in before if "encoder.layers" not in name}
    assert outside == {name for name in after if "encoder.layers" not in name}
    assert all(torch.equal(before[name], after[name]) for name in outside)
    assert "effconvert eval" in outcome.report.unmeasured
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained("out", dtype=torch.float32, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert outcome.plan.after.parameters == model.num_parameters() - constants(model)
    found = logits(model.eval())
    assert (found - logits(tiny(kind))).abs().max() > 1e-3
    written = model.generate(pairs()[0], max_new_tokens=6, do_sample=False)
    assert torch.equal(written, model.generate(pairs()[0], max_new_tokens=6, do_sample=False, use_cache=False))
    save(model, Path("again"))
    assert torch.equal(logits(opened("again", dtype=torch.float32)), found)
    labels = pairs()[1]
    model.train()(pairs()[0], labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.encoder.layers.parameters() if parameter.requires_grad)


def test_neutral_options_change_no_logit():
    outcome = run(put("model", "marian"), Sparse(pattern="strided", block=64), Gqa(groups=4), verify=True, **FEW)
    assert outcome.report.difference < 1e-5
    torch.testing.assert_close(logits(opened()), logits(tiny("marian")), **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "sides"), [("bart", ("right",)), ("m2m_100", ("right", "left"))])  # bart counts padding on the left as positions
def test_nothing_depends_on_what_a_source_is_padded_with(kind, sides):
    run(put("model", kind), Linear(), **FEW)
    model, (source, target) = opened(), pairs()
    alone = logits(model)
    for side in sides:
        for filling in (0, 7) if kind == "bart" else (0,):  # m2m_100 knows padding by its token
            fill, ones = torch.full((2, 4), filling), torch.ones_like(source)
            order = (1, -1) if side == "right" else (-1, 1)
            ids, mask = (torch.cat([body, pad][:: order[0]], 1) for body, pad in ((source, fill), (ones, torch.zeros_like(fill))))
            torch.testing.assert_close(model(ids, attention_mask=mask, decoder_input_ids=target).logits, alone, **CLOSE)


@pytest.mark.parametrize("kind", ["bart", "mbart"])  # with a norm behind the FFN, which stays, and before it
def test_a_decoder_without_ffns_is_one_whose_ffns_give_zeros(kind):
    outcome = run(put("model", kind), ShareFfn(width=60, drop_decoder=True), verify=True, **FEW)
    gone = {name for name in on_disk(Path("model")) if "decoder" in name} - {*on_disk(Path("out"))}
    parts = ("fc1", "fc2", "final_layer_norm") if kind == "mbart" else ("fc1", "fc2")
    assert gone == {f"model.decoder.layers.{index}.{part}.{what}" for index in range(2) for part in parts for what in ("weight", "bias")}
    assert any("nothing makes up for them" in note for note in outcome.plan.notes)
    model, zeroed, (source, target) = opened(dtype=torch.float32), tiny(kind), pairs()
    assert outcome.plan.after.parameters == model.num_parameters()
    with torch.inference_mode():
        before = logits(zeroed)
        for layer in zeroed.model.decoder.layers:
            torch.nn.init.zeros_(layer.fc2.weight)
            torch.nn.init.zeros_(layer.fc2.bias)
        expected = zeroed(encoder_outputs=model.model.encoder(source), decoder_input_ids=target).logits
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert (expected - before).abs().max() > 0.01
    written = model.generate(source, max_new_tokens=6, do_sample=False)
    assert torch.equal(written, model.generate(source, max_new_tokens=6, do_sample=False, use_cache=False))
    save(model, Path("again"))
    assert torch.equal(logits(opened("again", dtype=torch.float32)), logits(model))
    model.train()(source, labels=target).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert "has no FFNs any more" in str(refusal("out", ShareFfn(drop_decoder=True)))


def refusal(folder, step):
    """The error that a plan of this step ends with."""
    with pytest.raises(EffconvertError) as error:
        plan(open_checkpoint(Path(folder)), (step,))
    return error.value


@pytest.mark.parametrize(("kind", "role"), [("llama", "a decoder"), ("bert", "an encoder")])
def test_no_other_model_loses_its_ffns(kind, role):
    error = refusal(save(tiny(kind), Path("model")), ShareFfn(drop_decoder=True))
    assert isinstance(error, OptionError)
    assert f"{kind} is {role} alone, which nobody has shown to do without" in str(error)


def test_what_a_config_says_of_the_decoder_is_checked():
    content = read_config(save(tiny("bart"), Path("model"))).without_decoder_ffn().content
    assert (content["model_type"], content["architectures"]) == ("effconvert_bart", ["EffconvertBartForConditionalGeneration"])
    Path("model/config.json").write_text(json.dumps({**content, "decoder_skips": ["attention"]}))
    with pytest.raises(ModelError, match=r"decoder_skips = \['attention'\], where the list"):
        read_config(Path("model"))


def test_the_usual_name_of_the_depth_in_an_old_config_follows_it():
    put("model", "bart")
    file = Path("model/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3}))  # as facebook/bart-base has it
    run("model", PruneLayers(layers="0"), **FEW)
    assert "num_hidden_layers" not in json.loads(Path("out/config.json").read_text())
    assert len(opened().model.encoder.layers) == 2


def test_a_card_names_the_class_that_opens_it_and_a_plan_says_nothing_of_a_cache(command):
    put("model", "marian")
    told = command("narrow", "--ffn", "48", "model", "-o", "out").output
    assert "KV cache" not in told
    assert "AutoModelForSeq2SeqLM" in Path("out/README.md").read_text()
    told = command("inspect", "out").output
    assert "marian (MarianMTModel), encoder-decoder" in told
    assert "other" not in told  # the bias of logits is no parameter
    assert auto_class({"architectures": ["LlavaForConditionalGeneration"]})[0] == "LlavaForConditionalGeneration"


@pytest.mark.parametrize("last", ["num_hidden_layers", "encoder_layers"])
def test_where_a_config_names_the_depth_twice_the_usual_name_counts_as_in_transformers(last, tmp_path):
    content = {"model_type": "bart", "architectures": ["BartModel"], "d_model": 32, "encoder_attention_heads": 4}
    depths = {"num_hidden_layers": 3, "encoder_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({**content, **dict(sorted(depths.items(), key=lambda item: item[0] == last))}))
    assert read_config(tmp_path).layers == transformers.AutoConfig.from_pretrained(tmp_path).encoder_layers == 3


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path):
    config = read_config(save(tiny("mbart"), tmp_path))
    refusals = applicable(config)[1]
    assert {"expand-kv", "factor-embed", "mla", "moe", "retnet", "share-kv", "streaming"} <= refusals.keys()
    assert "mbart is an encoder-decoder, and retnet looks back only" in refusals["retnet"]
    for step, why in (
        (FactorEmbed(rank="4", blocks=1), "two places"),
        (Distill(), "pairs of texts"),
        (PruneLayers(layers="1", only="attention"), "whole layers"),
    ):
        with pytest.raises(ModelError, match=f"mbart is an encoder-decoder.*{why}"):
            plan(open_checkpoint(tmp_path), (step,))


def test_a_decoder_alone_is_refused(tmp_path):
    model = transformers.BartForCausalLM(tiny("bart").config)
    with pytest.raises(ModelError, match=r"no tensors named model\.encoder\.layers"):
        open_checkpoint(save(model, tmp_path))
