"""transformers models with techniques in them. Each class inherits from the family's own, so everything that works with that works here."""

from functools import lru_cache, partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.utils import logging

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import CLASS, KIND, STUB, STUB_FILE
from effconvert.errors import ModelError
from effconvert.families import CONVERTIBLE, Family
from effconvert.modeling.attention import NAME, SOFTMAX, install
from effconvert.modeling.caches import caches
from effconvert.modeling.converted_config import ConvertedConfig, own_config
from effconvert.modeling.grouped import Grouped, share
from effconvert.modeling.lent import LentLayer, lend
from effconvert.modeling.outside import Outside, has_no_table
from effconvert.modeling.places import Own, leave_out, leave_out_decoder_ffn, put
from effconvert.modeling.shared import Sharing
from effconvert.modeling.stand_ins import stand_in
from effconvert.modeling.state import State
from effconvert.modeling.transformers_experts import choose_experts_as
from effconvert.modeling.transformers_internals import (
    Cache,
    DynamicCache,
    DynamicLayer,
    attend_by,
    attends,
    auto_classes,
    cache_among,
    cache_name,
    check_overridden,
    checkpoints,
    implementation,
    keep_names,
)
from effconvert.surgery._placed import technique_of
from effconvert.surgery.mixing._mixing import Mixing

logger = logging.get_logger(__name__)
DYNAMIC = (None, "dynamic")  # values of `cache_implementation` that mean the default
NO_ROOM = "has no room for what the converted layers cache"


class ConvertedModel(Outside, Sharing):
    """Mixin for converted models: techniques in their modules, and a cache with room for the states of mixers."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        ours = own_config(self.config)
        softmax = implementation(config) or "sdpa"
        if not ours.family.own_attention:
            self._set_softmax(softmax if softmax != NAME else "sdpa")
        for index, layer in enumerate(layers_of(self, ours)):
            for place in ours.skips(index):
                leave_out(layer, place, ours, index)
            module = layer.get_submodule(ours.attention)
            if (lender := ours.cache_of(index)) != index:
                lend(layers_of(self, ours)[lender].get_submodule(ours.attention), module, ours)
            if ours.family.shares_kv_in_our_class and "k" not in ours.lacks(index):
                share(module, ours)
            for record in ours.replaced_in(index):
                technique = technique_of(record)
                if isinstance(technique, Mixing) and record.place == technique.place:
                    install(module, technique, ours, index)
                else:
                    put(layer, record, ours, index)
        if ours.decoder_lacks:
            leave_out_decoder_ffn(self.base_model.get_submodule(ours.family.decoder_layers), ours)  # type: ignore[attr-defined]
        self._put_outside(ours)
        if ours.shared:
            self._share(layers_of(self, ours), ours)
        self._initialize()
        self._mixes = any(not technique_of(record).by_token for record in ours.plain_outside.replaced)
        if ours.family.decoder and self.base_model is not self:  # type: ignore[attr-defined]
            self.base_model.register_forward_pre_hook(_with_cache, with_kwargs=True)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does; parameters of techniques that are never trained stay so."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, Own):
                module.freeze()
        model._forget_settings_of_the_original()
        return loaded

    def _forget_settings_of_the_original(self) -> None:
        """Remove from the generation config, which is the original's, what this model cannot do."""
        settings, ours = getattr(self, "generation_config", None), own_config(self.config)
        if settings is None or ours.encoder_decoder:
            return
        if settings.cache_implementation not in DYNAMIC and needs_own_cache(ours):
            logger.warning(f"generation_config.json names cache_implementation {settings.cache_implementation!r}, which {NO_ROOM}; the dynamic one is used")
            settings.cache_implementation = None
        if settings.prompt_lookup_num_tokens and any(cache.technique and cache.technique.cache_slots(ours) for cache in caches(ours)):
            logger.warning("generation_config.json asks for prompt lookup (prompt_lookup_num_tokens), which the states of mixers cannot follow; it is left out")
            settings.prompt_lookup_num_tokens = None

    def _initialize(self) -> None:
        """Set the initial values of techniques, except where weights will be loaded."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, Own) and not any(parameter.is_meta for parameter in module.parameters()):
                module.initialize()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Own):
            module.initialize()
        elif not has_no_table(module):
            super()._init_weights(module)  # type: ignore[misc]

    def _set_softmax(self, name: str) -> None:
        if name not in SOFTMAX:
            raise ValueError(f"layers without a mixer can run {' or '.join(SOFTMAX)} beside those with one, not {name!r}")
        for module in self.modules():  # type: ignore[attr-defined]
            if attends(module):
                module.softmax = name
        attend_by(self.config, NAME)

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Choose the implementation of layers without a mixer. Mixers stay. A mapping without an entry for this model changes nothing."""
        name = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if own_config(self.config).family.own_attention:
            super().set_attn_implementation(attn_implementation, *_, **__)  # type: ignore[misc]
        elif name is not None:
            self._set_softmax(name)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ours = own_config(self.config)
        if ours.encoder_decoder or not needs_own_cache(ours):  # techniques of an encoder-decoder are in its encoder, which has no cache
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        requested = generation_config.cache_implementation
        if requested not in DYNAMIC:
            raise ValueError(f"cache_implementation={requested!r} {NO_ROOM}; leave it out")
        generation_config.cache_implementation = None  # transformers refuses it together with a cache
        name = cache_name(self)
        if generation_config.use_cache and model_kwargs.get(name) is None:
            model_kwargs[name] = cache_for(self.config)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model, with a stub of code that says how to load it."""
        ours = own_config(self.config)
        if ours.family.fused:  # transformers would fuse parts that need not have equally many rows here
            kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / STUB_FILE).write_text(STUB.format(kind=ours.kind), encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: `import effconvert` registers the class, and checkpoints must not contain its source."""


def _with_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make a cache with room for mixers, where the family would make one without."""
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(model.config, "use_cache", False) and not model.training if use_cache is None else use_cache
    if cache_among((*args, *kwargs.values())) is not None:
        return args, kwargs
    if not use_cache or not own_config(model.config).decoder or (model.training and checkpoints(model)):
        return args, {**kwargs, "use_cache": False}  # else the family makes its own cache
    return args, {**kwargs, cache_name(model): cache_for(model.config)}


def _refuse(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Refuse masks that mixers cannot follow: they would mix hidden tokens. Packed texts are read without a cache."""
    arguments = {**dict(zip(signature(model.forward).parameters, args, strict=False)), **kwargs} if len(args) > 1 else kwargs
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and getattr(mask, "ndim", 2) != 2:
        raise ValueError("mixers know of padding only: give an attention_mask [batch, tokens], or none")
    if mask is not None or positions is None or positions.shape[-1] < 2 or not bool((positions.diff(dim=-1) != 1).any()):
        return args, kwargs
    ours = own_config(model.config)
    if not (ours.decoder and ours.family.packs):
        raise ValueError("several texts in one row (position_ids that begin anew) would be mixed with each other; give each a row of its own, padded")
    if cache_among(arguments.values()) is not None or arguments.get("use_cache"):
        raise ValueError("several texts in one row (position_ids that begin anew) cannot be gone on with in a cache; leave use_cache and the cache out")
    return args, {**kwargs, "use_cache": False}


def needs_own_cache(config: Config) -> bool:
    """Return whether some layer caches something else than the keys and values of the family's own layers."""
    return config.family.shares_kv_in_our_class or any(cache.technique or cache.lender is not None or not cache.width for cache in caches(config))


def cache_for(config: Any) -> Cache:
    """Make an empty cache for a converted model: states for mixers, and transformers' own layers elsewhere."""
    ours = own_config(config)
    stock = DynamicCache(config=config).layers
    layers: list[Any] = []
    for index, cache in enumerate(caches(ours)):
        if cache.lender is not None:
            layers.append(LentLayer(layers[cache.lender]))
        elif not cache.width:
            layers.append(State(cache.technique.cache_slots(ours) if cache.technique else {}))
        elif ours.family.shares_kv_in_our_class and cache.technique is None:
            layers.append(Grouped(ours.heads // ours.kv_heads))
        else:
            layers.append(stock[index] if index < len(stock) else DynamicLayer())
    return Cache(layers=layers)


def layers_of(model: Any, config: Config) -> list[nn.Module]:
    """Return the layers of a model."""
    family = config.family
    base = model if isinstance(model, getattr(transformers, family.base)) else getattr(model, family.prefix)
    return list(base.get_submodule(family.layers))


@lru_cache(None)
def config_class(kind: str) -> Any:
    """Return the config class of a converted family."""
    stock = type(transformers.AutoConfig.for_model(kind))
    converted = type(f"{CLASS}{stock.__name__}", (ConvertedConfig, stock), {"model_type": KIND + kind, "__module__": "effconvert.modeling"})
    for auto_class, name in auto_classes(kind):  # the config's class comes before any model's
        auto_class.register(converted, stand_in(partial(model_class, name), config_class=converted), exist_ok=True)
    return converted


@lru_cache(None)
def model_class(architecture: str) -> Any:
    """Return the class `architecture` of transformers with techniques in it.

    Raises:
        ModelError: there is none.
    """
    stock = getattr(transformers, architecture, None)
    kind = next((kind for kind, family in CONVERTIBLE.items() if _is_of(stock, family, kind)), None)
    if stock is None or kind is None:
        raise ModelError(f"{architecture} is no class of a family that effconvert knows; it knows {', '.join(CONVERTIBLE)}")
    check_overridden(stock)
    keep_names(architecture, kind, CLASS + architecture)

    @wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # no hooks: PEFT calls `forward` directly, without them
        if self._mixes:
            args, kwargs = _refuse(self, args, kwargs)
        if CONVERTIBLE[kind].decoder:
            args, kwargs = _with_cache(self, args, kwargs)
        return stock.forward(self, *args, **kwargs)

    members = {"config_class": config_class(kind), "__module__": "effconvert.modeling", "forward": forward}
    converted = type(CLASS + architecture, (ConvertedModel, stock), members)
    choose_experts_as(converted, stock)
    return converted


def _is_of(stock: Any, family: Family, kind: str) -> bool:
    return stock is not None and getattr(getattr(stock, "config_class", None), "model_type", None) == kind and family.base != ""


def class_by_name(name: str) -> Any:
    """Return the class of that name: EffconvertLlamaForCausalLM, EffconvertLlamaConfig."""
    architecture = name.removeprefix(CLASS)
    for kind in CONVERTIBLE:
        if architecture.endswith("Config") and name == config_class(kind).__name__:
            return config_class(kind)
    return model_class(architecture)
