"""Models of transformers with mixers in them: each class is derived from the family's own, so whatever works on that works on this."""

from functools import lru_cache, partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.families import FAMILIES, Family
from effconvert.checkpoint.replaced import CLASS, KIND, STUB, STUB_FILE, decode, encode, read
from effconvert.errors import ModelError
from effconvert.modeling.attention import NAME, SOFTMAX, install
from effconvert.modeling.caches import caches
from effconvert.modeling.grouped import Grouped, share
from effconvert.modeling.lent import LentLayer, lend
from effconvert.modeling.places import Own, leave_out, put
from effconvert.modeling.shared import Sharing
from effconvert.modeling.stand_ins import stand_in
from effconvert.modeling.state import State
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
from effconvert.surgery._placed import check_replaced, technique_of
from effconvert.surgery.mixing._mixing import Mixing

PARSED = "_effconvert"  # the attribute of a config in which what effconvert reads of it is kept


class ConvertedConfig:
    """What the config of a converted model is beside its family's: which layers have which mixers, and whether KV heads are shared, in `effconvert`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config.json."""
        own = Config(*read({"model_type": cls.model_type, **config_dict}))  # type: ignore[attr-defined]
        check_replaced(own)
        placed = {key: config_dict[key] for key in ("effconvert", "auto_map") if key in config_dict}
        return super().from_dict({**own.raw, **placed}, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Write one."""
        return encode(*decode(_plain(self)))


class Converted(Sharing):
    """What a converted model is beside its family's: mixers in its attention modules, and a cache that has room for what they remember."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        ours = own_config(self.config)
        softmax = implementation(config) or "sdpa"
        if not ours.family.own_attention:
            self._run_softmax_by(softmax if softmax != NAME else "sdpa")
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
                if isinstance(technique, Mixing):
                    install(module, technique, ours, index)
                else:
                    put(layer, record, ours, index)
        if ours.shared:
            self._share(layers_of(self, ours), ours)
        self._fresh()
        self._mixes = bool(ours.replaced)
        if ours.family.decoder and self.base_model is not self:  # type: ignore[attr-defined]
            self.base_model.register_forward_pre_hook(_with_cache, with_kwargs=True)  # type: ignore[attr-defined]

    def _fresh(self) -> None:
        """Give mixers their first values, where they are not about to be loaded."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, Own) and not any(parameter.is_meta for parameter in module.parameters()):
                module.begin()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Own):
            module.begin()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _run_softmax_by(self, name: str) -> None:
        if name not in SOFTMAX:
            raise ValueError(f"layers without a mixer can run {' or '.join(SOFTMAX)} beside those with one, not {name!r}")
        for module in self.modules():  # type: ignore[attr-defined]
            if attends(module):
                module.softmax = name
        attend_by(self.config, NAME)

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Choose what layers without a mixer run; those with one go on as they are, and so does all where a mapping names other models than this."""
        chosen = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if own_config(self.config).family.own_attention:
            super().set_attn_implementation(attn_implementation, *_, **__)  # type: ignore[misc]
        elif chosen is not None:
            self._run_softmax_by(chosen)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        chosen = generation_config.cache_implementation
        if chosen not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={chosen!r} has no room for what mixers remember; leave it out")
        generation_config.cache_implementation = None  # beside a cache that is there it may not be named
        name = cache_name(self)
        if generation_config.use_cache and model_kwargs.get(name) is None:
            model_kwargs[name] = cache_for(self.config)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as any model, with the few lines that say what it needs to be loaded."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / STUB_FILE).write_text(STUB.format(kind=own_config(self.config).kind), encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: this class is found by `import effconvert`, and its source is not to be copied into checkpoints."""


def _with_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make a cache with room for mixers, where the family would make one without."""
    asked = kwargs.get("use_cache")
    wanted = getattr(model.config, "use_cache", False) and not model.training if asked is None else asked
    if cache_among((*args, *kwargs.values())) is not None:
        return args, kwargs
    if not wanted or not own_config(model.config).decoder or (model.training and checkpoints(model)):
        return args, {**kwargs, "use_cache": False}  # else the family makes one of its own
    return args, {**kwargs, cache_name(model): cache_for(model.config)}


def _refuse(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Refuse what a mask can say to softmax attention and not to a mixer, which would mix what it should not; read packed texts without a cache."""
    named = {**dict(zip(signature(model.forward).parameters, args, strict=False)), **kwargs} if len(args) > 1 else kwargs
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if mask is not None and getattr(mask, "ndim", 2) != 2:
        raise ValueError("mixers know of padding only: give an attention_mask [batch, tokens], or none")
    if mask is not None or positions is None or positions.shape[-1] < 2 or not bool((positions.diff(dim=-1) != 1).any()):
        return args, kwargs
    ours = own_config(model.config)
    if not (ours.decoder and ours.family.packs):
        raise ValueError("several texts in one row (position_ids that begin anew) would be mixed with each other; give each a row of its own, padded")
    if cache_among(named.values()) is not None or named.get("use_cache"):
        raise ValueError("several texts in one row (position_ids that begin anew) cannot be gone on with in a cache; leave use_cache and the cache out")
    return args, {**kwargs, "use_cache": False}


def cache_for(config: Any) -> Cache:
    """Make an empty cache for a converted model: states where it has mixers, and what transformers takes elsewhere."""
    ours = own_config(config)
    usual = DynamicCache(config=config).layers
    layers: list[Any] = []
    for index, kept in enumerate(caches(ours)):
        if kept.lender is not None:
            layers.append(LentLayer(layers[kept.lender]))
        elif not kept.softmax:
            layers.append(State(kept.technique.cache_slots(ours) if kept.technique else {}))
        elif ours.family.shares_kv_in_our_class:
            layers.append(Grouped(ours.heads // ours.kv_heads))
        else:
            layers.append(usual[index] if index < len(usual) else DynamicLayer())
    return Cache(layers=layers)


def own_config(config: Any) -> Config:
    """Return a config of transformers as effconvert reads it: read once, and kept on the object."""
    own: Config | None = config.__dict__.get(PARSED)
    if own is None:
        own = Config(*decode(_plain(config)))
        config.__dict__[PARSED] = own
    return own


def _plain(config: Any) -> dict[str, Any]:
    """Return what a config of transformers would say of itself without us."""
    parsed = config.__dict__.pop(PARSED, None)
    try:
        stock: Any = super(ConvertedConfig, config) if isinstance(config, ConvertedConfig) else config
        said: dict[str, Any] = stock.to_dict()
        return said
    finally:
        if parsed is not None:
            config.__dict__[PARSED] = parsed


def layers_of(model: Any, config: Config) -> list[nn.Module]:
    """Return the layers of a model."""
    family = config.family
    base = model if isinstance(model, getattr(transformers, family.base)) else getattr(model, family.prefix)
    return list(base.get_submodule(family.layers))


@lru_cache(None)
def config_class(kind: str) -> Any:
    """Return the config class of a converted family."""
    stock = type(transformers.AutoConfig.for_model(kind))
    made = type(f"{CLASS}{stock.__name__}", (ConvertedConfig, stock), {"model_type": KIND + kind, "__module__": "effconvert.modeling"})
    for opens, name in auto_classes(kind):  # the config's class comes before any model's
        opens.register(made, stand_in(partial(model_class, name), config_class=made), exist_ok=True)
    return made


@lru_cache(None)
def model_class(architecture: str) -> Any:
    """Return the class that is `architecture` of transformers with mixers.

    Raises:
        ModelError: there is none.
    """
    stock = getattr(transformers, architecture, None)
    kind = next((kind for kind, family in FAMILIES.items() if _is_of(stock, family, kind)), None)
    if stock is None or kind is None:
        raise ModelError(f"{architecture} is no class of a family that effconvert knows; it knows {', '.join(FAMILIES)}")
    check_overridden(stock)
    keep_names(architecture, kind, CLASS + architecture)

    @wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # not as hooks, which PEFT passes by when it calls `forward`
        if self._mixes:
            args, kwargs = _refuse(self, args, kwargs)
        if FAMILIES[kind].decoder:
            args, kwargs = _with_cache(self, args, kwargs)
        return stock.forward(self, *args, **kwargs)

    made = {"config_class": config_class(kind), "__module__": "effconvert.modeling", "forward": forward}
    return type(CLASS + architecture, (Converted, stock), made)


def _is_of(stock: Any, family: Family, kind: str) -> bool:
    return stock is not None and getattr(getattr(stock, "config_class", None), "model_type", None) == kind and family.base != ""


def named(name: str) -> Any:
    """Return the class of that name: EffconvertLlamaForCausalLM, EffconvertLlamaConfig."""
    inside = name.removeprefix(CLASS)
    for kind in FAMILIES:
        if inside.endswith("Config") and name == config_class(kind).__name__:
            return config_class(kind)
    return model_class(inside)
