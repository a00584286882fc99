"""RWKV-4's time mixing between the projections of a pretrained model: a mean of earlier values, whose weights depend on key and distance, by channel."""
# B = batch, H = query heads, G = KV heads, T = tokens, D = head width, C = tokens in a chunk.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call, Slots

CHUNK = 16
SMALL = 1e-3  # size of random maps
RIDGE = 1e-4  # of the fit, in shares of the keys' mean square
SLOWEST, FASTEST = 2.0**-12, 8.0  # decays that are fitted
LOWEST = -1e30  # the log of nothing


def parameters(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Name the parameters: maps of a head's key and query to channels, a decay and a bonus for each channel, and shifts."""
    queries, keys = (config.heads, config.head_dim), (config.kv_heads, config.head_dim)
    maps = (*queries, config.head_dim)
    return {"key": maps, "receptance": maps, "decay": queries, "bonus": queries, "query_shift": queries, "key_shift": keys, "value_shift": keys}


def initial_values(config: Config, index: int) -> Mapping[str, Tensor]:
    """Maps of about 0, the decay of unknown heads, no bonus and no shift."""
    import torch

    from effconvert.surgery.mixing._retained import UNKNOWN

    draw = torch.Generator().manual_seed(index)
    values = {name: SMALL * torch.randn(shape, generator=draw) if len(shape) > 2 else torch.zeros(shape) for name, shape in parameters(config).items()}
    return {**values, "decay": torch.full_like(values["decay"], UNKNOWN).log()}


def fit(layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Fit key, decay and bonus of each head to its attention; they are the same for all of its channels."""
    import torch

    assert layer.activations
    config, sums = layer.config, [torch.zeros(()), torch.zeros(())]
    for capture in layer.activations.capture(layer, ("o",), until="o"):
        assert capture.weights is not None
        assert capture.key is not None
        rotation = capture.rotation if config.rotary_of(layer.index) else None
        keys = (rotation.undone(capture.key.float()) if rotation else capture.key).double().repeat_interleave(config.heads // config.kv_heads, 1)
        sums = [total + part.cpu() for total, part in zip(sums, equations(capture.weights.double(), keys), strict=True)]
    solution = solve(*sums)[:, None]  # [H, 1, 2 + D]
    return {
        **values,
        "decay": (-solution[..., 0]).clamp(SLOWEST, FASTEST).log().float().expand_as(values["decay"]).clone(),
        "bonus": solution[..., 1].float().expand_as(values["bonus"]).clone(),
        "key": solution[..., 2:].float().expand_as(values["key"]).clone(),
    }


def equations(attention: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normal equations of log attention on distance, own token and key, with a constant for each query: [H, 2 + D, 2 + D] and [H, 2 + D].

    Weighted by attention, the squared error is the KL divergence from the attention to second order. The distance is that to the token before; both
    arguments are of causal attention: [B, H, T, T] and keys [B, H, T, D].
    """
    import torch

    tokens = torch.arange(attention.shape[-1], device=attention.device)
    distance = (tokens[:, None] - tokens - 1).clamp_min(0).to(attention)
    log = attention.clamp_min(torch.finfo(attention.dtype).tiny).log()
    own = attention.diagonal(dim1=-2, dim2=-1)  # [B, H, T]
    far = attention * distance
    by_query = torch.cat([far.sum(-1, keepdim=True), own[..., None], attention @ keys], -1)  # means of what is regressed on, [B, H, T, 2 + D]
    corner = torch.diag_embed(torch.stack([(far * distance).sum((-1, -2)), own.sum(-1)], -1))  # [B, H, 2, 2]
    cross = torch.stack([far.sum(-2), own], -2) @ keys  # [B, H, 2, D]
    squares = (keys * attention.sum(-2)[..., None]).mT @ keys
    moments = torch.cat([torch.cat([corner, cross], -1), torch.cat([cross.mT, squares], -1)], -2)
    shown = attention * log
    products = torch.cat([(shown * distance).sum((-1, -2))[..., None], (own * log.diagonal(dim1=-2, dim2=-1)).sum(-1)[..., None]], -1)
    products = torch.cat([products, (shown.sum(-2)[..., None, :] @ keys)[..., 0, :]], -1)
    means = shown.sum(-1)[..., None]
    return (moments - by_query.mT @ by_query).sum(0), (products - (by_query * means).sum(-2)).sum(0)


def solve(moments: Tensor, products: Tensor) -> Tensor:
    """Solve the equations of each head, with a small ridge: [H, 2 + D]."""
    import torch

    scale = moments.diagonal(dim1=-2, dim2=-1)
    scale = scale + RIDGE * scale[:, 2:].mean(-1, keepdim=True) + torch.finfo(scale.dtype).tiny
    strength = torch.cat([torch.full_like(scale[:, :2], RIDGE**2), torch.full_like(scale[:, 2:], RIDGE)], -1) * scale
    solution: Tensor = torch.linalg.solve(moments + torch.diag_embed(strength), products)
    return solution


def cache_slots(config: Config) -> Slots:
    """The weighted sums of values and of ones, for each channel, with the log of their scale, and the last token."""
    queries, keys = (config.heads, config.head_dim), (config.kv_heads, config.head_dim)
    sums: Slots = dict.fromkeys(("sum", "weight", "scale"), (queries, "float32"))
    return {**sums, "last_query": (queries, "model"), "last_key": (keys, "model"), "last_value": (keys, "model")}


def mix(weights: Mapping[str, Tensor], call: Call) -> Tensor:
    """Shift, average the values, and gate."""
    import torch

    from effconvert.surgery.mixing._shift import shifted

    query, key = call.query.float(), call.key.float()
    if call.rotation:  # positions matter by a decay alone
        query, key = call.rotation.undone(query), call.rotation.undone(key)
    (query,) = shifted(call, "last_query", query, weights["query_shift"][:, None])
    (key,) = shifted(call, "last_key", key, weights["key_shift"][:, None])
    (value,) = shifted(call, "last_value", call.value.float(), weights["value_shift"][:, None])
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1) @ weights["key"].float().mT, value.repeat_interleave(shared, 1)
    slots: Slots = dict.fromkeys(("sum", "weight", "scale"), (tuple(value.shape[1:2] + value.shape[-1:]), "float32"))
    state = call.read("sum", slots), call.read("weight", slots), call.read("scale", slots)
    out, state = weighted_mean(key, value, weights["decay"].float().exp(), weights["bonus"].float(), call.live, state)
    call.write(**dict(zip(slots, state, strict=True)))
    gated: Tensor = 2 * torch.sigmoid(query @ weights["receptance"].float().mT) * out
    return gated


def weighted_mean(
    key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor, live: Tensor, state: tuple[Tensor, Tensor, Tensor], chunk: int = CHUNK
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Average values with weights exp(k_i - (t - 1 - i) w) before token t and exp(u + k_t) at it, by channel.

    Args:
        key: k, [B, H, T, D].
        value: [B, H, T, D].
        decay: w > 0, [H, D].
        bonus: u, [H, D].
        live: which tokens count, [B, T].
        state: sums of weighted values and of weights before the first token [B, H, D], and the log that they are to be scaled by.
        chunk: tokens in a chunk.

    Returns:
        [B, H, T, D] and the state after the last token.
    """
    import torch

    (sums, total, scale), outputs = state, []
    decay, bonus = decay[:, None, None], bonus[:, None, None]  # [H, 1, 1, D]
    for start in range(0, key.shape[2], chunk):
        k, v, alive = key[:, :, start : start + chunk], value[:, :, start : start + chunk], live[:, start : start + chunk]
        count = alive.cumsum(1).to(k)  # live tokens up to each, [B, C]
        scale = scale.masked_fill(total == 0, LOWEST)
        k = k.masked_fill(~alive[:, None, :, None], LOWEST)[:, :, None]  # [B, H, 1, C, D]
        away = (count[:, :, None] - 1 - count[:, None])[:, None, ..., None]  # from the token before each, [B, 1, C, C, 1]
        own = torch.eye(len(count[0]), dtype=torch.bool, device=k.device)[..., None]
        seen = own.new_ones(own.shape[:2]).tril()[..., None] & alive[:, None, None, :, None]
        scores = torch.where(own, k + bonus, k - away.clamp_min(0) * decay).masked_fill(~seen, LOWEST)  # [B, H, C, C, D]
        before = scale[:, :, None] - (count - 1).clamp_min(0)[:, None, :, None] * decay[:, 0]  # [B, H, C, D]
        top = torch.maximum(scores.amax(-2), before)
        weight, kept = (scores - top[..., None, :]).exp(), (before - top).exp()  # one of them is 1
        outputs.append(((weight * v[:, :, None]).sum(-2) + kept * sums[:, :, None]) / (weight.sum(-2) + kept * total[:, :, None]))
        scores = k[:, :, 0] - (count[:, -1:] - count)[:, None, :, None] * decay[:, 0]  # after the chunk, [B, H, C, D]
        before = scale - count[:, -1, None, None] * decay[:, 0, 0]
        scale = torch.maximum(scores.amax(-2), before)
        weight, kept = (scores - scale[:, :, None]).exp() * alive[:, None, :, None], (before - scale).exp()
        sums, total = (weight * v).sum(-2) + kept * sums, weight.sum(-2) + kept * total
    return torch.cat(outputs, 2), (sums, total, scale)
