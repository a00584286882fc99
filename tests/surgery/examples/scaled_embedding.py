"""Outer: the embedding doubled, and the norm of all layers before it halved for it; nothing changes."""

from effconvert.surgery._surgery import Surgery


class ScaledEmbedding(Surgery):
    """Double the embedding of a model with RMSNorm and an untied head: only sums with what layers add would see it."""

    @classmethod
    def allowed_options(cls, config):
        return "as it is"

    def check(self, config):
        pass

    def is_exact(self, config):
        return False

    def config(self, config):
        return config

    def outer(self, outer):
        outer["embed"] = outer["embed"] * 2

    def layer(self, layer):
        for part in ("o", "down"):
            layer[part] = layer[part] * 2
