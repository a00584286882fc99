"""Sparse upcycling: into each family with experts, exact, streamed, in the layout of stock files."""

import json
import math

import pytest
import torch
import transformers
from click.testing import CliRunner
from packaging.specifiers import SpecifierSet
from transformers import AutoConfig, AutoModelForCausalLM

from effconvert import steps
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.layer import Deferred
from effconvert.checkpoint.reading import read_config
from effconvert.cli import main
from effconvert.convert import plan as planning
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.ffn.moe import Moe
from tests.convert.test_seam import DropSecond
from tests.models import SETTINGS, characters, logits, on_disk, save, tiny

PLAIN = {"attention_bias": False, "mlp_bias": False}
NO_MLP_BIAS = {"mlp_bias": False}
WINDOWED = {"use_sliding_window": True, "sliding_window": 8}
SAME = 1e-6  # of the largest logit, in float32: weights that sum to one are not exactly one
TARGETS = [  # source, changes to its config, options, class
    ("llama", PLAIN, {}, "Mixtral"),
    ("llama", {**PLAIN, "head_dim": 16, "tie_word_embeddings": True}, {}, "Mixtral"),
    (
        "llama",
        {**PLAIN, "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        {},
        "Mixtral",
    ),
    ("llama", NO_MLP_BIAS, {}, "GraniteMoe"),
    ("llama", {**NO_MLP_BIAS, "head_dim": 16, "tie_word_embeddings": True}, {"top_k": 4}, "GraniteMoe"),
    ("llama", PLAIN, {"layers": "1"}, "Qwen2Moe"),
    ("mistral", {}, {}, "Mixtral"),
    ("mistral", {"sliding_window": None}, {"top_k": 1}, "Mixtral"),
    ("phi3", {"sliding_window": 8, "num_key_value_heads": 2}, {}, "Mixtral"),
    ("qwen2", {}, {}, "Qwen2Moe"),
    ("qwen2", {**WINDOWED, "max_window_layers": 1, "tie_word_embeddings": True}, {"layers": "0"}, "Qwen2Moe"),
    ("qwen3", {"attention_bias": True}, {}, "Qwen3Moe"),
    ("qwen3", {**WINDOWED, "max_window_layers": 0}, {"layers": "-1"}, "Qwen3Moe"),
    ("qwen3", {**WINDOWED, "max_window_layers": 2}, {}, "Qwen3Moe"),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 2}, {}, "FlexOlmo"),
    ("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0}, {}, "GraniteMoe"),
    ("granite", {"attention_bias": True, "tie_word_embeddings": True}, {}, "GraniteMoe"),
]
CASES = [*TARGETS, *((kind, changes, {**options, "granularity": 4}, name) for kind, changes, options, name in TARGETS)]


def upcycle(model, folder, *, verify=False, **options):
    """Convert a tiny model to 4 experts, and return what came of it."""
    source = model if isinstance(model, str) else str(save(model, folder / "source"))
    return convert(source, (Moe(**{"experts": 4, **options}),), RunOptions(output=folder / "out", verify=verify))


def opened(folder):
    """What stock transformers makes of a folder, with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def experts(folder, index=0):
    """Parts of a layer in a folder."""
    return open_checkpoint(folder).layer(index, "cpu")


@pytest.mark.few(2)
@pytest.mark.parametrize(("kind", "changes", "options", "name"), CASES)
def test_the_logits_stay_and_the_files_are_as_stock_writes_them(kind, changes, options, name, tmp_path):
    model = tiny(kind, **changes)
    outcome = upcycle(model, tmp_path, verify=True, **options)
    again = opened(tmp_path / "out")
    assert type(again).__name__ == f"{name}ForCausalLM"
    expected = logits(model)
    assert expected.std() > 0.1
    assert (logits(again) - expected).abs().max() <= SAME * expected.abs().max()
    assert outcome.report.difference <= SAME * expected.abs().max()
    stock, ours = on_disk(save(again, tmp_path / "again")), on_disk(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in stock.items()}
    ids = torch.arange(3, 9)[None]
    written = [made.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0).tolist() for made in (model, again)]
    assert written[0] == written[1]


def test_every_family_that_can_be_upcycled_is_tried():
    assert {kind for kind, *_ in TARGETS} == {kind for kind, family in FAMILIES.items() if family.upcycled}
    becomes = {target for family in FAMILIES.values() for target in family.upcycled}
    assert becomes | {"olmoe"} == {kind for kind, family in FAMILIES.items() if family.experts_key}  # which is no family's with experts: olmo has no QK-norm


PAIRS = [(kind, target) for kind, family in FAMILIES.items() for target in family.upcycled]
LEAST = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}  # of a config.json
OLDER = [{}, {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": None}]
NEW = {"architectures", "model_type", "dtype", "_name_or_path", "intermediate_size", "layer_types", "sliding_window"}  # held elsewhere


@pytest.mark.parametrize(("kind", "target", "older"), [(*pair, older) for pair in PAIRS for older in OLDER if pair[0] != "phi3" or "rope_scaling" not in older])
def test_what_a_config_leaves_out_keeps_the_value_that_its_own_class_has(kind, target, older, tmp_path):
    heads = {"num_key_value_heads": 4} if FAMILIES[kind].defaults.get("num_key_value_heads") else {}  # which would not divide 4
    biased = {"attention_bias": True} if (kind, target) == ("llama", "granitemoe") else {}
    raw = {"model_type": kind, "architectures": [FAMILIES[kind].lm], **LEAST, **heads, **biased, **older}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    source = AutoConfig.from_pretrained(tmp_path)
    made = Moe(experts=4, **({"layers": "0"} if (kind, target) == ("llama", "qwen2_moe") else {})).config(read_config(tmp_path))
    assert made.kind == target
    (tmp_path / "config.json").write_text(json.dumps(made.content))
    found = AutoConfig.from_pretrained(tmp_path)
    before, after = ({**config.to_dict(), "head_dim": getattr(config, "head_dim", None) or 16} for config in (source, found))
    for config in (before, after):
        config["rope_parameters"].pop("partial_rotary_factor", None)  # phi3's alone; it is 1
    shared = (before.keys() & after.keys()) - NEW
    assert {"rope_parameters", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "pad_token_id", "eos_token_id", "bos_token_id"} <= shared
    assert {key: after[key] for key in shared} == {key: before[key] for key in shared}
    assert before.get("sliding_window") == (after.get("sliding_window") or None)  # qwen2_moe says 0 for none
    if target == "granitemoe":
        assert after["attention_multiplier"] == (before["attention_multiplier"] if kind == "granite" else 16**-0.5)


def test_experts_are_bytes_of_the_ffn_and_only_the_router_is_computed(tmp_path):
    source = save(tiny("llama", **PLAIN), tmp_path / "source")
    planned = plan(open_checkpoint(source), (Moe(experts=4),))
    assert {target.name.split(".", 3)[3] for target in planned.targets if target.unit is not None} == {"block_sparse_moe.gate.weight"}
    upcycle(str(source), tmp_path)
    before, after = on_disk(source), on_disk(tmp_path / "out")
    for name, part in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        for expert in range(4):
            assert torch.equal(after[f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"], before[f"model.layers.1.mlp.{part}_proj.weight"])


def test_routers_are_small_normal_numbers_of_each_layer_by_the_seed(tmp_path):
    model = tiny("llama", **PLAIN, hidden_size=256)
    for folder, seed in (("one", 0), ("same", 0), ("other", 1)):
        (tmp_path / folder).mkdir()
        upcycle(model, tmp_path / folder, experts=64, seed=seed)
    one, same, other = (torch.stack([experts(tmp_path / folder / "out", index)["router"] for index in range(2)]) for folder in ("one", "same", "other"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (2, 64, 256)
    assert (one[0] != one[1]).all()
    assert abs(one.std() - 0.02) < 0.0005
    assert abs(one.mean()) < 0.0005


def test_slices_of_an_expert_share_their_row_of_the_router_and_are_its_neurons(tmp_path):
    upcycle(tiny("qwen3"), tmp_path, granularity=3)
    before, after = experts(tmp_path / "source"), experts(tmp_path / "out")
    assert read_config(tmp_path / "out").experts == 12
    assert read_config(tmp_path / "out").top_k == 6
    assert torch.equal(after["router"][3:6], after["router"][3].expand(3, -1))
    assert len(after["router"].unique(dim=0)) == 4
    for number in range(12):
        rows = slice(number % 3 * 16, number % 3 * 16 + 16)
        assert torch.equal(after[f"experts.{number}.gate"], before["gate"][rows])
        assert torch.equal(after[f"experts.{number}.up"], before["up"][rows])
        assert torch.equal(after[f"experts.{number}.down"], 3 * before["down"][:, rows])


def test_a_scale_that_is_rounded_is_not_promised_to_be_exact(tmp_path):
    config = read_config(save(tiny("llama", **PLAIN), tmp_path))
    assert [Moe(experts=4, granularity=number).is_exact(config) for number in (1, 2, 3, 4)] == [True, True, False, True]
    assert not Moe(experts=4, noise=0.01).is_exact(config)
    assert not Moe(experts=4, drop_upcycling=0.5).is_exact(config)


def test_noise_is_as_large_as_asked_for_and_its_own_in_each_expert(tmp_path):
    upcycle(tiny("llama", **PLAIN, hidden_size=128), tmp_path, noise=0.1)
    before, after = experts(tmp_path / "source"), experts(tmp_path / "out")
    for part in ("gate", "up", "down"):
        added = torch.stack([after[f"experts.{number}.{part}"] - before[part] for number in range(4)])
        assert abs(added.std() / before[part].std() - 0.1) < 0.003
        assert abs(torch.corrcoef(added.flatten(1)) - torch.eye(4)).max() < 0.05
    assert not torch.equal(experts(tmp_path / "out", 1)["experts.0.gate"] - experts(tmp_path / "source", 1)["gate"], after["experts.0.gate"] - before["gate"])


def test_dropped_neurons_are_the_same_in_all_three_and_drawn_by_what_they_replace(tmp_path):
    model = tiny("llama", **PLAIN, hidden_size=128, intermediate_size=96)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight += 1.0  # so that a mean is seen
    upcycle(model, tmp_path, drop_upcycling=0.3)
    before, after = experts(tmp_path / "source"), experts(tmp_path / "out")
    dropped = []
    for number in range(4):
        changed = {part: (after[f"experts.{number}.{part}"] != before[part]).all(1 if part != "down" else 0) for part in ("gate", "up", "down")}
        assert torch.equal(changed["gate"], changed["up"])
        assert torch.equal(changed["gate"], changed["down"])
        assert changed["gate"].sum() == math.floor(0.3 * 96)
        kept = ~changed["gate"]
        assert torch.equal(after[f"experts.{number}.down"][:, kept], before["down"][:, kept])
        for part in ("gate", "up"):
            new, old = after[f"experts.{number}.{part}"][changed["gate"]], before[part][changed["gate"]]
            assert abs(new.mean() - old.mean()) < 0.02
            assert abs(new.std() / old.std() - 1) < 0.05
        dropped.append(frozenset(changed["gate"].nonzero().flatten().tolist()))
    assert len(set(dropped)) == 4


@pytest.mark.parametrize("options", [{"noise": 0.1}, {"drop_upcycling": 0.5}, {"granularity": 2}, {"noise": 0.1, "drop_upcycling": 0.5, "granularity": 2}])
@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_one_expert_at_most_is_in_memory(kind, options, tmp_path):
    layer = plan(open_checkpoint(save(tiny(kind, **PLAIN), tmp_path)), (Moe(experts=4, **options),)).models("cpu")[-1].layers[0]
    made = {name: value for name, _, value in layer.tensors() if "experts" in name or "linear" in name}
    assert all(isinstance(value, Deferred) for value in made.values())
    assert len(made) == (3 * 4 * options.get("granularity", 1) if kind == "llama" else 2)
    for value in made.values():
        pieces = list(value.pieces())
        assert max(piece.numel() for piece in pieces) <= 48 * 32
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), value.compute().flatten())


def test_the_shared_expert_of_qwen2_moe_gives_nothing_and_can_learn(tmp_path):
    upcycle(tiny("qwen2"), tmp_path)
    layer = experts(tmp_path / "out")
    assert not layer["shared_down"].any()
    assert not layer["shared_router"].any()
    model = opened(tmp_path / "out").train()
    model(torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss.backward()
    assert model.model.layers[0].mlp.shared_expert.down_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("kind", "changes"), [("llama", PLAIN), ("qwen2", {}), ("qwen3", {}), ("olmo2", {}), ("granite", {})])
def test_a_trained_step_tells_experts_apart_and_the_balancing_loss_is_there_for_the_asking(kind, changes, tmp_path):
    upcycle(tiny(kind, **changes), tmp_path)
    model, ids = opened(tmp_path / "out"), torch.arange(3, 43).view(2, 20)
    assert model.config.router_aux_loss_coef == 0.02
    assert not model.config.output_router_logits
    assert not hasattr(model(ids), "aux_loss") or model(ids).aux_loss is None
    if transformers.__version__ in SpecifierSet("<5.18"):
        pytest.skip("transformers 5.17's granitemoe notes no logits of its router")
    out = model(ids, labels=ids, output_router_logits=True)
    assert 1.9 < out.aux_loss.item() < 3.0  # K where experts are equally busy
    assert out.loss.item() == pytest.approx(model(ids, labels=ids).loss.item() + 0.02 * out.aux_loss.item(), rel=1e-5)
    out.loss.backward()
    name = next(name for name, _ in model.named_parameters() if name.endswith("experts.down_proj"))
    gradient = dict(model.named_parameters())[name].grad
    assert not torch.equal(gradient[0], gradient[1])


def test_a_shard_that_grows_too_large_becomes_several_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "LARGEST", 100_000)
    model = tiny("granite", num_hidden_layers=3)
    outcome = upcycle(model, tmp_path, noise=0.1)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert len(sizes) > 1
    assert all(size <= max(100_000, (tmp_path / "source/model.safetensors").stat().st_size) + 5_000 for size in sizes.values())
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(sizes)
    assert index["metadata"]["total_size"] == outcome.plan.after.bytes
    assert opened(tmp_path / "out").num_parameters() == outcome.plan.after.parameters


def test_a_converted_model_is_planned_with_what_a_token_uses(tmp_path):
    size = upcycle(tiny("llama", **PLAIN), tmp_path, experts=8, top_k=3).plan.after
    ffn = 3 * 48 * 32 * 2
    assert size.active == size.parameters - 5 * ffn
    told = CliRunner().invoke(main, ["moe", "--experts", "8", "--top-k", "3", str(tmp_path / "source"), "-o", str(tmp_path / "other"), "--dry-run"])
    assert "active for a token" in told.output
    assert "loads as MixtralForCausalLM in stock transformers; no logit may change" in told.output
    seen = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")])
    assert "experts.gate" in seen.output
    assert "3 of 8 experts" in seen.output
    before = open_checkpoint(tmp_path / "source")
    assert plan(before, (Gqa(groups=2, pool="mean"),)).after.active == plan(before, (Gqa(groups=2, pool="mean"),)).after.parameters


def test_pooled_upcycled_and_refitted_in_one_pass(tmp_path):
    source = save(tiny("llama", **PLAIN), tmp_path / "source")
    text = characters(source)
    made = (Gqa(groups=2, pool="mean"), Moe(experts=4), steps.load("refit")())
    outcome = convert(str(source), made, RunOptions(output=tmp_path / "out", verify=False, calibrate=str(text), calibration_tokens=512))
    alone = convert(str(source), (made[0], made[2]), RunOptions(output=tmp_path / "alone", verify=False, calibrate=str(text), calibration_tokens=512))
    found, expected = logits(opened(outcome.output)), logits(opened(alone.output))
    assert outcome.plan.config.kind == "mixtral"
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()  # refitted from texts that experts give with another rounding
    assert (expected - logits(tiny("llama", **PLAIN))).abs().max() > 0.05 * expected.abs().max()


def test_a_refit_leaves_experts_alone_where_layers_were_dropped(tmp_path):
    source = save(tiny("mixtral", num_hidden_layers=3), tmp_path / "source")
    text = characters(source)
    convert(str(source), (DropSecond(), steps.load("refit")()), RunOptions(output=tmp_path / "out", calibrate=str(text), calibration_tokens=512))
    before, after = experts(tmp_path / "source"), experts(tmp_path / "out")
    assert all(torch.equal(after[part], before[part]) for part in before if part.startswith("experts."))


def test_what_is_upcycled_can_be_pooled_and_mixed_afterwards(tmp_path):
    upcycle(tiny("llama", **PLAIN), tmp_path)
    source, text = tmp_path / "out", characters(tmp_path / "out")
    outcome = convert(
        str(source), (Gqa(groups=2), steps.load("streaming")(window=8)), RunOptions(output=tmp_path / "more", calibrate=str(text), calibration_tokens=512)
    )
    assert outcome.plan.config.needs_effconvert
    assert outcome.report.after.parameters < outcome.report.before.parameters


def test_a_chain_gives_the_bytes_of_the_commands_one_after_the_other(tmp_path):
    source = save(tiny("llama", **PLAIN), tmp_path / "source")
    gqa, moe, quick = Gqa(groups=2, pool="mean"), Moe(experts=4, noise=0.1, granularity=2), {"verify": False}
    convert(str(source), (gqa, moe), RunOptions(output=tmp_path / "both", **quick))
    convert(str(source), (gqa,), RunOptions(output=tmp_path / "one", **quick))
    convert(str(tmp_path / "one"), (moe,), RunOptions(output=tmp_path / "two", **quick))
    both, two = on_disk(tmp_path / "both"), on_disk(tmp_path / "two")
    assert both.keys() == two.keys()
    assert all(torch.equal(both[name], two[name]) for name in both)


UNEVEN = {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3}
REFUSED = [
    ("llama", PLAIN, {"top_k": 5}, OptionError, "--top-k 5 is more than --experts 4; give at most 4"),
    ("llama", PLAIN, {"granularity": 5}, OptionError, "--granularity 5 does not divide the 48 neurons .* give 2, 3, 4, 6"),
    ("llama", {**PLAIN, "intermediate_size": 50}, {}, ModelError, "experts would be 50 wide, as this model's FFN is, and torch runs only multiples of 4"),
    ("llama", {**PLAIN, **UNEVEN}, {}, ModelError, "hidden states are 42 wide, and torch multiplies by experts only where that is a multiple of 4"),
    ("llama", PLAIN, {"granularity": 8}, OptionError, "into experts 4 wide or a multiple of it, which torch needs; give 2, 3, 4, 6, 12"),
    ("llama", PLAIN, {"experts": 1024, "granularity": 48}, OptionError, "more experts than any model has"),
    ("llama", PLAIN, {"experts": 1}, OptionError, "--experts is 1, and it should be greater than or equal to 2"),
    ("llama", PLAIN, {"noise": math.nan}, OptionError, "--noise is nan"),
    ("llama", PLAIN, {"drop_upcycling": 1.5}, OptionError, "--drop-upcycling is 1.5"),
    ("llama", PLAIN, {"layers": "5"}, OptionError, "--layers 5 names what is no layer"),
    ("llama", NO_MLP_BIAS, {"layers": "1"}, OptionError, "a granitemoe has experts in all of its layers, .* leave out --layers"),
    ("mistral", {}, {"layers": "1"}, OptionError, "a mixtral has experts in all of its layers"),
    ("llama", {}, {}, ModelError, "mlp_bias = True has no counterpart in granitemoe, .*effconvert inspect"),
    ("granite", {"mlp_bias": True}, {}, ModelError, "mlp_bias = True has no counterpart in granitemoe"),
    ("qwen3", {**WINDOWED, "max_window_layers": 1}, {}, ModelError, "has a sliding window in some layers, and qwen3_moe in all or in none"),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {}, ModelError, "rotates 4 of the 8 dimensions"),
    ("gemma2", {}, {}, ModelError, "gemma2 computes what no family with experts does"),
    ("gpt2", {}, {}, ModelError, "gpt2 has no gate in its FFN"),
    ("bert", {}, {}, ModelError, "bert has no gate in its FFN"),
    ("mixtral", {}, {}, ModelError, "mixtral has experts already"),
]


def test_where_its_widths_do_not_fit_inspection_does_not_list_it(tmp_path):
    config = open_checkpoint(save(tiny("llama", **PLAIN, **UNEVEN), tmp_path / "model")).config
    with pytest.raises(ModelError, match="hidden states are 42 wide"):
        Moe.allowed_options(config)


@pytest.mark.parametrize(("kind", "changes", "options", "error", "sentence"), REFUSED, ids=[sentence[:40] for *_, sentence in REFUSED])
def test_what_cannot_be_is_refused_with_the_reason_and_leaves_nothing(kind, changes, options, error, sentence, tmp_path):
    source = save(tiny(kind, **changes), tmp_path / "source")
    with pytest.raises(error, match=sentence):
        upcycle(str(source), tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_longrope_is_refused(tmp_path):
    source = save(tiny("phi3"), tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}))
    with pytest.raises(ModelError, match="longrope"):
        upcycle(str(source), tmp_path)


def test_a_mixer_in_attention_stays_and_something_in_the_ffn_is_refused(tmp_path):
    source = save(tiny("llama", **PLAIN), tmp_path / "source")
    streaming = steps.load("streaming")(window=8, layers="0")
    outcome = convert(str(source), (streaming, Moe(experts=4)), RunOptions(output=tmp_path / "out"))
    assert outcome.plan.config.content["model_type"] == "effconvert_mixtral"
    assert outcome.report


@pytest.mark.parametrize(("key", "value"), [("num_local_experts", 10**9), ("num_local_experts", "many"), ("num_experts_per_tok", 0), ("num_local_experts", 3)])
def test_a_config_of_experts_that_somebody_edited_is_refused(key, value, tmp_path):
    source = save(tiny("mixtral"), tmp_path)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(ModelError, match=r"mend the file|one is wrong"):
        open_checkpoint(source)


def test_an_expert_that_is_missing_is_named(tmp_path):
    from safetensors.torch import save_file

    source = save(tiny("mixtral"), tmp_path)
    tensors = on_disk(source)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has no model\.layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight"):
        open_checkpoint(source)


def test_the_number_of_experts_is_found_under_either_name(tmp_path):
    for kind in ("mixtral", "qwen3_moe"):
        source = save(tiny(kind), tmp_path / kind)
        raw = json.loads((source / "config.json").read_text())
        count = next(raw.pop(key) for key in ("num_local_experts", "num_experts") if key in raw)
        for key in ("num_local_experts", "num_experts"):
            (source / "config.json").write_text(json.dumps({**raw, key: count}))
            assert AutoConfig.from_pretrained(source).num_experts == count
            assert open_checkpoint(source).config.experts == count


def test_the_settings_of_tests_have_a_dense_layer_where_families_can():
    assert {kind for kind, settings in SETTINGS.items() if settings.get("mlp_only_layers")} == {
        kind for kind, family in FAMILIES.items() if family.dense_layers_key
    }
    assert all(hasattr(transformers, family.lm) for family in FAMILIES.values())
