"""Keep fewer neurons in each FFN, and fewer heads."""
# M = hidden width, F = neurons of an FFN, H = query heads, Hk = KV heads, D = head width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Facts, Surgery

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer


class Narrow(Surgery):
    """Keep fewer neurons in each FFN, and fewer heads.

    Neurons go one after the other, each time the one whose output the others can best make up for on the calibration text (optimal brain surgeon);
    the output projection of those that stay is fitted to the output of all. Heads go in the same way: as many from each KV head, or whole KV heads with
    their query heads. Layers are converted in order, each on the outputs of the converted layers below it. The model stays in its own class, gets
    smaller, and computes less. --refit then fits the outputs to the original's hidden states. At the same number of parameters, dropping whole layers
    costs less on small models: compare with prune-layers.
    Frantar & Alistarh 2022, arXiv 2208.11580; Kurtic et al. 2023, arXiv 2302.04089 (ZipLM); docs/narrow.md has measurements.

    \b
    Examples:
      effconvert narrow --ffn 1344 --refit ./SmolLM2-135M
      effconvert narrow --heads 6 --refit ./SmolLM2-135M
      effconvert narrow --ffn 12288 --calibrate mine.txt meta-llama/Llama-3.1-8B -o ./narrow
    """

    facts: ClassVar[Facts] = Facts(
        "models with an FFN; heads: those whose class knows their width",
        saves="parameters and arithmetic",
        native="its own class",
        exact="with as many as there are",
    )

    ffn: int | None = Field(None, ge=1, description="Neurons of each FFN to keep, F; GPUs like multiples of 64.", json_schema_extra={"metavar": "F"})
    heads: int | None = Field(
        None,
        ge=1,
        description="Query heads to keep, H: a multiple of the KV heads, or of the query heads of one KV head; then whole KV heads go.",
        json_schema_extra={"metavar": "H"},
    )

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return the message for an unknown option `name`; for `--hidden` with the reason."""
        if name == "hidden":
            return (
                "the width of the stream stays: a head that is tied to the embedding cannot follow its rotation, and fewer channels lose to dropped layers "
                "by far (docs/log.md); give --ffn or --heads, or take prune-layers"
            )
        return super().unknown(name)

    @property
    def label(self) -> str:
        """The name, with the numbers that are given."""
        return "-".join([self.name, *([str(self.ffn)] if self.ffn else []), *([f"heads-{self.heads}"] if self.heads else [])])

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The numbers that there are."""
        options, refusals = [], []
        for flag, change, count, part in (("--ffn F", config.with_ffn, "ffn", "down"), ("--heads H", config.with_heads, "heads", "o")):
            try:
                change(getattr(config, count))
                if shared := [layer for layer in range(config.layers) if config.shares(layer, part)]:
                    raise ModelError(
                        f"layer {shared[0]} shares its {part} with others, and narrow would fit it to each of them; narrow first, and share afterwards"
                    )
                options.append(f"{flag}, fewer than {getattr(config, count)}")
            except ModelError as error:
                refusals.append(error)
        if not options:
            raise refusals[0]
        return "; ".join(options)

    def check(self, config: Config) -> None:
        """Refuse more than there are, and families that cannot have fewer."""
        if self.ffn is None and self.heads is None:
            raise OptionError("give --ffn, the neurons of each FFN to keep, or --heads, the query heads to keep, or both")
        self.config(config)
        if (self.ffn or 0) > config.ffn:
            raise OptionError(f"--ffn {self.ffn} is more than the {config.ffn} neurons of this model's FFNs; give at most {config.ffn}")

    def is_exact(self, config: Config) -> bool:
        """Only where all stay."""
        return self.ffn in (None, config.ffn) and self.heads in (None, config.heads)

    def config(self, config: Config) -> Config:
        """Write the new numbers."""
        narrow = config.with_heads(self.heads) if self.heads else config
        return narrow.with_ffn(self.ffn) if self.ffn else narrow

    def needs_calibration(self, config: Config) -> bool:
        """If some go."""
        return not self.is_exact(config)

    def fit_bytes(self, config: Config) -> int:
        """Six matrices of all neurons, or of all heads, in float64."""
        return 6 * 8 * max(config.ffn if self.ffn else 0, config.heads * config.head_dim if self.heads else 0) ** 2

    def notes(self, config: Config) -> str:
        """Say where nothing changes."""
        return "as many neurons and heads as there are, so nothing changes" if self.is_exact(config) else ""

    def layer(self, layer: Layer) -> None:
        """Drop heads and neurons."""
        config = layer.config
        fewer_heads, fewer_neurons = (wanted not in (None, there) for wanted, there in ((self.heads, config.heads), (self.ffn, config.ffn)))
        trial = layer.on_top(layer.index, config)  # runs as the layer will, in the shapes that it has
        heads = self._heads(trial, self.heads or 1) if fewer_heads and "o" in layer else None
        neurons = self._neurons(trial, self.ffn or 1) if fewer_neurons and "down" in layer else None
        if heads:
            kept, layer["o"] = heads
            groups = config.with_heads(len(kept)).kv_heads
            for part in ("q", "q.bias"):
                if part in layer:
                    layer[part] = _by_head(layer[part], config.heads, kept)
            if groups < config.kv_heads:
                for part in layer.per_kv_head:
                    layer[part] = _by_head(layer[part], config.kv_heads, kept[:: len(kept) // groups] // (config.heads // config.kv_heads))
        if neurons:
            kept, layer["down"] = neurons
            for part in ("gate", "gate.bias", "up", "up.bias"):
                if part in layer:
                    layer[part] = layer[part][kept]

    def _heads(self, trial: Layer, count: int) -> tuple[Tensor, Tensor]:
        """Return the query heads that stay, and their output projection; that of `trial` is zero for the others."""
        import torch

        width = trial.config.head_dim
        if not trial.activations:
            return torch.arange(count), trial["o"][:, : count * width]
        from effconvert.surgery.width._fewer import fewer_heads

        kept, outputs = fewer_heads(trial, count, trial.config.with_heads(count).kv_heads)
        every = torch.zeros_like(trial["o"])
        every.unflatten(1, (-1, width))[:, kept] = outputs.unflatten(1, (-1, width))
        trial["o"] = every
        return kept, outputs

    def _neurons(self, trial: Layer, count: int) -> tuple[Tensor, Tensor]:
        """Return the neurons that stay, and their output projection."""
        import torch

        if not trial.activations:
            return torch.arange(count), trial["down"][:, :count]
        from effconvert.surgery.width._fewer import fewer_neurons

        return fewer_neurons(trial, count)


def _by_head(rows: Tensor, count: int, kept: Tensor) -> Tensor:
    """Return the rows [count * D, ...] of some heads."""
    by_head: Tensor = rows.unflatten(0, (count, -1))
    return by_head[kept].flatten(0, 1)
