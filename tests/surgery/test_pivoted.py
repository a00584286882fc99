"""The pivoted form of low rank: the same matrix in fewer numbers, of which none is large; what bfloat16 costs; old checkpoints, refit and training."""

import json

import pytest
import torch

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.surgery._placed import technique_of
from effconvert.surgery.projections._factors import factors, outputs_of, product, product_of, thin
from effconvert.surgery.projections._parts import equal_rank, thin_size
from effconvert.surgery.projections._pivoted import ORDER, inputs_are_pivots, multiply, pivoted
from effconvert.surgery.projections.low_rank import LowRank
from tests.heal.healing import opened, prose, put, run, tensors
from tests.models import logits, save


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projection(out, inner, spread=2.0):
    """A matrix, and inputs of which some are `spread` orders of magnitude greater than others."""
    inputs = random(400, inner, seed=1) @ random(inner, inner, seed=2) * torch.logspace(0, -spread, inner).double()[torch.randperm(inner)]
    return random(out, inner), inputs


@pytest.mark.parametrize(("out", "inner", "rank"), [(50, 30, 8), (50, 30, 29), (20, 30, 8), (30, 30, 29), (9, 6, 6), (6, 9, 6), (1, 5, 1)])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_the_same_matrix_in_fewer_numbers_of_which_none_is_large(out, inner, rank, weighted):
    weight, inputs = projection(out, inner)
    moment = inputs.T @ inputs / len(inputs) if weighted else None
    left, right = factors(weight, moment, rank)
    found = pivoted(left, right, moment)
    torch.testing.assert_close(product(found), left @ right, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(multiply(found, inputs[:5].view(5, 1, inner)), (inputs[:5] @ (left @ right).T)[:, None], atol=1e-9, rtol=1e-9)
    assert sum(found[name].numel() for name in ("left", "right")) == thin_size(out, inner, rank, pivoted=True) == rank * (out + inner - rank)
    assert found[ORDER].sort()[0].tolist() == list(range(min(out, inner)))
    if not inputs_are_pivots(found):
        assert found["left"].numel() == 0 or found["left"].abs().max() < 4
    elif found["right"].numel():
        sizes = (inputs.square().mean(0).sqrt() if weighted else torch.ones(inner).double())[found[ORDER]]
        assert (found["right"].abs() * sizes[rank:] / sizes[:rank, None]).max() < 4


@pytest.mark.parametrize("large", [0, 5])
def test_of_two_inputs_with_one_effect_the_larger_is_the_pivot(large):
    """Else the small one would have to be multiplied by what they differ."""
    matrix, sizes = random(12, 6), torch.ones(6).double()
    matrix[:, 0], sizes[large] = matrix[:, 5], 1000.0
    left, right = factors(matrix, sizes.square().diag(), 5)
    found = pivoted(left, right, sizes.square().diag())
    assert found[ORDER][-1] == 5 - large


@pytest.mark.parametrize(("out", "inner"), [(12, 8), (8, 12)])
@pytest.mark.parametrize("true_rank", [0, 3])
def test_a_matrix_of_lower_rank_than_its_factors(out, inner, true_rank):
    weight, inputs = random(out, true_rank) @ random(true_rank, inner), random(40, inner)
    inputs[:, 0] = 0  # an input that the text never has
    found = thin(weight, inputs.T @ inputs, 5, pivoted=True)
    torch.testing.assert_close(product(found), weight.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("out", "inner"), [(96, 64), (64, 96)])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_in_bfloat16_it_is_nearly_as_exact_as_plain_factors(out, inner, spread):
    """Each takes three roundings or so on the way, and those of the pivoted form are of greater numbers."""
    weight, inputs = projection(out, inner, spread)
    moment, inputs = inputs.T @ inputs / len(inputs), inputs.bfloat16()
    left, right = factors(weight, moment, 40)
    wanted = inputs.double() @ (left @ right).T
    plain = inputs @ right.bfloat16().T @ left.bfloat16().T
    stored = {name: value.bfloat16() if value.is_floating_point() else value for name, value in pivoted(left, right, moment).items()}
    errors = [float((output.double() - wanted).norm() / wanted.norm()) for output in (multiply(stored, inputs), plain)]
    assert errors[0] < 4 * errors[1] < 0.03


@pytest.mark.parametrize("is_pivoted", [True, False])
def test_the_rank_of_a_size_is_the_greatest_that_fits(is_pivoted):
    for out, inner, ratio in [(1536, 576, 0.9), (576, 1536, 0.25), (64, 64, 1.0), (7, 5, 0.5), (3, 9, 0.01)]:
        fits = [rank for rank in range(1, min(out, inner) + 1) if thin_size(out, inner, rank, is_pivoted) <= ratio * out * inner]
        assert equal_rank(out, inner, ratio, is_pivoted) == max(fits, default=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in bfloat16, and its projections with factors of either form: 64 neurons, so gate and up have more outputs than inputs."""
    folder = tmp_path_factory.mktemp("pivoted")
    (folder / "text.txt").write_text(prose())
    put(folder / "source", noise=1.0, only="weight", intermediate_size=64)
    save(opened(folder / "source").bfloat16(), folder / "source")
    for form in ("pivoted", "plain"):
        run(folder / "source", LowRank(rank=9, parts="all", form=form), place=folder / form, calibrate=str(folder / "text.txt"))
    return folder


def test_both_forms_compute_the_same_and_one_is_smaller(folder):
    first, second = (logits(opened(folder / form).float()) for form in ("pivoted", "plain"))
    assert (first - second).abs().max() < 0.03 * second.abs().max()  # the weights are rounded to bfloat16
    sizes = [sum(tensor.numel() for tensor in tensors(folder / form).values() if tensor.is_floating_point()) for form in ("pivoted", "plain")]
    assert sizes[0] == sizes[1] - 2 * 7 * 9**2  # of seven projections in two layers


def test_a_record_without_a_form_is_of_plain_factors(folder, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for file in (folder / "plain").iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    content = json.loads((old / "config.json").read_text())
    for record in content["effconvert"]["replaced"]:
        del record["options"]["form"]
    (old / "config.json").write_text(json.dumps(content))
    assert technique_of(read_config(old).replaced[0]).form == "plain"
    assert torch.equal(logits(opened(old)), logits(opened(folder / "plain")))


@pytest.mark.parametrize("form", ["pivoted", "plain"])
@pytest.mark.parametrize("part", ["gate", "down"])
def test_a_layer_knows_the_matrix_and_what_it_is_proportional_to(folder, form, part):
    layer = open_checkpoint(folder / form).model("cpu").layers[1]
    before = product_of(layer, part)
    name = {"gate": "gate_proj", "down": "down_proj"}[part]
    module = opened(folder / form).float().model.layers[1].mlp.get_submodule(name)
    hidden = torch.randn(2, 3, before.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hidden @ before.T, module(hidden) - module.bias, atol=1e-4, rtol=1e-4)
    for own in outputs_of(layer, part):
        layer[own] = 3 * layer[own]
    torch.testing.assert_close(product_of(layer, part), 3 * before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["pivoted", "plain"])
def test_a_converted_model_is_refitted_and_keeps_its_form(folder, form, tmp_path):
    source, text = folder / "source", str(folder / "text.txt")
    run(folder / form, Refit(teacher=str(source)), place=tmp_path / "fitted", calibrate=text)
    before, after = tensors(folder / form), tensors(tmp_path / "fitted")
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {name: (value.shape, value.dtype) for name, value in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.layers.1.mlp.down_proj.effconvert.left", "model.layers.1.mlp.down_proj.effconvert.right"} <= changed
    original = logits(opened(source).float())
    errors = [(logits(opened(place).float()) - original).norm() for place in (tmp_path / "fitted", folder / form)]
    assert errors[0] < errors[1]


def test_training_leaves_the_order_alone(folder, tmp_path):
    run(folder / "pivoted", Transfer(epochs=1, teacher=str(folder / "source")), place=tmp_path / "taught", calibrate=str(folder / "text.txt"))
    before, after = tensors(folder / "pivoted"), tensors(tmp_path / "taught")
    same = {name for name in before if torch.equal(before[name], after[name])}
    orders = {name for name in before if name.endswith(ORDER)}
    assert orders <= same
    assert not {name.replace(ORDER, "left") for name in orders} <= same
