"""A model's config.json: its shape, what techniques put into it, what its layers share, and how it says that it has become another.

Read as JSON and not by transformers, so that a plan needs no import of it, and keys that nobody knows survive.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from effconvert.checkpoint import patterns
from effconvert.checkpoint.families import FAMILIES
from effconvert.checkpoint.replaced import SKIPS, Replaced, by_layer, encode, overlap, skipped
from effconvert.checkpoint.shape import Shape
from effconvert.checkpoint.shared import CACHE_PARTS, Shared, kept_of, overlapping
from effconvert.checkpoint.wrappers import Wrapper
from effconvert.errors import ModelError, OptionError

CONFIG = "config.json"
LAYER_NUMBERS = ("mlp_only_layers",)  # keys that hold numbers of layers


@dataclass(frozen=True)
class Config(Shape):
    """The content of config.json, with the row that says what its keys are called."""

    replaced: tuple[Replaced, ...] = ()  # what techniques put in place of the family's own
    shared: tuple[Shared, ...] = ()  # what layers have in common
    wrapper: Wrapper | None = None  # what this language model is inside of

    @property
    def content(self) -> dict[str, Any]:
        """What config.json says."""
        alone = encode(self.raw, self.family, self.replaced, self.shared)
        return self.wrapper.content(alone) if self.wrapper else alone

    @property
    def alone(self) -> "Config":
        """The language model by itself, without what it is inside of."""
        return replace(self, wrapper=None)

    @property
    def architecture(self) -> str:
        """The class that the checkpoint was saved from."""
        named = (self.wrapper.raw if self.wrapper else self.raw).get("architectures")
        return str((named or [self.family.lm])[0])

    @property
    def predicts(self) -> bool:
        """Whether it has the head that it was pretrained with: for language models, one that predicts tokens."""
        return self.architecture.endswith("ForConditionalGeneration") if self.wrapper else self.architecture == self.family.lm

    def check_alone(self) -> None:
        """Refuse what needs another class than the whole has.

        Raises:
            ModelError: this is the language model inside of another.
        """
        if self.wrapper:
            raise ModelError(
                f"{self.kind} is inside a {self.wrapper.raw['model_type']} here, whose own class has no place for that; gqa, mqa, expand-kv, refit and "
                "dropping whole layers keep the class, or save the language model alone"
            )

    @property
    def needs_effconvert(self) -> bool:
        """Whether the model is opened with a class of effconvert, since transformers has none."""
        return self.family.shares_kv_in_our_class or bool(self.replaced or self.shared or self._skipped)

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
            if overlap(record.place, "attention") and any(common.what == "cache" and layer in common.layers for common in self.shared):
                raise OptionError(f"layer {layer} shares its keys and values with others, so nothing can be put in place of its {record.place}")
            for other in self.replaced_in(layer):
                if overlap(other.place, record.place):
                    raise OptionError(
                        f"layer {layer} has {other.technique} in place of its {other.place} already; leave it out of --layers, or begin from the original"
                    )
        self.check_alone()
        self.place(record.place)
        same = next((other for other in self.replaced if replace(other, layers=()) == replace(record, layers=())), None)
        if same:
            record = replace(record, layers=tuple(sorted({*same.layers, *record.layers})))
        return replace(self, replaced=(*(other for other in self.replaced if other is not same), record))

    def with_shared(self, what: str, layers: Iterable[int]) -> "Config":
        """Return the config of this model with layers that have something in common, which the first of them stores.

        Raises:
            OptionError: they share it already.
            ModelError: the family cannot.
        """
        self.check_alone()
        record = Shared(what, tuple(sorted(layers)))
        for other in self.shared:
            if clash := overlapping(record, other):
                raise OptionError(f"{clash} already; leave it out of --layers, or begin from the original")
        if what == "cache":
            self._check_lending(record.layers)
            return replace(self, shared=(*self.shared, record))
        for module, parts in self.modules.items():
            if any(map(record.has, parts)) and not all(map(record.has, parts)):
                raise ModelError(f"{self.kind} holds {', '.join(parts)} in one module ({module}), so layers cannot share {what} alone")
        if not any(map(record.has, self.parts)):
            raise ModelError(f"a layer of {self.kind} has no {what} that others could share")
        return replace(self, shared=(*self.shared, record))

    def _check_lending(self, layers: Sequence[int]) -> None:
        """Refuse layers that cannot read the keys and values of the first of them."""
        family = self.family
        if not self.decoder or family.shares_kv_in_our_class or not family.kv_heads_key:
            raise ModelError(f"{self.kind} has no keys and values of their own that layers could share; give a decoder such as llama")
        for part in {"k", "v"}:
            self.place(part)  # says so where it is in one module with others
        if len({self.windows()[layer] for layer in layers}) > 1:
            raise ModelError(f"layers {', '.join(map(str, layers))} have other windows, so they cannot read the same keys and values")
        if len({self.turned(layer) for layer in layers}) > 1:
            raise ModelError(f"RoPE turns keys in some of layers {', '.join(map(str, layers))} only, so they cannot read the same keys and values")
        self.check_interface()
        for layer in layers:
            if "attention" in self.skips(layer):
                raise OptionError(f"layer {layer} has no attention, so it shares no keys and values; leave it out of --layers")
            if other := next((record for record in self.replaced_in(layer) if overlap(record.place, "attention")), None):
                raise OptionError(
                    f"layer {layer} has {other.technique} in place of its {other.place}, so it shares no keys and values; leave it out of --layers"
                )

    def cache_of(self, layer: int) -> int:
        """Return the layer whose keys and values this one reads: itself, or an earlier one."""
        return next((record.layers[0] for record in self.shared if record.what == "cache" and layer in record.layers), layer)

    def stored_for(self, layer: int, part: str) -> int:
        """Return the layer that stores a part of this one: itself, or the first of those that share it and have it."""
        stem = part.removesuffix(".bias")
        return self._stored_for.get((layer, stem), layer)

    def stored_in(self, layer: int, name: str) -> int:
        """Return the layer that stores what is called `name` in this one, a tensor of the family's or a technique's own."""
        parts = self.modules.get(name.rpartition(".")[0], ())
        return self.stored_for(layer, parts[0]) if parts else layer

    def leaders(self, layer: int) -> set[int]:
        """Return the layers that store something for this one."""
        return {first for (other, _), first in self._stored_for.items() if other == layer and first != layer}

    @cached_property
    def _stored_for(self) -> dict[tuple[int, str], int]:
        found: dict[tuple[int, str], int] = {}
        for record in self.shared:
            lacks = {layer: self.lacks(layer) for layer in record.layers}
            for part in filter(record.has, self.parts):
                first = next((layer for layer in record.layers if part not in lacks[layer]), record.layers[0])
                found |= dict.fromkeys(((layer, part) for layer in record.layers), first)
        return found

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

    def skips(self, layer: int) -> set[str]:
        """Return the places of a layer where nothing is computed: attention, ffn (transformers' `per_layer_config`)."""
        return self._skipped.get(layer, set())

    @cached_property
    def _skipped(self) -> dict[int, set[str]]:
        return skipped(self.raw, self.family)

    def lacks(self, layer: int) -> set[str]:
        """Return the parts that a layer does without: what is skipped or was dropped, and either the experts or the dense FFN where the family has both."""
        gone = {part for record in self.replaced_in(layer) for part in record.drops}
        gone |= {part for place in self.skips(layer) for part in self.sublayer(place)}
        gone |= self.family.first_lacks if layer == 0 else set()
        gone |= self.parts.keys() & CACHE_PARTS if self.cache_of(layer) != layer else set()
        if self.experts:
            experts = {part for part in self.parts if part.startswith(("experts.", "shared_")) or part == "router"}
            gone |= {"gate", "up", "down"} if self.sparse(layer) else experts
        return gone

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
        return replace(self, raw=raw, replaced=tuple(record for record in moved if record.layers), shared=kept_of(self.shared, kept))

    def with_skips(self, place: str, layers: Iterable[int]) -> "Config":
        """Return the config of this model without the attention or the ffn of these layers, in transformers' words."""
        self.check_alone()
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
        self.check_alone()
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
        self.check_alone()
        family = FAMILIES[kind]
        for key, only in family.absent.items():
            if self.raw.get(key, only) != only:
                raise ModelError(f"{self.kind} with {key} = {self.raw[key]!r} has no counterpart in {kind}, which needs {only!r}; nothing else is like it")
        classes = {self.family.base: family.base, self.family.lm: family.lm}
        if self.architecture not in classes:
            raise ModelError(f"{self.architecture} has no counterpart in {kind}; it must be one of {', '.join(classes)}")
        kept = {key: value for key, value in self.raw.items() if key not in family.absent}
        return Config({**kept, **family.constants, "model_type": kind, "architectures": [classes[self.architecture]]}, family, self.replaced, self.shared)
