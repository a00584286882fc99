"""A Trainer of a student: its learning rates, its checkpoints, and what its log says."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState

from effconvert.errors import OptionError
from effconvert.heal._balance import balance
from effconvert.heal._deadline import rate
from effconvert.heal._lora import NAMES, RATE, Adapters
from effconvert.heal._projections import Projections
from effconvert.heal._training_log import SCORE, first_measurement
from effconvert.heal.distill import Distill
from effconvert.modeling.transformers_internals import unset_hf_deepspeed_config

Scores = Callable[[Any], Mapping[str, float]]  # model -> its scores by name
WARMUP = 0.05  # of a training


class StudentTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss a subclass computes."""

    def __init__(self, options: Distill, scores: Scores | None, **more: Any) -> None:
        super().__init__(**more)
        self.options, self.scores = options, scores
        if self.zero_stage == 3:
            unset_hf_deepspeed_config()  # otherwise it shares out each model that is loaded later, such as those that the first process alone verifies
            if not self.zero.zero3_save_16bit_model:
                raise OptionError(
                    "with ZeRO-3 the weights of a checkpoint are gathered only on request, and distill needs them; set zero3_save_16bit_model: true, as "
                    "configs/zero3.yaml does"
                )
        self.files: Mapping[str, bytes] = {}  # of each checkpoint, beside weights and configuration: names and contents
        self.same: dict[str, str] = {}  # parameters that are as in the teacher, and their names there
        self.adapters: Adapters | None = None
        self.projections: Projections | None = None
        self.balance = balance(self.model, options.balance > 0)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which accumulation averages
        self.began = time.monotonic()

    @property
    def zero(self) -> Any:
        """accelerate's settings of DeepSpeed's ZeRO; None without it."""
        return self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO; 0 without it."""
        return self.zero.zero_stage if self.zero else 0

    @property
    def shares_weights_out(self) -> bool:
        """Whether processes have parts of the weights (FSDP, DeepSpeed), so that two models cannot have one copy."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def adapt(self) -> None:
        """Put adapters beside the linear layers that are as in the teacher.

        Raises:
            OptionError: FSDP or DeepSpeed shares the weights out.
        """
        if self.shares_weights_out:
            raise OptionError("--lora works in one process, or with configs/ddp.yaml; FSDP and DeepSpeed share the weights out: leave it out there")
        self.adapters = Adapters(self.model, self.same, self.options.lora)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a plain model, with its tokenizer. Adapters are in its weights; they and projections have files of their own for a run that goes on."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            for name, content in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            for aside in (self.adapters, self.projections):
                if aside:
                    aside.save(folder)
            state_dict = self.adapters.merged() if self.adapters else state_dict
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights as any model is loaded: the Trainer would skip tensors that have other names on disk, such as those of experts."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict()
        if self.adapters:
            self.adapters.load(resume_from_checkpoint, stored)
        else:
            (model or self.model).load_state_dict(stored)
        if self.projections:
            self.projections.load(Path(resume_from_checkpoint))

    def create_optimizer(self, model: Any = None) -> Any:
        """Give adapters, routers, and weights that are as in the teacher, a rate of their own, or none."""
        routers = self.balance.rates if self.balance else {}
        if not (self.same or routers or self.projections):
            return super().create_optimizer(model)
        groups: dict[float, list[Tensor]] = {}  # multiple of the rate -> what is trained by it
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                factor = RATE if name.endswith(NAMES) else routers.get(name, 1.0) * (self.options.unchanged_rate if name in self.same else 1)
                groups.setdefault(factor, []).append(parameter)
        if self.projections:
            groups.setdefault(1.0, []).extend(self.projections.parameters())
        rate, betas = self.args.learning_rate, (self.args.adam_beta1, self.args.adam_beta2)
        parameters = [{"params": group, "lr": rate * factor} for factor, group in groups.items()]
        self.optimizer: Any = torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=0.0, fused=self.args.device.type == "cuda")
        if projections := self.projections:
            self.optimizer.register_step_post_hook(lambda *_: projections.zero_grad())  # the Trainer does so for the model alone
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate fall with the steps, or with the time if that is limited."""
        if not self.options.minutes:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler: Any = LambdaLR(self.optimizer if optimizer is None else optimizer, lambda _: rate(self.progress(), WARMUP))
        return self.lr_scheduler

    @property
    def seconds(self) -> float:
        """The time that training has taken until now, with that of the runs that this one goes on with."""
        before: float = next((entry["seconds"] for entry in reversed(self.state.log_history) if "seconds" in entry), 0.0)
        seconds: float = before + time.monotonic() - self.began
        return seconds

    def progress(self) -> float:
        """Return the share of the training that is over, by the first process's clock if minutes are limited."""
        steps: float = self.state.global_step / self.options.steps
        return max(steps, self._share_of_minutes(self.seconds)) if self.options.minutes else steps

    def measured(self) -> float:
        """Return the share of the minutes that the first measurement took, by the first process's clock; it ran the teacher too."""
        return self._share_of_minutes(first_measurement(self.state.log_history)["measuring"])

    def _share_of_minutes(self, seconds: float) -> float:
        assert self.options.minutes
        return float(broadcast(torch.tensor(seconds / 60 / self.options.minutes, device=self.args.device)))

    def was_done(self, checkpoint: Path) -> bool:
        """Whether the training had ended with this checkpoint; its state is that of the Trainer then, which would do one more step if it went on."""
        self.state: TrainerState = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return self.progress() >= 1

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """Add the time that training took until now, and the scores of the model to a measurement."""
        began = time.monotonic()
        if "eval_loss" in logs and self.scores:
            with torch.no_grad(), self.accelerator.autocast():
                logs |= {f"{SCORE}{name}": value for name, value in self.scores(self.model).items()}
        if "eval_loss" in logs:
            logs["measuring"] = logs["eval_runtime"] + time.monotonic() - began
        if "eval_loss" in logs and self.balance:
            logs[f"{SCORE}most used expert"] = self.balance.most_used(self.accelerator)
        logs["seconds"], self.began = round(self.seconds, 1), time.monotonic()
        super().log(logs, *more, **named)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Return the loss alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None
