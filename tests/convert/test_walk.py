"""A run over layers with one in memory: each family computes in it what the whole model of transformers computes."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.outer import Outer
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.shards import read_header
from effconvert.errors import ModelError
from effconvert.families import FAMILIES
from effconvert.heal._capture import Capture
from effconvert.heal._layerwise import LayerRunner
from effconvert.heal._tensors import embedding_rows, stored_tensors
from tests.models import ATTENDING, DECODERS, save, tiny

pytestmark = pytest.mark.families  # all of them, each time

WINDOWS, BATCH, LENGTH = 5, 2, 20  # so the last batch is shorter
CLOSE = {"rtol": 0, "atol": 1e-5}  # in float32, of numbers of about 1
PARTS = ("q", "o", "down")
SEEN = []  # what attention of the whole model was called with, layer by layer


def witness(module, query, key, value, attention_mask, **kwargs):
    """Attend as the family's eager implementation does, and remember what came in and what the weights were."""
    out, weights = sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    SEEN.append({"query": query, "key": key, "weights": weights, "scaling": kwargs.get("scaling", query.shape[-1] ** -0.5)})
    return out, weights


AttentionInterface.register("witness", witness)
AttentionMaskInterface.register("witness", eager_mask)


def token_ids(seed=0):
    """The same windows on each call, among them tokens that some families take for padding."""
    ids = torch.randint(3, 128, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[1, -4:] = 0
    ids[4, :3] = 0
    return ids


def parts_of(kind):
    """Parts to look at: experts are no modules of their own in memory."""
    return tuple(part for part in PARTS if part != "down" or not FAMILIES[kind].experts_key)


def runner_of(folder, ids):
    """A runner with the real weights outside the layers, and its checkpoint."""
    checkpoint = open_checkpoint(folder)
    outer = {name.removeprefix(checkpoint.prefix): stored.read("cpu") for name, stored in checkpoint.outer.items() if name.startswith(checkpoint.prefix)}
    return checkpoint, LayerRunner(checkpoint.config, outer, list(ids.split(BATCH)), torch.device("cpu"))


def weights_of(checkpoint, index):
    return {name: numbers for name, (_, numbers, _) in stored_tensors(checkpoint.layer(index, "cpu")).items()}


@torch.inference_mode()
def walked(folder, ids, parts=PARTS):
    """Walk over a model, and return what was seen in each layer, all windows together."""
    checkpoint, runner = runner_of(folder, ids)
    states, layers = runner.begin(), []
    for index in range(checkpoint.config.layers):
        looks = list(runner.run(index, weights_of(checkpoint, index), states, parts))
        states = [look.out for look in looks]
        together = {name: torch.cat([getattr(look, name) for look in looks]) for name in ("state", "out", "query", "key", "weights")}
        sides = {side: {part: torch.cat([getattr(look, side)[part] for look in looks]) for part in parts} for side in ("inputs", "outputs")}
        [scaling] = {look.scaling for look in looks}
        layers.append(Capture(**together, **sides, scaling=scaling))
    return layers


@torch.inference_mode()
def whole(model, ids, parts=PARTS):
    """Run the whole model of transformers at once, and return what hooks see in each layer."""
    family = FAMILIES[model.config.model_type]
    base = model.get_submodule(family.prefix)
    base.set_attn_implementation("witness")
    layers = [Capture(torch.empty(0)) for _ in base.get_submodule(family.layers)]
    handles = []

    def arrive(look):
        return lambda _, args, kwargs: setattr(look, "state", args[0] if args else kwargs["hidden_states"])

    def leave(look):
        return lambda _, args, out: setattr(look, "out", out[0] if isinstance(out, tuple) else out)

    def inside(look, part):
        def hook(_, args, out):
            look.inputs[part], look.outputs[part] = args[0], out

        return hook

    for look, layer in zip(layers, base.get_submodule(family.layers), strict=True):
        handles += [layer.register_forward_pre_hook(arrive(look), with_kwargs=True), layer.register_forward_hook(leave(look))]
        handles += [layer.get_submodule(family.parts[part]).register_forward_hook(inside(look, part)) for part in parts]
    SEEN.clear()
    base(ids, **({"use_cache": False} if family.decoder else {}))
    for handle in handles:
        handle.remove()
    for look, seen in zip(layers, SEEN, strict=True):
        look.query, look.key, look.weights, look.scaling = seen["query"], seen["key"], seen["weights"], seen["scaling"]
    return layers


@pytest.mark.parametrize("kind", ATTENDING)
def test_each_family_computes_in_a_walk_what_the_whole_model_computes(kind, tmp_path):
    model, ids = tiny(kind), token_ids()
    parts = parts_of(kind)
    found, expected = walked(save(model, tmp_path / "model"), ids, parts), whole(model, ids, parts)
    assert len(found) == len(expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.out.std() > 0.05
        assert mine.scaling == theirs.scaling
        for name in ("state", "out", "query", "key", "weights"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), **CLOSE, msg=lambda told, name=name: f"{name}: {told}")
        for part in parts:
            torch.testing.assert_close(mine.inputs[part], theirs.inputs[part], **CLOSE)
            torch.testing.assert_close(mine.outputs[part], theirs.outputs[part], **CLOSE)


@pytest.mark.parametrize(("kind", "changes", "scaling"), [("granite", {"attention_multiplier": 0.3}, 0.3), ("gemma2", {"query_pre_attn_scalar": 25}, 0.2)])
def test_scores_may_be_scaled_by_what_a_config_says(kind, changes, scaling, tmp_path):
    assert {look.scaling for look in walked(save(tiny(kind, **changes), tmp_path / "model"), token_ids())} == {scaling}


def test_fewer_kv_heads_are_seen_as_they_are(tmp_path):
    model, ids = tiny("llama", num_key_value_heads=2), token_ids()
    [first, _], [expected, _] = walked(save(model, tmp_path / "model"), ids), whole(model, ids)
    assert first.key.shape == (WINDOWS, 2, LENGTH, 8)
    torch.testing.assert_close(first.key, expected.key, **CLOSE)


def test_one_batch_alone_is_walked_too(tmp_path):
    model, ids = tiny("gemma2"), token_ids()[:1]
    found, expected = walked(save(model, tmp_path / "model"), ids), whole(model, ids)
    torch.testing.assert_close(found[-1].out, expected[-1].out, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_a_model_saved_without_its_prefix_is_walked_too(kind, tmp_path):
    model, ids = tiny(kind), token_ids()
    found, expected = walked(save(model.base_model, tmp_path / "model"), ids), whole(model, ids)
    torch.testing.assert_close(found[-1].out, expected[-1].out, **CLOSE)


@pytest.mark.parametrize("kind", ["roberta", "opt"])
def test_what_stands_for_padding_moves_no_window_of_another_batch(kind, tmp_path):
    """Roberta counts positions from what is no padding; each window by itself."""
    folder, ids = save(tiny(kind), tmp_path / "model"), token_ids()
    together = walked(folder, ids)
    for window in range(WINDOWS):
        alone = walked(folder, ids[window : window + 1])
        torch.testing.assert_close(alone[0].state, together[0].state[window : window + 1], **CLOSE)


@torch.inference_mode()
def test_layers_may_be_walked_in_any_order_and_twice(tmp_path):
    folder, ids = save(tiny("gemma2"), tmp_path / "model"), token_ids()
    expected = walked(folder, ids)
    checkpoint, runner = runner_of(folder, ids)
    for index in (1, 0, 1):
        out = torch.cat([look.out for look in runner.run(index, weights_of(checkpoint, index), list(expected[index].state.split(BATCH)))])
        torch.testing.assert_close(out, expected[index].out, rtol=0, atol=0)


@torch.inference_mode()
def test_two_runs_of_a_layer_side_by_side_keep_their_weights_apart(tmp_path):
    checkpoint, runner = runner_of(save(tiny("llama"), tmp_path / "model"), token_ids())
    states, weights = runner.begin(), weights_of(checkpoint, 0)
    other = {name: tensor * 2 for name, tensor in weights.items()}
    alone = [[look.out for look in runner.run(0, given, states)] for given in (weights, other)]
    for (one, two), *expected in zip(zip(runner.run(0, weights, states), runner.run(0, other, states), strict=True), *alone, strict=True):
        assert torch.equal(one.out, expected[0])
        assert torch.equal(two.out, expected[1])


def on_meta(runner):
    return all(parameter.is_meta for layer in runner.layers for parameter in layer.parameters())


@pytest.mark.parametrize("kind", ATTENDING)
@torch.inference_mode()
def test_the_weights_of_a_layer_are_gone_after_its_run(kind, tmp_path):
    checkpoint, runner = runner_of(save(tiny(kind), tmp_path / "model"), token_ids())
    states = runner.begin()
    assert on_meta(runner)
    run = runner.run(0, weights_of(checkpoint, 0), states)
    next(run)
    assert not on_meta(runner)
    run.close()  # somebody who looks no further
    assert on_meta(runner)
    list(runner.run(1, weights_of(checkpoint, 1), states, ("o",), until="o"))
    assert on_meta(runner)
    with pytest.raises(ModelError, match=r"missing: .*; left over: .*nothing"):
        list(runner.run(0, {"nothing": torch.zeros(1)}, states))
    assert on_meta(runner)


def test_a_layer_gets_all_of_its_tensors_and_no_other(tmp_path):
    checkpoint, runner = runner_of(save(tiny("bert"), tmp_path / "model"), token_ids())
    states, weights = runner.begin(), weights_of(checkpoint, 0)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in weights.items()}
    expected, found = (next(runner.run(0, tensors, states)).out for tensors in (weights, old))
    assert torch.equal(found, expected)  # the names of old files are those that from_pretrained takes, too
    for change in (lambda held: held.pop("output.dense.bias"), lambda held: held.update(more=torch.zeros(1))):
        changed = dict(weights)
        change(changed)
        with pytest.raises(ModelError, match=r"missing: .*output\.dense\.bias|left over: .*more"):
            next(runner.run(0, changed, states))


@pytest.mark.parametrize("kind", ATTENDING)
@torch.inference_mode()
def test_a_run_goes_no_further_than_it_is_asked_to(kind, tmp_path):
    checkpoint, runner = runner_of(save(tiny(kind), tmp_path / "model"), token_ids())
    family, states, ran = checkpoint.config.family, runner.begin(), []
    for part in parts_of(kind):
        runner.layers[0].get_submodule(family.parts[part]).register_forward_hook(lambda *_, part=part: ran.append(part))
    list(runner.run(0, weights_of(checkpoint, 0), states[:1]))
    for until in parts_of(kind):
        ran.clear()
        [look] = runner.run(0, weights_of(checkpoint, 0), states[:1], (until,), until=until)
        assert tuple(ran) == PARTS[: PARTS.index(until) + 1]
        assert set(look.inputs) == set(look.outputs) == {until}
        assert not look.out.numel()
        assert (look.query is None) == (until == "q")


@torch.inference_mode()
def test_what_is_not_asked_for_is_not_kept(tmp_path):
    checkpoint, runner = runner_of(save(tiny("llama"), tmp_path / "model"), token_ids())
    [look, *_] = runner.run(0, weights_of(checkpoint, 0), runner.begin())
    assert not look.inputs
    assert not look.outputs
    hooks = [module for module in runner.layers[0].modules() if module._forward_hooks]
    assert not hooks


def test_of_an_embedding_only_the_rows_that_are_used_are_there(tmp_path):
    table = torch.randn(40, 8).bfloat16()
    table[20:] = float("nan")  # nobody may look at them
    save_file({"embed.weight": table, "other": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "weights")
    config = read_config(save(tiny("llama"), tmp_path / "shape"))
    stored = {"embed_tokens.weight": read_header(tmp_path / "weights")["embed.weight"]}
    rows = embedding_rows(Outer(config, "", stored, "cpu"), (40, 8), torch.tensor([[3, 7], [7, 0]]))
    assert rows.dtype == torch.float32
    assert rows.shape == (40, 8)
    used = [0, 3, 7]
    assert torch.equal(rows[used], table[used].float())
    assert rows.abs().sum(1).nonzero().flatten().tolist() == used


@pytest.mark.parametrize("kind", DECODERS)
def test_a_layer_rounds_what_is_new_to_what_is_stored(kind, tmp_path):
    """What is run is what will lie on disk, in the type that lies there."""
    folder = save(tiny(kind).to(torch.bfloat16), tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    layer = checkpoint.layer(0, "cpu")
    changed = layer["o"] + 1e-4 * torch.randn(layer["o"].shape)
    layer["o"] = changed
    stored = stored_tensors(layer)
    name = f"{checkpoint.config.parts['o']}.weight"
    assert [at for at, (_, _, new) in stored.items() if new] == [name]
    expected = changed.bfloat16().float()
    assert torch.equal(stored[name][1], expected.T if checkpoint.config.family.transposed else expected)
    held = load_file(folder / "model.safetensors")
    for inside, (origin, numbers, new) in stored.items():
        assert new or torch.equal(numbers, held[origin.name].float()), inside


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in DECODERS])
@torch.inference_mode()
def test_texts_of_several_lengths_walk_side_by_side(kind, tmp_path):
    """Each as the whole model reads it alone: with the masks and positions of its own length."""
    folder = save(tiny(kind), tmp_path / kind)
    texts = [token_ids(seed)[:rows, :length] for seed, (rows, length) in enumerate([(2, LENGTH), (4, 7), (2, LENGTH), (3, 7)])]
    checkpoint, _ = runner_of(folder, texts[0])
    outer = {name.removeprefix(checkpoint.prefix): stored.read("cpu") for name, stored in checkpoint.outer.items() if name.startswith(checkpoint.prefix)}
    runner = LayerRunner(checkpoint.config, outer, texts, torch.device("cpu"))
    states = runner.begin()
    for index in range(checkpoint.config.layers):
        states = [look.out for look in runner.run(index, weights_of(checkpoint, index), states)]
    model = tiny(kind).get_submodule(FAMILIES[kind].prefix)
    normed = model.get_submodule(FAMILIES[kind].outer.get("final_norm", "")) if "final_norm" in FAMILIES[kind].outer else torch.nn.Identity()
    for text, state in zip(texts, states, strict=True):
        torch.testing.assert_close(normed(state), model(text, attention_mask=torch.ones_like(text)).last_hidden_state, **CLOSE)
