"""What the engine offers a technique: changes put off, layers dropped and reordered, parts refused, encoders as well as decoders."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.shards import StoredTensor
from effconvert.convert.run import convert
from effconvert.errors import ModelError
from effconvert.options import RunOptions
from effconvert.surgery._surgery import Surgery
from effconvert.surgery.attention.gqa import Gqa
from tests.models import logits, save, tiny


class Plain(Surgery):
    """Changes nothing: what a test technique begins with."""

    @property
    def name(self):
        return "plain"

    @classmethod
    def allowed_options(cls, config):
        return ""

    def check(self, config):
        pass

    def is_exact(self, config):
        return False

    def config(self, config):
        return config


class DropFirst(Plain):
    def config(self, config):
        return dataclasses.replace(config, raw={**config.raw, "num_hidden_layers": config.layers - 1})

    def rewrite(self, model):
        model.layers = model.layers[1:]
        super().rewrite(model)


class Flip(Plain):
    """Turns v and o round: nothing changes."""

    def is_exact(self, config):
        return True

    def layer(self, layer):
        for part in ("v", "v.bias", "o"):
            if part in layer:
                layer[part] = layer[part].neg()


class AddGate(Plain):
    def layer(self, layer):
        layer["gate"] = layer["up"]


class Misspelt(Plain):
    def layer(self, layer):
        layer["ups"] = layer["up"]


def test_a_layer_can_be_dropped_and_the_others_are_renumbered(tmp_path):
    model = tiny("llama", num_hidden_layers=3)
    outcome = convert(str(save(model, tmp_path / "source")), (DropFirst(),), RunOptions(output=tmp_path / "out"))
    del model.model.layers[0]
    model.config.num_hidden_layers = 2
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model), rtol=0, atol=0)
    assert outcome.plan.before.kv_bytes * 2 == outcome.plan.after.kv_bytes * 3


def test_surgeries_in_a_row_are_the_commands_one_after_the_other(tmp_path):
    source = save(tiny("llama", num_hidden_layers=3), tmp_path / "source")
    quick = {"verify": False}
    convert(str(source), (Gqa(groups=2, pool="mean"), DropFirst(), Gqa(groups=1, pool="first")), RunOptions(output=tmp_path / "at-once", **quick))
    convert(str(source), (Gqa(groups=2, pool="mean"),), RunOptions(output=tmp_path / "one", **quick))
    convert(str(tmp_path / "one"), (DropFirst(),), RunOptions(output=tmp_path / "two", **quick))
    convert(str(tmp_path / "two"), (Gqa(groups=1, pool="first"),), RunOptions(output=tmp_path / "three", **quick))
    assert (tmp_path / "at-once/model.safetensors").read_bytes() == (tmp_path / "three/model.safetensors").read_bytes()
    assert (tmp_path / "at-once/config.json").read_bytes() == (tmp_path / "three/config.json").read_bytes()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "distilbert", "roberta"])
def test_an_encoder_is_verified_without_cache_and_perplexity(kind, tmp_path):
    model = tiny(kind)
    outcome = convert(str(save(model, tmp_path / "source")), (Flip(),), RunOptions(output=tmp_path / "out"))
    assert outcome.report.difference is not None
    assert outcome.report.after.kv_bytes == 0
    assert outcome.report.after.quality is None
    assert "encoder" in outcome.report.unmeasured
    torch.testing.assert_close(logits(AutoModelForMaskedLM.from_pretrained(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "surgery", "lost"), [("gpt2", AddGate(), "gate"), ("llama", Misspelt(), "ups")], ids=["no gate", "misspelt"])
def test_a_part_that_the_layout_has_no_place_for_is_refused(kind, surgery, lost, tmp_path):
    source = save(tiny(kind), tmp_path / "source")
    with pytest.raises(ModelError, match=f"layer 0 has {lost} after surgery, for which"):
        convert(str(source), (surgery,), RunOptions(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_claim_of_exactness_that_is_false_is_caught(tmp_path):
    class Wrong(Flip):
        def layer(self, layer):
            layer["v"] = layer["v"].neg()

    source = save(tiny("llama"), tmp_path / "source")
    with pytest.raises(ModelError, match="must not change any"):
        convert(str(source), (Wrong(),), RunOptions(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_changes_are_put_off_until_asked_for_and_done_once_in_order(tmp_path):
    checkpoint = open_checkpoint(save(tiny("llama"), tmp_path))
    below, seen = checkpoint.layer(0, "cpu"), []
    below.later(lambda layer: seen.append(("first", layer.index, layer.config.kv_heads, "q" in layer)))
    below.later(lambda layer: seen.append(("second", layer.index, layer.config.kv_heads, "q" in layer)))
    above = below.on_top(5, checkpoint.config.with_kv_heads(2))
    above.later(lambda layer: seen.append(("third", layer.index, layer.config.kv_heads, "q" in layer)))
    assert seen == []
    assert "k" in above
    assert "v" in above
    assert sorted(seen) == [("first", 0, 4, True), ("second", 0, 4, True), ("third", 5, 2, True)]
    assert [name for name, *_ in seen if name != "third"] == ["first", "second"]


class Share(Plain):
    """Layer 1 gets the up projection of layer 0."""

    def rewrite(self, model):
        first, second = model.layers[:2]
        second.later(lambda layer: layer.__setitem__("up", first["up"]))


class Scale(Plain):
    """Doubles the up projection, once more for each layer below."""

    def layer(self, layer):
        layer["up"] = layer["up"] * 2 * (layer.index + 1)


class DropSecond(DropFirst):
    def rewrite(self, model):
        model.layers = [model.layers[0], *model.layers[2:]]
        Plain.rewrite(self, model)


def up(folder):
    return [layer.mlp.up_proj.weight.detach() for layer in AutoModelForCausalLM.from_pretrained(folder).model.layers]


@pytest.mark.parametrize(
    ("surgeries", "expected"),
    [
        ((Share(), Scale()), [(0, 2), (0, 4), (2, 6)]),
        ((Scale(), Share()), [(0, 2), (0, 2), (2, 6)]),
        ((Scale(), DropSecond()), [(0, 2), (2, 6)]),
        ((DropSecond(), Scale()), [(0, 2), (2, 4)]),
        ((Share(), DropSecond(), Scale()), [(0, 2), (2, 4)]),
    ],
    ids=["share, scale", "scale, share", "scale, drop", "drop, scale", "share, drop, scale"],
)
def test_each_surgery_finds_what_the_one_before_left(surgeries, expected, tmp_path):
    source = save(tiny("llama", num_hidden_layers=3), tmp_path / "source")
    convert(str(source), surgeries, RunOptions(output=tmp_path / "out", verify=False))
    before, after = up(source), up(tmp_path / "out")
    assert len(after) == len(expected)
    for (layer, factor), weight in zip(expected, after, strict=True):
        torch.testing.assert_close(weight, before[layer] * factor, rtol=0, atol=0)


def test_sharing_and_pooling_go_in_either_order(tmp_path):
    source = save(tiny("llama", num_hidden_layers=3), tmp_path / "source")
    pool, quick = Gqa(groups=2, pool="mean"), {"verify": False}
    for name, surgeries in (("pooled", (pool,)), ("share-pool", (Share(), pool)), ("pool-share", (pool, Share()))):
        convert(str(source), surgeries, RunOptions(output=tmp_path / name, **quick))
    pooled, one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("pooled", "share-pool", "pool-share"))
    ups = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(3)]
    assert not torch.equal(pooled[ups[0]], pooled[ups[1]])
    expected = {**pooled, ups[1]: pooled[ups[0]]}
    for found in (one, other):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_tensor_that_is_needed_is_read_once_and_no_other(tmp_path, monkeypatch):
    real, read = StoredTensor.read, []

    def counting(self, device):
        if device == "cpu":
            read.append(self.name)
        return real(self, device)

    monkeypatch.setattr(StoredTensor, "read", counting)
    source = save(tiny("llama", num_hidden_layers=4), tmp_path / "source", max_shard_size="40KB")
    convert(str(source), (Gqa(groups=2, pool="mean"), Gqa(groups=1, pool="mean")), RunOptions(output=tmp_path / "out", verify=False))
    assert sorted(read) == sorted(f"model.layers.{index}.self_attn.{part}_proj.{kind}" for index in range(4) for part in "kv" for kind in ("weight", "bias"))
