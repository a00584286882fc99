"""Refit the experts that a dense FFN was split into: their output projections, all of a layer in one regression."""
# T = tokens in a window, M = hidden width, E = experts, K = experts chosen for a token, F = neurons of all experts.

from collections.abc import Sequence

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.modeling.transformers_experts import ACT2FN
from effconvert.surgery._ridge import HELD_OUT, Moments, ridge


def refit_experts(layer: Layer, outputs: Sequence[str], originals: Sequence[int]) -> None:
    """Fit the experts' outputs, as the router chooses them, so that the stream after the layer is the original's, whatever the layers below are.

    `outputs` are those of the routed experts in the order of the router, and of the shared one behind them. The output after a norm is not linear in the
    weights before it, so such layers stay.
    """
    assert layer.activations
    if "mlp_post_norm" in layer:
        return
    experts = _Experts(layer, outputs)
    moments, index = (Moments(), Moments()), 0
    captures = layer.activations.capture(layer, ("mlp_norm",))
    targets = layer.activations.original_stream(2 * originals[-1] + 2)
    for capture, target in zip(captures, targets, strict=True):
        for window, residual in zip(capture.outputs["mlp_norm"], (target - capture.out) / experts.multiplier, strict=True):
            index += 1
            moments[int(index % HELD_OUT == 0)].add(experts.hidden(window), residual)
    if (change := ridge(*moments)) is not None:
        for part, columns in zip(outputs, change.float().cpu().split(experts.widths, 1), strict=True):
            layer[part] = layer[part] + columns


class _Experts:
    """The weights of a layer's experts, side by side."""

    def __init__(self, layer: Layer, outputs: Sequence[str]) -> None:
        assert layer.activations
        config, state = layer.config, layer.activations.states[0]
        stems = [part.removesuffix("down") for part in outputs]
        self.gate, self.up = (torch.cat([layer[f"{stem}{part}"] for stem in stems]).to(state) for part in ("gate", "up"))  # [F, M]
        self.widths = [layer[part].shape[1] for part in outputs]
        self.router = layer["router"].to(state)  # [E, M]
        self.shared_router = layer["shared_router"].to(state) if "shared_router" in layer else None  # [1, M]
        self.chosen = config.top_k
        self.activation = ACT2FN[config.get("hidden_act") or "silu"]
        self.multiplier = float(config.get("residual_multiplier") or 1)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the inputs of all output projections, times the weights that experts have in the sum: [T, M] -> [T, F]."""
        likely = (inputs @ self.router.T).softmax(-1)
        top = likely.topk(self.chosen, -1)
        weights = torch.zeros_like(likely).scatter_(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))  # [T, E]
        if self.shared_router is not None:
            weights = torch.cat([weights, (inputs @ self.shared_router.T).sigmoid()], -1)
        by_neuron = weights.repeat_interleave(torch.tensor(self.widths, device=weights.device), -1)
        hidden: Tensor = self.activation(inputs @ self.gate.T) * (inputs @ self.up.T) * by_neuron
        return hidden
