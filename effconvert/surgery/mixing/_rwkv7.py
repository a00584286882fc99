"""RWKV-7's time mixing between the projections of a pretrained model: the delta rule with a decay and a rate for each channel of the keys."""
# B = batch, H = query heads, G = KV heads, R = query heads that share one, T = tokens, D = head width, M = hidden width, N = rank.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call, Slots

RANK = 32  # of what decay, rate and gate depend on
SMALL = 0.01  # size of what they depend on at first
FASTEST = 0.6065306597126334  # e^(-1/2): the largest -log w


def parameters(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Name the parameters; receptances have those of query heads, keys and values those of KV heads."""
    keys, queries, width = (config.kv_heads, config.head_dim), (config.heads, config.head_dim), config.hidden
    down, up = (RANK, width), (config.kv_heads * config.head_dim, RANK)
    return {
        "shift": (3, width),
        **{"query_shift": queries, "key_shift": keys, "value_shift": keys},
        **{"decay_down": down, "decay_up": up, "decay_bias": keys},
        **{"rate_down": down, "rate_up": up, "rate_bias": keys},
        **{"removal": keys, "replacement": keys, "bonus": queries, "gain": queries},
        **{"gate_down": down, "gate_up": (config.heads * config.head_dim, RANK)},
    }


def initial_values(config: Config, index: int) -> Mapping[str, Tensor]:
    """No shift and no bonus, a rate of a half, and a gate of about 1."""
    import torch

    from effconvert.surgery.mixing._retained import UNKNOWN

    values: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(index)
    for name, shape in parameters(config).items():
        if name.endswith(("_down", "_up")):  # both random: gradients of either are products with the other
            rows = torch.randn(shape, generator=draw)
            values[name] = torch.nn.functional.normalize(rows, dim=-1) if name.endswith("_down") else SMALL * rows
        else:
            values[name] = torch.full(shape, 1.0 if name in ("removal", "replacement", "gain") else 0.0)
    return {**values, "decay_bias": _bias(torch.full_like(values["decay_bias"], UNKNOWN))}


def fit(layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Fit the decays to how attention falls with the distance, and the gains to the size of its outputs."""
    from effconvert.surgery.mixing._retained import fitted

    return fitted(layer, values, "decay_bias", _bias)


def _bias(far: Tensor) -> Tensor:
    """Return d of decays w = exp(-sigmoid(d) / sqrt(e)) = 1 - far."""
    return (-(-far.double()).log1p() / FASTEST).logit().to(far.dtype)


def cache_slots(config: Config) -> Slots:
    """The matrix of each KV head, and the last token."""
    keys, queries = (config.kv_heads, config.head_dim), (config.heads, config.head_dim)
    last: Slots = {"last_hidden": ((config.hidden,), "model"), "last_query": (queries, "model"), "last_key": (keys, "model"), "last_value": (keys, "model")}
    return {"state": ((*keys, config.head_dim), "float32"), **last}


def mix(weights: Mapping[str, Tensor], call: Call) -> Tensor:
    """Shift, run the delta rule, norm, add the bonus and gate."""
    from torch.nn import functional

    from effconvert.surgery.mixing._delta import delta_rule
    from effconvert.surgery.mixing._retained import normed
    from effconvert.surgery.mixing._shift import shifted

    def of_keys(name: str) -> Tensor:
        """Return parameters of heads [G, D] for rows [B, G, T, D]."""
        return weights[name].float()[:, None]

    def by_head(rows: Tensor, name: str) -> Tensor:
        """Return rows times a matrix, by head: [B, T, N] to [B, heads, T, D]."""
        heads: Tensor = functional.linear(rows, weights[name].float()).unflatten(-1, (-1, call.key.shape[-1])).transpose(1, 2)
        return heads

    for_decay, for_rate, for_gate = (
        functional.linear(rows, weights[f"{name}_down"].to(rows.dtype)).float()
        for name, rows in zip(("decay", "rate", "gate"), shifted(call, "last_hidden", call.hidden, *weights["shift"]), strict=True)
    )
    (query,) = shifted(call, "last_query", call.query.float(), weights["query_shift"][:, None])
    (key,) = shifted(call, "last_key", call.key.float(), weights["key_shift"][:, None])
    (value,) = shifted(call, "last_value", call.value.float(), weights["value_shift"][:, None])
    query = (query * call.scaling).unflatten(1, (key.shape[1], -1))  # [B, G, R, T, D]

    live = call.live[:, None, :, None].float()  # padding neither writes nor makes anything forget
    fall = -FASTEST * (of_keys("decay_bias") + by_head(for_decay.tanh(), "decay_up")).sigmoid() * live
    rate = (of_keys("rate_bias") + by_head(for_rate, "rate_up")).sigmoid()
    removed = functional.normalize(key * of_keys("removal"), dim=-1)
    written = key * (1 + (rate - 1) * of_keys("replacement"))
    state = call.read("state", {"state": ((key.shape[1], key.shape[-1], value.shape[-1]), "float32")})
    sums, state = delta_rule(query, -removed, removed * rate * live, value, fall, state, written * live)
    call.write(state=state)

    own = (query * weights["bonus"].float().unflatten(0, query.shape[1:3])[..., None, :] * written[:, :, None]).sum(-1, keepdim=True) * value[:, :, None]
    gate = 1 + by_head(for_gate.sigmoid(), "gate_up")
    gated: Tensor = (normed(sums.flatten(1, 2), weights["gain"]) + own.flatten(1, 2)) * gate
    return gated
