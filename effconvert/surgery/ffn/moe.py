"""Copy each FFN into experts behind a router: sparse upcycling (MoE)."""
# E = experts, K = experts that run for a token, G = granularity, M = hidden width, F = width inside the FFN.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.checkpoint.replaced import DEEPEST
from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Facts, Layerwise
from effconvert.surgery.ffn._targets import become_sparse, check_dense, choose, expert_step, parts_of_ffn, width_note, with_experts

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer

FFN = ("gate", "up", "down")
SPREAD = 0.02  # of the router's weights, a standard deviation
SHARED = 32  # neurons of qwen2_moe's shared expert, whose output is zero at first: the smallest number that every loader takes


class Moe(Layerwise):
    """Copy each FFN into experts behind a router: sparse upcycling (MoE).

    This makes a model LARGER: every FFN is stored E times, and each token runs K of them. It is the start of MoE training; without training
    nothing improves. The output is transformers' own family with experts (llama becomes mixtral, qwen3 becomes qwen3_moe). The logits stay the same:
    the experts are equal at first, and the weights of the chosen ones sum to one. --noise and --drop-upcycling make experts differ and change the
    logits.
    Komatsuzaki et al. 2023, arXiv 2212.05055; Drop-Upcycling: Nakamura et al. 2025, arXiv 2502.19261; granular experts: He et al. 2024,
    arXiv 2410.07524.

    \b
    Examples:
      effconvert moe --experts 8 ./SmolLM2-135M
      effconvert moe --experts 8 --top-k 1 --granularity 4 ./Qwen3-0.6B -o ./fine
      effconvert moe --experts 8 --drop-upcycling 0.5 --layers 1-27/2 ./Qwen2.5-0.5B
    """

    facts: ClassVar[Facts] = Facts(
        "decoders with a gated FFN",
        saves="nothing: it is a start for training",
        native="the family with experts (a llama as a mixtral)",
        exact="without --noise and --drop-upcycling",
    )

    experts: int = Field(ge=2, le=1024, description="Experts of a layer, each a copy of its FFN.", json_schema_extra={"metavar": "E"})
    top_k: int = Field(2, ge=1, description="Experts that run for a token.", json_schema_extra={"metavar": "K"})
    granularity: int = Field(
        1,
        ge=1,
        description="Split each expert into G smaller ones: E*G experts, of which K*G run. At first the router chooses all G parts of an expert together.",
        json_schema_extra={"metavar": "G"},
    )
    noise: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Add normal noise to the experts, in multiples of each matrix's standard deviation; for example 0.01."
    )
    drop_upcycling: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Redraw this share of each expert's neurons, with the mean and standard deviation of the old ones; needs training. The paper has 0.5.",
        json_schema_extra={"metavar": "FRACTION"},
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Random seed of routers, noise and neurons.")

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Any numbers, with the family of the result."""
        return f"--experts E --top-k K, as a {next(iter(with_experts(config)))}"

    def check(self, config: Config) -> None:
        """Refuse models without a matching family with experts, and numbers that contradict each other."""
        self._target_config(config)
        if self.top_k > self.experts:
            raise OptionError(f"--top-k {self.top_k} is more than --experts {self.experts}; give at most {self.experts}")
        if self.experts * self.granularity > DEEPEST:
            raise OptionError(f"--experts {self.experts} times --granularity {self.granularity} is more experts than any model has; give at most {DEEPEST}")
        step = expert_step(config)
        if config.ffn % step:
            raise ModelError(f"experts would be {config.ffn} wide, as this model's FFN is, and torch runs only multiples of {step}; take another model")
        if config.ffn % (self.granularity * step):
            raise OptionError(
                f"--granularity {self.granularity} does not divide the {config.ffn} neurons of this model's FFN into experts {step} wide or a multiple of it, "
                f"which torch needs; give {parts_of_ffn(config)}"
            )
        check_dense(config, self.chosen(config))

    def is_exact(self, config: Config) -> bool:
        """If experts are copies, or slices whose scale is a power of two: then nothing is rounded."""
        return not (self.noise or self.drop_upcycling) and self.granularity & (self.granularity - 1) == 0

    def notes(self, config: Config) -> str:
        """Say that the model needs training, and what it costs until then."""
        notes = [f"it gets larger, a token's FFNs cost {self.top_k} x what they cost before, and nothing is better until it is trained"]
        notes += ["random noise or neurons change the logits"] if self.noise or self.drop_upcycling else []
        if self.granularity > 1:
            notes.append("in bfloat16 the slices of two experts can tie, and then a few tokens get some of each")
        notes += [note] if (note := width_note(config.ffn // self.granularity)) else []
        return "; ".join(notes)

    def config(self, config: Config) -> Config:
        """Become the family with experts; defaults of the old family that differ there are written out."""
        return self._target_config(config)

    def layer(self, layer: Layer) -> None:
        """Replace the FFN by a router and copies or slices of it."""
        import torch

        family, width = self._target_config(layer.config).family, layer.config.hidden
        for number in range(self.experts * self.granularity):
            for part in FFN:
                self._expert(layer, number, part)
        layer["router"] = self._normal(layer, "router", self.experts, width)[:, None].expand(-1, self.granularity, -1).flatten(0, 1)
        if family.shared_ffn_key:
            for part in ("shared_gate", "shared_up"):
                layer[part] = self._normal(layer, part, SHARED, width)
            for part, shape in (("shared_down", (width, SHARED)), ("shared_router", (1, width))):
                layer[part] = torch.zeros(shape, device="meta" if layer.shapes_only else "cpu")
        for part in FFN:
            del layer[part]

    def _target_config(self, config: Config) -> Config:
        chosen = self.chosen(config)
        target = choose(with_experts(config), chosen, config.layers)[0]
        return become_sparse(target, chosen, self.experts * self.granularity, self.top_k * self.granularity, config.ffn // self.granularity, SHARED)

    def _expert(self, layer: Layer, number: int, part: str) -> None:
        to, inner, width = f"experts.{number}.{part}", layer.config.ffn // self.granularity, layer.config.hidden
        if self.granularity == 1 and not (self.noise or self.drop_upcycling):
            layer.copy(part, to)
        else:
            layer.defer(to, (width, inner) if part == "down" else (inner, width), partial(self._expert_weights, layer, number, part))

    def _expert_weights(self, layer: Layer, number: int, part: str) -> Tensor:
        """Return a projection of an expert: a slice of the neurons, some of them redrawn, with noise."""
        import torch

        inner = layer.config.ffn // self.granularity
        start, whole = number % self.granularity * inner, layer.before(part)
        neurons = (whole.T if part == "down" else whole)[start : start + inner].clone()  # [F/G, M], a row for each neuron
        del whole  # at most two large matrices are in memory
        if part == "down":
            neurons *= self.granularity  # each of the G slices has a G-th of the weight
        if self.drop_upcycling:
            new = torch.randperm(inner, generator=self._generator(layer, number, "neurons"))[: int(self.drop_upcycling * inner)]
            old = neurons[new]
            if len(new):
                neurons[new] = torch.randn(old.shape, generator=self._generator(layer, number, f"new {part}")).mul_(old.std(correction=0)).add_(old.mean())
        if self.noise:
            noise = torch.randn(neurons.shape, generator=self._generator(layer, number, f"noise {part}"))
            neurons += noise.mul_(self.noise * neurons.std(correction=0))
        return neurons.T if part == "down" else neurons

    def _normal(self, layer: Layer, part: str, rows: int, columns: int) -> Tensor:
        import torch

        if layer.shapes_only:
            return torch.empty(rows, columns, device="meta")
        return SPREAD * torch.randn(rows, columns, generator=self._generator(layer, 0, part))

    def _generator(self, layer: Layer, number: int, what: str) -> Generator:
        import torch

        return torch.Generator().manual_seed(Random(f"{self.seed}, {layer.index}, {number}, {what}").getrandbits(63))
