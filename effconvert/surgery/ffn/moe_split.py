"""Split each FFN into experts, of which a token runs only some."""
# E = parts of an FFN, K = parts that run for a token, S = of these, parts that always run; M = hidden width, F = neurons of an FFN.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.errors import OptionError
from effconvert.surgery._surgery import Facts, Layerwise
from effconvert.surgery.ffn._targets import become_sparse, check_dense, choose, expert_step, parts_of_ffn, width_note, with_experts

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.ffn._neurons import Split

FLAT = 2.0**-10  # the router's weights are that small: the softmax of its scores is 1/K almost, as in the dense sum, and their order is the same
NUMBERS = 2**26  # most energies in memory: tokens times neurons


class MoeSplit(Layerwise):
    """Split each FFN into experts, of which a token runs only some.

    The neurons of an FFN are grouped into E parts of one size. S of them always run (the shared expert), and a router chooses K - S of the others
    for each token. Nothing is added but the router, so the model keeps its size, and a token costs K/E of the FFNs' arithmetic. Grouping and router are
    fitted to the calibration text in closed form. With K = E no logit changes; with fewer the model gets worse, and --refit brings part of it back.
    The output is transformers' own family with experts: a llama becomes a qwen2_moe, or with --shared 0 a mixtral. At the same perplexity dropping
    layers (prune-layers) saves more, and on a CPU decoding is no faster: it is a start for training. docs/moe-split.md has measurements.
    MoEfication: Zhang et al. 2022, arXiv 2110.01786; CMoE: Pei et al. 2025, arXiv 2502.04416.

    \b
    Examples:
      effconvert moe-split --experts 8 --active 6 --refit ./SmolLM2-135M
      effconvert moe-split --experts 16 --active 8 --shared 6 --layers 4-29 ./SmolLM2-135M -o ./sparse
    """

    facts: ClassVar[Facts] = Facts(
        "decoders with a gated FFN",
        saves="arithmetic of a token's FFNs",
        native="the family with experts (a llama as a qwen2_moe)",
        exact="with --active as many as --experts",
    )

    experts: int = Field(ge=2, le=1024, description="Parts of each FFN.", json_schema_extra={"metavar": "E"})
    active: int = Field(ge=1, description="Parts that run for a token, with those of the shared expert.", json_schema_extra={"metavar": "K"})
    shared: int | None = Field(
        None,
        ge=0,
        description="Of these, parts that always run, as the shared expert. Default: half of K, or 0 where the family has no shared expert.",
        json_schema_extra={"metavar": "S"},
    )

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The numbers of experts, with the family of the result."""
        return f"--experts {parts_of_ffn(config)} --active K, as a {' or a '.join(with_experts(config))}"

    def check(self, config: Config) -> None:
        """Refuse models without a matching family with experts, and numbers that contradict each other."""
        with_experts(config)
        if config.ffn % self.experts:
            raise OptionError(f"--experts {self.experts} does not divide the {config.ffn} neurons of this model's FFN; give {parts_of_ffn(config)}")
        if (width := config.ffn // self.experts) % (step := expert_step(config)):
            raise OptionError(f"--experts {self.experts} makes experts {width} wide, and torch runs only multiples of {step}; give {parts_of_ffn(config)}")
        if self.active > self.experts:
            raise OptionError(f"--active {self.active} is more than --experts {self.experts}; give at most {self.experts}")
        if self.shared is not None and self.shared >= self.active:
            raise OptionError(f"--shared {self.shared} leaves the router none of the --active {self.active} parts to choose; give at most {self.active - 1}")
        self._target_config(config)
        check_dense(config, self.chosen(config))

    def is_exact(self, config: Config) -> bool:
        """If all parts run and are weighted by powers of two: then nothing is rounded."""
        routed = self.experts - self._shares(config)
        return self.active == self.experts and routed & (routed - 1) == 0

    def needs_calibration(self, config: Config) -> bool:
        """If some parts do not run."""
        return self.active < self.experts

    def notes(self, config: Config) -> str:
        """Say what becomes cheaper, and what does not."""
        cheaper = f"a token runs {self.active} of {self.experts} parts of an FFN; the size on disk and in memory stays"
        notes = ["all experts run, so nothing becomes cheaper" if self.active == self.experts else cheaper, width_note(config.ffn // self.experts)]
        return "; ".join(filter(None, notes))

    def config(self, config: Config) -> Config:
        """Become the family with experts."""
        return self._target_config(config)

    def layer(self, layer: Layer) -> None:
        """Replace the FFN by a router and its parts."""
        shared, width = self._shares(layer.config), layer.config.ffn // self.experts
        routed = self.experts - shared
        split = self._split(layer, routed, shared)
        for number in range(routed):
            self._defer(layer, f"experts.{number}.", width, split.routed[number], self.active - shared)
        layer["router"] = split.router.to("meta" if layer.shapes_only else "cpu")
        if shared:
            self._defer(layer, "shared_", shared * width, split.shared, 2)  # its gate is a sigmoid of 0: one half
            layer["shared_router"] = split.router.new_zeros(1, layer.config.hidden).to(layer["router"].device)
        for part in ("gate", "up", "down"):
            del layer[part]

    def _defer(self, layer: Layer, prefix: str, width: int, neurons: Tensor, factor: int) -> None:
        """Assign the projections of some neurons, the output times a factor that its weight in the sum takes away again."""

        def of(part: str) -> Tensor:
            weights = layer.before(part)
            return weights[:, neurons] * factor if part == "down" else weights[neurons]

        for part in ("gate", "up", "down"):
            shape = (layer.config.hidden, width) if part == "down" else (width, layer.config.hidden)
            layer.defer(f"{prefix}{part}", shape, partial(of, part))

    def _split(self, layer: Layer, routed: int, shared: int) -> Split:
        import torch

        from effconvert.surgery.ffn._neurons import Sample, by_energy, in_order

        if not layer.activations:
            return in_order(layer.config.ffn, routed, shared, layer.config.hidden)
        windows: list[Tensor] = []
        energies: list[Tensor] = []
        lengths = layer["down"].square().sum(0)  # [F], squared
        step = 1 + layer.config.ffn * sum(ids.numel() for ids in layer.activations.ids) // NUMBERS
        for capture in layer.activations.capture(layer, ("gate", "down"), until="down"):
            inputs, hidden = (capture.inputs[part].reshape(*capture.state.shape[:2], -1)[:, ::step] for part in ("gate", "down"))
            windows += inputs
            energies.append((hidden.square() * lengths.to(hidden)).flatten(0, 1))
        split = by_energy(Sample(windows, torch.cat(energies)), routed, shared, self.active - shared)
        return replace(split, router=split.router * FLAT)

    def _shares(self, config: Config) -> int:
        """Return S."""
        if self.shared is not None:
            return self.shared
        return self.active // 2 if any(target.family.shared_ffn_key for target in self._able(config)) else 0

    def _able(self, config: Config) -> list[Config]:
        return choose(with_experts(config), self.chosen(config), config.layers)

    def _target_config(self, config: Config) -> Config:
        shared, width = self._shares(config), config.ffn // self.experts
        able = self._able(config)
        fitting = [target for target in able if bool(target.family.shared_ffn_key) == bool(shared)]
        if not fitting:
            kinds = " or a ".join(target.kind for target in able)
            raise OptionError(
                f"a {kinds} has no shared expert; leave out --shared" if shared else f"a {kinds} always has a shared expert; give --shared 1 or more"
            )
        return become_sparse(fitting[0], self.chosen(config), self.experts - shared, self.active - shared, width, shared * width)
