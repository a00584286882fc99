"""Repeat the shared key and value heads: exact GQA to MHA."""
# H = query heads, Hk = KV heads, G = KV heads after, D = head width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Facts, Surgery

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer


class ExpandKv(Surgery):
    """Repeat the shared key and value heads: exact GQA to MHA.

    The logits stay equal and the cache grows. Use it for tools that need one KV head per query head, or to compare ways of pooling heads again.
    --groups makes a finer GQA instead. Query head h used KV head h*Hk//H, so each head is repeated in place.

    \b
    Examples:
      effconvert expand-kv ./SmolLM2-135M
      effconvert expand-kv --groups 9 ./SmolLM2-135M -o ./mha
    """

    facts: ClassVar[Facts] = Facts("models with GQA or MQA", saves="nothing: it is for loaders without GQA", native="its own class", exact="always")

    groups: int | None = Field(
        None,
        ge=1,
        description="KV heads to write: a multiple of the model's that divides its query heads. Default: one per query head.",
        json_schema_extra={"metavar": "G"},
    )

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Name the larger numbers of KV heads."""
        return f"--groups {', '.join(map(str, _choices(config)))}"

    def check(self, config: Config) -> None:
        """Refuse a number that is no multiple of the KV heads or no divisor of the query heads."""
        possible = _choices(config)
        if self._count(config) not in possible:
            raise OptionError(
                f"--groups {self.groups} does not lie between this model's {config.kv_heads} KV heads and {config.heads} query heads "
                f"as a multiple of the one and a divisor of the other; give {' or '.join(map(str, possible))}"
            )

    def is_exact(self, config: Config) -> bool:
        """Always."""
        return True

    def config(self, config: Config) -> Config:
        """Write the new number of KV heads."""
        return config.with_kv_heads(self._count(config))

    def layer(self, layer: Layer) -> None:
        """Repeat the rows of k and v (and of parts that go with them) head by head."""
        times = self._count(layer.config) // layer.config.kv_heads
        for part in layer.per_kv_head:
            heads = layer[part].unflatten(0, (layer.config.kv_heads, layer.config.head_dim))  # [Hk, D, ...]
            layer[part] = heads.repeat_interleave(times, 0).flatten(0, 1)

    def _count(self, config: Config) -> int:
        return config.heads if self.groups is None else self.groups


def _choices(config: Config) -> list[int]:
    config.place("scores")  # raises where nothing attends, or a family does so by itself
    if config.family.fixed_kv_heads:
        config.with_kv_heads(config.heads)  # raises with the reason
    larger = [count for count in range(config.kv_heads + 1, config.heads + 1) if count % config.kv_heads == 0 and config.heads % count == 0]
    if not larger:
        raise ModelError(f"this {config.kind} has a KV head for each of its {config.heads} query heads already; there is nothing to repeat")
    return larger
