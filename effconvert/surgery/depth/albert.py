"""Write a bert as transformers' own albert: layers stored once."""
# V = vocabulary, M = width of the layers, E = width of the embedding, F = neurons of an FFN.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.checkpoint.shared import whole_layers
from effconvert.errors import ModelError, OptionError
from effconvert.families.encoders import BERT_DEFAULTS
from effconvert.surgery._surgery import Facts, Surgery

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model
    from effconvert.checkpoint.outer import Outer
    from effconvert.surgery._surgery import ForwardProtocol

NORMS = ("attn_post_norm", "attn_post_norm.bias", "mlp_post_norm", "mlp_post_norm.bias")


class Albert(Surgery):
    """Write a bert as transformers' own albert: layers stored once.

    transformers opens the result without effconvert. --groups G stores G layers, each for a group of neighbours, which share their norms too: it is
    fitted to what all of them compute, as in share-layers, which leaves each its own norms and loses less. --embedding E makes the tables of tokens,
    positions and types E numbers wide, with a norm over E numbers and a matrix to the width of the layers, fitted to the original's embeddings. With all
    layers and the full width no logit changes, and nothing is saved. A narrow embedding costs little. Shared layers cost much without training:
    dropping layers first (prune-layers) is better. docs/albert.md has measurements. Lan et al. 2019, arXiv 1909.11942.

    \b
    Examples:
      effconvert albert --embedding 128 google-bert/bert-base-uncased -o ./thin
      effconvert albert --groups 3 --embedding 128 ./all-MiniLM-L6-v2 -o ./shared
    """

    facts: ClassVar[Facts] = Facts("a bert", saves="parameters", native="albert", exact="with all layers, and an embedding of full width")

    groups: int | None = Field(
        None, ge=1, description="Layers to store; each runs in place of a group of neighbours. Default: all.", json_schema_extra={"metavar": "G"}
    )
    embedding: int | None = Field(None, ge=2, description="Width of the embedding. Default: that of the layers.", json_schema_extra={"metavar": "E"})
    pool: Literal["fitted", "first"] = Field(
        "fitted", description="What a group shares: a layer that is fitted to all of its layers on the calibration text (fitted), or its first layer (first)."
    )

    @property
    def label(self) -> str:
        """The name, with the numbers that are given."""
        return "-".join([self.name, *([str(self.groups)] if self.groups else []), *([f"embedding-{self.embedding}"] if self.embedding else [])])

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The numbers of groups and the widths."""
        cls().check(config)
        narrow = "" if config.predicts else f", --embedding 2 to {config.hidden}"
        return f"--groups 1 to {config.layers}{narrow}"

    def check(self, config: Config) -> None:
        """Refuse what is no plain bert, more groups than layers, and an embedding that the head cannot follow."""
        if not config.family.stored_once:
            raise ModelError(
                f"{config.kind} computes what transformers' albert does not, which is a bert with layers stored once; "
                "share-layers stores them once in a class of effconvert"
            )
        if config.needs_effconvert:
            raise ModelError(f"this {config.kind} has parts of effconvert in it, for which albert has no place; begin from the original")
        if (self.groups or 1) > config.layers:
            raise OptionError(f"--groups {self.groups} is more than the {config.layers} layers of this model; give at most {config.layers}")
        if self._width(config) > config.hidden:
            raise OptionError(f"--embedding {self.embedding} is more than the width of the layers; give at most {config.hidden}")
        if config.predicts and self._width(config) < config.hidden:
            raise OptionError(
                f"the head of {config.architecture} multiplies by the embedding what comes out of an activation, to which no narrow table can be fitted; "
                f"leave out --embedding, or save the encoder alone ({config.family.base})"
            )
        self.config(config)

    def is_exact(self, config: Config) -> bool:
        """If all layers are stored, and the embedding is as wide as they are."""
        return not self._groups(config) and self._width(config) == config.hidden

    def config(self, config: Config) -> Config:
        """Become an albert."""
        keys = {"embedding_size": self._width(config), "num_hidden_groups": self.groups or config.layers}
        target = config.become(config.family.stored_once)
        target = target.with_keys({**BERT_DEFAULTS, **target.raw, **keys})
        for record in whole_layers([target.group_of(index) for index in range(target.layers)]):
            target = target.with_shared(record.what, record.layers)
        return target

    def needs_calibration(self, config: Config) -> bool:
        """If shared layers are fitted."""
        return self.pool == "fitted" and bool(self._groups(config))

    def needs_original(self, config: Config) -> bool:
        """Likewise: the original's hidden states are what they are fitted to."""
        return self.needs_calibration(config)

    def reads_ahead(self, config: Config) -> bool:
        """Likewise: all layers of a group are read at its first."""
        return self.needs_calibration(config)

    def needs_survey(self, config: Config) -> bool:
        """If the embedding is fitted."""
        return self._width(config) < config.hidden

    def fit_bytes(self, config: Config) -> int:
        """Six matrices of the neurons of two layers, and a few of the embedding's width, in float64."""
        return 8 * (6 * (2 * config.ffn) ** 2 * self.needs_calibration(config) + 8 * config.hidden**2 * self.needs_survey(config))

    def notes(self, config: Config) -> str:
        """Say where nothing is saved."""
        return "nothing is saved: all layers and the whole embedding stay, and a matrix is added" if self.is_exact(config) else ""

    def survey(self, forward: ForwardProtocol) -> Mapping[str, Tensor]:
        """Return the fitted embedding."""
        from effconvert.surgery.embedding._mapped import fit

        return vars(fit(forward, self._width(forward.config)))

    def rewrite(self, model: Model) -> None:
        """Fit the first layer of each group, let the others share it, and write the embedding."""
        for group in self._groups(model.config):
            first = model.layers[group[0]]
            for index in group[1:]:
                model.layers[index].share(first, "layer")
            if self.pool == "fitted":  # not before: sharing asks the first layer for its parts, which would fit it at once
                first.later(partial(self._fit, path=model.layers[group[0] : group[-1] + 1], group=group))
        model.outer.later(self.outer)

    def outer(self, outer: Outer) -> None:
        """Add the matrix behind the embedding, narrow the tables, and leave out what a bert's head has of its pretraining."""
        import torch

        config, device = outer.config, "meta" if outer.shapes_only else "cpu"
        width, hidden = self._width(config), config.hidden
        if width < hidden:
            shapes = {"basis": (hidden, width), "matrix": (hidden, width), "bias": (hidden,)}
            fitted = outer.survey or {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            outer.defer_rows("embed", (config.vocabulary, width), lambda numbers: outer.rows_before("embed", numbers) @ fitted["basis"])
            for part in ("positions", "types"):
                outer[part] = outer.before(part).to(fitted["basis"].device) @ fitted["basis"]
            outer["embed_norm"], outer["embed_norm.bias"] = torch.ones(width, device=device), torch.zeros(width, device=device)
            outer["project_in"], outer["project_in.bias"] = fitted["matrix"], fitted["bias"]
        else:
            outer["project_in"], outer["project_in.bias"] = torch.eye(hidden, device=device), torch.zeros(hidden, device=device)
        if config.bare and "pooler.dense.weight" not in outer:  # AlbertModel always has one
            outer["pooler.dense.weight"], outer["pooler.dense.bias"] = torch.zeros(hidden, hidden, device=device), torch.zeros(hidden, device=device)
        for part in [part for part in outer if part.startswith("head.seq_relationship")]:  # a masked language model does not read it
            del outer[part]

    def _fit(self, layer: Layer, path: Sequence[Layer], group: Sequence[int]) -> None:
        for part in layer:
            layer[part] = layer[part]  # marks it as changed, for the plan
        if layer.activations:
            from effconvert.surgery.depth._fitted import fit_layer

            fit_layer(layer, path, group, NORMS)

    def _width(self, config: Config) -> int:
        """Return E."""
        return self.embedding or config.hidden

    def _groups(self, config: Config) -> list[tuple[int, ...]]:
        """Return the groups of two or more layers."""
        return [record.layers for record in self.config(config).shared]
