"""The shape of a model: the numbers in config.json that surgeries need, read by the family's row."""
# L = layers, M = hidden width, H = query heads, Hk = KV heads, D = head width, F = width of the FFN, E = experts, V = vocabulary.

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from effconvert.checkpoint import patterns
from effconvert.errors import ModelError
from effconvert.families import EXPERTS_KEYS, Family

ATTENTION_PARTS = ("q", "k", "v", "kv_a", "kv_a_norm", "kv_b", "o", "q_norm", "k_norm", "attn_norm", "attn_post_norm")  # the parts of attention, with its norms
TOP_K_KEY = "num_experts_per_tok"
DECODER_SKIPS = "decoder_skips"  # key of config.json for all layers of the decoder behind an encoder: ["mlp"], as in transformers' `per_layer_config`


@dataclass(frozen=True)
class Shape:
    """The content of config.json as the family's own class has it, with the family's row for the names of its keys."""

    raw: Mapping[str, Any]
    family: Family

    @cached_property
    def parts(self) -> dict[str, str]:
        """The modules of a layer's parts: part -> module. `experts.*.gate` in the family's row is repeated for each expert."""
        missing = {part for part, (key, value) in self.family.lacking.items() if self.get(key) == value}
        modules = {part: module for part, module in self.family.parts.items() if "*" not in part and part not in missing}
        of_expert = {part: module for part, module in self.family.parts.items() if "*" in part}
        for number in map(str, range(self.experts)):
            modules |= {part.replace("*", number): module.replace("*", number) for part, module in of_expert.items()}
        return modules

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shape [out, in] of each projection of a layer: part -> rows, columns."""
        rows, kv_rows, width, ffn, inner = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.ffn, self.expert_ffn
        shapes = {"q": (rows, width), "k": (kv_rows, width), "v": (kv_rows, width), "o": (width, rows)}
        shapes |= {"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn), "router": (self.experts, width), "shared_router": (1, width)}
        if self.latent:
            rank, turned, value = (self._integer(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim"))
            unturned = int(self.get("qk_nope_head_dim"))
            shapes |= {"q": (self.heads * (unturned + turned), width), "o": (width, self.heads * value)}
            shapes |= {"kv_a": (rank + turned, width), "kv_b": (self.heads * (unturned + value), rank)}
        for number in range(self.experts):
            shapes |= {f"experts.{number}.gate": (inner, width), f"experts.{number}.up": (inner, width), f"experts.{number}.down": (width, inner)}
        return shapes

    def stacked(self, parts: Sequence[str]) -> bool:
        """Whether these parts are fused in a tensor [E, out, in], as the experts of some families are."""
        return self.family.experts_stacked and parts[0].startswith("experts.")

    def stored_shape(self, parts: Sequence[str]) -> tuple[int, ...]:
        """Return the shape on disk of the tensor that these parts are fused in."""
        rows, columns = sum(self.matrices[part][0] for part in parts), self.matrices[parts[0]][1]
        if self.stacked(parts):
            return self.experts, rows // self.experts, columns
        return (columns, rows) if self.family.transposed else (rows, columns)

    @cached_property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """Map each module of a layer to the parts that are fused in it, in order."""
        fused: dict[str, tuple[str, ...]] = {}
        for part, module in self.parts.items():
            fused[module] = (*fused.get(module, ()), part)
        return fused

    def layer_path(self, index: int) -> str:
        """Return the module of a layer in the base model; of a family that stores layers once, that which runs in its place."""
        family = self.family
        inside = f".{family.group_layer}" if family.group_layer else ""
        return f"{family.layers}.{self.group_of(index)}{inside}"

    @property
    def layer_pattern(self) -> str:
        """A pattern for `layer_path`, in which the number is a group."""
        inside = f".{self.family.group_layer}" if self.family.group_layer else ""
        return rf"{re.escape(self.family.layers)}\.(\d+){re.escape(inside)}"

    def group_of(self, index: int) -> int:
        """Return the number under which a layer is stored: its own, or that of its group of neighbours, as albert's class counts them."""
        return int(index / (self.layers / self._integer(self.family.groups_key))) if self.family.groups_key else index

    def tensor_name(self, part: str) -> str:
        """Return the name in a layer of the tensor that a part is in; that of a bias for "k.bias"."""
        stem = part.removesuffix(".bias")
        place = self.parts.get(stem, stem)
        return place if part in self.family.loose else f"{place}.{'weight' if part == stem else 'bias'}"

    def parts_in(self, name: str) -> tuple[str, ...]:
        """Return the parts that are fused in the tensor `name` of a layer, in order, without `.bias`; none where the family has no such tensor."""
        return self._parts_in.get(name, ())

    @cached_property
    def _parts_in(self) -> dict[str, tuple[str, ...]]:
        return {self.tensor_name(parts[0] + suffix): parts for parts in self.modules.values() for suffix in ("", ".bias")}

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
    def decoder_lacks(self) -> tuple[str, ...]:
        """The modules that each layer of the decoder behind an encoder lacks: none, or those of its FFN with the norm before it.

        A norm behind the FFN stays, as it norms the stream, which later layers were trained on (decision 42).
        """
        if not (self.encoder_decoder and self.get(DECODER_SKIPS)):
            return ()
        return tuple(self.family.parts[part] for part in ("mlp_norm", "up", "down") if part in self.family.parts)

    @property
    def role(self) -> str:
        """What it is: a decoder, an encoder, or an encoder-decoder."""
        return "decoder" if self.decoder else "encoder-decoder" if self.encoder_decoder else "encoder"

    @property
    def blocks(self) -> int:
        """Blocks of heads in a tensor of fused queries, keys and values; each block has a share of every part."""
        return self.kv_heads if self.family.per_head else self.family.blocks or 1

    def check_interface(self) -> None:
        """Refuse models whose attention function cannot be replaced.

        Raises:
            ModelError: it is not called through transformers' AttentionInterface.
        """
        if self.latent:
            raise ModelError(f"{self.kind} has attention of its own, with latents in place of keys and values, so its attention function cannot be changed")
        if self.family.own_attention:
            raise ModelError(f"{self.kind} has attention of its own, outside transformers' AttentionInterface, so its attention function cannot be changed")

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

    def sublayer(self, place: str) -> set[str]:
        """Return the parts of a layer's attention or ffn, with the norms that serve it alone."""
        attention = self.parts.keys() & ATTENTION_PARTS
        if not any(part.startswith("mlp_") for part in self.parts):
            attention -= {"attn_norm"}  # parallel attention and FFN share this norm
        return attention if place == "attention" else self.parts.keys() - attention - {"attn_norm"}

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
    def rotary(self) -> int:
        """Dimensions of a head that RoPE turns, always the first ones. Some families skip layers: see `rotary_of`."""
        parameters = self.get("rope_parameters") or {}
        part = parameters.get("partial_rotary_factor", self.get(self.family.rotary_key))
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
    def normed(self) -> bool:
        """Whether queries and keys go through a norm."""
        return "q_norm" in self.parts

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
