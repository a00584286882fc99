"""Across layers: one FFN for each two layers, the mean of both."""

from effconvert.surgery._surgery import Surgery


class SharedFfn(Surgery):
    """Have each two layers share their FFN."""

    @classmethod
    def allowed_options(cls, config):
        return "as it is"

    def check(self, config):
        pass

    def is_exact(self, config):
        return False

    def config(self, config):
        for first in range(0, config.layers, 2):
            config = config.with_shared("ffn", (first, first + 1))
        return config

    def rewrite(self, model):
        for first, second in zip(model.layers[::2], model.layers[1::2], strict=True):
            first.later(lambda layer, other=second: self.average(layer, other))
            second.share(first, "ffn")

    def average(self, layer, other):
        for part in [part for part in layer if part.partition(".")[0] in ("gate", "up", "down")]:
            layer[part] = (layer[part] + other.before(part)) / 2
