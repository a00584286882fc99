"""What a model computes on a text while it is converted, layer by layer: each is fed by the *converted* layers below it, which is what it will see."""
# B = windows run at a time, T = tokens in a window, M = hidden width.

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.outer import Outer
from effconvert.checkpoint.shards import FLOATS
from effconvert.heal._layerwise import Capture, LayerRunner, check_finite, device, inside, silenced, stored_tensors


class Activations:
    """Where a conversion stands: what arrives at the layer that is at work, and what it and the original make of that.

    Attributes:
        states: what arrives there, [B, T, M] for each batch.
    """

    def __init__(self, source: Checkpoint, teacher: Checkpoint, outer: Sequence[Outer], batches: Sequence[Tensor]) -> None:
        """Begin before the first layer.

        Args:
            source: the model that is converted.
            teacher: what healing goes towards.
            outer: what is outside the layers before the first step, and after each.
            batches: token ids, [B, T] each.
        """
        self.device = device()
        self.source, self.teacher, self.ids = source, teacher, [batch.to(self.device) for batch in batches]
        self.outer = outer
        self._original = outer[0] if teacher is source else teacher.model("cpu").outer
        self.runners: dict[int, LayerRunner] = {}
        self.notes: dict[int, dict[str, float]] = {}
        self._own: tuple[int, list[Tensor]] = (0, [])  # layers of the original that were run by themselves, and what the last of them made
        self.states = self._runner(outer[-1]).begin()
        check_finite(self.states, "the embedding")

    @property
    def scores(self) -> int:
        """How many numbers the weights of one head's attention are, over all texts."""
        return sum(len(batch) * batch.shape[1] ** 2 for batch in self.ids)

    def capture(self, layer: Layer, parts: Sequence[str] = (), until: str = "") -> Iterator[Capture]:
        """Run a layer as it stands, and yield what each batch was in it: see `LayerRunner.run`."""
        return self._run(self._outer_of(layer.config), layer, layer.index, self.states, parts, until)

    def original(self, layers: Sequence[int], parts: Sequence[str] = (), until: str = "") -> Iterator[Capture]:
        """Run layers of the original, one after the other, on what arrives here; yield of each batch what the last of them was."""
        states = self.states
        for index in layers[:-1]:
            states = [look.out for look in self._run(self._original, self.teacher.layer(index, "cpu"), index, states)]
        return self._run(self._original, self.teacher.layer(layers[-1], "cpu"), layers[-1], states, parts, until)

    def own(self, step: int) -> list[Tensor]:
        """Return the stream of the original where nothing was converted, [B, T, M]: before its layer l for 2 l, between that one's halves for 2 l + 1.

        Asked layer after layer: only the last ones are kept.
        """
        done, states = self._own
        if not states:
            states = self._runner(self._original).begin()
        for index in range(done, step // 2):
            states = [look.out for look in self._run(self._original, self.teacher.layer(index, "cpu"), index, states)]
        self._own = (step // 2, states)
        if step % 2 == 0:
            return states
        half = silenced(self.teacher.layer(step // 2, "cpu"), "ffn")
        return [look.out for look in self._run(self._original, half, step // 2, states)]

    def stored(self, layer: Layer) -> dict[str, Tensor]:
        """Return a layer as it will lie on disk: name in the layer -> numbers."""
        return {name: numbers.to(self.device) for name, (_, numbers, _) in stored_tensors(layer).items()}

    def given(self, layer: Layer, place: str, learnt: Mapping[str, Tensor], fixed: Mapping[str, Tensor], batch: int) -> Tensor:
        """Return what a place of a layer, `fixed` on disk, gives on one batch, [B, T, M], if some parts were others; with gradients for these."""
        tried = layer.on_top(layer.index, layer.config)
        for part, tensor in learnt.items():
            tried[part] = tensor
        changed = {name: tensor.to(FLOATS[origin.dtype]).to(fixed[name]) for name, origin, tensor in tried.tensors() if isinstance(tensor, Tensor)}
        runner = self._runner(self._outer_of(layer.config))
        return runner.given(layer.index, {**fixed, **changed}, self.states[batch], place)

    def note(self, index: int, said: dict[str, float]) -> None:
        """Keep what is to be told of the layer at work."""
        self.notes[index] = said

    def advance(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on to the next layer, by what layer `index`, which has become `tensors`, makes of what arrived.

        Raises:
            ModelError: that is NaN or infinite.
        """
        runner = self._runner(self.outer[-1])
        tensors = {name: numbers.to(self.device) for name, numbers in tensors.items()}
        self.states = [look.out for look in runner.run(index, tensors, self.states)]
        check_finite(self.states, f"layer {index}")

    def _run(self, outer: Outer, layer: Layer, index: int, states: Sequence[Tensor], parts: Sequence[str] = (), until: str = "") -> Iterator[Capture]:
        tensors = self.stored(layer)
        for look in self._runner(outer).run(index, tensors, states, parts, until):
            check_finite([look.out, *look.outputs.values()], f"layer {index}")
            yield look

    def _outer_of(self, config: Config) -> Outer:
        """Return what is outside the layers at the step whose layers have this config."""
        return next(outer for outer in self.outer if outer.config == config)

    def _runner(self, outer: Outer) -> LayerRunner:
        outer = self._outer_of(outer.config) if outer is not self._original else outer
        if id(outer) not in self.runners:
            self.runners[id(outer)] = LayerRunner(outer.config, inside(outer, self.ids), self.ids, self.device)
        return self.runners[id(outer)]
