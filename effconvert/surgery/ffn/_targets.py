"""The families with experts that compute what a dense model does but for its FFN."""

from typing import Any

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import overlap
from effconvert.checkpoint.shape import TOP_K_KEY
from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES

CODE = ("auto_map", "layer_types", "max_window_layers", "partial_rotary_factor")  # keys that belong to the class before
ROW = 16  # bytes
BALANCE = 0.02  # weight of the load-balancing loss, as in Drop-Upcycling; used once `output_router_logits` is true


def check_dense(config: Config, chosen: set[int]) -> None:
    """Refuse layers whose FFN is not the family's own, or is shared: experts of each layer would store it again for each.

    Raises:
        OptionError: the first of them.
    """
    for index in sorted(chosen):
        other = next((record.technique for record in config.replaced_in(index) if overlap(record.place, "ffn")), None)
        if other or "ffn" in config.skips(index):
            raise OptionError(f"layer {index} has {other or 'nothing'} in place of its FFN, and experts are made from one; begin from the original")
        if config.shares(index, "down"):
            raise OptionError(f"layer {index} shares its FFN with others, and would store its own again as experts; begin from the original")


def expert_step(config: Config) -> int:
    """Return what the widths of an expert must be multiples of: torch multiplies by experts (grouped_mm) where a row of them is a multiple of 16 bytes."""
    return ROW // (2 if (config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16") else 4)


def parts_of_ffn(config: Config) -> str:
    """Return the numbers of parts, up to 64, into which an FFN can be cut so that torch can multiply by them.

    Raises:
        ModelError: there is none.
    """
    step = expert_step(config)
    if fits := [number for number in range(2, 65) if config.ffn % (number * step) == 0]:
        return ", ".join(map(str, fits))
    raise ModelError(f"the {config.ffn} neurons of this model's FFN cannot be cut into experts whose width is a multiple of {step}, which torch needs")


def width_note(width: int) -> str:
    """Return the note on experts that run in float32 alone."""
    return f"its experts are {width} wide, so it runs in float32 alone: torch needs multiples of 8 in bfloat16 and float16" if width % (ROW // 2) else ""


def become_sparse(target: Config, chosen: set[int], experts: int, active: int, width: int, shared: int = 0) -> Config:
    """Return a config with experts of `width` neurons in the `chosen` layers, and a shared expert of `shared` neurons where the family has one."""
    family = target.family
    keys: dict[str, Any] = {family.experts_key: experts, TOP_K_KEY: active, family.expert_ffn_key or family.ffn_key: width, "output_router_logits": False}
    keys |= {"router_aux_loss_coef": BALANCE}
    keys |= {family.shared_ffn_key: shared} if family.shared_ffn_key else {}
    keys |= {family.dense_layers_key: sorted(set(range(target.layers)) - chosen)} if family.dense_layers_key else {}
    return target.with_keys(keys)


def choose(families: dict[str, Config], chosen: set[int], layers: int) -> list[Config]:
    """Return the families that can have experts in the `chosen` layers alone, the best first.

    Raises:
        OptionError: there is none.
    """
    able = [target for kind, target in families.items() if FAMILIES[kind].dense_layers_key or len(chosen) == layers]
    if not able:
        raise OptionError(f"a {' or a '.join(families)} has experts in all of its layers, and --layers leaves some out; leave out --layers")
    return able


def with_experts(config: Config) -> dict[str, Config]:
    """Return the families with experts that match this model, each with its config, the best first.

    Raises:
        ModelError: there is none.
    """
    kind, family = config.kind, config.family
    if family.experts_key:
        raise ModelError(f"{kind} has experts already; begin from a model without")
    if "gate" not in family.parts:
        raise ModelError(
            f"{kind} has no gate in its FFN, and the experts of transformers' families have one; take a llama, mistral, qwen2, qwen3, olmo2 or granite"
        )
    if not family.upcycled:
        way = "write it as a llama by `effconvert rope-layout --to llama`, where that can, or " if "llama" in family.relaid else ""
        known = "a llama, mistral, qwen2, qwen3, olmo2, granite or phi3"
        raise ModelError(f"{kind} computes what no family with experts does that effconvert knows; {way}take {known}")
    if config.hidden % (step := expert_step(config)):
        raise ModelError(f"hidden states are {config.hidden} wide, and torch multiplies by experts only where that is a multiple of {step}; take another model")
    configs: dict[str, Config] = {}
    reasons: dict[str, None] = {}
    for target, keys in family.upcycled.items():
        try:
            configs[target] = _as(config, target).with_keys(keys)
        except ModelError as error:
            reasons[str(error).partition(";")[0]] = None
    if not configs:
        raise ModelError(f"{'; '.join(reasons)}; no other family with experts matches it; `effconvert inspect` lists what works with this model")
    return configs


def _as(config: Config, kind: str) -> Config:
    """Return the config of a model in family `kind`, which computes the same but for the FFN.

    Raises:
        ModelError: it would compute something else.
    """
    target, family, windows = config.with_defaults().become(kind), FAMILIES[kind], config.windows()
    if config.rotary != config.head_dim:
        raise ModelError(f"{config.kind} rotates {config.rotary} of the {config.head_dim} dimensions of a head by RoPE, and {kind} rotates all")
    if "longrope" in (config.ropes.get("rope_type"), config.ropes.get("type")):
        raise ModelError(f"{config.kind} with longrope changes its angles when a text gets long, and {kind} does not")
    keys: dict[str, Any] = {family.scale_key: config.scale} if family.scale_key else {}
    if family.layers_alike or not family.windowed:
        if len(set(windows)) > 1 or (windows[0] and not family.windowed):
            raise ModelError(f"{config.kind} has a sliding window in some layers, and {kind} {'in all or in none' if family.windowed else 'has none'}")
        keys |= {"sliding_window": windows[0]} if family.windowed else {}
        keys |= {key: bool(windows[0]) for key in family.window_keys}
    else:
        keys["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return target.without(*CODE).with_keys(keys)
