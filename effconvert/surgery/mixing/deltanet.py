"""Linear attention that replaces what it has for a key (gated DeltaNet)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, M = hidden width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing
from effconvert.surgery.mixing._retained import OPEN, UNKNOWN

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call, Slots


class Deltanet(Mixing):
    """Linear attention that replaces what it has for a key (gated DeltaNet).

    S <- alpha S + k (beta (v - alpha k S)), o = q S, with queries and keys of length 1: the state S forgets by alpha, and of what it has for a key a share
    of beta is replaced. Both depend on the token. A norm and a gate for each head follow. There is no softmax, so a pretrained model has to be trained
    again. Alpha begins as each KV head's attention falls with the distance, beta at a half, outputs at their original size. The state is a D x D matrix
    for each KV head, for any length. Queries and keys keep the family's RoPE; the paper's short convolution is left out.
    On a CPU it is no faster than softmax up to 2,048 tokens, and twice as fast at 8,192.
    Yang et al. 2024, arXiv 2412.06464.

    \b
    Examples:
      effconvert deltanet --layers 1-29/2 ./SmolLM2-135M -o ./deltanet
      effconvert deltanet --keep-softmax 0,-1 --transfer ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts("decoders", saves="KV cache: a state of fixed size", native="", exact="")

    no_encoders = "goes through a text once, from its first token; encoders see later tokens too: linear and performer are for them"

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """What alpha and beta of each KV head depend on, and gain and gate of each query head."""
        inner, groups = config.heads * config.head_dim, config.kv_heads
        return {
            "decay": (groups, config.hidden),
            "decay_bias": (groups,),
            "rate": (groups, config.hidden),
            "rate_bias": (groups,),
            "gain": (config.heads, config.head_dim),
            "gate": (inner, config.hidden),
            "gate_bias": (inner,),
        }

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Alpha and beta the same for all tokens, and a gate of 1."""
        import torch

        values = {name: torch.zeros(shape) for name, shape in self.parameters(config).items()}
        # Stores the logit of 1 - alpha: in bfloat16 alphas near 1 would be equal.
        decay = torch.logit(torch.full_like(values["decay_bias"], UNKNOWN))
        return {**values, "decay_bias": decay, "gain": torch.ones_like(values["gain"]), "gate_bias": torch.full_like(values["gate_bias"], OPEN)}

    def needs_calibration(self, config: Config) -> bool:
        """Decays and sizes are fitted."""
        return True

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Fit the decays to how attention falls with the distance, and the gains to the size of its outputs."""
        import torch

        from effconvert.surgery.mixing._retained import fitted

        return fitted(layer, values, "decay_bias", torch.logit)

    def cache_slots(self, config: Config) -> Slots:
        """The matrix of each KV head."""
        return {"state": ((config.kv_heads, config.head_dim, config.head_dim), "float32")}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Run the delta rule, norm and gate."""
        from torch.nn import functional

        from effconvert.surgery.mixing._delta import delta_rule
        from effconvert.surgery.mixing._retained import gated, normed

        def of_token(name: str) -> Tensor:
            """Return a number for each token, [B, Hk, T, 1]."""
            return (functional.linear(call.hidden, weights[name].to(call.hidden.dtype)).float() + weights[f"{name}_bias"].float()).mT[..., None]

        live = call.live[:, None, :, None].float()  # padding neither writes nor makes anything forget
        query, key = functional.normalize(call.grouped.float(), dim=-1), functional.normalize(call.key.float(), dim=-1)
        fall, rate = functional.logsigmoid(-of_token("decay")) * live, of_token("rate").sigmoid() * live
        state = call.read("state", {"state": ((key.shape[1], key.shape[-1], call.value.shape[-1]), "float32")})
        sums, state = delta_rule(query, -rate * fall.exp() * key, key, rate * call.value.float(), fall, state)
        call.write(state=state)
        return gated(normed(sums.flatten(1, 2), weights["gain"]), weights, call.hidden)
