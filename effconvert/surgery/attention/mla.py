"""Put keys and values into latents (MLA), as a deepseek_v3."""
# M = hidden width, H = query heads, Hk = KV heads, D = head width, P = pairs of a head, N = pairs that are kept, R = numbers of values that are kept.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Facts, Surgery

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery._surgery import ForwardProtocol

TOKENS = 4096  # of the calibration text, for the choice
CODE = ("auto_map", "layer_types", "max_window_layers", "rope_theta", "rope_scaling", "partial_rotary_factor")  # keys that belong to the class before
STANDARD = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 4096}  # where config.json leaves them out
CONSTANT = 4096.0  # a latent so large that the norm divides by it alone; a power of two, within float16
VLLM = "not for vLLM, whose class of this family has no biases and other RoPE (docs/mla.md)"


class Mla(Surgery):
    """Put keys and values into latents (MLA), as a deepseek_v3.

    A token caches R + 1 + d numbers a layer: R of which the values of all heads are made, one constant, and a key of d that all query heads share.
    Keys of one RoPE frequency are mixed across heads, and values freely; what loses least on a text goes. The result is a deepseek_v3 without experts,
    which transformers opens by itself; vLLM's class lacks what it needs. No logit changes where R and d are as many as the model caches. At the same
    size narrow-kv, which needs effconvert, can choose for each layer. --refit makes up for a part. At half of
    the cache both lose the same; at a third narrow-kv loses less. docs/mla.md has the measurements.
    DeepSeek-V2 2024, arXiv 2405.04434; TransMLA: Meng et al. 2025, arXiv 2502.07864.

    \b
    Examples:
      effconvert mla --rank 96 --rope-dims 96 --refit ./SmolLM2-135M
      effconvert mla --rank 192 ./SmolLM2-135M -o ./latent
    """

    facts: ClassVar[Facts] = Facts("llama, and mistral without a window", saves="KV cache", native="deepseek_v3", exact="with --rank as many as values")

    rank: int = Field(ge=1, description="Numbers of values that a token caches, R.", json_schema_extra={"metavar": "R"})
    rope_dims: int | None = Field(
        None,
        ge=2,
        multiple_of=2,
        description="Width of the key that RoPE turns, d, even; better not less than a head's. Default: as wide as all keys.",
        json_schema_extra={"metavar": "D"},
    )
    frequencies: str | None = Field(
        None,
        pattern=r"^\d+(,\d+)*$",
        description="Pairs of that key for each frequency of RoPE, the fastest first, d/2 in sum. Default: those that lose least on the calibration text.",
        json_schema_extra={"metavar": "N,N,..."},
    )

    @property
    def label(self) -> str:
        """The name with the sizes."""
        return "-".join(map(str, filter(None, (self.name, self.rank, self.rope_dims))))

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The largest sizes."""
        check_family(config)
        rank, pairs = whole(config)
        return f"--rank 1 to {rank}, --rope-dims 2 to {2 * pairs}"

    def check(self, config: Config) -> None:
        """Refuse models that a deepseek_v3 cannot hold, and more numbers than there are."""
        check_family(config)
        rank, pairs = whole(config)
        if self.rank > rank:
            raise OptionError(f"--rank {self.rank} is more than the {rank} numbers of values that this model has for a token; give at most {rank}")
        if self.rope_dims and self.rope_dims > 2 * pairs:
            raise OptionError(f"--rope-dims {self.rope_dims} is more than the {2 * pairs} numbers of keys that this model caches; give at most {2 * pairs}")
        if self.frequencies is None:
            return
        counts = self._counts(config)
        if len(counts) != config.rotary // 2 or max(counts) > config.kv_heads or sum(counts) < 1:
            raise OptionError(
                f"--frequencies {self.frequencies} does not fit: RoPE has {config.rotary // 2} frequencies here, and each can have 0 to {config.kv_heads} pairs"
            )
        if self.rope_dims not in (None, 2 * sum(counts)):
            raise OptionError(f"--frequencies has {sum(counts)} pairs in sum, and --rope-dims {self.rope_dims} is twice another number; leave one out")

    @property
    def undecided(self) -> bool:
        """If the width of the key is given, and not what is in it."""
        return self.rope_dims is not None and self.frequencies is None

    @property
    def rule(self) -> str:
        """What is compared, and the tokens that it is compared on."""
        return f"the least energy of the errors in all layers, on up to {TOKENS:,} tokens"

    def decide(self, forward: ForwardProtocol) -> Mla:
        """Choose how many pairs each frequency gets: config.json has one list of them for all layers."""
        from effconvert.surgery.attention._latent_sizes import by_frequency

        assert self.rope_dims
        counts = by_frequency(forward, self.rope_dims // 2, TOKENS)
        return self.model_copy(update={"frequencies": ",".join(map(str, counts))})

    def is_exact(self, config: Config) -> bool:
        """If all numbers stay."""
        rank, pairs = whole(config)
        return self.rank == rank and not self.undecided and sum(self._counts(config)) == pairs

    def needs_calibration(self, config: Config) -> bool:
        """If some do not."""
        return not self.is_exact(config)

    def fit_bytes(self, config: Config) -> int:
        """Some matrices of all heads in float64."""
        return 8 * (6 * config.hidden**2 + 12 * config.heads * config.head_dim * config.hidden)

    def notes(self, config: Config) -> str:
        """Say what a token caches, and what cannot open it."""
        width = self.rope_dims or 2 * sum(self._counts(config))
        numbers = self.rank + 1 + width
        return f"a token caches {numbers} numbers a layer ({self.rank} of values, a constant, {width} of keys) in place of {config.cached_numbers}; {VLLM}"

    def config(self, config: Config) -> Config:
        """Become the family with latent attention."""
        from effconvert.surgery.attention._angles import rope_entry_of_pairs

        target, counts = config.with_defaults().become(config.family.latent), self._counts(config)
        width = 2 * sum(counts)
        keys: dict[str, Any] = {
            **{"num_key_value_heads": config.heads, "q_lora_rank": None, "kv_lora_rank": self.rank + 1, "v_head_dim": config.head_dim},
            **{"qk_nope_head_dim": 0, "qk_rope_head_dim": width, "head_dim": width, "qk_head_dim": width, "rope_interleave": True},
            **{"attention_bias": True, "first_k_dense_replace": config.layers, "num_nextn_predict_layers": 0},
        }
        standard = {key: value for key, value in STANDARD.items() if key not in target.raw}
        target = target.without(*CODE).with_keys(standard | keys)
        return target.with_keys({"rope_parameters": rope_entry_of_pairs(config.with_keys(standard), counts)})

    def layer(self, layer: Layer) -> None:
        """Write the latents of a layer in place of its keys and values. The output projection stays."""
        config = layer.config
        if "q.bias" in layer:
            raise ModelError(f"queries of this {config.kind} have a bias, for which deepseek_v3 has no place; narrow-kv takes it, in a class of effconvert")
        for part, value in self._parts(layer).items():
            layer[part] = value
        for part in ("k", "v", "k.bias", "v.bias"):
            if part in layer:
                del layer[part]

    def _parts(self, layer: Layer) -> Mapping[str, Tensor]:
        """Return the new parts of a layer."""
        import torch

        config, exact = layer.config, self.is_exact(layer.config)
        width, latent = 2 * sum(self._counts(config)), self.rank + 1
        if layer.shapes_only or not (layer.activations or exact):
            shapes = {
                "q": (config.heads * width, config.hidden),
                "kv_a": (latent + width, config.hidden),
                "kv_a.bias": (latent + width,),
                "kv_a_norm": (latent,),
                "kv_b": (config.heads * config.head_dim, latent),
                "o.bias": (config.hidden,),
            }
            return {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
        from effconvert.surgery.attention._heads import heads_of, read_heads
        from effconvert.surgery.attention._latents import latents
        from effconvert.surgery.attention._mla import assigned

        # Where nothing is lost only sizes count: those of inputs behind their norm.
        heads = (
            heads_of(layer, torch.diag(torch.cat([layer["attn_norm"].double().square(), torch.ones(1).double()]))) if exact else read_heads(layer, ones=True)
        )
        return {**assigned(latents(heads, self._counts(config), self.rank), heads.moment, config.scale, CONSTANT), "o.bias": torch.zeros(config.hidden)}

    def _counts(self, config: Config) -> list[int]:
        """Return the pairs of the key for each frequency, [P]."""
        return [config.kv_heads] * (config.rotary // 2) if self.frequencies is None else [int(count) for count in self.frequencies.split(",")]


def whole(config: Config) -> tuple[int, int]:
    """Return all numbers of values, no more than the width of the stream, and all pairs of keys."""
    return min(config.hidden, config.kv_heads * config.head_dim), config.kv_heads * config.rotary // 2


def check_family(config: Config) -> None:
    """Refuse models that a deepseek_v3 cannot hold.

    Raises:
        ModelError: what stands in the way.
    """
    from effconvert.surgery.attention._angles import frequencies

    config.check_alone()
    if config.latent:
        raise ModelError(f"{config.kind} has latent attention already, so there are no keys and values to make latents of; begin from the original")
    if why := _obstacle(config):
        raise ModelError(f"{config.kind} cannot become a deepseek_v3: {why}; `effconvert inspect` lists what works, such as narrow-kv in a class of effconvert")
    frequencies(config)  # raises where RoPE is of another kind
    config.with_defaults().become(config.family.latent)  # raises where a switch has no counterpart


def _obstacle(config: Config) -> str:
    """Return why a deepseek_v3 cannot compute what a model does; empty if it can."""
    parts, family = config.parts, config.family
    if not config.decoder:
        return "it is an encoder, without a cache to make smaller"
    if not parts.keys() >= {"q", "k", "v"}:
        return "it does not attend"
    reasons = {
        "something of effconvert's is in it already; begin from the original": config.needs_effconvert,
        "its queries and keys go through a norm, which is of each head": config.normed,
        "RoPE does not turn all of its keys": not all(config.rotary_of(index) == config.head_dim for index in range(config.layers)),
        "it has experts, and those of a deepseek_v3 are chosen otherwise": bool(family.experts_key),
        "its FFN has no gate": "gate" not in parts,
        "its norms stand elsewhere": not parts.keys() >= {"attn_norm", "mlp_norm"} or bool(parts.keys() & {"attn_post_norm", "mlp_post_norm"}),
        "it has a sliding window": any(config.windows()),
        "its queries have a bias": bool(config.get("attention_bias")),
        "its scores have a factor of their own": bool(family.scale_key),
        "it is not written as a llama, and `effconvert rope-layout --to llama` may write it so": "llama" in family.relaid,
        "a layer of its family computes more than a llama's (biases of queries, for instance)": not family.latent,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
