"""The activations of a model on the calibration text during conversion. Each layer reads the output of the *converted* layers below it."""
# B = windows run at a time, T = tokens in a window, M = hidden width.

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.outer import Outer
from effconvert.checkpoint.shards import NUMBERS
from effconvert.errors import TechniqueError
from effconvert.heal._capture import Capture
from effconvert.heal._layerwise import LayerRunner, device
from effconvert.heal._tensors import check_finite, outer_tensors, stored_tensors, zero_sublayer


class Activations:
    """The inputs of the layer that is being converted, and what this layer and the original's compute from them.

    Attributes:
        states: the layer's inputs, [B, T, M] for each batch.
        turn: number of the source's layer whose inputs these are; None while steps only say what they change, and no layer may be computed.
    """

    def __init__(self, source: Checkpoint, teacher: Checkpoint, outer: Sequence[Outer], batches: Sequence[Tensor]) -> None:
        """Begin before the first layer.

        Args:
            source: the model that is converted.
            teacher: the model that healing goes towards.
            outer: the tensors outside the layers before the first step, and after each.
            batches: token ids, [B, T] each.
        """
        self.device = device()
        self.source, self.teacher, self.ids = source, teacher, [batch.to(self.device) for batch in batches]
        self.outer = outer
        self.turn: int | None = 0
        self._original = outer[0] if teacher is source else teacher.model("cpu").outer
        self.runners: dict[int, LayerRunner] = {}
        self.notes: dict[int, dict[str, float]] = {}
        self._lent: dict[int, list[dict[str, Tensor]]] = {}  # see `LayerRunner.lent`
        self._stream: tuple[int, list[Tensor]] = (0, [])  # number of the original's layers that ran on its own stream, and their output
        self.states = self._runner(outer[-1]).begin()
        check_finite(self.states, "the embedding")

    @property
    def scores(self) -> int:
        """The number of attention weights of one head, over all texts."""
        return sum(len(batch) * batch.shape[1] ** 2 for batch in self.ids)

    def capture(self, layer: Layer, parts: Sequence[str] = (), until: str = "", states: Sequence[Tensor] | None = None) -> Iterator[Capture]:
        """Run a layer with its current weights on `states`, by default the current inputs, and yield its activations for each batch: see `LayerRunner.run`."""
        if states is None and layer.source_index != self.turn:
            raise TechniqueError(f"a step computes layer {layer.index} out of its turn, on the inputs of another; it should do that in `layer.later`")
        return self._run(self._outer_of(layer.config), layer, layer.index, self.states if states is None else states, parts, until)

    def original(self, layers: Sequence[int], parts: Sequence[str] = (), until: str = "") -> Iterator[Capture]:
        """Run layers of the original one after the other on `states`; yield the activations of the last for each batch.

        If the original's layers read a token's position in their inputs, and those of the converted model do not have it, they run on the original's own.
        """
        states = self.original_stream(2 * layers[0]) if self.outer[-1].config.lacks_table_of(self._original.config) else self.states
        for index in layers[:-1]:
            states = [capture.out for capture in self._run(self._original, self.teacher.layer(index, "cpu"), index, states)]
        return self._run(self._original, self.teacher.layer(layers[-1], "cpu"), layers[-1], states, parts, until)

    def original_stream(self, step: int) -> list[Tensor]:
        """Return the stream of the original alone, [B, T, M]: before its layer l for step 2 l, between that layer's attention and FFN for 2 l + 1.

        Only the last states are kept: an earlier step begins anew from the embeddings.
        """
        first, states = self._stream
        if not states or first > step // 2:
            first, states = 0, self._runner(self._original).begin()
        for index in range(first, step // 2):
            states = [capture.out for capture in self._run(self._original, self.teacher.layer(index, "cpu"), index, states)]
        self._stream = (step // 2, states)
        if step % 2 == 0:
            return states
        half = zero_sublayer(self.teacher.layer(step // 2, "cpu"), "ffn")
        return [capture.out for capture in self._run(self._original, half, step // 2, states)]

    def stored(self, layer: Layer) -> dict[str, Tensor]:
        """Return a layer as it will be on disk: name in the layer -> numbers."""
        return {name: numbers.to(self.device) for name, (_, numbers, _) in stored_tensors(layer).items()}

    def place_output(self, layer: Layer, place: str, trainable: Mapping[str, Tensor], stored: Mapping[str, Tensor], batch: int) -> Tensor:
        """Return the output at a place of a layer on one batch, [B, T, M], with gradients for the `trainable` parts; the rest is as `stored`."""
        trial = layer.on_top(layer.index, layer.config)
        for part, tensor in trainable.items():
            trial[part] = tensor
        changed = {name: tensor.to(NUMBERS[origin.dtype]).to(stored[name]) for name, origin, tensor in trial.tensors() if isinstance(tensor, Tensor)}
        runner = self._runner(self._outer_of(layer.config))
        return runner.place_output(layer.index, {**stored, **changed}, self.states, batch, place)

    def note(self, index: int, errors: dict[str, float]) -> None:
        """Keep errors of a layer for the report, beside those that other steps noted."""
        self.notes[index] = {**self.notes.get(index, {}), **errors}

    def advance(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on to the next layer: its inputs are the outputs of layer `index` with the converted `tensors`.

        Raises:
            ModelError: they are NaN or infinite.
        """
        runner = self._runner(self.outer[-1])
        tensors = {name: numbers.to(self.device) for name, numbers in tensors.items()}
        states = []
        for capture in runner.run(index, tensors, self.states):
            states.append(capture.out)
            runner.keep_lent(index)
        check_finite(states, f"layer {index}")
        self.states = states
        config = runner.config
        for lender in [lender for lender in self._lent if max(reader for reader in config.readers if config.cache_of(reader) == lender) <= index]:
            del self._lent[lender]

    def _run(self, outer: Outer, layer: Layer, index: int, states: Sequence[Tensor], parts: Sequence[str] = (), until: str = "") -> Iterator[Capture]:
        if self.turn is None:
            raise TechniqueError("a step computes a layer in `rewrite`, before its turn; it should do that in `layer.later`")
        tensors = self.stored(layer)
        for capture in self._runner(outer).run(index, tensors, states, parts, until):
            check_finite([capture.out, *capture.outputs.values()], f"layer {index}")
            yield capture

    def _outer_of(self, config: Config) -> Outer:
        """Return the tensors outside the layers at the step whose layers have this config."""
        return next(outer for outer in self.outer if outer.config == config)

    def _runner(self, outer: Outer) -> LayerRunner:
        outer = self._outer_of(outer.config) if outer is not self._original else outer
        if id(outer) not in self.runners:
            self.runners[id(outer)] = LayerRunner(outer.config, outer_tensors(outer, self.ids), self.ids, self.device)
            self.runners[id(outer)].lent = self._lent
        return self.runners[id(outer)]
