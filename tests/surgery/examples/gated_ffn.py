"""FFN: what the family's own FFN makes, times a gain of each channel."""

import torch

from effconvert.surgery._replacement import Replacement


class GatedFfn(Replacement):
    """Multiply what the FFN makes by a gain."""

    place = "ffn"

    def parameters(self, config, place=""):
        return {"gain": (config.hidden,)}

    def initial_values(self, config, index):
        return {"gain": torch.ones(config.hidden)}

    def is_exact(self, config):
        return True

    def forward(self, weights, hidden, context):
        return weights["gain"] * context.original(hidden)
