"""Projection: two thin matrices in place of `up` and `down`, exact at full rank."""

import torch
from pydantic import Field

from effconvert.surgery._replacement import Replacement


class ThinProjection(Replacement):
    """Replace projections by their truncated singular value decomposition."""

    drops = ("up", "down")
    rank: int = Field(ge=1, description="Inner width R.")

    def places(self, config):
        return ("up", "down")

    def parameters(self, config, place=""):
        out, inner = (config.ffn, config.hidden) if place == "up" else (config.hidden, config.ffn)
        return {"left": (out, self.rank), "right": (self.rank, inner)}

    def is_exact(self, config):
        return self.rank == min(config.ffn, config.hidden)

    def values(self, layer, place):
        if layer.shapes_only:
            return super().values(layer, place)
        left, size, right = torch.linalg.svd(layer[place], full_matrices=False)
        return {"left": left[:, : self.rank] * size[: self.rank], "right": right[: self.rank]}

    def forward(self, weights, hidden, context):
        return hidden @ weights["right"].T @ weights["left"].T
