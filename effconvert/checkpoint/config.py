"""A model's config.json: its shape, the records of techniques and of shared layers, and the config of another model made from it.

It is read as JSON, not by transformers: a plan needs no import of transformers, and unknown keys survive.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from effconvert.checkpoint import patterns
from effconvert.checkpoint.records import Records
from effconvert.checkpoint.replaced import CLASS, OUTSIDE, SKIPS, Replaced, by_layer, encode, overlap
from effconvert.checkpoint.shape import DECODER_SKIPS
from effconvert.checkpoint.shared import Shared, clash_of, renumber
from effconvert.checkpoint.wrappers import Wrapper
from effconvert.errors import ModelError, OptionError
from effconvert.families import CONVERTIBLE, KNOWN

CONFIG = "config.json"
LAYER_NUMBERS = ("mlp_only_layers",)  # keys that hold numbers of layers


@dataclass(frozen=True)
class Config(Records):
    """The content of config.json, with the family's row for the names of its keys."""

    wrapper: Wrapper | None = None  # the model that contains this language model

    @property
    def content(self) -> dict[str, Any]:
        """The content of config.json on disk."""
        alone = encode(self.raw, self.family, self.replaced, self.shared)
        return self.wrapper.content(alone) if self.wrapper else alone

    @property
    def alone(self) -> "Config":
        """The language model by itself, without its wrapper."""
        return replace(self, wrapper=None)

    @property
    def architecture(self) -> str:
        """The class that the checkpoint was saved from."""
        classes = (self.wrapper.raw if self.wrapper else self.raw).get("architectures")
        return str((classes or [self.family.lm])[0])

    @property
    def opened_by(self) -> str:
        """The class that a folder opens as: one of effconvert's, where the model has parts of effconvert in it."""
        return f"{CLASS}{self.architecture}" if self.needs_effconvert else self.architecture

    @property
    def predicts(self) -> bool:
        """Whether it has the head of its pretraining, which predicts tokens in language models."""
        return self.architecture.endswith("ForConditionalGeneration") if self.wrapper else self.architecture == self.family.lm

    @property
    def needs_eager(self) -> bool:
        """Whether its class computes what it should in eager attention alone: capped scores, or one way where it masks for a language model inside."""
        return bool(self.get("attn_logit_softcapping")) or (self.wrapper is not None and self.wrapper.masks)

    @property
    def bare(self) -> bool:
        """Whether it was saved without any head."""
        return self.architecture == self.family.base

    def check_alone(self) -> None:
        """Refuse a language model inside another model, for changes that need another class.

        Raises:
            ModelError: this is inside another model.
        """
        if self.wrapper:
            raise ModelError(
                f"{self.kind} is inside a {self.wrapper.raw['model_type']} here, whose own class has no place for that; gqa, mqa, expand-kv, narrow, "
                "refit and dropping whole layers keep the class, or save the language model alone"
            )

    @property
    def needs_effconvert(self) -> bool:
        """Whether loading needs a class of effconvert, because transformers has none."""
        ties = self.shared and not self.family.groups_key  # of which no class of transformers knows
        return self.family.shares_kv_in_our_class or bool(self.replaced or ties or self._skipped or self.decoder_lacks)

    @property
    def plain_outside(self) -> "Config":
        """This config without the techniques outside the layers."""
        return replace(self, replaced=tuple(record for record in self.replaced if record.place not in OUTSIDE))

    def with_replaced(self, record: Replaced) -> "Config":
        """Return this config with one more record of a technique.

        Raises:
            OptionError: there is a technique at that place already.
            ModelError: the family has no such place.
        """
        for layer in record.layers:
            if gone := [place for place in self.skips(layer) if overlap(place, record.place)]:
                raise OptionError(f"layer {layer} has no {gone[0]}, so nothing can be put in its place; leave it out of --layers")
            if overlap(record.place, "attention") and any(common.what == "cache" and layer in common.layers for common in self.shared):
                raise OptionError(
                    f"layer {layer} shares its keys and values with others, so nothing can be put in place of its {record.place}; leave it out of --layers"
                )
            for taken in self.replaced_in(layer):
                if overlap(taken.place, record.place):
                    raise OptionError(
                        f"layer {layer} has {taken.technique} in place of its {taken.place} already; leave it out of --layers, or begin from the original"
                    )
        self.check_alone()
        if record.place in OUTSIDE:
            if previous := self.replaced_outside(record.place):
                raise OptionError(f"{previous.technique} is in place of the {record.place} already; begin from the original")
            return replace(self, replaced=(*self.replaced, record))
        self.place(record.place)
        same = next((previous for previous in self.replaced if replace(previous, layers=()) == replace(record, layers=())), None)
        if same:
            record = replace(record, layers=tuple(sorted({*same.layers, *record.layers})))
        return replace(self, replaced=(*(previous for previous in self.replaced if previous is not same), record))

    def with_shared(self, what: str, layers: Iterable[int]) -> "Config":
        """Return this config with layers that share `what`; the first of them stores it.

        Raises:
            OptionError: they share it already.
            ModelError: the family cannot share that.
        """
        self.check_alone()
        record = Shared(what, tuple(sorted(layers)))
        for previous in self.shared:
            if clash := clash_of(record, previous):
                raise OptionError(f"{clash} already; leave it out of --layers, or begin from the original")
        if what == "cache":
            self._check_lenders(record.layers)
            return replace(self, shared=(*self.shared, record))
        for module, parts in self.modules.items():
            if any(map(record.has, parts)) and not all(map(record.has, parts)):
                raise ModelError(f"{self.kind} holds {', '.join(parts)} in one module ({module}), so layers cannot share {what} alone")
        if not any(map(record.has, self.parts)):
            raise ModelError(f"a layer of {self.kind} has no {what} that others could share")
        return replace(self, shared=(*self.shared, record))

    def check_lending(self) -> None:
        """Refuse a model whose layers cannot read each other's keys and values.

        Raises:
            ModelError: it is one.
        """
        self.check_alone()
        if not self.decoder or self.family.shares_kv_in_our_class or not self.family.kv_heads_key:
            raise ModelError(f"{self.kind} has no keys and values of their own that layers could share; give a decoder such as llama")
        for part in ("k", "v"):
            self.place(part)  # raises where it is fused with others
        self.check_interface()

    def _check_lenders(self, layers: Sequence[int]) -> None:
        """Refuse layers that cannot read the keys and values of the first of them."""
        self.check_lending()
        if len({self.windows()[layer] for layer in layers}) > 1:
            raise ModelError(f"layers {', '.join(map(str, layers))} have other windows, so they cannot read the same keys and values")
        if len({self.rotary_of(layer) for layer in layers}) > 1:
            raise ModelError(f"RoPE turns keys in some of layers {', '.join(map(str, layers))} only, so they cannot read the same keys and values")
        for layer in layers:
            if "attention" in self.skips(layer):
                raise OptionError(f"layer {layer} has no attention, so it shares no keys and values; leave it out of --layers")
            if technique := next((record for record in self.replaced_in(layer) if overlap(record.place, "attention")), None):
                raise OptionError(
                    f"layer {layer} has {technique.technique} in place of its {technique.place}, so it shares no keys and values; leave it out of --layers"
                )

    def with_layers(self, layers: Sequence[int]) -> "Config":
        """Return the config of a model of only these layers, in this order. Every entry of config.json for single layers follows."""
        raw = {**self.raw, **patterns.select_layers(self.get, self.family, self.layers, layers), self.family.layers_key: len(layers)}
        if self.family.experts_key and (self.get("decoder_sparse_step") or 1) > 1:
            raw |= {"decoder_sparse_step": 1, "mlp_only_layers": [layer for layer in range(self.layers) if not self.sparse(layer)]}
        if entries := by_layer(raw):
            raw["per_layer_config"] = {str(new): entries[old] for new, old in enumerate(layers) if old in entries}
            if not raw["per_layer_config"]:
                del raw["per_layer_config"]
        for key in LAYER_NUMBERS:
            if raw.get(key):
                raw[key] = [new for new, old in enumerate(layers) if old in raw[key]]
        renumbered = (replace(record, layers=tuple(new for new, old in enumerate(layers) if old in record.layers)) for record in self.replaced)
        records = tuple(record for record in renumbered if record.layers or record.place in OUTSIDE)
        return replace(self, raw=raw, replaced=records, shared=renumber(self.shared, layers))

    def with_skips(self, place: str, layers: Iterable[int]) -> "Config":
        """Return this config without the attention or the ffn of these layers, by transformers' `per_layer_config`."""
        self.check_alone()
        if self.encoder_decoder:
            raise ModelError(f"{self.kind} is an encoder-decoder, whose class reads what config.json says of single layers for both stacks; drop whole layers")
        if place == "attention" and (read := {self.cache_of(reader) for reader in self.readers} & {*layers}):
            raise OptionError(f"other layers read the keys and values of layer {min(read)}, so its attention must stay; leave it out of --layers")
        entries = by_layer(self.raw)
        word = next(word for word, skips in SKIPS.items() if skips == place)
        for layer in layers:
            entry = dict(entries.get(layer) or {})
            entries[layer] = {**entry, "skip": sorted({*(entry.get("skip") or ()), word})}
        return replace(self, raw={**self.raw, "per_layer_config": {str(layer): entries[layer] for layer in sorted(entries)}})

    def without_decoder_ffn(self) -> "Config":
        """Return this config without the FFNs of the decoder behind its encoder.

        Raises:
            OptionError: there is no such decoder, or its FFNs are gone already.
        """
        if not self.encoder_decoder:
            role = "a decoder" if self.decoder else "an encoder"
            raise OptionError(
                f"--drop-decoder drops the FFNs of a decoder that reads an encoder's output, and {self.kind} is {role} alone, which nobody has shown to do "
                "without; leave it out"
            )
        if self.decoder_lacks:
            raise OptionError(f"the decoder of this {self.kind} has no FFNs any more; leave out --drop-decoder")
        return self.with_keys({DECODER_SKIPS: ["mlp"]})

    def with_kv_heads(self, count: int) -> "Config":
        """Return this config with `count` KV heads: of its family or a related one if they can, else of a class of effconvert.

        Raises:
            ModelError: no class can have `count` KV heads.
        """
        inside = [record for record in self.plain_outside.replaced if overlap(record.place, "attention")]
        if inside and count != self.kv_heads:
            techniques = " and ".join(dict.fromkeys(record.technique for record in inside))
            raise ModelError(f"its {techniques} fits {self.kv_heads} KV heads; change their number first, and do {techniques} afterwards")
        if count == self.kv_heads:
            return self
        self.check_interface()
        if self.family.fixed_kv_heads:
            raise ModelError(f"{self.kind} cannot be written with another number of KV heads: it has {self.kv_heads} by definition")
        stock = CONVERTIBLE[self.kind]
        shared = replace(self, raw={**self.raw, stock.grouped.kv_heads_key: count}, family=stock.grouped)
        if stock.kv_heads_key:
            return shared
        self.check_alone()
        plain = replace(self, raw={key: value for key, value in self.raw.items() if key != stock.grouped.kv_heads_key}, family=stock)
        if count == self.heads:
            return plain
        if count == 1 and stock.multi_query:
            with suppress(ModelError):  # the related family lacks a switch that this model uses
                return plain.become(stock.multi_query)
        return shared

    def with_heads(self, count: int) -> "Config":
        """Return this config with `count` query heads of the same width: as many of each KV head, or with fewer KV heads.

        Raises:
            OptionError: neither is possible.
            ModelError: the family cannot have another number of heads, or its heads are not by themselves.
        """
        if self.latent:
            raise ModelError(f"{self.kind} makes the keys and values of all heads of one latent, so none can be taken away; change their number before mla")
        self.place("scores")
        if not self.family.kv_heads_key or self.family.fixed_head_width:
            raise ModelError(f"the class of {self.kind} makes a head as wide as its stream divided by the number of heads, so their number cannot change alone")
        if "k_norm" in self.family.per_kv_head:
            raise ModelError(f"a norm goes over all heads of {self.kind} together, so none can be taken away")
        if technique := next((record for record in self.replaced if overlap(record.place, "attention")), None):
            raise ModelError(f"{technique.technique} stands in place of its {technique.place}, and fits {self.heads} heads; change their number first")
        if self.readers:
            raise ModelError(f"layer {self.readers[0]} reads the keys and values of another; change the number of heads first")
        shared = self.heads // self.kv_heads
        fits = [n for n in range(1, self.heads + 1) if (n % self.kv_heads == 0 or n % shared == 0) and self.hidden % n == 0]  # classes check the last
        if count not in fits:
            options = ", ".join(map(str, fits))
            raise OptionError(f"{count} heads do not fit {self.heads} query heads, {self.kv_heads} KV heads and a stream {self.hidden} wide; give {options}")
        if count == self.heads:
            return self
        groups = count // shared if count % self.kv_heads else self.kv_heads
        return self.with_keys({self.family.heads_key: count, self.family.kv_heads_key: groups, "head_dim": self.head_dim})

    def with_ffn(self, count: int) -> "Config":
        """Return this config with `count` neurons in each FFN.

        Raises:
            ModelError: the family has another kind of FFN, or its width follows from others.
        """
        if self.experts or self.family.experts_key:
            raise ModelError(f"{self.kind} has experts in place of an FFN, which stay as they are; give a model without")
        if "down" not in self.parts:
            raise ModelError(f"a layer of {self.kind} has no FFN whose neurons effconvert knows")
        if technique := next((record for record in self.replaced if overlap(record.place, "ffn") or record.place in ("gate", "up", "down")), None):
            raise ModelError(f"{technique.technique} stands in place of its {technique.place}, so its neurons are not known; change their number first")
        if not self.family.ffn_key:
            raise ModelError(f"{self.kind} has {self.ffn} neurons in an FFN by definition: four times its width")
        return self if count == self.ffn else self.with_keys({self.family.ffn_key: count})

    def with_window(self, window: int, layers: set[int]) -> "Config | None":
        """Return this config with a sliding window of `window` tokens in `layers`; None where transformers has no class for it."""
        family = CONVERTIBLE.get(self.family.windowed)
        if family is None or window < 2 or any(self.windows()) or (family.layers_alike and len(layers) < self.layers):
            return None
        try:
            own = self if family == self.family else self.with_defaults().become(self.family.windowed)
        except ModelError:
            return None
        kinds = ["sliding_attention" if index in layers else "full_attention" for index in range(self.layers)]
        types = {} if family.layers_alike else {"layer_types": kinds, "max_window_layers": 0}
        return replace(own, raw={**own.raw, **family.window_keys, "sliding_window": window, **types})

    def with_keys(self, keys: Mapping[str, Any]) -> "Config":
        """Return this config with other values of some keys."""
        return replace(self, raw={**self.raw, **keys})

    def without(self, *keys: str) -> "Config":
        """Return this config without some keys."""
        return replace(self, raw={key: value for key, value in self.raw.items() if key not in keys})

    def with_defaults(self) -> "Config":
        """Return this config with transformers' defaults written out, for a class with other defaults."""
        raw = {**self.family.defaults, **self.raw, "head_dim": self.head_dim}
        if self.family.kv_heads_key:
            raw[self.family.kv_heads_key] = self.kv_heads
        if self.get("rope_parameters") and "rope_theta" in raw:
            raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), **raw["rope_parameters"]}
        return replace(self, raw=raw)

    def become(self, kind: str) -> "Config":
        """Return this config as one of the related family `kind`."""
        self.check_alone()
        family = KNOWN[kind]
        for key, needed in family.absent.items():
            if self.raw.get(key, needed) != needed:
                raise ModelError(f"{self.kind} with {key} = {self.raw[key]!r} has no counterpart in {kind}, which needs {needed!r}; no other family is like it")
        classes = {self.family.base: family.base, self.family.lm: family.lm}
        if self.architecture not in classes:
            raise ModelError(f"{self.architecture} has no counterpart in {kind}; it must be one of {', '.join(classes)}")
        raw = {key: value for key, value in self.raw.items() if key not in family.absent}
        return Config({**raw, **family.constants, "model_type": kind, "architectures": [classes[self.architecture]]}, family, self.replaced, self.shared)
