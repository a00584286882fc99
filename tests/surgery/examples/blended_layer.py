"""Layer: a share of what the whole layer makes, the rest of what it was given."""

import torch

from effconvert.surgery._replacement import Replacement


class BlendedLayer(Replacement):
    """Blend a layer with the identity."""

    place = "layer"

    def parameters(self, config, place=""):
        return {"share": (1,)}

    def initial_values(self, config, index):
        return {"share": torch.ones(1)}

    def is_exact(self, config):
        return True

    def forward(self, weights, hidden, context):
        return hidden + weights["share"] * (context.original(hidden) - hidden)
