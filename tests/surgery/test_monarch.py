"""Monarch matrices in place of projections: what they can say exactly, and the fit where they cannot."""

from pathlib import Path

import pytest
import torch

from effconvert.errors import ModelError, OptionError
from effconvert.surgery.projections._blocks import monarch
from effconvert.surgery.projections._factors import factors
from effconvert.surgery.projections.monarch import Monarch
from tests.heal.healing import letters, opened, prose, put, run
from tests.models import logits, save, tiny


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(left, right):
    return Monarch(blocks=len(left)).product({"left": left, "right": right})


@pytest.mark.parametrize(("out", "inner", "blocks"), [(24, 16, 4), (16, 24, 8), (12, 12, 3), (8, 16, 1)])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_monarch_matrix_is_found_again(out, inner, blocks, weighted):
    matrix = dense(random(blocks, out // blocks, blocks), random(blocks, blocks, inner // blocks, seed=1))
    rows = random(300, inner, seed=2) @ random(inner, inner, seed=3)
    found = dense(*monarch(matrix, rows.T @ rows / 300 if weighted else None, blocks))
    torch.testing.assert_close(found, matrix, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("out", "inner", "blocks"), [(24, 8, 8), (8, 24, 8), (8, 8, 8)])
def test_blocks_of_one_row_or_column_are_any_matrix(out, inner, blocks):
    matrix = random(out, inner)
    torch.testing.assert_close(dense(*monarch(matrix, None, blocks)), matrix, atol=1e-8, rtol=1e-8)


def test_without_a_text_each_block_is_its_first_singular_pair():
    matrix, blocks = random(12, 8), 4
    found = dense(*monarch(matrix, None, blocks))
    for k in range(blocks):
        for r in range(blocks):
            left, size, right = torch.linalg.svd(matrix[k::blocks, 2 * r : 2 * r + 2])
            torch.testing.assert_close(found[k::blocks, 2 * r : 2 * r + 2], size[0] * left[:, :1] @ right[:1], atol=1e-6, rtol=0)


def test_the_text_counts_and_the_fit_to_the_whole_is_best():
    matrix, mix = random(24, 16), random(16, 16, seed=1) * torch.logspace(0, -2, 16).double()
    moment = mix @ mix.T

    def error(other):
        return float((((matrix - other) @ moment) * (matrix - other)).sum())

    left, right = monarch(matrix, moment, 4)
    assert error(dense(left, right)) < 0.8 * error(dense(*monarch(matrix, None, 4)))
    for seed in range(3):
        assert error(dense(left + 1e-3 * random(*left.shape, seed=seed), right)) > error(dense(left, right))
    assert error(dense(left, right)) > error(torch.matmul(*factors(matrix, moment, 4)))  # which is the best of its size


def test_a_converted_layer_multiplies_as_the_dense_matrix_does():
    technique, hidden = Monarch(blocks=4), random(2, 5, 16)
    left, right = random(4, 6, 4), random(4, 4, 4, seed=1)
    found = technique.forward({"left": left, "right": right}, hidden, None)
    torch.testing.assert_close(found, hidden @ dense(left, right).T)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt"])
def test_models_of_monarch_matrices_lose_nothing(kind):
    model = tiny(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("mlp.", "intermediate", "layer.0.output.dense", "layer.1.output.dense", "fc1", "fc2")) and parameter.ndim == 2:
                transposed = kind == "gpt2"
                out, inner = parameter.T.shape if transposed else parameter.shape
                made = 0.1 * dense(random(8, out // 8, 8), random(8, 8, inner // 8, seed=1)).float()
                parameter.copy_(made.T if transposed else made)
    save(model, Path("model"))
    letters().save_pretrained("model")
    outcome = run("model", Monarch(blocks=8))
    expected, found = logits(model), logits(opened("out"))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert opened("out").num_parameters() == outcome.plan.after.parameters < outcome.plan.before.parameters


def test_as_many_blocks_as_rows_change_no_logit():
    model = tiny("llama")
    save(model, Path("model"))
    assert run("model", Monarch(blocks=32, parts="q,o")).plan.is_exact
    expected = logits(model)
    assert (logits(opened("out")) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_does_not_fit_is_refused():
    put(Path("model"))
    with pytest.raises(OptionError, match=r"--blocks 5 does not divide the 32 inputs and 48 outputs of gate; give 2, 4, 8, 16"):
        run("model", Monarch(blocks=5))
    with pytest.raises(OptionError, match="--parts head is no projection"):
        run("model", Monarch(blocks=4, parts="head"))
    put(Path("phi3"), "phi3")
    with pytest.raises(ModelError, match="phi3 holds gate, up in one module"):
        run("phi3", Monarch(blocks=4))
    assert not Path("out").exists()
