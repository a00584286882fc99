"""Keep fewer numbers of keys and values, chosen by what each is worth."""
# B = batch, T = tokens, M = hidden width, H = query heads, Hk = KV heads, D = head width, P = rotary pairs,
# N = turned pairs that are kept, R = other numbers that are kept.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.surgery._replacement import PlaceContext, Replacement
from effconvert.surgery._surgery import Facts

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery._surgery import ForwardProtocol

KNOWN = {"q", "k", "v", "o", "attn_norm", "attn_post_norm"}  # parts of attention
TOKENS = 4096  # of the calibration text, for the choice
LEAST = 8  # pairs, and other numbers, that every layer keeps


class NarrowKv(Replacement):
    """Keep fewer numbers of keys and values, chosen by what each is worth.

    The keys and values of all heads become one head that all query heads share. Keys of one RoPE frequency are mixed across heads, values and other keys
    freely; the directions that matter least on a text are left out, over all layers together. Queries and outputs of each head absorb the mixing,
    so they grow as the cache shrinks: reading a prompt takes longer, and decoding after a long one is faster. --refit recovers most of the loss. The
    result needs effconvert. docs/narrow-kv.md compares it with gqa and others.

    \b
    Examples:
      effconvert narrow-kv --keep 0.5 --refit ./SmolLM2-135M
      effconvert narrow-kv --latents 48+96 ./SmolLM2-135M -o ./narrow
    """

    facts: ClassVar[Facts] = Facts("decoders without norms of queries and keys", saves="KV cache", native="", exact="with --keep 1")
    place = "attention"
    drops = ("q", "k", "v", "o")
    frozen = ("pairs",)
    no_encoders = "narrows the cache, which encoders do not have; low-rank makes projections smaller"

    keep: float | None = Field(
        None, gt=0, le=1, description="Share of the cache's numbers to keep, over all chosen layers.", json_schema_extra={"metavar": "R"}
    )
    latents: str | None = Field(
        None,
        pattern=r"^\d+\+[1-9]\d*(,\d+\+[1-9]\d*)*$",
        description="Pairs of numbers that RoPE turns + other numbers, of each layer, instead of --keep: 48+96; or one of these for each layer.",
        json_schema_extra={"metavar": "N+N"},
    )

    @property
    def label(self) -> str:
        """The name, with the share or the numbers; a list would be too long."""
        size = self.latents if self.keep is None and "," not in str(self.latents) else self.keep
        return "-".join([self.name, *([] if size is None else [str(size)])])

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The share, or the numbers up to all of them."""
        cls(keep=1).check(config)
        return "--keep R, or --latents " + "+".join(map(str, whole(config, 0)))

    @classmethod
    def check_family(cls, config: Config) -> None:
        """Refuse attention that is more than four projections and RoPE."""
        super().check_family(config)
        if config.latent:
            raise ModelError(f"{config.kind} caches latents in place of keys and values, which are narrow already; give mla a smaller --rank instead")
        config.check_interface()
        if config.normed:
            raise ModelError(f"queries and keys of {config.kind} go through a norm, which is of each head, so heads cannot be mixed; gqa and share-kv apply")
        if config.family.scales_queries or config.get("clip_qkv") or config.get("scale_attn_by_inverse_layer_idx"):
            raise ModelError(f"{config.kind} changes queries or keys beside RoPE here, so their heads cannot be mixed; gqa and share-kv apply")
        if more := config.parts.keys() & config.sublayer("attention") - KNOWN:
            raise ModelError(f"attention of {config.kind} has {', '.join(sorted(more))}, for which one narrow head has no place; gqa and share-kv apply")

    def check(self, config: Config) -> None:
        """Refuse other models, and more numbers than there are."""
        if (self.keep is None) == (self.latents is None):
            raise OptionError("give either --keep, the share of the cache to keep, or --latents")
        if shared := sorted(index for index in self.chosen(config) if any(config.shares(index, part) for part in ("q", "k", "v", "o"))):
            raise OptionError(
                f"layer {shared[0]} shares its attention with others, and would store its own again; do narrow-kv first, or leave it out of --layers"
            )
        super().check(config)

    def chosen(self, config: Config) -> set[int]:
        """Return the layers to change: those with attention, and for a single size with pairs those that RoPE turns, unless --layers names others."""
        layers = super().chosen(config)
        if self.layers:
            return layers
        attending = {index for index in layers if "attention" not in config.skips(index)}
        if self.latents is None or "," in self.latents:
            return attending
        return {index for index in attending if bool(config.rotary_of(index)) == bool(_size(self.latents)[0])}

    @property
    def undecided(self) -> bool:
        """If only the share is known, and not everything stays."""
        return self.keep is not None and self.keep < 1

    @property
    def rule(self) -> str:
        """What is compared, and the tokens that it is compared on."""
        return f"the least energy of the errors, on up to {TOKENS:,} tokens"

    def decide(self, forward: ForwardProtocol) -> NarrowKv:
        """Choose how many numbers each layer keeps."""
        from effconvert.surgery.attention._latent_sizes import choose

        config = forward.config
        every = {index: whole(config, index) for index in sorted(self.chosen(config))}
        sizes = choose(forward, every, round((self.keep or 1) * cached(config) * len(every)), LEAST, TOKENS)
        return self.model_copy(update={"keep": None, "latents": ",".join(f"{pairs}+{rank}" for pairs, rank in sizes)})

    def is_exact(self, config: Config) -> bool:
        """If all numbers stay."""
        return all(size == whole(config, index) for index, size in self._sizes(config).items())

    def needs_calibration(self, config: Config) -> bool:
        """If some do not."""
        return not self.is_exact(config)

    def fit_bytes(self, config: Config) -> int:
        """Some matrices of all heads in float64."""
        return 8 * (6 * config.hidden**2 + 12 * config.heads * config.head_dim * config.hidden)

    def notes(self, config: Config) -> str:
        """Say what is saved, and how much queries and outputs grow."""
        sizes = self._sizes(config)
        before = cached(config) * len(sizes)
        after = sum(2 * pairs + rank for pairs, rank in sizes.values())
        if self.undecided:
            return ""
        widths = sum(_query_width(config, *size) + size[1] for size in sizes.values()) / (2 * config.head_dim * len(sizes))
        return f"{after / before:.1%} of the numbers in the cache of these layers stay; queries and outputs become {widths:.3g} times as wide"

    def config(self, config: Config) -> Config:
        """Record each size, with the layers that have it."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in self._sizes(config).items():
            groups.setdefault(size, []).append(index)
        for (pairs, rank), layers in groups.items():
            one = self.model_copy(update={"keep": None, "latents": f"{pairs}+{rank}", "layers": ",".join(map(str, layers))})
            config = super(NarrowKv, one).config(config)
        return config

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Queries, keys and values in one matrix, outputs, their biases, and the pair of RoPE by whose angle each pair of numbers turns."""
        pairs, rank = _size(str(self.latents))
        width = config.heads * _query_width(config, pairs, rank)
        latent, hidden = 2 * pairs + rank, config.hidden
        shapes = {
            "q": (width, hidden),
            "q_bias": (width,),
            "kv": (latent, hidden),
            "kv_bias": (latent,),
            "o": (hidden, config.heads * rank),
            "o_bias": (hidden,),
        }
        return {**shapes, **({"pairs": (pairs,)} if pairs else {})}

    def cached_width(self, config: Config) -> int:
        """The numbers of its latents."""
        pairs, rank = _size(str(self.latents))
        return 2 * pairs + rank

    def layer(self, layer: Layer) -> None:
        """Change the layer by its own size."""
        pairs, rank = self._sizes(layer.config)[layer.index]
        one = self.model_copy(update={"keep": None, "latents": f"{pairs}+{rank}", "layers": str(layer.index)})
        super(NarrowKv, one).layer(layer)

    def values(self, layer: Layer, place: str) -> Mapping[str, Tensor]:
        """Return the best head of this size."""
        import torch

        from effconvert.surgery.attention._heads import heads_of, read_heads
        from effconvert.surgery.attention._latents import assigned, latents

        exact, hidden = self.is_exact(layer.config), layer.config.hidden
        if layer.shapes_only or not (layer.activations or exact):
            return super().values(layer, place)
        heads = heads_of(layer, torch.eye(hidden + 1, dtype=torch.double)) if exact else read_heads(layer, ones=True)
        return assigned(latents(heads, *_size(str(self.latents))), layer["o.bias"] if "o.bias" in layer else torch.zeros(hidden))

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Attend with one head of keys and values for all queries."""
        import torch
        from torch.nn.functional import linear

        attention = context.attention
        assert attention
        pairs, rank = _size(str(self.latents))
        key, value = linear(hidden, weights["kv"], weights["kv_bias"])[:, None].split([2 * pairs, rank], -1)  # [B, 1, T, 2N], [B, 1, T, R]
        query = linear(hidden, weights["q"], weights["q_bias"]).unflatten(-1, (weights["o"].shape[1] // rank, -1)).transpose(1, 2)  # [B, H, T, 2N (+ R)]
        if pairs:
            cos, sin = (rows[:, None, :, weights["pairs"].long()] for rows in attention.angles(hidden))  # [B or 1, 1, T, N]
            query, key = (turn(rows, cos, sin) for rows in (query, key))
            key, value = attention.remember(key, value)
        else:
            value, key = attention.remember(value, key)  # a cache counts its tokens by keys, which must not be empty
        if query.shape[-1] > key.shape[-1]:  # what RoPE does not turn of keys is mixed with values
            key = torch.cat([key, value], -1)
        out = attention.attend(query, key, value)  # [B, T, H, R]
        return linear(out.flatten(2), weights["o"], weights["o_bias"])

    def _sizes(self, config: Config) -> dict[int, tuple[int, int]]:
        """Return the numbers that each chosen layer keeps: pairs that RoPE turns, and others.

        Raises:
            OptionError: they are more than there are, or another number of them is given.
        """
        layers = sorted(self.chosen(config))
        if self.latents is None:
            return {index: _share(whole(config, index), (self.keep or 1) * cached(config)) for index in layers}
        sizes = [_size(size) for size in self.latents.split(",")]
        sizes *= len(layers) if len(sizes) == 1 else 1
        if len(sizes) != len(layers):
            raise OptionError(f"--latents has {len(sizes)} sizes, and {len(layers)} layers are chosen; give one for each, or a single one")
        for index, size in zip(layers, sizes, strict=True):
            most = whole(config, index)
            if size[0] > most[0] or size[1] > most[1] or (most[0] and not size[0]):
                bounds = f"{'1 to ' if most[0] else ''}{most[0]}+1 to {most[1]}"
                raise OptionError(f"--latents {size[0]}+{size[1]} does not fit layer {index}; it can be {bounds}")
        return dict(zip(layers, sizes, strict=True))


def turn(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the N pairs of rows [B, G, T, 2N (+ R)] by the angles [B or 1, 1, T, N]; the other numbers stay."""
    import torch

    count = cos.shape[-1]
    first, second, rest = rows.split([count, count, rows.shape[-1] - 2 * count], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def whole(config: Config, layer: int) -> tuple[int, int]:
    """Return all numbers of a layer: pairs that RoPE turns, and values with what it does not turn of keys, which are no more than the width of the stream."""
    turned = config.rotary_of(layer)
    return config.kv_heads * turned // 2, min(config.hidden, config.kv_heads * (2 * config.head_dim - turned))


def cached(config: Config) -> int:
    """Return the numbers that a layer of the model caches for a token."""
    return 2 * config.kv_heads * config.head_dim


def _share(size: tuple[int, int], numbers: float) -> tuple[int, int]:
    """Return so many numbers with as many of both kinds as in `size`, before they are chosen."""
    share = min(1.0, numbers / (2 * size[0] + size[1]))
    pairs, rank = (max(min(LEAST, most), round(share * most)) for most in size)
    return pairs, rank


def _size(text: str) -> tuple[int, int]:
    pairs, rank = map(int, text.split("+"))
    return pairs, rank


def _query_width(config: Config, pairs: int, rank: int) -> int:
    """Return the width of a head's queries: they ask the values too where RoPE leaves a part of keys alone."""
    return 2 * pairs + (rank if not pairs or config.rotary < config.head_dim else 0)
