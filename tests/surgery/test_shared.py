"""Layers that share what they compute with: it is stored once, on disk and in memory, and steps after the sharing find it in each of them."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

import effconvert
from effconvert.checkpoint.shared import SHARES
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError, TechniqueError
from effconvert.eval.quality.perplexity import cache_bytes
from effconvert.heal.refit import Refit
from effconvert.modeling import cache_for
from effconvert.modeling.caches import kv_bytes
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.mixing.linear import Linear
from tests.convert.test_seam import Plain
from tests.heal import healing
from tests.heal.healing import killed_saving, prose, put, run
from tests.mixers.mixing import keep_no_activations, with_cache
from tests.models import logits, save, tiny


class Share(Plain):
    """Has some layers share something: what the first of them has."""

    what: str = "layer"
    group: tuple[int, ...] = (1, 2)

    def config(self, config):
        return config.with_shared(self.what, self.group)

    def rewrite(self, model):
        for index in self.group[1:]:
            model.layers[index].share(model.layers[self.group[0]], self.what)


class ShareFitted(Share):
    """Likewise, but the first one's o is scaled by what it sees, and the last one's down by what that one sees."""

    def needs_calibration(self, config):
        return True

    def rewrite(self, model):
        model.layers[self.group[0]].later(lambda layer: self.scale(layer, "o"))
        super().rewrite(model)
        model.layers[self.group[-1]].later(lambda layer: self.scale(layer, "down"))

    def scale(self, layer, part):
        seen = 1.0
        if layer.activations:
            seen = 3 * torch.cat([look.inputs[part] for look in layer.activations.capture(layer, (part,), until=part)]).std().item()
        layer[part] = layer[part] * seen


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def tensors(folder):
    return healing.tensors(Path(folder))


def deep(kind="llama", layers=4, **changes):
    types = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if kind == "gemma2" else {}
    return save(tiny(kind, **{("n_layer" if kind == "gpt2" else "num_hidden_layers"): layers}, **types, **changes), Path("model"))


def to(name, *steps, model="model"):
    return convert(str(model), steps, RunOptions(output=name))


def opened(folder):
    model, _ = effconvert.load(str(folder), dtype="float32")
    return model.eval()


@pytest.mark.few(4)
@pytest.mark.parametrize("what", [what for what in SHARES if what != "cache"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_shared_is_on_disk_and_in_memory_once(what, tied):
    deep(tie_word_embeddings=tied)
    before, outcome = tensors("model"), to("out", Share(what=what, group=(0, 1, 3)))
    after, model = tensors("out"), opened("out")
    gone = before.keys() - after.keys()
    assert gone
    assert {name.split(".")[2] for name in gone} == {"1", "3"}
    assert all(torch.equal(after[name], before[name]) for name in after)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in gone:
        assert parameters[name] is parameters[name.replace("layers.1.", "layers.0.").replace("layers.3.", "layers.0.")]
    assert sum(parameter.numel() for parameter in model.parameters()) == outcome.plan.after.parameters
    model.save_pretrained("again")
    assert tensors("again").keys() == after.keys()
    assert torch.equal(logits(opened("again")), logits(model))


def test_layers_that_were_the_same_compute_the_same_once_shared():
    model = tiny("llama", num_hidden_layers=3)
    model.model.layers[2].load_state_dict(model.model.layers[1].state_dict())
    save(model, Path("model"))
    to("out", Share())
    torch.testing.assert_close(logits(opened("out")), logits(model))
    written = opened("out").generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
    assert torch.equal(written, model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False))


def test_a_gradient_reaches_the_one_parameter_from_every_layer():
    deep()
    to("out", Share(group=(0, 1, 2, 3)))
    model = opened("out")
    model(torch.arange(3, 12)[None]).logits.square().mean().backward()
    assert len([name for name, parameter in model.named_parameters() if name.endswith("q_proj.weight") and parameter.grad.abs().sum() > 0]) == 1


@pytest.mark.parametrize("what", ["layer", "ffn"])
def test_a_trainer_trains_it_once_and_saves_it_once(what):
    deep()
    to("out", Share(what=what))
    model, ids = opened("out"), torch.arange(3, 19)[None]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    trainer = Trainer(model, TrainingArguments("run", max_steps=2, learning_rate=1e-2, **quiet), train_dataset=[{"input_ids": ids[0], "labels": ids[0]}])
    trainer.train()
    trainer.save_model("trained")
    assert tensors("trained").keys() == tensors("out").keys()
    after = opened("trained")
    assert torch.equal(logits(after), logits(model.eval()))
    name = "mlp.down_proj.weight"
    assert after.model.layers[2].get_parameter(name) is after.model.layers[1].get_parameter(name)
    assert not torch.equal(after.model.layers[1].get_parameter(name), before[f"model.layers.1.{name}"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for the older name
@pytest.mark.parametrize("what", ["layer", "ffn"])
def test_adapters_of_peft_are_of_each_layer_and_leave_what_is_shared_as_it_is(what):
    peft = pytest.importorskip("peft")
    deep()
    to("out", Share(what=what))
    model, ids = opened("out"), torch.arange(3, 19)[None]
    expected, before = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], r=2))
    torch.testing.assert_close(logits(adapted.eval()), expected)
    optimizer = torch.optim.SGD([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapters = [layer.mlp.down_proj.lora_B["default"].weight for layer in adapted.base_model.model.model.layers[1:3]]
    assert not torch.equal(*adapters)
    adapted.save_pretrained("adapter")
    again = peft.PeftModel.from_pretrained(opened("out"), "adapter").eval()
    torch.testing.assert_close(logits(again), logits(adapted))
    assert (logits(again) - expected).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in again.unload().state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi3"])
def test_a_later_step_finds_it_in_every_layer(kind):
    deep(kind)
    steps = [Share(), Gqa(groups=2, pool="mean")]
    to("chain", *steps)
    to("one", steps[0])
    to("two", steps[1], model="one")
    assert tensors("chain").keys() == tensors("two").keys()
    assert all(torch.equal(tensor, tensors("two")[name]) for name, tensor in tensors("chain").items())
    assert torch.equal(logits(opened("chain")), logits(opened("two")))


def test_what_a_layer_has_of_its_own_stands_beside_what_it_shares():
    deep()
    to("out", Share(), Linear(layers="2"))
    own = [name for name in tensors("out") if ".effconvert." in name]
    assert {name.split(".")[2] for name in own} == {"2"}
    assert not [name for name in tensors("out") if name.startswith("model.layers.2.") and name not in own]
    opened("out")


@pytest.mark.parametrize("dropped", ["1", "2", "0"])
@pytest.mark.parametrize("together", [True, False])
def test_dropped_layers_leave_what_they_stored_to_the_others(dropped, together):
    deep()
    if together:
        to("out", Share(group=(1, 2, 3)), PruneLayers(layers=dropped))
    else:
        to("one", Share(group=(1, 2, 3)))
        to("out", PruneLayers(layers=dropped), model="one")
    model = tiny("llama", num_hidden_layers=4)
    for index in (2, 3):
        model.model.layers[index].load_state_dict(model.model.layers[1].state_dict())
    del model.model.layers[int(dropped)]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = 3
    torch.testing.assert_close(logits(opened("out")), logits(model))
    stored = {name.split(".")[2] for name in tensors("out") if ".layers." in name}
    assert stored == ({"0"} if dropped == "0" else {"0", "1"})


def test_what_only_one_layer_is_left_with_is_its_own_again():
    deep()
    to("out", Share(), PruneLayers(layers="1"))
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "llama"


def test_what_would_give_layers_other_values_of_what_they_share_is_refused():
    put(Path("model"), num_hidden_layers=4)

    class Half(Plain):
        def rewrite(self, model):
            model.layers[2].later(lambda layer: layer.__setitem__("o", layer["o"] / 2))

    with pytest.raises(OptionError, match=r"layers 1, 2 share their attention, and plain would give each of them another o"):
        run("model", Share(what="attention"), Half())
    with pytest.raises(OptionError, match="layer 2 shares its layer with others already"):
        run("model", Share(), Share(what="ffn", group=(2, 3)))
    assert not Path("out").exists()


def test_a_module_that_holds_more_is_refused():
    deep("phi3")
    with pytest.raises(ModelError, match=r"phi3 holds q, k, v in one module \(self_attn.qkv_proj\), so layers cannot share q alone"):
        to("out", Share(what="q"))
    deep("gpt2")
    with pytest.raises(ModelError, match="a layer of gpt2 has no gate"):
        to("out", Share(what="gate"))


def test_a_step_that_computes_a_layer_at_the_turn_of_another_is_a_mistake_of_its_author():
    class Ahead(ShareFitted):
        def config(self, config):
            return config

        def rewrite(self, model):
            model.layers[2].later(lambda layer: self.scale(layer, "o"))
            model.layers[1].later(lambda _: model.layers[2]["o"])

    put(Path("model"), num_hidden_layers=4)
    with pytest.raises(TechniqueError, match="a step computes layer 2 out of its turn"):
        run("model", Ahead())


def test_a_step_that_computes_a_layer_before_its_turn_is_a_mistake_of_its_author():
    class Early(ShareFitted):
        def rewrite(self, model):
            super().rewrite(model)
            assert "o" in model.layers[1]  # fits it, on the inputs of the first layer

    put(Path("model"), num_hidden_layers=4)
    with pytest.raises(TechniqueError, match=r"before its turn|out of its turn"):
        run("model", Early())
    assert not Path("out").exists()


@pytest.mark.parametrize("saved", [1, 2, 3])
def test_a_calibrated_sharing_that_was_cut_off_goes_on_to_the_same_numbers(saved, monkeypatch):
    put(Path("model"), num_hidden_layers=4)
    step = ShareFitted(what="attention", group=(1, 3))
    run("model", step, place="whole")
    killed_saving(monkeypatch, saved, lambda: run("model", step))
    run("model", step)
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    changed = {name for name, tensor in tensors("whole").items() if not torch.equal(tensor, tensors("model")[name])}
    assert changed == {"model.layers.1.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"}


def test_inspect_says_what_is_shared_and_counts_it_once(command):
    deep()
    to("out", Share(what="ffn"))
    told = command("inspect", "out").output
    assert "layers 1, 2 share their ffn" in told
    gate = 3 * (32 * 48 + 48)  # of four layers, biases among them
    assert f"{gate}" in next(line for line in told.splitlines() if line.startswith("gate"))


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"what": "memory", "layers": [1, 2]}, "layers cannot share 'memory'; they can share layer, attention, ffn"),
        ({"what": "ffn", "layers": [1, 4]}, "the model has layers 0 to 3"),
        ({"what": "ffn", "layers": [2]}, "not two or more layers"),
        ({"what": "ffn", "layers": [2, 1]}, "not two or more layers in ascending order"),
        ({"what": "ffn"}, "layers"),
        ("ffn", "makes no sense"),
    ],
)
def test_records_that_somebody_edited_are_refused(entry, told, command):
    deep()
    to("out", Share())
    file = Path("out/config.json")
    content = json.loads(file.read_text())
    content["effconvert"]["shared"] = [entry]
    file.write_text(json.dumps(content))
    result = command("inspect", "out")
    assert result.exit_code == 1
    assert told in result.output
    assert "take the file that effconvert wrote" in result.output


def test_a_file_that_holds_what_an_earlier_layer_stores_is_refused(command):
    deep()
    to("out", Share())
    content = json.loads(Path("out/config.json").read_text())
    content["effconvert"]["shared"] = [{"what": "ffn", "layers": [0, 1]}]
    Path("out/config.json").write_text(json.dumps(content))
    result = command("inspect", "out")
    assert result.exit_code == 1
    assert "holds model.layers.1.mlp" in result.output
    assert "one of the two is wrong" in result.output


def lent_by_hand(kind="llama", group=(1, 2), **changes):
    """A stock model in which the later layers of a group compute with the hidden states that the first one's keys and values are made of."""
    model = tiny(kind, **changes)
    layers = [model.model.layers[index].self_attn for index in group]
    seen = {}
    for name in ("k_proj", "v_proj"):
        getattr(layers[0], name).register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out))
        for layer in layers[1:]:
            getattr(layer, name).register_forward_hook(lambda _, args, out, name=name: seen[name])
    if hasattr(layers[0], "k_norm"):
        for layer in layers[1:]:
            layer.k_norm.load_state_dict(layers[0].k_norm.state_dict())
    return model


def changes_of(kind, layers=4):
    return {"num_hidden_layers": layers, **({"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if kind.startswith("gemma") else {})}


LENDING = {"llama": (1, 2), "mistral": (0, 1, 3), "qwen3": (1, 3), "gemma3_text": (0, 2), "olmo2": (1, 2), "qwen2": (0, 1)}


@pytest.mark.parametrize(("kind", "group"), LENDING.items())
def test_layers_that_read_an_earlier_ones_keys_and_values_keep_none(kind, group):
    changes = changes_of(kind)
    save(tiny(kind, **changes), Path("model"))
    outcome = to("out", Share(what="cache", group=group))
    model, expected = opened("out"), lent_by_hand(kind, group, **changes)
    torch.testing.assert_close(logits(model), logits(expected))
    assert outcome.plan.after.kv_bytes == outcome.plan.before.kv_bytes * (5 - len(group)) // 4
    ids = torch.arange(3, 27)[None]  # longer than a window
    cache = cache_for(model.config)
    steps = [model(ids[:, :9], **with_cache(model, cache)), *(model(ids[:, at : at + 1], **with_cache(model, cache)) for at in range(9, 24))]
    torch.testing.assert_close(torch.cat([step.logits for step in steps], 1), expected(ids).logits)
    assert cache_bytes(cache) == kv_bytes(outcome.plan.config, 4, 24)
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids[:, :5], **beams), expected.generate(ids[:, :5], **beams))
    model.save_pretrained("again")
    assert tensors("again").keys() == tensors("out").keys()
    assert torch.equal(logits(opened("again")), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_keys_that_are_lent(checkpointing):
    deep()
    to("out", Share(what="cache"))
    found = []
    for model in (opened("out"), lent_by_hand(num_hidden_layers=4)):
        model.train()
        if checkpointing:
            keep_no_activations(model)
        model(torch.arange(3, 12)[None], use_cache=False).logits.square().mean().backward()
        found.append(model.model.layers[1].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*found)


def test_a_cache_of_transformers_own_gives_the_same_and_keeps_more():
    deep()
    to("out", Share(what="cache"))
    model, ids = opened("out"), torch.arange(3, 15)[None]
    stock = transformers.DynamicCache(config=model.config)
    first = model(ids[:, :6], **with_cache(model, stock)).logits
    torch.testing.assert_close(torch.cat([first, model(ids[:, 6:], **with_cache(model, stock)).logits], 1), model(ids).logits)


def test_what_cannot_lend_is_refused():
    deep("phi3")
    with pytest.raises(ModelError, match=r"phi3 holds q, k, v in one module, so [kv] alone"):
        to("out", Share(what="cache"))
    deep("gpt2")
    with pytest.raises(ModelError, match="gpt2 has no keys and values of their own"):
        to("out", Share(what="cache"))
    deep("gemma2")
    with pytest.raises(ModelError, match="layers 1, 2 have other windows"):
        to("out", Share(what="cache"))
    deep()
    with pytest.raises(OptionError, match="layers 2 read the keys and values of layer 1, so it must stay"):
        to("out", Share(what="cache"), PruneLayers(layers="1"))
    with pytest.raises(OptionError, match="layer 1 has linear in place of its scores"):
        to("out", Linear(layers="1"), Share(what="cache"))
    with pytest.raises(OptionError, match="layer 2 shares its keys and values with others"):
        to("out", Share(what="cache"), Linear(layers="2"))
    with pytest.raises(OptionError, match="layer 1 shares its cache with others already"):
        to("out", Share(what="cache"), Share(what="attention"))
    put(Path("model"), num_hidden_layers=4)
    to("lent", Share(what="cache"))
    with pytest.raises(ModelError, match="layer 2 of the original reads the keys and values of layer 1"):
        run("model", Refit(teacher="lent"))
