"""Linear attention that decays with the distance (RetNet)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, M = hidden width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call, Slots

EPSILON = 1e-10  # of the group norm
OPEN = 1.2784645  # silu of it is 1
SHORTEST, LONGEST = 2.0**-3, 2.0**-12  # 1 - gamma of heads that look least far back, and furthest


class Retnet(Mixing):
    """Linear attention that decays with the distance (RetNet).

    A head's output is the sum over earlier tokens of gamma^distance (q k) v, brought to a size by a norm, and gated by what the token is. There is no
    softmax: scores have signs, so of a pretrained model nothing is left until it is trained again. What a decoder remembers is a matrix of D x D a query
    head, however long the text. Queries and keys keep the family's RoPE. Sun et al. 2023, arXiv 2307.08621.

    \b
    Examples:
      effconvert retnet --layers 10-19 ./SmolLM2-135M -o ./retnet
      effconvert retnet --decay paper ./SmolLM2-135M
    """

    no_encoders = "looks back only, and forgets with the distance; encoders see what comes after a token too: linear and performer are for them"

    decay: Literal["fitted", "paper"] = Field(
        "fitted",
        description="Gamma of each head: as its attention falls with the distance on the calibration text, with an output of the size that it had (fitted); "
        "or 1 - 2^(-5 - h) of head h, with one of size 1 (paper).",
    )

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """How fast heads forget, the size of what they give, and the gate."""
        inner = config.heads * config.head_dim
        return {"decay": (config.heads,), "gain": (config.heads, config.head_dim), "gate": (inner, config.hidden), "gate_bias": (inner,)}

    def begin(self, config: Config, index: int) -> Mapping[str, Tensor]:
        """The paper's decays, which are the same in all layers, and a gate that lets all through."""
        import torch

        shapes = self.parameters(config)
        # Kept is the logit of 1 - gamma: in bfloat16 gammas near 1 would be all the same, and training cannot take it out of bounds.
        decay = torch.logit(2.0 ** (-5 - torch.arange(config.heads, dtype=torch.float64))).float()
        return {
            "decay": decay,
            "gain": torch.ones(shapes["gain"]),
            "gate": torch.zeros(shapes["gate"]),
            "gate_bias": torch.full(shapes["gate_bias"], OPEN),
        }

    def needs_calibration(self, config: Config) -> bool:
        """Where decays are fitted."""
        return self.decay == "fitted"

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Fit the decays to how attention falls with the distance, and the gains to the size of what it gives."""
        import torch

        assert layer.activations
        heads, attended, squares, count = layer.config.heads, torch.zeros(0), torch.zeros(layer.config.heads, dtype=torch.float64), 0
        for look in layer.activations.capture(layer, ("o",), until="o"):
            assert look.weights is not None
            found = by_distance(look.weights).double().cpu()  # [H, T // 2]
            attended = attended + found if len(attended) else found
            given = look.inputs["o"].reshape(*look.state.shape[:2], heads, -1)  # [B, T, H, D]
            squares += given.double().square().mean((1, 3)).sum(0).cpu()
            count += len(given)
        far = fitted_decay(attended)
        decay = torch.where(far.isnan(), values["decay"].double(), torch.logit(far)).float()
        size = (squares / count).sqrt().float()  # the norm makes every head's root mean square 1
        return {**values, "decay": decay, "gain": size[:, None].expand_as(values["gain"]).clone()}

    def remembers(self, config: Config) -> Slots:
        """The sum over all tokens, as each query head forgets it."""
        return {"state": ((config.kv_heads, config.heads // config.kv_heads, config.head_dim, config.head_dim), "float32")}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Retain, norm and gate.

        The paper's code scales scores and decays so that no sum grows large, each form in its own way, and the norm takes that out again. In float32 no
        form needs it, and so all of them give the same whatever the norm's epsilon.
        """
        from torch.nn import functional

        from effconvert.kernels.linear_attention import linear_attention

        query, live = call.grouped.float() * call.scaling, call.live.float()
        key, value = call.key.float() * live[:, None, :, None], call.value.float()
        fall = functional.logsigmoid(-weights["decay"].float()).unflatten(0, query.shape[1:3])[..., None] * live[:, None, None]  # padding makes nobody forget
        shape = (*query.shape[1:3], key.shape[-1], value.shape[-1])
        made, state = linear_attention(query, key[:, :, None], value, call.read("state", {"state": (shape, "float32")}), fall)
        call.write(state=state)
        made = made.flatten(1, 2)  # [B, H, T, D]
        normed = made * (made.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weights["gain"].float()[:, None]
        gate = functional.linear(call.hidden, weights["gate"].to(call.hidden.dtype)).float() + weights["gate_bias"].float()
        gated: Tensor = normed * functional.silu(gate).unflatten(-1, (normed.shape[1], -1)).transpose(1, 2)
        return gated


def by_distance(weights: Tensor) -> Tensor:
    """Sum attention [B, H, T, T] over the batch for each distance, [H, T // 2].

    Only over the later half of the queries, which have all these distances: of the earlier ones attention is shared among fewer keys. So the first token
    is left out, too, which many heads look at when there is nothing to look at.
    """
    import torch

    tokens = weights.shape[-1]
    far = tokens // 2
    return torch.stack([weights[:, :, tokens - far :].diagonal(tokens - far - distance, -2, -1).sum((0, -1)) for distance in range(far)], -1)


def fitted_decay(attended: Tensor) -> Tensor:
    """Return 1 - gamma of each head [H], by least squares of log attention [H, distances] on the distance; NaN where no two distances are attended to.

    A distance counts by the attention that it gets: else the many far ones, which hardly any head looks at, would decide.
    """
    import torch

    weight = attended / attended.sum(-1, keepdim=True).clamp_min(torch.finfo(attended.dtype).tiny)
    distance = torch.arange(attended.shape[-1], dtype=attended.dtype)
    log = attended.clamp_min(torch.finfo(attended.dtype).tiny).log()
    off = distance - (weight * distance).sum(-1, keepdim=True)
    spread = (weight * off.square()).sum(-1)
    slope = (weight * off * log).sum(-1) / spread
    far = -torch.expm1(slope)
    return torch.where((attended > 0).sum(-1) > 1, far.clamp(LONGEST, SHORTEST), torch.nan)
