"""Share each key and value head among a group of query heads (GQA)."""
# M = hidden width, H = query heads, Hk = KV heads, G = KV heads after, D = head width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Facts, Surgery

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer

Pool = Literal["pca", "aligned", "mean", "first"]
Grouping = Literal["adjacent", "similar"]
POOL: Any = Field(
    "pca",
    description="How a group's heads are pooled. After calibration: weighted PCA of what outputs and scores need (pca), or the mean in a common basis "
    "(aligned). Without it: the plain mean, which is the paper's rule (mean), or the first head (first).",
)
CALIBRATED_RULES = ("pca", "aligned")  # rules that need calibration
NORMED = "its queries and keys go through a norm, which fixes their heads' bases but for signs: keys are averaged, and --pool applies to values alone"
CLIPPED = "its queries, keys and values are clipped (clip_qkv), which pooling ignores: the more is clipped, the less heads are what they were"


class Gqa(Surgery):
    """Share each key and value head among a group of query heads (GQA).

    The KV cache shrinks to G/Hk of its size; models that share heads already work too. The model first runs on a text, layer by layer, to see what
    its heads share. --refit then recovers more quality than any choice of --pool. Exact where G is the model's own number of KV heads.
    Ainslie et al. 2023, arXiv 2305.13245; docs/gqa.md measures the rules.

    \b
    Examples:
      effconvert gqa --groups 8 --refit meta-llama/Llama-2-7b-hf
      effconvert gqa --groups 1 --calibrate mine.txt ./SmolLM2-135M -o ./mqa
    """

    facts: ClassVar[Facts] = Facts(
        "models that attend",
        saves="KV cache",
        native="its own class (gpt2, bert and others without KV heads need effconvert)",
        exact="with --groups as many as KV heads",
    )

    groups: int = Field(ge=1, description="KV heads to keep, G: a divisor of the model's.", json_schema_extra={"metavar": "G"})
    pool: Pool = POOL
    grouping: Grouping = Field("adjacent", description="Which heads are pooled: neighbours, or those that lose least by it (after calibration).")

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Name the numbers of groups that divide the model's KV heads."""
        return f"--groups {', '.join(map(str, choices(config)))}{pooling(config)}"

    def check(self, config: Config) -> None:
        """Refuse a number of groups that the heads or the family do not allow."""
        possible = choices(config)
        if self.groups > config.kv_heads:
            more = f"; effconvert expand-kv makes more of them, up to the {config.heads} query heads" if config.family.kv_heads_key else ""
            raise OptionError(f"--groups {self.groups} is more than this model's {config.kv_heads} KV heads; give {_either(possible)}{more}")
        if config.kv_heads % self.groups:
            raise OptionError(f"--groups {self.groups} does not divide this model's {config.kv_heads} KV heads; give {_either(possible)}")
        config.with_kv_heads(self.groups)  # raises where the family cannot store this number

    def is_exact(self, config: Config) -> bool:
        """Only with as many groups as heads."""
        return self.groups == config.kv_heads

    def config(self, config: Config) -> Config:
        """Write the new number of KV heads."""
        return config.with_kv_heads(self.groups)

    def needs_calibration(self, config: Config) -> bool:
        """If the rule or the grouping does, and there is something to pool."""
        return not self.is_exact(config) and (self.pool in CALIBRATED_RULES or self._reorders)

    def notes(self, config: Config) -> str:
        """Say that nothing changes, what norms of queries and keys rule out, and what is done in spite of clipping."""
        if self.is_exact(config):
            return f"the model has {self.groups} KV heads already, so nothing changes"
        if self.pool not in CALIBRATED_RULES:
            return ""
        return "; ".join(note for note, applies in ((NORMED, config.normed), (CLIPPED, config.get("clip_qkv"))) if applies)

    def layer(self, layer: Layer) -> None:
        """Pool each group of KV heads into one, in k, v and the parts that go with them, and fit q and o to it."""
        if self.groups == layer.config.kv_heads or "k" not in layer:
            return  # keeps the bytes: a mean over one head would turn -0.0 into 0.0
        if not self.needs_calibration(layer.config):
            self._plain(layer, self.pool)
        elif layer.activations:
            from effconvert.surgery.attention._heads import read_heads, write_heads
            from effconvert.surgery.attention._pooling import order, pool

            heads = read_heads(layer)
            new_order = order(heads, self.groups) if self._reorders else None
            write_heads(pool(heads.reordered(new_order), self.groups, self.pool), layer, new_order)
        else:
            self._shapes(layer)

    @property
    def _reorders(self) -> bool:
        return self.grouping == "similar" and self.groups > 1

    def _shapes(self, layer: Layer) -> None:
        """Mark the parts that will change, with their new shapes."""
        from effconvert.surgery.attention._heads import norms_heads

        for part in ("q", "q.bias", "o", *(["q_norm"] if self._reorders and norms_heads(layer) else [])):
            if part in layer:
                layer[part] = layer[part]
        self._plain(layer, "first")

    def _plain(self, layer: Layer, rule: str) -> None:
        for part in layer.per_kv_head:
            heads = layer[part].unflatten(0, (self.groups, -1, layer.config.head_dim))  # [G, Hk/G, D, ...]
            # On the meta device only the shape matters, and `mean` would import torch's compiler: 1.5 s and 150 MB for every plan.
            layer[part] = (heads[:, 0] if rule == "first" or heads.is_meta else heads.mean(1)).flatten(0, 1)


def choices(config: Config) -> list[int]:
    """Return every number of KV heads that pooling this model can give.

    Raises:
        ModelError: nothing attends in it, or by itself.
    """
    config.place("scores")
    if config.readers:
        reader = config.readers[0]
        raise ModelError(f"layer {reader} reads the keys and values of layer {config.cache_of(reader)}; pool heads first, and share the cache afterwards")
    return [count for count in range(1, config.kv_heads + 1) if config.kv_heads % count == 0]


def pooling(config: Config) -> str:
    """Return the rules of pooling that this model allows, where these are not all.

    Raises:
        ModelError: a technique is fitted to the heads that there are.
    """
    if config.kv_heads > 1:
        config.with_kv_heads(1)
    shared = any(config.shares(layer, "k") for layer in range(config.layers))  # calibrated rules would pool in each of these layers otherwise
    return f" --pool {' or '.join(rule for rule in get_args(Pool) if rule not in CALIBRATED_RULES)}" if shared else ""


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
