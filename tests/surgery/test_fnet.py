"""Fourier mixing: the transform is the paper's, in transformers' own class and in ours; what is learnable begins near the attention that was there."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import effconvert
from effconvert.checkpoint.reading import read_config
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.modeling.loading import load
from effconvert.options import RunOptions
from effconvert.surgery._replacement import PlaceContext
from effconvert.surgery.mixing.fnet import Fnet, apply_filter, fit_filter, fit_scale, fourier
from effconvert.surgery.mixing.linear import Linear
from tests.mixers.mixing import keep_no_activations
from tests.models import characters, save, tiny

ENCODERS = ["bert", "roberta", "distilbert", "modernbert", "electra", "mpnet"]
FILTERS = ["none", "scale", "gfnet"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # of float64


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(rows=2, length=20, seed=0):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def every(rows):
    return torch.ones(rows.shape[:2], dtype=torch.bool)


def run(model, step, *more, place="out", **given):
    """Convert a tiny model of that family, or a folder."""
    source = model if isinstance(model, Path) else save(tiny(model), Path(model))
    text = characters(source) if not (source / "tokenizer.json").is_file() else source.parent / "calibration.txt"
    return convert(str(source), (step, *more), RunOptions(output=Path(place), **{"calibrate": str(text), "calibration_tokens": 512, "verify": False, **given}))


def opened(folder):
    return load(Path(folder), read_config(Path(folder)), torch.float32, "cpu")


# The transform


@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 3), (7, 8), (20, 6)])
def test_the_transform_is_the_product_with_the_matrices_of_the_discrete_fourier_transform(length, width):
    rows = draw(3, length, width)
    over_tokens, over_channels = (
        torch.exp(-2j * math.pi * torch.outer(torch.arange(size), torch.arange(size)).double() / size).to(torch.complex128) for size in (length, width)
    )
    expected = (over_tokens @ rows.to(torch.complex128) @ over_channels).real
    torch.testing.assert_close(fourier(rows, every(rows)), expected, rtol=1e-12, atol=1e-10)


def test_each_text_is_transformed_over_its_own_tokens_wherever_padding_stands():
    rows, live = draw(5, 9, 4), torch.ones(5, 9, dtype=torch.bool)
    live[0, 6:] = live[1, :3] = live[2, 2] = live[2, 5] = live[3] = False
    made = fourier(rows.masked_fill(~live[..., None], torch.nan), live)
    for text, there in enumerate(live):
        if there.any():
            torch.testing.assert_close(made[text, there], torch.fft.fft2(rows[text, there]).real, **EXACT)
        assert not made[text, ~there].any()


def test_a_filter_is_a_convolution_around_the_longest_text_and_the_same_in_shorter_ones():
    rows, response = draw(2, 10, 3), draw(9, 3, 2, seed=1)  # 16 places
    kernel = torch.fft.irfft(torch.view_as_complex(response), 16, dim=0)
    for length in (1, 6, 10):
        cut = rows[:, :length]
        expected = torch.stack([sum(kernel[(place - other) % 16] * cut[:, other] for other in range(length)) for place in range(length)], 1)
        torch.testing.assert_close(apply_filter(cut, every(cut), response), expected, **EXACT)


def test_a_filter_passes_by_padding_wherever_it_stands():
    rows, response, live = draw(4, 9, 3), draw(5, 3, 2, seed=1), torch.ones(4, 9, dtype=torch.bool)  # 8 places: fewer than the batch is long
    live[0, 6:] = live[1, :3] = live[2, 2] = live[2, 5] = live[3] = False
    live[0, 5:], live[1, :4] = False, False
    made = apply_filter(rows.masked_fill(~live[..., None], torch.nan), live, response)
    for text, there in enumerate(live):
        if there.any():
            alone = rows[text, there][None]
            torch.testing.assert_close(made[text, there], apply_filter(alone, every(alone), response)[0], **EXACT)
        assert not made[text, ~there].any()


def test_a_text_that_is_longer_than_the_filter_is_refused():
    rows = draw(1, 9, 3)
    with pytest.raises(ValueError, match="has 9 tokens, and this filter is for 8 at most"):
        apply_filter(rows, every(rows), draw(5, 3, 2))


def test_what_is_learnable_is_found_again():
    texts = [draw(4, length, 3, seed=length) for length in (6, 16, 16, 11)]
    pairs = [(rows, -0.25 * fourier(rows, every(rows))) for rows in texts]
    torch.testing.assert_close(fit_scale(pairs).double(), torch.tensor([-0.25]).double(), rtol=1e-6, atol=0)
    response, whole = draw(9, 3, 2, seed=1), [draw(40, 16, 3, seed=seed) for seed in range(4)]
    response[[0, -1], :, 1] = 0  # of a real signal these two frequencies are real
    found = fit_filter([(rows, apply_filter(rows, every(rows), response)) for rows in whole], 9)
    torch.testing.assert_close(found, response, rtol=0.05, atol=0.05)  # a ridge shrinks


def test_a_filter_of_what_has_nothing_to_do_with_what_attention_gave_is_nothing():
    noise = [(draw(8, 16, 3, seed=seed), draw(8, 16, 3, seed=seed + 9)) for seed in range(2)]
    assert fit_filter(noise, 9).abs().max() < 0.05


# Transformers' own class


class Written(nn.Module):
    """A BERT with Fourier mixing, by hand from its tensors."""

    def __init__(self, folder):
        super().__init__()
        self.config, self.tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    def norm(self, rows, name):
        return nn.functional.layer_norm(rows, rows.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], self.config["layer_norm_eps"])

    def linear(self, rows, name):
        return nn.functional.linear(rows, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def hidden(self, ids, prefix):
        inside, places = f"{prefix}embeddings.", torch.arange(ids.shape[1])
        words, positions, types = (self.tensors[f"{inside}{name}_embeddings.weight"] for name in ("word", "position", "token_type"))
        rows = self.norm(words[ids] + positions[places] + types[0], f"{inside}LayerNorm")
        for index in range(self.config["num_hidden_layers"]):
            at = f"{prefix}encoder.layer.{index}."
            rows = self.norm(rows + torch.fft.fft(torch.fft.fft(rows, dim=-1), dim=1).real, f"{at}attention.output.LayerNorm")
            inner = nn.functional.gelu(self.linear(rows, f"{at}intermediate.dense"))
            rows = self.norm(rows + self.linear(inner, f"{at}output.dense"), f"{at}output.LayerNorm")
        return rows

    def logits(self, ids):
        head = "cls.predictions."
        rows = self.norm(nn.functional.gelu(self.linear(self.hidden(ids, "bert."), f"{head}transform.dense")), f"{head}transform.LayerNorm")
        return rows @ self.tensors["bert.embeddings.word_embeddings.weight"].T + self.tensors[f"{head}bias"]


def test_a_bert_becomes_transformers_fnet_and_computes_what_is_written_here():
    run("bert", Fnet(), verify=True)
    model, info = transformers.FNetForMaskedLM.from_pretrained("out", output_loading_info=True)
    assert not any(info[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(tokens()).logits, Written(Path("bert")).logits(tokens()), **CLOSE)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_bare_bert_becomes_a_bare_fnet_with_its_pooler_or_one_of_zeros(pooled):
    model = transformers.BertModel(tiny("bert").config, add_pooling_layer=pooled).eval()
    run(save(model, Path("bare")), Fnet())
    made, info = transformers.FNetModel.from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"]
    with torch.inference_mode():
        found = made.eval()(tokens())
        torch.testing.assert_close(found.last_hidden_state, Written(Path("bare")).hidden(tokens(), ""), **CLOSE)
        first = found.last_hidden_state[:, 0]
        torch.testing.assert_close(found.pooler_output, model.pooler.dense(first).tanh() if pooled else torch.zeros_like(first), **CLOSE)


def test_what_a_berts_config_leaves_out_is_said_for_fnet():
    source = save(tiny("bert"), Path("bert"))
    said = json.loads((source / "config.json").read_text())
    for key in ("hidden_act", "type_vocab_size", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"):
        said.pop(key, None)
    (source / "config.json").write_text(json.dumps(said))
    run(source, Fnet())
    bert, fnet = transformers.BertConfig(), transformers.AutoConfig.from_pretrained("out")
    for key in ("hidden_act", "type_vocab_size", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(fnet, key) == getattr(bert, key), key
    assert fnet.dtype == torch.float32
    assert not hasattr(fnet, "num_attention_heads")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_model_of_half_precision_keeps_its_bytes_and_is_opened_in_float32(dtype, key):
    source = save(tiny("bert").to(dtype), Path("bert"))
    said = json.loads((source / "config.json").read_text())
    said[key] = said.pop("dtype")
    (source / "config.json").write_text(json.dumps(said))
    outcome = run(source, Fnet(), verify=True)
    assert outcome.report.dtype == "float32"
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {dtype}
    model = AutoModelForMaskedLM.from_pretrained("out").eval()
    assert model.dtype == torch.float32
    with torch.inference_mode():
        assert model(tokens()).logits.isfinite().all()
    assert effconvert.load("out").model.dtype == torch.float32


@pytest.mark.parametrize("named", ["BertTokenizer", None])
@pytest.mark.parametrize("there", [True, False])
def test_the_tokenizer_still_tells_padding(named, there):
    source = save(tiny("bert"), Path("bert"))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    transformers.BertTokenizer(vocab={piece: index for index, piece in enumerate(vocabulary)}).save_pretrained(source)
    told = source / "tokenizer_config.json"
    said = json.loads(told.read_text()) | {"tokenizer_class": named}
    told.write_text(json.dumps({key: value for key, value in said.items() if value}))
    if not there:
        told.unlink()
    before = told.read_bytes() if there else None
    outcome = run(source, Fnet())
    made = AutoTokenizer.from_pretrained("out")(["a b c", "d"], padding=True)
    assert made.attention_mask == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert "tokenizer_config.json" in outcome.plan.output_files
    if named and there:
        assert (Path("out") / "tokenizer_config.json").read_bytes() == before


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_a_head_that_only_its_own_family_has_keeps_the_model_in_a_class_of_ours(head):
    model = getattr(transformers, head)(tiny("bert").config)
    run(save(model, Path("head")), Fnet())
    assert type(opened("out")).__name__ == f"Effconvert{head}"


# A class of ours


def stand_in(folder, model, filter="none"):
    """What `model` computes with its attention's modules replaced by hand."""
    config, stored = read_config(Path(folder)), load_file(Path(folder) / "model.safetensors")
    technique = Fnet(filter=filter)
    for record in config.replaced:
        for index in record.layers:
            layer = model.base_model.get_submodule(config.family.layers)[index]
            weights = {
                name.rpartition(".")[2]: tensor for name, tensor in stored.items() if f"{config.family.layers}.{index}." in name and ".effconvert." in name
            }
            module = layer.get_submodule(config.attention)
            module.forward = lambda hidden, *_, weights=weights, **__: (technique.forward(weights, hidden, PlaceContext(None, every(hidden))), None)
            if not config.parts["o"].startswith(f"{config.attention}."):
                parent, _, name = config.parts["o"].rpartition(".")
                setattr(layer.get_submodule(parent), name, nn.Identity())
    return model


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_computes_it_in_the_chosen_layers_and_softmax_in_the_others(kind, filter):
    outcome = run(kind, Fnet(filter=filter, keep_softmax="-1"), verify=True)
    assert {record.layers for record in outcome.plan.config.replaced} == {(0,)}
    model = AutoModelForMaskedLM.from_pretrained("out").eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens()).logits, stand_in("out", tiny(kind), filter)(tokens()).logits, **CLOSE)
    again = AutoModelForMaskedLM.from_pretrained(save(model, Path("again"))).eval()
    with torch.inference_mode():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    bare = AutoModel.from_pretrained("out").eval()
    assert type(bare).__name__.startswith("Effconvert")


def test_ours_is_the_native_class_where_nothing_is_padded():
    source = save(tiny("bert"), Path("bert"))
    run(source, Fnet())
    run(source, Fnet(layers="0"), place="one")
    run(Path("one"), Fnet(layers="1"), place="ours")
    assert read_config(Path("ours")).kind == "bert"
    with torch.inference_mode():
        torch.testing.assert_close(opened("ours")(tokens()).logits, opened("out")(tokens()).logits, **CLOSE)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_nothing_depends_on_what_a_batch_is_padded_with(kind, filter):
    run(kind, Fnet(filter=filter, layers="0"))
    model, ids, mask = opened("out"), tokens(4, 24), torch.ones(4, 24, dtype=torch.long)
    mask[1, 20:], mask[2, 7:], mask[3, :4] = 0, 0, 0
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if kind in ("bert", "modernbert") else {}
    with torch.inference_mode():
        made = model(ids, attention_mask=mask, **places).logits
        for row in range(4 if places else 3):  # the others count positions from the left
            there = mask[row].bool()
            torch.testing.assert_close(made[row, there], model(ids[row, there][None]).logits[0], rtol=1e-4, atol=1e-4)


def test_the_native_class_ignores_padding_and_the_plan_says_so():
    outcome = run("bert", Fnet())
    assert "ignores attention_mask" in " ".join(outcome.plan.notes)
    model, ids, mask = opened("out"), tokens(1, 24), torch.ones(1, 24, dtype=torch.long)
    mask[:, 16:] = 0
    with torch.inference_mode():
        padded, alone = model(ids, attention_mask=mask).logits[:, :16], model(ids[:, :16]).logits
    assert (padded - alone).abs().max() > 0.1 * alone.abs().max()


@pytest.mark.parametrize("filter", FILTERS)
def test_gradients_pass_through_padding_and_checkpoints(filter):
    run("bert", Fnet(filter=filter, layers="0"))
    found, mask = [], torch.ones(3, 20, dtype=torch.long)
    mask[1, 12:] = 0
    for checkpointed in (False, True):
        model = opened("out").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            keep_no_activations(model)
        model(tokens(3), attention_mask=mask, labels=tokens(3)).loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert all(grad.isfinite().all() for grad in grads.values())
        own = [grad for name, grad in grads.items() if ".effconvert." in name]
        assert len(own) == (filter != "none")
        assert all(grad.abs().sum() > 0 for grad in own)
        found.append(torch.cat([grads[name].flatten() for name in sorted(grads)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("filter", FILTERS)
def test_half_precision_is_run_and_stays_what_it_is(filter):
    run("bert", Fnet(filter=filter, layers="0"))
    model = opened("out")
    with torch.inference_mode():
        expected = model(tokens()).logits
        made = model.to(torch.bfloat16)(tokens()).logits
    assert made.dtype == torch.bfloat16
    assert (made.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.usefixtures("one_window_a_batch")
@pytest.mark.parametrize("filter", ["scale", "gfnet"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_what_is_learnable_comes_nearer_to_the_attention_than_nothing(kind, filter):
    """On the calibration text: a sum of squares that is smaller than that of the attention itself."""
    seen = []

    class Spy(Fnet):
        def fit(self, layer, values):
            found = super().fit(layer, values)
            for look in layer.activations.capture(layer, ("q", "o"), until="o"):
                rows, given = look.inputs["q"], look.outputs["o"]
                made = self.forward(found, rows, PlaceContext(None, every(rows)))
                seen.append((float((made - given).square().sum()), float(given.square().sum())))
            return found

        @property
        def name(self):
            return "fnet"

    run(kind, Spy(filter=filter, layers="0"))
    assert len(seen) > 1
    off, whole = map(sum, zip(*seen, strict=True))
    assert off < whole


def test_a_model_that_shares_kv_heads_can_have_it():
    from effconvert.surgery.attention.gqa import Gqa

    source = save(tiny("bert"), Path("bert"))
    run(source, Gqa(groups=2, pool="mean"), Fnet(keep_softmax="0"), place="kept", verify=True)
    run(source, Gqa(groups=2, pool="mean"), Fnet(), place="native", verify=True)
    assert [type(opened(place)).__name__ for place in ("kept", "native")] == ["EffconvertBertForMaskedLM", "FNetForMaskedLM"]


# What cannot be, and what is said


def test_where_positions_were_rotations_of_attention_the_plan_says_what_is_left():
    assert "transform's phases" in " ".join(run("modernbert", Fnet()).plan.notes)
    assert "transform's phases" not in " ".join(run("roberta", Fnet(), place="other").plan.notes)


def test_a_fitted_model_has_no_loud_transform():
    source = save(tiny("bert"), Path("bert"))
    told = [" ".join(run(source, Fnet(filter=filter), place=filter).plan.notes) for filter in FILTERS]
    assert ["times the residual" in said for said in told] == [True, False, False]
    assert ["ignores attention_mask" in said for said in told] == [True, False, False]


@pytest.mark.parametrize("step", [Fnet(keep_softmax="0-1"), Fnet(layers="0", keep_softmax="0")])
def test_no_layer_is_refused(step):
    with pytest.raises(OptionError, match="no layer is left to change"):
        run("bert", step)


@pytest.mark.parametrize("first", [Fnet(layers="0"), Linear(layers="0")])
def test_a_layer_that_has_something_gets_no_transform_beside_it(first):
    run("bert", first, place="first")
    with pytest.raises(OptionError, match=f"layer 0 has {first.name} in place of its"):
        run(Path("first"), Fnet())


def test_an_fnet_has_nothing_that_attends():
    run("bert", Fnet())
    for step in (Fnet(), Linear()):
        with pytest.raises(ModelError, match="fnet does not attend"):
            run(Path("out"), step, place="again")


# Healing


def far(original, folder, layer):
    """How far what a layer gives is from what the original's gives on the same inputs, on text that nobody saw; relative."""
    models = [opened(original), opened(folder)]
    layers = [model.base_model.get_submodule(read_config(Path(place)).family.layers)[layer] for model, place in zip(models, (original, folder), strict=True)]
    states = []
    layers[1].register_forward_pre_hook(lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
    given = []
    layers[0].register_forward_pre_hook(lambda _, args, kwargs: ((states[0], *args[1:]), kwargs), with_kwargs=True)
    for module in layers:
        module.register_forward_hook(lambda _, args, out: given.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        for model in reversed(models):
            model(tokens(4, 30, seed=9))
    made, wanted = given
    return float((made - wanted).norm() / wanted.norm())


@pytest.mark.usefixtures("one_window_a_batch")
@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("kind", "step"),
    [("bert", Fnet()), *((kind, Fnet(keep_softmax="-1")) for kind in ENCODERS), ("bert", Fnet(filter="scale")), ("modernbert", Fnet(filter="gfnet"))],
    ids=["native", *ENCODERS, "scale", "gfnet"],
)
def test_layers_are_taught_as_a_whole(kind, step):
    source = save(tiny(kind), Path("source"))
    run(source, step, place="plain")
    outcome = run(source, step, Transfer(epochs=4))
    taught = [index for index in range(2) if step.keep_softmax is None or index == 0]
    assert list(outcome.layer_errors) == [str(index) for index in taught]
    for said in outcome.layer_errors.values():
        assert said["after"] < said["before"]
    assert far(source, "out", 0) < far(source, "plain", 0)
    family, (before, after) = outcome.plan.config.family, (load_file(f"{place}/model.safetensors") for place in ("plain", "out"))
    for name in before:
        inside = name.partition(f"{family.layers}.")[2]
        assert inside or torch.equal(before[name], after[name]), name  # nothing outside the layers
        assert not inside or int(inside[0]) in taught or torch.equal(before[name], after[name]), name
    parts = {name.rpartition(f"{family.layers}.0.")[2] for name in before if f"{family.layers}.0." in name and not torch.equal(before[name], after[name])}
    assert {part.rpartition(".")[0] for part in parts} >= {family.parts[part] for part in ("up", "down", "mlp_post_norm") if part in family.parts}
    assert any("effconvert." in part for part in parts) == (step.filter != "none")


@pytest.mark.usefixtures("one_window_a_batch")
def test_a_native_model_is_taught_by_a_command_of_its_own():
    source = save(tiny("bert"), Path("source"))
    run(source, Fnet(), place="plain")
    run(Path("plain"), Transfer(teacher=str(source), epochs=2), place="out")
    run(source, Fnet(), Transfer(epochs=2), place="at-once")
    one, other = load_file("out/model.safetensors"), load_file("at-once/model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert far(source, "out", 0) < far(source, "plain", 0)


def test_a_refit_makes_the_mlp_do_what_it_can_where_no_norm_follows():
    source = save(tiny("modernbert"), Path("source"))
    step = Fnet(keep_softmax="-1")
    run(source, step, place="plain")
    run(source, step, Refit())
    changed = [name for name, tensor in load_file("plain/model.safetensors").items() if not torch.equal(tensor, load_file("out/model.safetensors")[name])]
    assert changed == ["model.layers.0.mlp.Wo.weight"]
    assert far(source, "out", 0) < far(source, "plain", 0)


@pytest.mark.parametrize("step", [Fnet(), Fnet(keep_softmax="-1")])
def test_a_refit_changes_nothing_where_a_norm_follows_and_says_so(step):
    source = save(tiny("bert"), Path("source"))
    run(source, step, place="plain")
    outcome = run(source, step, Refit())
    assert Path("plain/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert "a norm follows its MLP" in " ".join(outcome.plan.notes)


def test_options_are_frozen_and_a_filter_that_is_none_is_refused():
    with pytest.raises(OptionError, match="filter"):
        Fnet(filter="fir")
    assert Fnet().filter == "none"
