"""Linear attention that decays with the distance (RetNet)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, M = hidden width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing
from effconvert.surgery.mixing._retained import OPEN

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call, Slots


class Retnet(Mixing):
    """Linear attention that decays with the distance (RetNet).

    A head's output is the sum over earlier tokens of gamma^distance (q k) v, followed by a norm and a gate that depends on the token. There is no
    softmax and scores can be negative, so a pretrained model has to be trained again. The state is a D x D matrix for each query head, for any length.
    Queries and keys keep the family's RoPE. Sun et al. 2023, arXiv 2307.08621.

    \b
    Examples:
      effconvert retnet --layers 10-19 ./SmolLM2-135M -o ./retnet
      effconvert retnet --decay paper ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts("decoders", saves="KV cache: a state of fixed size", native="", exact="")

    no_encoders = "looks back only, and decays with the distance; encoders see later tokens too: linear and performer are for them"

    decay: Literal["fitted", "paper"] = Field(
        "fitted",
        description="Gamma of each head: fitted to how its attention falls with the distance on the calibration text, with outputs of their original size "
        "(fitted); or 1 - 2^(-5 - h) for head h, with outputs of size 1 (paper).",
    )

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The decay of each head, the gain of its output, and the gate."""
        inner = config.heads * config.head_dim
        return {"decay": (config.heads,), "gain": (config.heads, config.head_dim), "gate": (inner, config.hidden), "gate_bias": (inner,)}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """The paper's decays, the same in all layers, and a gate of 1."""
        import torch

        shapes = self.parameters(config)
        # Stores the logit of 1 - gamma: in bfloat16 gammas near 1 would be equal, and a logit cannot leave its bounds in training.
        decay = torch.logit(2.0 ** (-5 - torch.arange(config.heads, dtype=torch.float64))).float()
        return {
            "decay": decay,
            "gain": torch.ones(shapes["gain"]),
            "gate": torch.zeros(shapes["gate"]),
            "gate_bias": torch.full(shapes["gate_bias"], OPEN),
        }

    def needs_calibration(self, config: Config) -> bool:
        """If decays are fitted."""
        return self.decay == "fitted"

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Fit the decays to how attention falls with the distance, and the gains to the size of its outputs."""
        import torch

        from effconvert.surgery.mixing._retained import fitted

        return fitted(layer, values, "decay", torch.logit)

    def cache_slots(self, config: Config) -> Slots:
        """The decayed sum over all tokens, for each query head."""
        return {"state": ((config.kv_heads, config.heads // config.kv_heads, config.head_dim, config.head_dim), "float32")}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Retain, norm and gate.

        The paper's code scales scores and decays to keep sums small, and the norm undoes it. float32 does not need that, and without it the parallel,
        chunked and recurrent forms agree for any epsilon of the norm.
        """
        from torch.nn import functional

        from effconvert.surgery.mixing._features import attend
        from effconvert.surgery.mixing._retained import gated, normed

        query, live = call.grouped.float() * call.scaling, call.live.float()
        key, value = call.key.float() * live[:, None, :, None], call.value.float()
        fall = functional.logsigmoid(-weights["decay"].float()).unflatten(0, query.shape[1:3])[..., None] * live[:, None, None]  # no decay at padding
        shape = (*query.shape[1:3], key.shape[-1], value.shape[-1])
        sums, state = attend(query, key, value, call.read("state", {"state": (shape, "float32")}), fall, kernels=call.kernels)
        call.write(state=state)
        return gated(normed(sums.flatten(1, 2), weights["gain"]), weights, call.hidden)
