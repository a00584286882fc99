"""Turn an FFN without a gate into a gated one."""
# B = texts, T = tokens, M = hidden width, F = neurons of an FFN.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.surgery._replacement import PlaceContext, Replacement
from effconvert.surgery._surgery import Facts

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer

TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names in config.json of GELU by its tanh form
GELUS = ("gelu", "gelu_python", *TANH)
LEAST_SQUARES = 1.712  # the b with the least squared error of x sigmoid(b x) from GELU for normal x; at most 0.020 for any x
SLOPES = {"silu": 1.0, "swish": 1.0, "quick_gelu": 1.702, **dict.fromkeys(GELUS, LEAST_SQUARES)}  # activation -> b: it is about x sigmoid(b x)
EXACT: Mapping[str, tuple[str, ...]] = {"geglu": GELUS, "reglu": ("relu", "relu2"), "swiglu": ("silu", "swish", "quick_gelu")}


class Glu(Replacement):
    """Turn an FFN without a gate into a gated one.

    down(act(up x)) becomes down(act(gate x) * (up x)): the gate is the old projection, and the new one begins as 1 for every neuron, so no logit changes
    (GeGLU of GELU, ReGLU of ReLU; for squared ReLU it begins as the gate). SwiGLU of GELU has an error of at most 0.020 for each neuron's value, as
    x sigmoid(1.712 x) is its least-squares fit. By itself this saves nothing: it makes the FFN half as large again. It is for those who train on: gated FFNs
    learn better, and the new projection gets gradients from the first step.
    Shazeer 2020, arXiv 2002.05202; docs/glu.md.

    \b
    Examples:
      effconvert glu --activation geglu openai-community/gpt2
      effconvert glu --activation swiglu --layers 6-11 distilbert/distilbert-base-uncased
    """

    by_token: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        "models whose FFN is a module without a gate", saves="nothing: larger, to be trained", native="", exact="geglu of GELU, reglu of ReLU, swiglu of SiLU"
    )
    place: ClassVar[str] = "ffn"
    drops: ClassVar[tuple[str, ...]] = ("up", "down")

    activation: Literal["geglu", "swiglu", "reglu"] = Field(description="Activation of the gate: GELU, SiLU or ReLU.")
    form: Literal["erf", "tanh"] | None = Field(None, description="The formula of GELU, for geglu. Default: the model's.")

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The activations that are exact, and SwiGLU where it comes near."""
        cls.check_family(config)
        kind = activation_of(config)
        return "--activation " + " or ".join(name for name in EXACT if _fits(name, kind))

    @classmethod
    def check_family(cls, config: Config) -> None:
        """Refuse a gated FFN, experts, a family without a module for its FFN, and activations that no gated FFN has."""
        super().check_family(config)
        if config.family.experts_key:
            raise ModelError(f"{config.kind} has experts in place of an FFN, which stay as they are; give a model without")
        if "gate" in config.parts:
            raise ModelError(f"{config.kind} has a gate in its FFN already; give a model without, such as gpt2 or phi")
        config.place("ffn")  # raises where it has no module
        if not any(_fits(name, activation_of(config)) for name in EXACT):
            raise ModelError(f"{config.kind} computes {activation_of(config)} in its FFN, which no gated FFN is like; give a model with GELU, ReLU or SiLU")

    def check(self, config: Config) -> None:
        """Refuse an activation that is not like the model's."""
        super().check(config)
        if self.form and self.activation != "geglu":
            raise OptionError(f"--form {self.form} is of GELU, and --activation {self.activation} has none; leave it out")
        if not _fits(self.activation, kind := activation_of(config)):
            fitting = " or ".join(f"--activation {name}" for name in EXACT if _fits(name, kind))
            raise OptionError(f"--activation {self.activation} is not like the {kind} of this {config.kind}; give {fitting}")

    def is_exact(self, config: Config) -> bool:
        """If the gate has the model's activation."""
        return activation_of(config) in EXACT[self.activation] and self.form in (None, _form(config))

    def notes(self, config: Config) -> str:
        """Say what grows."""
        return "nothing is saved: the FFNs become half as large again, and are to be trained"

    def config(self, config: Config) -> Config:
        """Record the technique, with the formula of GELU."""
        form = self.form or (_form(config) if self.activation == "geglu" else None)
        return super(Glu, self.model_copy(update={"form": form})).config(config)

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Gate and up [F, M] and down [M, F], with biases."""
        inner, width = config.ffn, config.hidden
        return {
            **{"gate": (inner, width), "gate_bias": (inner,), "up": (inner, width), "up_bias": (inner,)},
            **{"down": (width, inner), "down_bias": (width,)},
        }

    def values(self, layer: Layer, place: str) -> Mapping[str, Tensor]:
        """Take the gate from `up`, and have the new projection give what makes the product the old activation."""
        import torch

        up, down = layer["up"], layer["down"]
        bias, shift = (layer[f"{part}.bias"] if f"{part}.bias" in layer else torch.zeros_like(layer[part][:, 0]) for part in ("up", "down"))
        kind = activation_of(layer.config)
        slope = SLOPES[kind] if self.activation == "swiglu" else 1.0  # x sigmoid(b x) = silu(b x) / b
        own = (up, bias) if kind == "relu2" else (torch.zeros_like(up), torch.full_like(bias, 1 / slope))
        return {"gate": up * slope, "gate_bias": bias * slope, "up": own[0], "up_bias": own[1], "down": down, "down_bias": shift}

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Return down(act(gate x) * (up x)) for x [B, T, M]."""
        from torch.nn import functional

        gate = functional.linear(hidden, weights["gate"], weights["gate_bias"])
        if self.activation == "geglu":
            gate = functional.gelu(gate, approximate="tanh" if self.form == "tanh" else "none")
        else:
            gate = functional.silu(gate) if self.activation == "swiglu" else functional.relu(gate)
        return functional.linear(gate * functional.linear(hidden, weights["up"], weights["up_bias"]), weights["down"], weights["down_bias"])


def activation_of(config: Config) -> str:
    """Return the activation of a model's FFN by its name in transformers, "" where config.json does not say it."""
    return next((str(name) for key in ("hidden_act", "activation_function", "activation") if (name := config.get(key))), "")


def _fits(name: str, kind: str) -> bool:
    return kind in EXACT[name] or (name == "swiglu" and kind in SLOPES)


def _form(config: Config) -> Literal["erf", "tanh"]:
    return "tanh" if activation_of(config) in TANH else "erf"
