"""What every technique owes, whatever it does: one row a technique in `CASES`, and every family is tried."""

import hashlib
import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file

import effconvert.modeling
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.families import FAMILIES
from effconvert.checkpoint.outer import outer_part
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.replaced import KIND
from effconvert.convert.run import convert
from effconvert.errors import ModelError
from effconvert.modeling.loading import class_of
from effconvert.modeling.model import own_config
from effconvert.options import RunOptions
from effconvert.steps import load
from effconvert.steps import techniques as catalogue
from effconvert.surgery._placed import techniques_of
from tests.mixers import mixing
from tests.models import ATTENDING, DECODERS, GROUPING, characters, heed_caps, logits, save, tiny


@dataclass(frozen=True)
class Case:
    neutral: dict | None  # options with which no logit may change (None: there are none such),
    neutral_from: dict  # on a model with these changes to its config
    same_bytes: bool  # whether not even a bit may change then
    small: dict  # options that change something,
    small_from: dict  # likewise
    kinds: list  # families that it can be done to, by the rows of today
    refusal: str = ""  # the reason why the others cannot
    parts: tuple = ()  # what it changes in a layer beside `Family.per_kv_head` and the biases of that
    keys: tuple = ("num_key_value_heads",)  # what it changes in config.json, where it stays in the family or goes to ours
    cache: bool = True  # whether the KV cache changes its size
    encoder: dict = field(default_factory=dict)  # in place of `small` for encoders
    mixer: bool = False  # whether it brings parameters of its own, and leaves those that are there alone
    takes: bool = False  # whether it takes parts away, and leaves the others alone
    added: tuple = ()  # tensors outside the layers that it adds where it becomes a family of transformers
    native_keys: tuple = ()  # keys of config.json that it changes there, beside those that name the family
    replaces: tuple = ()  # parts of a layer that are gone, and others in their place


MULTI_HEAD = [kind for kind in ATTENDING if not FAMILIES[kind].fixed_kv_heads]
DENSE = [kind for kind, family in FAMILIES.items() if family.upcycled]
HEADS = {count: {"num_key_value_heads": count} for count in (1, 2, 4)}
CASES = {
    "gqa": Case({"groups": 4}, HEADS[4], True, {"groups": 2}, HEADS[4], MULTI_HEAD, parts=("q", "q.bias", "o")),
    "mqa": Case({}, HEADS[1], True, {}, HEADS[4], MULTI_HEAD, parts=("q", "q.bias", "o")),
    "moe": Case(
        {"experts": 4},
        {"mlp_bias": False},
        False,
        {"experts": 4, "noise": 0.5},
        {"mlp_bias": False},
        DENSE,
        "has no gate in its FFN|has experts already|computes what no family",
        keys=(
            *("num_local_experts", "num_experts", "num_experts_per_tok", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef"),
            *("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_only_layers", "qkv_bias", "attention_multiplier"),
            *("head_dim", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
        ),
        cache=False,
        replaces=("gate", "up", "down"),
    ),
    "expand-kv": Case(
        *({"groups": 4}, HEADS[2], False, {"groups": 2}, HEADS[1], GROUPING),
        "has a KV head for each|cannot be written with another number|does not attend|has attention of its own",
    ),
    "fnet": Case(
        *({}, {}, False, {}, {}, [*mixing.ENCODERS, "mpnet"], "is a decoder, and fnet mixes|does not attend|adds to the stream"),
        **{"keys": (), "cache": False, "mixer": True},
        added=("embed_projection", "embed_projection.bias", "pooler.dense.weight", "pooler.dense.bias"),
        native_keys=("num_attention_heads", "attention_probs_dropout_prob", "use_cache"),
    ),
}
SUBLAYERS = [kind for kind, family in FAMILIES.items() if not family.norms_stream and "attention" not in family.adds_inside]
CASES["prune-layers"] = Case(
    *(None, {}, False, {"layers": "1", "only": "attention"}, {}, SUBLAYERS, "normalises what its layers add to|adds to the stream"),
    keys=("per_layer_config",),
    takes=True,
)
MIXED = ("model_type", "architectures", "auto_map", "layer_types", "effconvert")
for name, row in mixing.ROWS.items():  # what they compute is tried on all families in tests/mixers; here a few are written, and read again
    reason = next(iter(row.refused.values()))
    CASES[name] = Case(row.neutral, {}, False, row.small, {}, row.pipeline, f".*{reason}", (), MIXED, True, row.encoder, True)
MATRIX = [(name, kind) for name, case in CASES.items() for kind in case.kinds]
NEUTRAL = [(name, kind) for name, kind in MATRIX if CASES[name].neutral is not None and not CASES[name].mixer and (kind in GROUPING or name == "gqa")] + [
    ("mqa", "gpt_bigcode")
]
NEUTRAL += [(name, kind) for name, kind in mixing.NEUTRAL if kind in CASES[name].kinds]
TABLED = [name for name in CASES if name in mixing.ROWS]  # mixers between projections: all their families are there
OTHERWISE = [("mqa", "gpt_bigcode"), ("gqa", "gpt_bigcode")]  # nothing to refuse, or the options are wrong and not the model
REFUSED = [(name, kind) for name, case in CASES.items() for kind in FAMILIES if kind not in case.kinds and (name, kind) not in OTHERWISE and name not in TABLED]
REFUSED += [(name, next(iter(row.refused))) for name, row in mixing.ROWS.items()]
LIKELY = {name: next(kind for kind in ("llama", "bert") if kind in (mixing.ROWS[name] if name in TABLED else case).kinds) for name, case in CASES.items()}


def technique(name, options):
    return load(name)(**options)


def build(kind, changes):
    return tiny(kind, **(changes if kind in GROUPING else {}))


def small(name, kind):
    case = CASES[name]
    return case.small if FAMILIES[kind].decoder else case.encoder or case.small


def run(source, output, name, options, **how):
    text = source.parent / "text.txt"
    text.write_text("Where we go, nobody knows; there and back again, many times. " * 2)
    little = {"text": text, "tokens": 32, "context": 16, "calibrate": str(text.with_name("calibration.txt")), "calibration_tokens": 512}
    return convert(str(source), (technique(name, options),), RunOptions(output=output, **little, **how))


def read_back(folder):
    model, info = class_of(read_config(folder)).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return heed_caps(model.eval())


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digests(folder):
    told = ("effconvert.json", "README.md")  # which say what was measured
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in told]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kv_bytes(model):
    """Bytes of the cache that a token adds (on average where mixers add those of many tokens at a time), and that mixers hold however few came."""
    if not own_config(model.config).family.decoder:
        return 0, 0
    first, second, early, late = (held(model, length) for length in (1, 2, 24, 48))
    return second[0] - first[0] + math.ceil((late[1] - early[1]) / 24), 2 * early[1] - late[1]


def held(model, length):
    """Bytes of the cache in layers of softmax and in those of mixers."""
    cache = effconvert.modeling.cache_for(model.config)
    with torch.inference_mode():
        model(torch.tensor([[3] * length]), use_cache=True, **mixing.with_cache(model, cache))
    softmax = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if not hasattr(layer, "nbytes")]
    return sum(softmax), sum(layer.nbytes for layer in cache.layers if hasattr(layer, "nbytes"))


@pytest.fixture(scope="module", params=MATRIX, ids="-".join)
def done(request, tmp_path_factory):
    """A conversion that changes something, of a model in several shards: its name, its source and what came of it."""
    name, kind = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{kind}")
    source = save(build(kind, CASES[name].small_from), folder / "source", max_shard_size="40KB")
    characters(source)
    (source / "NOTICE").write_text("words of the author")
    (source / "README.md").write_text("---\nlicense: mit\n---\nThe original.\n")
    return name, source, run(source, folder / "out", name, small(name, kind))


def test_the_table_names_every_technique():
    assert set(CASES) == set(catalogue())


@pytest.mark.parametrize("name", CASES)
def test_the_class_of_a_technique_carries_its_name_and_summary(name):
    surgery = technique(name, small(name, LIKELY[name]))
    assert surgery.name == name
    assert type(surgery).__doc__.startswith(catalogue()[name])


@pytest.mark.parametrize(("name", "kind"), NEUTRAL, ids=map("-".join, NEUTRAL))
def test_neutral_options_change_no_logit(name, kind, tmp_path):
    case = CASES[name]
    model = build(kind, case.neutral_from)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::3] = -0.0  # a sum or a mean would make it 0.0
    source = save(model, tmp_path / "source", max_shard_size="40KB")
    outcome = run(source, tmp_path / "out", name, mixing.neutral(name, kind) if case.mixer else case.neutral)
    assert outcome.plan.is_exact
    expected, found = logits(model), logits(read_back(tmp_path / "out"))
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert outcome.report.difference <= 1e-5 * expected.abs().max()
    assert outcome.report.unmeasured == ("the model has no tokenizer" if kind in DECODERS else f"{kind} is an encoder and predicts no next token")
    assert outcome.report.before.quality is None
    if case.same_bytes:
        before, after = tensors(source), tensors(tmp_path / "out")
        assert {tensor: bits(value) for tensor, value in after.items()} == {tensor: bits(value) for tensor, value in before.items()}
        assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_conversion_that_changes_something_changes_what_it_should_and_no_other_part(done):
    name, source, outcome = done
    config = outcome.plan.checkpoint.config
    family, checkpoint = config.family, outcome.plan.checkpoint
    allowed = set() if CASES[name].mixer or CASES[name].takes else {*family.per_kv_head, *(f"{part}.bias" for part in family.per_kv_head), *CASES[name].parts}
    if CASES[name].replaces:
        hold_what_stays(checkpoint, open_checkpoint(outcome.output), CASES[name].replaces)
        return
    before, after, names = tensors(source), tensors(outcome.output), renamed(outcome.plan)
    new = {
        f"{checkpoint.layer_prefix(index)}{family.attention}.effconvert.{parameter}": shape
        for record, technique in techniques_of(outcome.plan.config)
        for index in record.layers
        for parameter, shape in technique.parameters(config).items()
    }
    native = outcome.plan.config.family.base != family.base
    added = {outcome.plan.models("meta")[-1].outer.place(part) for part in CASES[name].added} if native else set()
    assert after.keys() == {*names.values()} | new.keys() | added
    assert {tensor: tuple(after[tensor].shape) for tensor in new} == new
    after = {tensor: after[there] for tensor, there in names.items()}
    for tensor, value in ((tensor, before[tensor]) for tensor in names):
        inside = tensor.removeprefix(checkpoint.prefix).removeprefix(f"{family.layers}.").partition(".")[2].rpartition(".")[0]
        suffix = ".bias" if tensor.endswith(".bias") else ""
        parts = {part + suffix for part in config.modules.get(inside, ())} if tensor not in checkpoint.outer else set()
        if parts & allowed:
            assert bits(after[tensor]) != bits(value), tensor
        elif family.transposed and parts and tensor.endswith(".weight") and value.ndim == 2 and not outcome.plan.config.family.transposed:
            assert bits(after[tensor].T) == bits(value), tensor
        else:
            assert bits(after[tensor]) == bits(value), tensor


def renamed(plan):
    """Map the name of each tensor of the source that is still there to what it is called in the converted model."""
    checkpoint, config, names = plan.checkpoint, plan.config, {}
    for index, stored in enumerate(checkpoint.layers):
        for name in stored:
            module, _, suffix = name.rpartition(".")
            if (part := checkpoint.config.modules[module][0]) in config.parts.keys() - config.lacks(index):
                names[checkpoint.layer_prefix(index) + name] = f"{plan.layer_prefix(index)}{config.parts[part]}.{suffix}"
    outer = plan.models("meta")[-1].outer
    return names | {name: outer.place(outer_part(name, checkpoint.prefix, checkpoint.config)) for name in checkpoint.outer}


def hold_what_stays(before, after, gone):
    """Every part that is not replaced is what it was, whatever its name is in the other family."""
    assert {name: tensor.read("cpu").tolist() for name, tensor in after.outer.items()} == {
        name: tensor.read("cpu").tolist() for name, tensor in before.outer.items()
    }
    for index in range(before.config.layers):
        one, other = before.layer(index, "cpu"), after.layer(index, "cpu")
        stays = {part for part in one if part not in gone}
        assert stays == {part for part in other if part in one}
        assert all(torch.equal(other[part], one[part]) for part in stays)
        assert set(other) > stays


def test_a_conversion_leaves_the_other_files_and_config_keys_alone(done):
    name, source, outcome = done
    assert (outcome.output / "NOTICE").read_text() == "words of the author"
    card = (outcome.output / "README.md").read_text()
    assert "license: mit" in card
    assert "The original." not in card  # which is about another model
    others = {path.name for path in source.glob("*.json") if path.name not in ("config.json", "model.safetensors.index.json")}
    assert {"tokenizer.json", *(["generation_config.json"] if outcome.plan.config.family.decoder else [])} <= others
    assert all((outcome.output / other).read_bytes() == (source / other).read_bytes() for other in others)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, outcome.output))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    ours = {"model_type", "architectures", "auto_map", "effconvert", "layer_types"}
    if after["model_type"] == before["model_type"] or name in TABLED:
        assert changed == set(CASES[name].keys)
    elif after["model_type"].startswith(KIND):
        assert changed == ours | set(CASES[name].keys)
    else:
        assert after["model_type"] == outcome.plan.config.kind
        family = outcome.plan.config.family
        assert changed <= {"model_type", "architectures", *family.constants, *family.absent, *CASES[name].keys, *CASES[name].native_keys}


def test_what_was_planned_is_what_transformers_loads(done):
    name, source, outcome = done
    before, after = outcome.plan.before, outcome.plan.after
    for folder, size in ((source, before), (outcome.output, after)):
        model = read_back(folder)
        assert sum(parameter.numel() for parameter in model.parameters()) == size.parameters
        assert kv_bytes(model) == (size.kv_bytes, size.state_bytes)
        assert sum(tensor.nbytes for tensor in tensors(folder).values()) == size.bytes
        assert read_config(folder).kind == model.config.model_type.removeprefix(KIND)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert (index["metadata"]["total_size"], index["metadata"]["total_parameters"]) == (size.bytes, size.parameters)
        assert index["weight_map"].keys() == tensors(folder).keys()
    assert (before.kv_bytes != after.kv_bytes) == (CASES[name].cache and outcome.plan.config.family.decoder)
    assert outcome.plan.disk >= sum(tensor.nbytes for tensor in tensors(outcome.output).values())


def test_the_report_holds_what_was_measured(done):
    _, source, outcome = done
    report = outcome.report
    assert [side.parameters for side in (report.before, report.after)] == [read_back(folder).num_parameters() for folder in (source, outcome.output)]
    sides = [(side.kv_bytes, side.state_bytes) for side in (report.before, report.after)]
    assert sides == [kv_bytes(read_back(folder)) for folder in (source, outcome.output)]
    if outcome.plan.config.family.decoder:
        assert not report.unmeasured
        assert report.before.quality.perplexity > 1
        assert (report.after.quality.kl > 1e-3) == (not outcome.plan.is_exact)
    manifest = json.loads((outcome.output / "effconvert.json").read_text())
    assert manifest["recipe"] == outcome.plan.recipe
    assert manifest["verified"]


def test_a_converted_model_survives_being_saved_and_loaded_by_transformers(done, tmp_path):
    model = read_back(done[2].output)
    again = read_back(save(model, tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))


def test_the_same_input_gives_the_same_bytes(done, tmp_path):
    name, source, outcome = done
    again = run(source, tmp_path / "again", name, small(name, outcome.plan.config.kind), verify=False)
    assert digests(again.output) == digests(outcome.output)
    assert again.report is None


def test_a_layout_of_one_shard_holds_the_same_tensors(done, tmp_path):
    name, source, outcome = done
    assert len(list(source.glob("*.safetensors"))) > 1
    whole = save(read_back(source), tmp_path / "whole")
    characters(whole)
    again = run(whole, tmp_path / "out", name, small(name, outcome.plan.checkpoint.config.kind), verify=False)
    assert [path.name for path in again.output.glob("*.safetensors")] == ["model.safetensors"]
    assert {tensor: bits(value) for tensor, value in tensors(again.output).items()} == {
        tensor: bits(value) for tensor, value in tensors(outcome.output).items()
    }


@pytest.mark.parametrize(("name", "kind"), REFUSED, ids=map("-".join, REFUSED))
def test_a_family_that_cannot_say_it_is_refused_with_the_reason(name, kind, tmp_path):
    source = save(build(kind, {}), tmp_path / "source")
    with pytest.raises(ModelError, match=f"^(this )?{kind} ({CASES[name].refusal})"):
        run(source, tmp_path / "out", name, CASES[name].small)
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_on_a_dry_run(name, tmp_path):
    source = save(build(LIKELY[name], CASES[name].small_from), tmp_path / "source")
    characters(source)
    outcome = run(source, tmp_path / "out", name, small(name, LIKELY[name]), dry_run=True)
    assert outcome.plan.shards
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_a_base_model_without_its_head_is_converted_too(name, tmp_path):
    kind = {"llama": "qwen2", "bert": "distilbert"}[LIKELY[name]]
    source = save(build(kind, CASES[name].small_from).base_model, tmp_path / "source")
    characters(source)
    outcome = run(source, tmp_path / "out", name, small(name, kind))
    assert outcome.report.unmeasured == ("Qwen2Model has no language-model head" if kind == "qwen2" else "distilbert is an encoder and predicts no next token")
    assert read_back(outcome.output).num_parameters() == outcome.plan.after.parameters
