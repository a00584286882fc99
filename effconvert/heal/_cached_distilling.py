"""Distillation towards predictions on disk: no teacher is in memory."""

from torch import Tensor

from effconvert.heal._distiller import Distiller, Predictions
from effconvert.heal._kept import KeptObjective
from effconvert.heal._objective import Head
from effconvert.heal._teacher_cache import HeldOutWindows, TeacherCache


class CachedDistiller(Distiller):
    """A Distiller whose teacher is a cache. On held-out windows its loss is exact: the teacher's hidden states and its head are there."""

    def use(self, teacher: TeacherCache, predicts: bool) -> Head | None:
        """Read the teacher's head."""
        self.kept = KeptObjective(self.objective, teacher.kept)
        return HeldOutWindows(teacher).head(self.args.device)

    def teachers(self, inputs: dict[str, Tensor]) -> tuple[Predictions, Tensor]:
        """Return the hidden states that are kept of held-out windows."""
        counts = inputs["counts"]
        return Predictions([inputs["hidden"][counts]], self.teacher_head), inputs["labels"][counts]

    def held_out_predictions(self, inputs: dict[str, Tensor]) -> Predictions:
        """Return what the windows have with them."""
        return self.teachers(inputs)[0]

    def compared(self, own: Predictions, labels: Tensor, inputs: dict[str, Tensor], training: bool) -> Tensor:
        """Return the loss towards what is kept, or on held-out windows towards the teacher's own predictions."""
        if "hidden" in inputs or own.head is None:
            return super().compared(own, labels, inputs, training)
        counts = inputs["counts"]
        return self.kept(own.hidden[-1], own.head, inputs["ids"][counts], inputs["numbers"][counts], labels)
