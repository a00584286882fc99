"""Experts that are kept equally busy: the loss of transformers, layer by layer, and its gradients."""

import json
from pathlib import Path

import pytest
import torch

from effconvert.errors import OptionError
from effconvert.heal._balance import balance
from effconvert.heal._distiller import Distiller
from effconvert.heal.distill import Distill
from effconvert.modeling.transformers_internals import checkpoint_activations
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.ffn.moe_split import MoeSplit
from tests.heal.healing import put, run
from tests.models import FAMILIES, tiny

SPARSE = [kind for kind, family in FAMILIES.items() if family.experts_key]
SHORT = {"data": "text.txt", "window": 32, "batch_tokens": 128, "train_tokens": 2560, "rate": 3e-3}


def routed(model):
    return balance(model, needed=True), torch.arange(6, 30).reshape(2, 12)


@pytest.mark.parametrize("kind", SPARSE)
def test_the_loss_of_one_layer_is_transformers_own_and_unchosen_tokens_do_not_count(kind):
    model = tiny(kind, num_hidden_layers=1).eval()
    if kind == "granitemoe" and balance(model, needed=False) is None:
        pytest.skip("this version of transformers does not record its router logits, and --balance is refused")
    balanced, ids = routed(model)
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[:, -2:] = False
    expected = model(input_ids=ids, attention_mask=counts.long(), output_router_logits=True).aux_loss
    model.base_model(input_ids=ids)
    torch.testing.assert_close(balanced.loss(counts) + balanced.chosen, expected)


def test_the_loss_is_a_mean_over_layers_and_its_gradient_that_of_the_definition():
    balanced, ids = routed(tiny("mixtral"))
    counts = torch.arange(ids.numel()).reshape(ids.shape) % 5 > 0
    draw = torch.Generator().manual_seed(0)
    balanced.logits = tuple(torch.randn(ids.numel(), 8, generator=draw, dtype=torch.double, requires_grad=True) for _ in range(3))
    found = balanced.loss(counts)
    gradients = torch.autograd.grad(found, balanced.logits)
    expected = 0
    for logits in balanced.logits:
        seen = logits[counts.flatten()]
        chosen = torch.zeros_like(seen).scatter_(1, seen.topk(2, -1).indices, 1.0).mean(0)
        expected = expected + (8 * (chosen * seen.softmax(-1).mean(0)).sum() - 2) / 3
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, balanced.logits), strict=True):
        assert (gradient - reference).abs().max() <= 2e-5 * reference.abs().max()  # transformers adds shares up in float32


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for saving in (False, True):
        model = tiny("mixtral").train()
        balanced, ids = routed(model)
        if saving:
            checkpoint_activations(model)
        model.base_model(input_ids=ids, use_cache=False)
        balanced.loss(torch.ones_like(ids, dtype=torch.bool)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradient, gradients[1][name], atol=1e-7) for name, gradient in gradients[0].items())


def test_routers_are_trained_at_a_rate_in_proportion_to_their_size():
    model = tiny("mixtral")
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    with torch.no_grad():
        routers[0].fill_(2.0**-10)
        routers[1].fill_(3.0)
    rates = balance(model, needed=True).rates
    assert rates == {"model.layers.0.mlp.gate.weight": pytest.approx(2.0**-10 * routers[0].shape[1] ** 0.5), "model.layers.1.mlp.gate.weight": 1.0}


def test_the_most_used_expert_gets_fewer_tokens_where_experts_are_balanced(monkeypatch):
    groups, real = [], Distiller.create_optimizer
    monkeypatch.setattr(Distiller, "create_optimizer", lambda self, model=None: (groups.append(made := real(self, model)), made)[1])
    put(Path("model"), attention_bias=False, mlp_bias=False, noise=1.0, only="weight")
    shares = {}
    for coefficient in (0.0, 1.0):
        run("model", MoeSplit(experts=4, active=2, shared=0), Distill(**SHORT, balance=coefficient), place=f"out{coefficient}")
        curve = json.loads(Path(f"out{coefficient}/effconvert.json").read_text())["distillation"]["curve"]
        shares[coefficient] = [point["scores"]["most used expert"] for point in curve]
    assert shares[0.0][0] == shares[1.0][0]
    assert min(group["initial_lr"] for group in groups[0].param_groups) < SHORT["rate"] / 100  # of routers that moe-split writes
    assert 0.5 <= shares[1.0][-1] < shares[0.0][-1]


def test_a_model_without_experts_is_refused():
    put(Path("model"))
    with pytest.raises(OptionError, match="--balance needs experts, and a llama has none; leave it out, or do moe-split or moe first"):
        run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT, balance=0.01))
