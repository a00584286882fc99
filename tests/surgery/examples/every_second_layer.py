"""Across layers: keep every second layer, and give it the mean of both layers' down projections."""

from effconvert.surgery._surgery import Surgery


class EverySecondLayer(Surgery):
    """Drop every second layer."""

    @classmethod
    def allowed_options(cls, config):
        return "as it is"

    def check(self, config):
        pass

    def is_exact(self, config):
        return False

    def config(self, config):
        return config.with_layers(range(0, config.layers, 2))

    def rewrite(self, model):
        for kept, dropped in zip(model.layers[::2], model.layers[1::2], strict=True):
            kept.later(lambda layer, other=dropped: layer.__setitem__("down", (layer["down"] + other["down"]) / 2))
        model.layers = model.layers[::2]
