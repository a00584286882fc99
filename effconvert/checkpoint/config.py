"""A model's config.json read through its family's row: the few numbers that surgeries ask for.

Read as JSON and not by transformers, so that a plan needs no import of it, and keys that nobody knows survive.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from effconvert.checkpoint import patterns
from effconvert.checkpoint.families import EXPERTS_KEYS, FAMILIES, Family
from effconvert.checkpoint.replaced import SKIPS, Replaced, by_layer, encode, overlap, skipped
from effconvert.errors import ModelError, OptionError

CONFIG = "config.json"
LAYER_NUMBERS = ("mlp_only_layers",)  # keys that hold numbers of layers
ATTENDING = ("q", "k", "v", "o", "q_norm", "k_norm", "attn_norm", "attn_post_norm")  # the parts of attention, with the norms that are its own
TOP_K_KEY = "num_experts_per_tok"


@dataclass(frozen=True)
class Config:
    """The content of config.json, with the row that says what its keys are called."""

    raw: Mapping[str, Any]  # as the family's own class would have it
    family: Family
    replaced: tuple[Replaced, ...] = ()  # what techniques put in place of the family's own

    @property
    def content(self) -> dict[str, Any]:
        """What config.json says."""
        return encode(self.raw, self.family, self.replaced)

    @property
    def needs_effconvert(self) -> bool:
        """Whether the model is opened with a class of effconvert, since transformers has none."""
        return self.family.shares_kv_in_our_class or bool(self.replaced) or bool(self._skipped)

    def replaced_in(self, layer: int) -> list[Replaced]:
        """Return what techniques put into a layer."""
        return [record for record in self.replaced if layer in record.layers]

    def replaced_at(self, layer: int, place: str) -> Replaced | None:
        """Return what a technique put into a layer at `place`."""
        return next((record for record in self.replaced_in(layer) if record.place == place), None)

    def with_replaced(self, record: Replaced) -> "Config":
        """Return the config of this model with one thing more replaced.

        Raises:
            OptionError: something is replaced there already.
            ModelError: the family has no such place.
        """
        for layer in record.layers:
            if gone := [place for place in self.skips(layer) if overlap(place, record.place)]:
                raise OptionError(f"layer {layer} has no {gone[0]}, so nothing can be put in its place; leave it out of --layers")
            for other in self.replaced_in(layer):
                if overlap(other.place, record.place):
                    raise OptionError(
                        f"layer {layer} has {other.technique} in place of its {other.place} already; leave it out of --layers, or begin from the original"
                    )
        self.place(record.place)
        same = next((other for other in self.replaced if replace(other, layers=()) == replace(record, layers=())), None)
        if same:
            record = replace(record, layers=tuple(sorted({*same.layers, *record.layers})))
        return replace(self, replaced=(*(other for other in self.replaced if other is not same), record))

    def place(self, name: str) -> str:
        """Return the module of a layer that is at a place; empty for the layer itself.

        Raises:
            ModelError: this family has no module there.
        """
        if name == "layer":
            return ""
        if name in self.family.adds_inside:
            raise ModelError(f"{self.kind} adds to the stream inside its {name}, so nothing can be put in its place")
        if name in ("scores", "attention"):
            if not self.attention:
                raise ModelError(f"{self.kind} does not attend, so nothing can be put in the place of its attention")
            if name == "scores":
                self.check_interface()
            return self.attention
        module = self.family.ffn if name == "ffn" else self.parts.get(name, "")
        if not module:
            raise ModelError(f"a layer of {self.kind} has no module of its own for {name}, so nothing can be put in its place")
        if name != "ffn" and len(self.modules[module]) > 1:
            raise ModelError(f"{self.kind} holds {', '.join(self.modules[module])} in one module, so {name} alone cannot be replaced")
        return module

    def check_interface(self) -> None:
        """Refuse models whose attention is out of reach.

        Raises:
            ModelError: it is not called through transformers' AttentionInterface.
        """
        if self.family.own_attention:
            raise ModelError(f"{self.kind} attends by itself, and not through transformers' AttentionInterface, so what it attends by cannot be changed")

    @cached_property
    def parts(self) -> dict[str, str]:
        """Where a layer keeps its parts: part -> module; `experts.*.gate` of the family's row once for each expert."""
        lacking = {part for part, (key, value) in self.family.lacking.items() if self.get(key) == value}
        laid = {part: module for part, module in self.family.parts.items() if "*" not in part and part not in lacking}
        each = {part: module for part, module in self.family.parts.items() if "*" in part}
        for number in map(str, range(self.experts)):
            laid |= {part.replace("*", number): module.replace("*", number) for part, module in each.items()}
        return laid

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shape [out, in] of each projection of a layer: part -> rows, columns."""
        rows, kv_rows, width, ffn, inner = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.ffn, self.expert_ffn
        shapes = {"q": (rows, width), "k": (kv_rows, width), "v": (kv_rows, width), "o": (width, rows)}
        shapes |= {"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn), "router": (self.experts, width), "shared_router": (1, width)}
        for number in range(self.experts):
            shapes |= {f"experts.{number}.gate": (inner, width), f"experts.{number}.up": (inner, width), f"experts.{number}.down": (width, inner)}
        return shapes

    def stacked(self, parts: Sequence[str]) -> bool:
        """Whether what is fused of these parts is a tensor [E, out, in]: the experts of a family that keeps them together."""
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

    @property
    def blocks(self) -> int:
        """Of how many blocks of heads a tensor of fused queries, keys and values is made, each with a share of every part."""
        return self.kv_heads if self.family.per_head else self.family.blocks or 1

    @property
    def attention(self) -> str:
        """The module of a layer that attends; empty where nothing does."""
        return self.family.attention

    @property
    def experts(self) -> int:
        """Experts of a layer, E; 0 where the family has none."""
        if not self.family.experts_key:
            return 0
        return self._whole(next((key for key in EXPERTS_KEYS if key in self.raw), self.family.experts_key))

    @property
    def top_k(self) -> int:
        """Experts that run for a token; 0 where the family has none."""
        return min(self._whole(TOP_K_KEY), self.experts) if self.experts else 0

    @property
    def expert_ffn(self) -> int:
        """Width inside an expert."""
        return self._whole(self.family.expert_ffn_key) if self.family.expert_ffn_key else self.ffn

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts: all do in a family of experts, but for those that its config leaves dense."""
        if not self.experts:
            return False
        step = self.get("decoder_sparse_step") or 1
        return layer not in (self.get("mlp_only_layers") or ()) and (layer + 1) % step == 0

    def skips(self, layer: int) -> set[str]:
        """Return the places of a layer where nothing is computed: attention, ffn (transformers' `per_layer_config`)."""
        return self._skipped.get(layer, set())

    @cached_property
    def _skipped(self) -> dict[int, set[str]]:
        return skipped(self.raw, self.family)

    def sublayer(self, place: str) -> set[str]:
        """Return the parts of a layer that are its attention or its ffn, with the norms that are that one's alone."""
        attention = self.parts.keys() & ATTENDING
        if not any(part.startswith("mlp_") for part in self.parts):
            attention -= {"attn_norm"}  # what goes into attention and FFN alike, side by side
        return attention if place == "attention" else self.parts.keys() - attention - {"attn_norm"}

    @property
    def norms_stream(self) -> bool:
        """Whether layers normalise what they add to, and not only what they read: then none of them is the identity where it adds nothing."""
        return self.family.norms_stream or self.get("do_layer_norm_before") is False

    def lacks(self, layer: int) -> set[str]:
        """Return the parts that a layer does without: what is skipped or was dropped, and either the experts or the dense FFN where the family has both."""
        gone = {part for record in self.replaced_in(layer) for part in record.drops}
        gone |= {part for place in self.skips(layer) for part in self.sublayer(place)}
        gone |= self.family.first_lacks if layer == 0 else set()
        if self.experts:
            experts = {part for part in self.parts if part.startswith(("experts.", "shared_")) or part == "router"}
            gone |= {"gate", "up", "down"} if self.sparse(layer) else experts
        return gone

    @property
    def kind(self) -> str:
        """The `model_type`."""
        return str(self.raw["model_type"])

    @property
    def architecture(self) -> str:
        """The class that the checkpoint was saved from."""
        return str((self.get("architectures") or [self.family.lm])[0])

    @property
    def heads(self) -> int:
        """Query heads, H; 0 where nothing attends."""
        return self._whole(self.family.heads_key) if self.family.heads_key else 0

    @property
    def kv_heads(self) -> int:
        """Key and value heads, Hk."""
        if self.family.fixed_kv_heads:
            return self.family.fixed_kv_heads
        key = self.family.kv_heads_key
        return self._whole(key) if key and self.get(key) is not None else self.heads

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return self._whole(self.family.layers_key)

    @property
    def hidden(self) -> int:
        """Width of the residual stream, M."""
        return self._whole(self.family.hidden_key)

    @property
    def ffn(self) -> int:
        """Width inside the MLP, F (GPT-2 leaves it out where it is 4 M)."""
        return self._whole(self.family.ffn_key) if self.get(self.family.ffn_key) is not None else 4 * self.hidden

    @property
    def head_dim(self) -> int:
        """Width of a head, D."""
        return self._whole("head_dim") if self.get("head_dim") is not None else self.hidden // max(1, self.heads)

    @property
    def scale(self) -> float:
        """What scores are multiplied by, of a family that takes them as they come from queries and keys."""
        return float(self.get(self.family.scale_key)) if self.family.scale_key else self.head_dim**-0.5

    @property
    def rotary(self) -> int:
        """Dimensions of a head that RoPE turns, the first ones; in some families in some layers only: `turned`."""
        parameters = self.get("rope_parameters") or {}
        part = parameters.get("partial_rotary_factor", self.get(self.family.rotary_key))
        if self.family.rotary_counts and part is not None:
            return int(part)
        return int(self.head_dim * (1 if part is None else part)) if self.family.rope else 0

    def turned(self, layer: int) -> int:
        """Dimensions of a head that RoPE turns in a layer; 0 where it leaves that alone."""
        return self.rotary if self._turns[layer] else 0

    @cached_property
    def _turns(self) -> list[bool]:
        return patterns.turns(self.get, self.family, self.layers)

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
        return self._whole("vocab_size")

    @property
    def longest(self) -> int | None:
        """The longest context in tokens, where there is a limit."""
        length: int | None = self.get(self.family.positions_key)
        if length is None or not self.family.positions_after_padding:
            return length
        return length - int(self.get("pad_token_id") or 0) - 1

    def get(self, key: str) -> Any:
        """Return the value of `key`, transformers' own where the file is silent, None where there is none."""
        return self.raw.get(key, self.family.defaults.get(key))

    def windows(self) -> list[int | None]:
        """Return each layer's sliding window in tokens, None where it sees everything."""
        return patterns.windows(self.get, self.family, self.layers)

    def with_layers(self, kept: Sequence[int]) -> "Config":
        """Return the config of this model with these of its layers only, in this order: everything that config.json says of layers goes with them."""
        raw = {**self.raw, **patterns.of_layers(self.get, self.family, self.layers, kept), self.family.layers_key: len(kept)}
        if self.family.experts_key and (self.get("decoder_sparse_step") or 1) > 1:
            raw |= {"decoder_sparse_step": 1, "mlp_only_layers": [layer for layer in range(self.layers) if not self.sparse(layer)]}
        if said := by_layer(raw):
            raw["per_layer_config"] = {str(new): said[old] for new, old in enumerate(kept) if old in said}
            if not raw["per_layer_config"]:
                del raw["per_layer_config"]
        for key in LAYER_NUMBERS:
            if raw.get(key):
                raw[key] = [new for new, old in enumerate(kept) if old in raw[key]]
        moved = (replace(record, layers=tuple(new for new, old in enumerate(kept) if old in record.layers)) for record in self.replaced)
        return replace(self, raw=raw, replaced=tuple(record for record in moved if record.layers))

    def with_skips(self, place: str, layers: Iterable[int]) -> "Config":
        """Return the config of this model without the attention or the ffn of these layers, in transformers' words."""
        said = by_layer(self.raw)
        word = next(word for word, skips in SKIPS.items() if skips == place)
        for layer in layers:
            entry = dict(said.get(layer) or {})
            said[layer] = {**entry, "skip": sorted({*(entry.get("skip") or ()), word})}
        return replace(self, raw={**self.raw, "per_layer_config": {str(layer): said[layer] for layer in sorted(said)}})

    def with_kv_heads(self, count: int) -> "Config":
        """Return the config of the same model with `count` KV heads: as its family says it, or a related one, or else in a class of ours.

        Raises:
            ModelError: nothing is this family with `count` KV heads.
        """
        if self.replaced and count != self.kv_heads:
            raise ModelError(f"its mixers are made for {self.kv_heads} KV heads; change their number first, and put mixers in afterwards")
        if count == self.kv_heads:
            return self
        self.check_interface()
        if self.family.fixed_kv_heads:
            raise ModelError(f"{self.kind} cannot be written with another number of KV heads: it has {self.kv_heads} by definition")
        stock = FAMILIES[self.kind]
        shared = replace(self, raw={**self.raw, stock.grouped.kv_heads_key: count}, family=stock.grouped)
        if stock.kv_heads_key:
            return shared
        plain = replace(self, raw={key: value for key, value in self.raw.items() if key != stock.grouped.kv_heads_key}, family=stock)
        if count == self.heads:
            return plain
        if count == 1 and stock.multi_query:
            with suppress(ModelError):  # it lacks a switch that this model has on
                return plain.become(stock.multi_query)
        return shared

    def with_window(self, window: int, layers: set[int]) -> "Config | None":
        """Return the config of this model with a sliding window of that many tokens in `layers`, None where no class of transformers is that."""
        family = FAMILIES.get(self.family.windowed)
        if family is None or window < 2 or any(self.windows()) or (family.layers_alike and len(layers) < self.layers):
            return None
        try:
            own = self if family == self.family else self.become(self.family.windowed)
        except ModelError:
            return None
        kinds = ["sliding_attention" if index in layers else "full_attention" for index in range(self.layers)]
        types = {} if family.layers_alike else {"layer_types": kinds, "max_window_layers": 0}
        return replace(own, raw={**own.raw, **family.window_keys, "sliding_window": window, **types})

    def saying(self, keys: Mapping[str, Any]) -> "Config":
        """Return this config with other values of some keys."""
        return replace(self, raw={**self.raw, **keys})

    def without(self, *keys: str) -> "Config":
        """Return this config without some keys."""
        return replace(self, raw={key: value for key, value in self.raw.items() if key not in keys})

    def spelt_out(self) -> "Config":
        """Return this config with what transformers takes where it is silent written out, for a class that takes something else."""
        raw = {**self.family.defaults, **self.raw, "head_dim": self.head_dim}
        if self.family.kv_heads_key:
            raw[self.family.kv_heads_key] = self.kv_heads
        if self.get("rope_parameters") and "rope_theta" in raw:
            raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), **raw["rope_parameters"]}
        return replace(self, raw=raw)

    def become(self, kind: str) -> "Config":
        """Return this config as that of the related family `kind`."""
        family = FAMILIES[kind]
        for key, only in family.absent.items():
            if self.raw.get(key, only) != only:
                raise ModelError(f"{self.kind} with {key} = {self.raw[key]!r} has no counterpart in {kind}, which needs {only!r}; nothing else is like it")
        classes = {self.family.base: family.base, self.family.lm: family.lm}
        if self.architecture not in classes:
            raise ModelError(f"{self.architecture} has no counterpart in {kind}; it must be one of {', '.join(classes)}")
        kept = {key: value for key, value in self.raw.items() if key not in family.absent}
        return Config({**kept, **family.constants, "model_type": kind, "architectures": [classes[self.architecture]]}, family, self.replaced)

    def _whole(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int or value < 1:
            raise ModelError(f"config.json of this {self.kind} says {key} = {value!r}, where a whole number of at least 1 is needed; mend the file")
        return value
