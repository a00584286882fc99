"""The shape of a model: the numbers in config.json that surgeries need, read by the family's row."""
# L = layers, M = hidden width, H = query heads, Hk = KV heads, D = head width, F = width of the FFN, E = experts, V = vocabulary.

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from effconvert.checkpoint import patterns
from effconvert.errors import ModelError
from effconvert.families import EXPERTS_KEYS, Family

TOP_K_KEY = "num_experts_per_tok"
PART = "partial_rotary_factor"  # key of the part of a head that RoPE turns
DECODER_SKIPS = "decoder_skips"  # key of config.json for all layers of the decoder behind an encoder: ["mlp"], as in transformers' `per_layer_config`


@dataclass(frozen=True)
class Shape:
    """The content of config.json as the family's own class has it, with the family's row for the names of its keys."""

    raw: Mapping[str, Any]
    family: Family

    @property
    def decoder(self) -> bool:
        """Whether a token sees only earlier ones: true of decoders, unless the config makes attention bidirectional, as in text embedders."""
        both_ways = (not self.raw.get("is_causal", True) and not self.family.always_causal) or bool(
            self.family.both_ways_key and self.get(self.family.both_ways_key)
        )
        return self.family.decoder and not both_ways

    @property
    def encoder_decoder(self) -> bool:
        """Whether there is a decoder behind the encoder; the layers are then the encoder's, and no step changes the decoder's as layers."""
        return bool(self.family.decoder_layers)

    @property
    def role(self) -> str:
        """What it is: a decoder, an encoder, or an encoder-decoder."""
        return "decoder" if self.decoder else "encoder-decoder" if self.encoder_decoder else "encoder"

    def check_interface(self) -> None:
        """Refuse models whose attention function cannot be replaced.

        Raises:
            ModelError: it is not called through transformers' AttentionInterface.
        """
        if self.latent:
            raise ModelError(f"{self.kind} has attention of its own, with latents in place of keys and values, so its attention function cannot be changed")
        if self.family.own_attention:
            why = f"{self.kind} has attention of its own, outside transformers' AttentionInterface, so its attention function cannot be changed"
            way = f"; `effconvert rope-layout` writes it as a {self.family.relaid[0]}, where it can" if self.family.relaid else ""
            raise ModelError(why + way)

    def check_stored_apart(self) -> None:
        """Refuse models of a family that stores layers once, which no step can change.

        Raises:
            ModelError: this is one.
        """
        if self.family.groups_key:
            raise ModelError(
                f"{self.kind} runs a layer that is stored once many times ({self.family.groups_key} = {self.get(self.family.groups_key)}), which no step "
                "changes yet; begin from an encoder such as bert, let `albert` be the last step, and train the result with transformers"
            )

    @property
    def attention(self) -> str:
        """The module of a layer that attends; empty where nothing does."""
        return self.family.attention

    @property
    def experts(self) -> int:
        """Experts of a layer, E; 0 where the family has none."""
        if not self.family.experts_key:
            return 0
        return self._integer(next((key for key in EXPERTS_KEYS if key in self.raw), self.family.experts_key))

    @property
    def top_k(self) -> int:
        """Experts that run for a token; 0 where the family has none."""
        return min(self._integer(TOP_K_KEY), self.experts) if self.experts else 0

    @property
    def expert_ffn(self) -> int:
        """Width inside an expert."""
        return self._integer(self.family.expert_ffn_key) if self.family.expert_ffn_key else self.ffn

    @property
    def active_ffn(self) -> int:
        """Neurons of a layer's FFN that run for a token, in layers with experts."""
        shared = self.get(self.family.shared_ffn_key) if self.family.shared_ffn_key else 0
        return self.top_k * self.expert_ffn + int(shared or 0)

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts. In a family with experts all layers do, except those that its config leaves dense."""
        if not self.experts:
            return False
        step = self.get("decoder_sparse_step") or 1
        return layer not in (self.get("mlp_only_layers") or ()) and (layer + 1) % step == 0

    @property
    def norms_stream(self) -> bool:
        """Whether layers normalise the residual stream itself. Then a layer that adds nothing is not the identity."""
        return self.family.norms_stream or self.get("do_layer_norm_before") is False

    @property
    def kind(self) -> str:
        """The `model_type`."""
        return str(self.raw["model_type"])

    @property
    def heads(self) -> int:
        """Query heads, H; 0 where nothing attends."""
        return self._integer(self.family.heads_key) if self.family.heads_key else 0

    @property
    def kv_heads(self) -> int:
        """Key and value heads, Hk."""
        if self.family.fixed_kv_heads:
            return self.family.fixed_kv_heads
        key = self.family.kv_heads_key
        return self._integer(key) if key and self.get(key) is not None else self.heads

    @property
    def latent(self) -> bool:
        """Whether attention is latent (MLA): a token has one vector, of which the keys and values of all heads are made, and one key that RoPE turns."""
        return "kv_a" in self.family.parts

    @property
    def cached_numbers(self) -> int:
        """Numbers that a layer caches of a token: keys and values, or latents and the key that RoPE turns."""
        if self.latent:
            return self._integer("kv_lora_rank") + self._integer("qk_rope_head_dim")
        return 2 * (self.heads if self.family.caches_query_heads else self.kv_heads) * self.head_dim

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return self._integer(self.family.layers_key)

    @property
    def hidden(self) -> int:
        """Width of the residual stream, M."""
        return self._integer(self.family.hidden_key)

    @property
    def embed_width(self) -> int:
        """Width of the embedding table, which in some families is less than M."""
        return self._integer(self.family.embed_key) if self.family.embed_key and self.get(self.family.embed_key) is not None else self.hidden

    @property
    def ffn(self) -> int:
        """Width inside the MLP, F (GPT-2 leaves it out where it is 4 M)."""
        return self._integer(self.family.ffn_key) if self.get(self.family.ffn_key) is not None else 4 * self.hidden

    @property
    def head_dim(self) -> int:
        """Width of a head, D."""
        return self._integer("head_dim") if self.get("head_dim") is not None else self.hidden // max(1, self.heads)

    @property
    def scale(self) -> float:
        """The factor of attention scores."""
        return float(self.get(self.family.scale_key)) if self.family.scale_key else self.head_dim**-0.5

    @property
    def ropes(self) -> Mapping[str, Any]:
        """What config.json says of RoPE, under the present key or under the former."""
        return self.get("rope_parameters") or self.get("rope_scaling") or {}

    @property
    def rotary(self) -> int:
        """Dimensions of a head that RoPE turns, always the first ones. Some families skip layers: see `rotary_of`.

        With `proportional` RoPE these are all, some of them by nothing. Classes without a default for a part of a head take no notice of one.
        """
        parameters, key = self.ropes, self.family.rotary_key
        if parameters.get("rope_type") == "proportional" or (self.family.rope and key == PART and PART not in self.family.defaults):
            return self.head_dim
        part = parameters.get(PART, self.get(key))
        if self.family.rotary_counts and part is not None:
            return int(part)
        return int(self.head_dim * (1 if part is None else part)) if self.family.rope else 0

    def rotary_of(self, layer: int) -> int:
        """Dimensions of a head that RoPE turns in a layer; 0 in layers without RoPE."""
        return self.rotary if self._turns[layer] else 0

    @cached_property
    def _turns(self) -> list[bool]:
        return patterns.turns(self.get, self.family, self.layers)

    @property
    def has_table(self) -> bool:
        """Whether positions are vectors of a table, which are added to the embeddings."""
        return "positions" in self.family.outer

    def lacks_table_of(self, original: "Shape") -> bool:
        """Whether the original's layers read positions in the stream, from a table that this model has not."""
        return original.has_table and not self.has_table

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.get("tie_word_embeddings"))

    @property
    def vocabulary(self) -> int:
        """Number of tokens, V."""
        return self._integer("vocab_size")

    @property
    def longest(self) -> int | None:
        """The longest context in tokens, where there is a limit."""
        length: int | None = self.get(self.family.positions_key)
        if length is None or not self.family.positions_after_padding:
            return length
        return length - int(self.get("pad_token_id") or 0) - 1

    @property
    def stated_length(self) -> int:
        """The longest context in tokens.

        Raises:
            ModelError: config.json does not say.
        """
        if self.longest is None:
            raise ModelError(f"config.json of this {self.kind} does not say how long a text may be ({self.family.positions_key}); write it there")
        return self.longest

    def get(self, key: str) -> Any:
        """Return the value of `key`, else transformers' default, else None."""
        return self.raw.get(key, self.family.defaults.get(key))

    def windows(self) -> list[int | None]:
        """Return each layer's sliding window in tokens, None without a window."""
        return patterns.windows(self.get, self.family, self.layers)

    def _integer(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int or value < 1:
            raise ModelError(f"config.json of this {self.kind} says {key} = {value!r}, where a whole number of at least 1 is needed; mend the file")
        return value
