"""An FFN split into experts: all together they compute what it does, each neuron is in one of them, and the router finds those that matter."""

from pathlib import Path

import pytest
import torch

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.heal.refit import Refit
from effconvert.options import RunOptions
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.depth.share_layers import ShareLayers
from effconvert.surgery.ffn._neurons import Sample, _balanced, by_energy
from effconvert.surgery.ffn.moe import Moe
from effconvert.surgery.ffn.moe_split import FLAT, MoeSplit
from tests.heal.healing import TOKENS, apart, killed_saving, prose, put, run
from tests.models import logits, save, tiny
from tests.surgery.test_moe import NO_MLP_BIAS, PLAIN, SAME, WINDOWED, opened

TARGETS = [  # source, changes to its config, options, class
    ("llama", PLAIN, {}, "Qwen2Moe"),
    ("llama", PLAIN, {"shared": 0}, "Mixtral"),
    ("llama", NO_MLP_BIAS, {}, "GraniteMoe"),
    ("llama", PLAIN, {"layers": "1"}, "Qwen2Moe"),
    ("mistral", {}, {}, "Mixtral"),
    ("phi3", {"sliding_window": 8, "num_key_value_heads": 2}, {}, "Mixtral"),
    ("qwen2", {**WINDOWED, "max_window_layers": 1}, {"layers": "0"}, "Qwen2Moe"),
    ("qwen3", {"attention_bias": True}, {"layers": "-1"}, "Qwen3Moe"),
    ("olmo2", {"num_key_value_heads": 2}, {}, "FlexOlmo"),
    ("granite", {"residual_multiplier": 0.4}, {}, "GraniteMoe"),
]
EXPERTS = 4


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def split(model, *, place="out", **options):
    source = model if isinstance(model, Path) else save(model, Path("source"))
    return convert(str(source), (MoeSplit(**{"experts": EXPERTS, "active": EXPERTS, **options}),), RunOptions(output=Path(place), verify=False))


def projections(folder, index=0):
    """The projections of each expert of a layer, those of the shared one first."""
    layer = open_checkpoint(Path(folder)).layer(index, "cpu")
    stems = [part.removesuffix("gate") for part in layer if part == "shared_gate" or (part.startswith("experts.") and part.endswith("gate"))]
    return layer, {stem: [layer[f"{stem}{part}"] for part in ("gate", "up", "down")] for stem in stems}


@pytest.mark.parametrize(("kind", "changes", "options", "name"), TARGETS)
def test_all_experts_together_are_the_ffn(kind, changes, options, name):
    model = tiny(kind, **changes)
    outcome = split(model, **options)
    again = opened("out")
    assert type(again).__name__ == f"{name}ForCausalLM"
    assert (logits(again) - logits(model)).abs().max() <= SAME * logits(model).abs().max()
    assert outcome.plan.is_exact
    before, after = (config.parameters for config in (outcome.plan.before, outcome.plan.after))
    assert before < after < 1.1 * before


@pytest.mark.few(2)
@pytest.mark.parametrize(("kind", "changes", "options", "name"), TARGETS)
def test_a_token_gets_the_sum_of_the_experts_that_its_router_chooses(kind, changes, options, name):
    put(Path("source"), kind, **changes)
    run("source", MoeSplit(experts=EXPERTS, active=3, **options))
    index = min(MoeSplit(experts=EXPERTS, active=3, **options).chosen(read_config(Path("source"))))
    layer, experts = projections("out", index)
    dense = open_checkpoint(Path("source")).layer(index, "cpu")
    neurons = {tuple(row.tolist()): number for number, row in enumerate(dense["gate"])}
    places = {stem: [neurons[tuple(row.tolist())] for row in gate] for stem, (gate, _, _) in experts.items()}
    assert sorted(number for numbers in places.values() for number in numbers) == list(range(len(neurons)))  # each neuron once
    for stem, (_, up, down) in experts.items():
        assert torch.equal(up, dense["up"][places[stem]])
        factor = 2 if stem == "shared_" else 3 - ("shared_" in experts)
        assert torch.equal(down, factor * dense["down"][:, places[stem]])
    config = read_config(Path("out"))
    assert config.top_k == 3 - ("shared_" in experts)
    assert config.experts == EXPERTS - ("shared_" in experts)
    hidden = torch.randn(7, config.hidden, generator=torch.Generator().manual_seed(0))
    activation = torch.nn.functional.silu(hidden @ dense["gate"].T) * (hidden @ dense["up"].T)
    best = (hidden @ layer["router"].T).topk(config.top_k, -1).indices
    mask = torch.zeros(7, len(neurons))
    for row, chosen in enumerate(best.tolist()):
        for stem in [f"experts.{expert}." for expert in chosen] + ["shared_"] * ("shared_" in experts):
            mask[row, places[stem]] = 1
    expected = (activation * mask) @ dense["down"].T
    block = opened("out").model.layers[index].get_submodule("block_sparse_moe" if name == "GraniteMoe" else "mlp")
    found = block(hidden[None])
    found = (found[0] if isinstance(found, tuple) else found)[0]
    assert (found - expected).norm() <= 4 * FLAT * expected.norm()  # the weights of chosen experts are equal but for the router's small scores


def planted(tokens=512, neurons=96, groups=6, width=24):
    """Inputs that say which group of neurons is active, and the energy of these neurons."""
    draw = torch.Generator().manual_seed(1)
    which = torch.randint(groups, (tokens,), generator=draw)
    order = torch.randperm(neurons, generator=draw) % groups  # the group of each neuron
    inputs = torch.nn.functional.one_hot(which, width).float() + 0.05 * torch.randn(tokens, width, generator=draw)
    energy = (order == which[:, None]).float() * torch.rand(tokens, neurons, generator=draw) + 1e-4
    return inputs, energy, order, which


def test_neurons_that_are_active_together_are_one_expert_and_the_router_finds_it():
    inputs, energy, order, _ = planted()
    found = by_energy(Sample(inputs.split(32), energy), 6, 0, 1)
    groups = [set(order[numbers].tolist()) for numbers in found.routed]
    assert all(len(group) == 1 for group in groups)
    new_inputs, _, _, new = planted(tokens=64)
    chosen = (new_inputs @ found.router.T).argmax(1)
    assert torch.equal(torch.tensor([next(iter(groups[expert])) for expert in chosen.tolist()]), new)


def test_neurons_that_are_always_active_are_shared():
    inputs, energy, _, _ = planted()
    always = torch.tensor([5, 17, 40, 41, 60, 61, 62, 80, 81, 82, 83, 84])
    energy[:, always] = 5 + torch.rand(len(energy), len(always), generator=torch.Generator().manual_seed(2))
    found = by_energy(Sample(inputs.split(32), energy), 7, 1, 2)
    assert sorted(found.shared.tolist()) == always.tolist()


@pytest.mark.parametrize("columns", [2, 3, 8])
def test_groups_have_one_size_and_nearly_the_best_total(columns):
    gain = torch.rand(48, columns, generator=torch.Generator().manual_seed(columns)) ** 3
    where = _balanced(gain)
    assert torch.bincount(where, minlength=columns).tolist() == [48 // columns] * columns
    from scipy.optimize import linear_sum_assignment

    rows, places = linear_sum_assignment(gain.repeat_interleave(48 // columns, 1).numpy(), maximize=True)
    best = gain.repeat_interleave(48 // columns, 1)[rows, places].sum()
    assert gain.gather(1, where[:, None]).sum() >= 0.97 * best


def test_neurons_without_any_energy_are_split_as_well():
    assert torch.bincount(_balanced(torch.zeros(12, 3)), minlength=3).tolist() == [4, 4, 4]


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("kind", "changes", "options"), [("llama", PLAIN, {}), ("llama", PLAIN, {"shared": 0}), ("qwen3", {}, {}), ("granite", {"residual_multiplier": 2.5}, {})]
)
def test_refit_brings_part_of_it_back(kind, changes, options):
    put(Path("source"), kind, noise=2.0, only="mlp.down_proj.weight", **changes)
    step = MoeSplit(experts=EXPERTS, active=2, **options)
    run("source", step, place="plain")
    run("source", step, Refit(), place="fitted")
    plain, fitted = apart(Path("source"), Path("plain"), Path("fitted"))
    assert fitted < 0.9 * plain
    before, after = (projections(folder)[1] for folder in ("plain", "fitted"))
    assert all(torch.equal(before[stem][0], after[stem][0]) and not torch.equal(before[stem][2], after[stem][2]) for stem in before)


def test_a_refit_of_the_written_model_does_the_same():
    put(Path("source"), noise=2.0, only="mlp.down_proj.weight", **PLAIN)
    step = MoeSplit(experts=12, active=6, shared=2)  # a stored layer has the shared expert before the others
    run("source", step, place="plain")
    run("source", step, Refit(), place="fitted")
    run("plain", Refit(teacher="source"), place="again")
    plain, fitted, again = apart(Path("source"), Path("plain"), Path("fitted"), Path("again"))
    assert fitted < 0.9 * plain
    assert again == pytest.approx(fitted, rel=0.05)


def test_refit_after_dropped_layers_too():
    put(Path("source"), num_hidden_layers=4, noise=2.0, only="mlp.down_proj.weight", **PLAIN)
    steps = (PruneLayers(layers="1"), MoeSplit(experts=EXPERTS, active=3))
    run("source", *steps, place="plain")
    run("source", *steps, Refit(), place="fitted")
    plain, fitted = apart(Path("source"), Path("plain"), Path("fitted"))
    assert fitted < 0.9 * plain


def test_refit_leaves_alone_what_computes_the_same():
    put(Path("source"), **PLAIN)
    run("source", MoeSplit(experts=EXPERTS, active=EXPERTS), Refit(), place="fitted")
    assert apart(Path("source"), Path("fitted"))[0] < 1e-6


def test_a_run_that_was_cut_off_goes_on_to_the_same_numbers(monkeypatch):
    put(Path("source"), **PLAIN)
    step = MoeSplit(experts=EXPERTS, active=2)
    run("source", step, place="whole")
    killed_saving(monkeypatch, 1, lambda: run("source", step))
    run("source", step)
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_what_is_exact_is_said_and_calibration_is_asked_for_only_where_something_is_chosen():
    config = read_config(save(tiny("llama", **PLAIN), Path("source")))
    exact = {(experts, active, shared): MoeSplit(experts=experts, active=active, shared=shared).is_exact(config) for experts, active, shared in EXACT}
    assert exact == EXACT
    assert MoeSplit(experts=4, active=3).needs_calibration(config)
    assert not MoeSplit(experts=4, active=4).needs_calibration(config)


EXACT = {(4, 4, 0): True, (4, 4, None): True, (8, 8, 4): True, (8, 8, 1): False, (3, 3, 0): False, (8, 6, 4): False}


@pytest.mark.parametrize(
    ("kind", "changes", "options", "error", "said"),
    [
        ("llama", PLAIN, {"experts": 5}, OptionError, "--experts 5 does not divide the 48 neurons of this model's FFN; give 2, 3, 4, 6, 12"),
        ("llama", PLAIN, {"experts": 8}, OptionError, "--experts 8 makes experts 6 wide, and torch runs only multiples of 4; give 2, 3, 4, 6, 12"),
        ("llama", {**PLAIN, "intermediate_size": 50}, {}, ModelError, "the 50 neurons of this model's FFN cannot be cut into experts whose width"),
        ("llama", PLAIN, {"active": 5}, OptionError, "--active 5 is more than --experts 4"),
        ("llama", PLAIN, {"active": 2, "shared": 2}, OptionError, "--shared 2 leaves the router none of the --active 2 parts"),
        ("qwen2", {}, {"shared": 0}, OptionError, "a qwen2_moe always has a shared expert; give --shared 1 or more"),
        ("qwen3", {}, {"shared": 1}, OptionError, "a qwen3_moe has no shared expert; leave out --shared"),
        ("mistral", {}, {"layers": "0"}, OptionError, "has experts in all of its layers"),
        ("llama", PLAIN, {"layers": "9"}, OptionError, "--layers 9 names what is no layer"),
        ("mixtral", {}, {}, ModelError, "mixtral has experts already"),
        ("gpt2", {}, {}, ModelError, "gpt2 has no gate in its FFN"),
        ("llama", {"mlp_bias": True, "attention_bias": True}, {}, ModelError, "mlp_bias"),
    ],
)
def test_what_cannot_be_split_is_refused(kind, changes, options, error, said):
    with pytest.raises(error, match=said):
        split(tiny(kind, **changes), **options)
    assert not Path("out").exists()


def test_experts_that_no_16_bit_type_can_run_are_refused_there_and_announced_elsewhere():
    with pytest.raises(OptionError, match="--experts 4 makes experts 12 wide, and torch runs only multiples of 8; give 2, 3, 6"):
        split(tiny("llama", **PLAIN).bfloat16())
    assert "its experts are 12 wide, so it runs in float32 alone" in " ".join(split(tiny("llama", **PLAIN)).plan.notes)
    assert "float32 alone" not in " ".join(split(tiny("llama", **PLAIN), place="wide", experts=3, active=3).plan.notes)


def test_layers_that_share_their_ffn_are_refused():
    put(Path("source"), num_hidden_layers=4, **PLAIN)
    run("source", ShareLayers(groups=2, pool="first"), place="shared")
    for step in (MoeSplit(experts=EXPERTS, active=2), Moe(experts=EXPERTS)):
        with pytest.raises(OptionError, match="layer 0 shares its FFN with others, and would store its own again as experts"):
            run("shared", step)
    assert not Path("out").exists()


def test_the_command_says_what_becomes_cheaper(command):
    put(Path("source"), **PLAIN)
    result = command(
        "moe-split", "--experts", "4", "--active", "2", "source", "-o", "out", "--calibrate", "text.txt", "--calibration-tokens", TOKENS, "--dry-run"
    )
    assert result.exit_code == 0, result.output
    assert "a token runs 2 of 4 parts of an FFN" in " ".join(result.output.split())
