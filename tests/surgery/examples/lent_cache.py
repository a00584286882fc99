"""Across layers: each second layer reads the keys and values of the one before it."""

from effconvert.surgery._surgery import Surgery


class LentCache(Surgery):
    """Halve the cache: each second layer reads the keys and values of the one before it."""

    @classmethod
    def allowed_options(cls, config):
        return "as it is"

    def check(self, config):
        pass

    def is_exact(self, config):
        return False

    def config(self, config):
        for first in range(0, config.layers, 2):
            config = config.with_shared("cache", (first, first + 1))
        return config

    def rewrite(self, model):
        for first, second in zip(model.layers[::2], model.layers[1::2], strict=True):
            second.share(first, "cache")
