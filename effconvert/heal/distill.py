"""Train a converted model to predict what the original predicts."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from effconvert import processes
from effconvert.errors import ModelError, OptionError
from effconvert.heal._healing import Healing
from effconvert.kernels._kinds import Kind
from effconvert.options import HomePath, Listed, Names
from effconvert.quantities import duration

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model
    from effconvert.surgery._surgery import Step

TOKENS = 262144  # to train on, where neither tokens nor minutes are given
ENDLESS = 10**12  # tokens, where minutes are


class Distill(Healing):
    """Train a converted model to predict what the original predicts.

    All weights are trained by transformers' Trainer on the divergence between the original's and the model's predictions of every token; logits are
    computed for a few tokens at a time. Masked language models see a text with masks; models without a head are compared by their hidden states.
    Held-out text decides: what is best there is the result, and the model stays as it is if nothing is better.
    It needs the model and the original in memory, and four numbers for each weight. A run that was stopped goes on from its last checkpoint.
    MODEL is the converted model.
    Hinton et al. 2015, arXiv 1503.02531; docs/distill-results.md has numbers.

    \b
    Examples:
      effconvert distill ./SmolLM2-135M-gqa-1 --teacher ./SmolLM2-135M --data articles.txt -o ./distilled
      effconvert distill ./pruned --teacher HuggingFaceTB/SmolLM2-135M --train-tokens 2000000
      effconvert distill ./pruned --teacher ./SmolLM2-135M --data articles.txt --cache-teacher ./predictions
      effconvert distill ./SmolLM2-135M --student-layers 20 --minutes 30 --passkey 256,1024
    """

    comes_last: ClassVar[bool] = True
    data: str = Field(
        "docstrings",
        description="Text to train on: a text file, JSON or parquet with a `text` or `messages` in each row, a dataset on the Hub (owner/name, or "
        "owner/name:config), or `docstrings` of the standard library. Messages are written by the chat template, and what the assistant says is predicted.",
        json_schema_extra={"metavar": "FILE|DATASET|docstrings"},
    )
    train_tokens: int | None = Field(
        None,
        ge=1024,
        le=10**12,
        description=f"Tokens to train on; the text is repeated where it has fewer. Default: {TOKENS}, or no limit with --minutes.",
        json_schema_extra={"metavar": "N"},
    )
    minutes: float | None = Field(
        None,
        gt=0,
        le=10**6,
        description="Train for so long, measurements included; the learning rate falls with the time. Another run may see another number of tokens.",
        json_schema_extra={"metavar": "NUMBER"},
    )
    window: int = Field(512, ge=16, le=10**6, description="Tokens in each window: a model learns to attend no further.")
    packing: Literal["joined", "documents"] = Field(
        "joined",
        description="Windows of the rows one after the other, which go across their ends (joined), or of one row each, filled up at the end (documents). "
        "Messages are never joined.",
    )
    batch_tokens: int = Field(512, ge=16, le=10**8, description="Tokens in each step of the optimiser; at least a window for each process.")
    rate: float = Field(1e-4, gt=0, le=1, description="Highest learning rate (AdamW, with a warm-up and a cosine).")
    recall: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the windows in which a passage comes twice: predicting it again teaches the model to find what is far back.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Numbers to compute in; weights and gradients stay float32. auto is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is "
        "faster if the CPU computes it (AVX512-BF16, AMX).",
    )
    objective: Kind = Field(
        "kl",
        description="KL(original || model) (kl), KL(model || original) (reverse-kl), or the Jensen-Shannon divergence, half of both to their mean (jsd).",
    )
    temperature: float = Field(1.0, gt=0, le=100, description="Divides logits before they are compared; the loss is multiplied by its square.")
    ce: float = Field(0.0, ge=0, le=1, description="Share of the loss on the text itself (cross-entropy); the rest is the divergence.")
    balance: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Coefficient of the load-balancing loss of a model with experts, which is added to the loss (0.01 in Switch Transformers; "
        "`router_aux_loss_coef` in transformers).",
    )
    student_layers: int | None = Field(
        None,
        ge=2,
        description="Make a student with so many layers first: MODEL is the original, its layers are dropped as by prune-layers --drop, and refit follows.",
        json_schema_extra={"metavar": "N"},
    )
    student_ffn: int | None = Field(
        None, ge=1, description="Make a student with so many neurons in each FFN first, as by narrow --ffn.", json_schema_extra={"metavar": "F"}
    )
    tasks: Names = Field(
        (),
        description="Tasks of lm-eval to measure with each held-out measurement: their scores stand in the log and in the curve.",
        json_schema_extra={"metavar": "TASK,…"},
    )
    include_path: HomePath | None = Field(None, description="Folder with task files of your own.", json_schema_extra={"metavar": "DIR"})
    limit: int | None = Field(None, ge=1, description="Only the first N documents of each task.", json_schema_extra={"metavar": "N"})
    passkey: Annotated[tuple[Annotated[int, Field(ge=64)], ...], Listed] = Field(
        (), description="Lengths in tokens at which to hide a passkey and ask for it, with each held-out measurement.", json_schema_extra={"metavar": "N,…"}
    )
    gradient_checkpointing: bool = Field(False, description="Compute activations of layers again for the gradients: less memory, a third more time.")
    report_to: str = Field(
        "none",
        description="Where the Trainer sends its log besides: tensorboard, wandb, or others that transformers knows and that are installed "
        "(TensorBoard into TENSORBOARD_LOGGING_DIR).",
        json_schema_extra={"metavar": "NAME"},
    )
    cache_teacher: HomePath | None = Field(
        None,
        description="Folder for the original's predictions: they are computed once and written there, and the original is not in memory while the model is "
        "trained. Later runs on the same text read them.",
        json_schema_extra={"metavar": "DIR"},
    )
    cache_kind: Literal["samples", "topk"] = Field(
        "samples",
        description="What is kept of each prediction: ids drawn from it, whose gradient is that of KL on average (samples), or the likeliest ids, and one "
        "probability for all others (topk).",
    )
    cache_size: int = Field(64, ge=1, le=65535, description="Ids kept of each prediction. Samples: ids drawn; one that comes often is stored once.")
    hidden: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the loss on hidden states after every layer; those of a teacher of another width are compared through linear maps, which are "
        "trained and left behind. A model without a head that predicts tokens is trained on its last hidden states, and with this on all.",
    )
    hidden_loss: Literal["mse", "cosine"] = Field(
        "mse", description="Distance of hidden states: squared error as a share of the original's mean square, or one minus the cosine."
    )
    unchanged_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Learning rate of the weights that are as in the original, as a share of --rate. 0 keeps them, and then they are in memory once.",
    )
    lora: int = Field(
        0,
        ge=0,
        le=4096,
        description="Rank of adapters (LoRA) beside the linear layers that are as in the original, in place of training these: they are in memory once. "
        "What the conversion changed is trained whole. The result has the adapters in its weights. 0: none.",
        json_schema_extra={"metavar": "RANK"},
    )

    @model_validator(mode="after")
    def _tasks_for_their_options(self) -> Self:
        if not self.tasks and (self.include_path or self.limit):
            raise ValueError(f"--{'limit' if self.limit else 'include-path'} is for lm-eval's tasks, and none is named; give --tasks, or leave it out")
        return self

    @model_validator(mode="after")
    def _what_a_cache_has(self) -> Self:
        if not self.cache_teacher and (without_effect := self.changed("cache_kind", "cache_size")):
            raise ValueError(f"{without_effect[0]} does nothing without --cache-teacher; give that too")
        if self.cache_teacher and self.minutes and not self.train_tokens:
            raise ValueError("--cache-teacher keeps the predictions of the tokens to train on, and --minutes alone does not say how many; give --train-tokens")
        if self.cache_teacher and self.cache_kind == "samples" and self.objective != "kl":
            raise ValueError(
                f"--objective {self.objective} needs the original's probability of what the model predicts, which samples do not have; "
                "use --cache-kind topk, or kl"
            )
        if self.lora and self.unchanged_rate < 1:
            raise ValueError("--lora keeps the weights that are as in the original, and --unchanged-rate says how fast they change; leave one of them out")
        if self.cache_teacher and (self.hidden or self.compares_weights):
            weights = f"{'--lora' if self.lora else '--unchanged-rate'} needs the original's weights"
            what = "--hidden needs the original's hidden states" if self.hidden else weights
            raise ValueError(f"{what}, which --cache-teacher does not keep; leave one of them out")
        return self

    def check(self, config: Config) -> None:
        """Refuse shares of the loss that are more than all of it, or that the model has no head for."""
        config.check_alone()
        _check_role(config)
        if self.ce + self.hidden > 1:
            raise OptionError(f"--ce {self.ce:g} and --hidden {self.hidden:g} are shares of the loss, and together more than 1")
        if self.ce and not config.predicts:
            raise OptionError(f"--ce needs a head that predicts tokens, and {config.architecture} has none; leave it out")
        if self.balance and not config.experts:
            raise OptionError(f"--balance needs experts, and a {config.kind} has none; leave it out, or do moe-split or moe first")
        if self.cache_teacher and not (config.decoder and config.predicts):
            raise OptionError(f"--cache-teacher keeps predictions of the next token, and {config.architecture} makes none; leave it out")
        if self.cache_teacher and self.cache_kind == "topk" and self.cache_size > config.vocabulary:
            raise OptionError(f"--cache-size {self.cache_size} is more than the {config.vocabulary} tokens of the model; give at most that")

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Any model, and the refusal of what is trained on pairs."""
        _check_role(config)
        return super().allowed_options(config)

    def needs_calibration(self, config: Config) -> bool:
        """Never: it trains the whole model."""
        return False

    def needs_original(self, config: Config) -> bool:
        """Only where layers or weights are compared with the original's."""
        return self.hidden > 0 or self.compares_weights

    @property
    def any_width(self) -> bool:
        """Where hidden states alone are compared: they are mapped to the original's width."""
        return not self.compares_weights

    def notes(self, config: Config) -> str:
        """Say how many steps it takes, and what is compared."""
        compared = "" if config.predicts else "; compares last hidden states, for there is no head that predicts tokens"
        tokens = f"{self.windows * self.window:,} tokens"
        length = f"{duration(60 * self.minutes)}, in steps of {tokens}" if self.minutes else f"{self.steps:,} steps of {tokens}"
        if self.minutes and self.train_tokens:
            length = f"{self.steps:,} steps of {tokens}, or for {duration(60 * self.minutes)} if they end first"
        return f"trains for {length}; held-out text decides which of the models on the way is kept{compared}"

    def in_bfloat16(self, device: str) -> bool:
        """Return whether a step on this type of device computes in bfloat16."""
        return self.precision == "bfloat16" or (self.precision == "auto" and device == "cuda")

    @property
    def compares_weights(self) -> bool:
        """Whether it matters which weights are as in the original."""
        return self.unchanged_rate < 1 or self.lora > 0

    @property
    def keeps_unchanged(self) -> bool:
        """Whether weights that are as in the original stay, so that both models have the same."""
        return self.unchanged_rate == 0 or self.lora > 0

    @property
    def windows(self) -> int:
        """Windows in a step."""
        return max(processes.count(), self.batch_tokens // self.window)

    @property
    def steps(self) -> int:
        """Steps of the optimiser."""
        tokens = self.train_tokens or (ENDLESS if self.minutes else TOKENS)
        return max(1, tokens // (self.windows * self.window))

    @property
    def makes_student(self) -> bool:
        """Whether its options describe a student."""
        return bool(self.student_layers or self.student_ffn)

    def stands_for(self, config: Config) -> tuple[Step, ...]:
        """Return the steps that make the student that --student-layers and --student-ffn describe, and this one without these options.

        Raises:
            OptionError: the model has no more layers, or another model is named as the teacher.
        """
        if not self.makes_student:
            return (self,)
        if self.teacher:
            raise OptionError("the student of --student-layers or --student-ffn is made of MODEL, which is its teacher; leave --teacher out")
        from effconvert.heal.refit import Refit
        from effconvert.surgery.depth.prune_layers import PruneLayers
        from effconvert.surgery.width.narrow import Narrow

        if self.student_layers and self.student_layers >= config.layers:
            raise OptionError(f"--student-layers {self.student_layers} is not fewer than the {config.layers} layers of the model; give fewer")
        smaller: list[Step] = [PruneLayers(drop=config.layers - self.student_layers)] if self.student_layers else []
        smaller += [Narrow(ffn=self.student_ffn)] if self.student_ffn else []
        return (*smaller, Refit(), self.model_copy(update={"student_layers": None, "student_ffn": None}))

    def rewrite(self, model: Model) -> None:
        """Change nothing here: the whole model is trained when it is written."""

    def changes(self, layer: Layer, originals: range) -> list[str]:
        """None by itself."""
        return []

    def heal(self, layer: Layer, originals: range) -> None:
        """Do nothing: see `rewrite`."""


def _check_role(config: Config) -> None:
    if config.encoder_decoder:
        raise ModelError(
            f"{config.kind} is an encoder-decoder, which is trained on pairs of texts, and distill knows of texts alone; take refit or transfer for its "
            "encoder, and train it with Seq2SeqTrainer of transformers"
        )
