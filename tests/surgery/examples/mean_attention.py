"""Attention: the mean of all tokens so far, in place of the whole module."""

import torch

from effconvert.surgery._replacement import Replacement


class MeanAttention(Replacement):
    """Replace attention by a running mean and a gain."""

    place = "attention"
    drops = ("q", "k", "v", "o", "q_norm", "k_norm")
    no_decoders = "remembers nothing"

    def parameters(self, config, place=""):
        return {"gain": (config.hidden,)}

    def initial_values(self, config, index):
        return {"gain": torch.ones(config.hidden)}

    def forward(self, weights, hidden, context):
        return weights["gain"] * (hidden * context.live[..., None]).cumsum(1) / context.live.cumsum(1).clamp_min(1)[..., None]
