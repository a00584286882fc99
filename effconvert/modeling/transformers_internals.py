"""All names that effconvert uses of transformers beyond its public API; the next version may not have them.

No other file uses such a name, but for transformers_experts.py. tests/mixers/test_transformers_internals.py has a test for each. If a version lacks one,
the error names the versions that were tested.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import lru_cache
from inspect import signature
from typing import Any

import transformers
from torch import Tensor, nn

from effconvert.errors import EffconvertError, ModelError

TESTED = ">=5.17,<5.25"  # versions of transformers; pyproject.toml says the same


def untested(name: str) -> EffconvertError:
    """Return the error for a name that this version of transformers lacks."""
    message = f"effconvert uses what transformers {transformers.__version__} does not have ({name})"
    return EffconvertError(f"{message}; it was tested with transformers {TESTED}: pip install 'transformers{TESTED}'")


try:
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.integrations.integration_utils import get_available_reporting_integrations
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise untested(str(error).partition(" (")[0]) from error

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "BaseModelOutput",
    "Cache",
    "CacheLayerMixin",
    "Conv1D",
    "DynamicCache",
    "DynamicLayer",
    "eager_mask",
    "no_init_weights",
    "sdpa_mask",
    "unset_hf_deepspeed_config",
]
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # of a model's argument for the cache: since 5.24, before, and before of models with states
CHECKPOINTING = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the newer name first
IMPLEMENTATION = "_attn_implementation"  # of a config: the name of the attention function
OVERRIDDEN = ("_init_weights", "_adjust_bias", "get_expanded_tied_weights_keys")  # methods of models that our classes override
GENERATING = "_prepare_cache_for_generation"  # likewise, of models that generate


def cache_among(values: Iterable[Any]) -> Any:
    """Return the cache among arguments or outputs, whatever its name (transformers 5.24 renamed it); None without one."""
    return next((value for value in values if isinstance(value, Cache)), None)


def cache_name(model: Any) -> str:
    """Return the name of `model`'s argument for the cache."""
    return _cache_name(type(model).forward)


def takes_cache(model: Any) -> bool:
    """Whether `model` can be given a cache; some families keep other states."""
    return not signature(type(model).forward).parameters.keys().isdisjoint(CACHE_NAMES)


@lru_cache(None)
def _cache_name(forward: Callable[..., Any]) -> str:
    names = signature(forward).parameters
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise untested(f"an argument {' or '.join(CACHE_NAMES)} of {forward.__qualname__}")


def attention_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the hidden states [B, T, M] of a call of an attention module, and cosines and sines of RoPE, where the family has them."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(args), None)
    if not isinstance(hidden, Tensor):
        raise untested("hidden_states, which attention is called with")
    return hidden, kwargs.get("position_embeddings")


def implementation(config: Any) -> str | None:
    """Return the name of the attention function of models with this config."""
    check_has(config, IMPLEMENTATION)
    return getattr(config, IMPLEMENTATION)  # type: ignore[no-any-return]


def attend_by(config: Any, name: str) -> None:
    """Set the attention function of models with this config, without a check of the name."""
    check_has(config, IMPLEMENTATION)
    setattr(config, IMPLEMENTATION, name)


def attention_function(config: Any) -> Callable[..., Any]:
    """Return the attention function of models with this config."""
    return ALL_ATTENTION_FUNCTIONS[implementation(config)]  # type: ignore[no-any-return]


def scaling_of(attention: nn.Module, otherwise: float) -> float:
    """Return the factor of scores in an attention module; `otherwise` where the family keeps none."""
    return float(getattr(attention, "scaling", otherwise))


def sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """Attend by torch's function, as transformers calls it."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def eager(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention function of a module's family."""
    return _of_family(module, "eager_attention_forward")


def rotary(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that applies RoPE in a module's family: of queries, keys, cosines, sines."""
    return _of_family(module, "apply_rotary_pos_emb")


def _of_family(module: nn.Module, name: str) -> Callable[..., Any]:
    file = sys.modules[type(module).__module__]
    check_has(file, name)
    return getattr(file, name)  # type: ignore[no-any-return]


def attends(module: nn.Module) -> bool:
    """Whether `module` calls the attention function."""
    return hasattr(module, "is_causal")


def is_causal(module: nn.Module) -> bool:
    """Whether an attention module sees earlier tokens alone."""
    return bool(getattr(module, "is_causal", False))


def repeat_heads(attention: nn.Module, times: int) -> None:
    """Set how many query heads of a module share a KV head, for `sdpa`."""
    attention.num_key_value_groups = times  # type: ignore[assignment]


def shared_by(attention: nn.Module) -> int:
    """Return how many query heads of a module share a KV head; 1 where the family does not say."""
    return int(getattr(attention, "num_key_value_groups", 1))


def checkpoints(model: Any) -> bool:
    """Whether `model` recomputes activations in training (checkpointing), so that it can have no cache."""
    for name in CHECKPOINTING:
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    raise untested(f"{' or '.join(CHECKPOINTING)} of {type(model).__name__}")


def check_overridden(model: Any) -> None:
    """Check that a class of models has the methods that our classes override; else nothing would call ours.

    Raises:
        EffconvertError: it lacks one.
    """
    for name in (*OVERRIDDEN, GENERATING) if hasattr(model, "generate") else OVERRIDDEN:
        check_has(model, name)


def compute_constant(model: Any, module: nn.Module, device: Any) -> None:
    """Give the parameters of a module, which have no memory yet, the values that the class of `model` begins with."""
    check_has(model, "_init_weights")
    module.to_empty(device=device)
    model._init_weights(module)


def keep_names(architecture: str, kind: str, ours: str) -> None:
    """Make the class `ours` read the names that `architecture` has on disk, where they differ from those in memory (experts)."""
    if mapping := _name_mapping(architecture, kind):
        register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def _name_mapping(architecture: str, kind: str) -> list[Any] | None:
    """Return transformers' mapping of names on disk to names in memory, of a class of models or of its `model_type`."""
    return get_checkpoint_conversion_mapping(architecture) or get_checkpoint_conversion_mapping(kind)  # type: ignore[no-any-return]


def names_at_run_time(stored: Mapping[str, Tensor], architecture: str, kind: str, expected: Mapping[str, Tensor], partial: bool = False) -> dict[str, Tensor]:
    """Return tensors with their names and shapes in memory, as in `from_pretrained`: separate experts become one tensor.

    Args:
        stored: name on disk, inside the base model -> tensor.
        architecture: the class of transformers with these names.
        kind: its `model_type`.
        expected: name in memory -> a tensor of the right shape.
        partial: whether some may be missing.

    Raises:
        ModelError: tensors are missing, left over, or of another shape.
    """
    if stored.keys() == expected.keys() or (partial and stored.keys() <= expected.keys()):
        return dict(stored)
    mapping = [*(_name_mapping(architecture, kind) or []), *(get_checkpoint_conversion_mapping("legacy") or [])]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    result: dict[str, Tensor] = {}
    fused: dict[str, Any] = {}
    for name in sorted(stored, key=dot_natural_key):  # experts in the order of their numbers
        target, pattern = rename_source_key(name, renamings, converters)
        if target not in expected and name in expected:
            target, pattern = name, None
        if pattern is None:
            result[target] = stored[name]
        else:
            fused.setdefault(target, deepcopy(by_pattern[pattern])).add_tensor(target, name, pattern, stored[name])
    for target, converter in fused.items():
        for name, value in converter.convert(target).items():
            result[name] = value[0] if isinstance(value, list) else value
    missing = set() if partial else expected.keys() - result.keys()
    mismatched = {name for name in expected.keys() & result.keys() if result[name].shape != expected[name].shape}
    wrong = {"missing": missing, "left over": result.keys() - expected.keys(), "of another shape": mismatched}
    if message := "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names):
        raise ModelError(f"{architecture} does not find the tensors that it needs ({message}): a fault of effconvert, please report it")
    return result


def auto_classes(kind: str) -> Iterator[tuple[Any, str]]:
    """Yield each Auto class for models of type `kind`, and the name of the class that it loads them with."""
    by_auto_class = list(_auto_classes(kind))
    if not by_auto_class:
        raise untested(f"an Auto class for {kind}")
    for auto_class, names in by_auto_class:
        yield auto_class, names[0]


def classes_of(kind: str) -> dict[str, tuple[str, ...]]:
    """Return the name of each Auto class that loads models of type `kind`, and the names of the classes that it loads them with."""
    return {auto_class.__name__: names for auto_class, names in _auto_classes(kind)}


def _auto_classes(kind: str) -> Iterator[tuple[Any, tuple[str, ...]]]:
    from transformers.models.auto import modeling_auto

    for auto_class in vars(modeling_auto).values():
        if isinstance(auto_class, type) and (mapping := getattr(auto_class, "_model_mapping", None)) is not None:
            check_has(mapping, "_model_mapping")
            if names := mapping._model_mapping.get(kind):
                yield auto_class, (names,) if isinstance(names, str) else tuple(names)


def check_has(owner: Any, name: str) -> None:
    """Check that an object of transformers has a name.

    Raises:
        EffconvertError: it has not.
    """
    if not hasattr(owner, name):
        raise untested(f"{name} of {getattr(owner, '__name__', type(owner).__name__)}")


def reporting_integrations() -> list[str]:
    """Return the loggers that transformers' Trainer can write to here: tensorboard, wandb, and others that are installed."""
    return list(get_available_reporting_integrations())


def checkpoint_activations(model: Any) -> None:
    """Let a model compute the activations of its layers again for the gradients, instead of keeping them."""
    name = "activation_checkpointing_enable" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing_enable"  # before 5.24
    getattr(model, name)()


def shard(model: Any) -> None:
    """Shard a model that is not trained over all processes (FSDP2), layer by layer; what several modules share goes with the rest of the model."""
    from torch.distributed.fsdp import fully_shard

    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()) and all(uses[id(parameter)] == 1 for parameter in module.parameters()):
            fully_shard(module)
    fully_shard(model)
