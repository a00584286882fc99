"""Other family: a llama as the mistral that it is."""

from effconvert.surgery._surgery import Surgery


class AsMistral(Surgery):
    """Write a llama as a mistral without a window."""

    @classmethod
    def allowed_options(cls, config):
        return "as it is"

    def check(self, config):
        config.become("mistral")

    def is_exact(self, config):
        return True

    def config(self, config):
        other = config.become("mistral")
        return type(config)({**other.raw, "sliding_window": None}, other.family, other.replaced)
