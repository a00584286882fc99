"""Refit the one head of keys and values of a layer, as narrow-kv and mla make it: queries, then outputs and values, to what the original's layer does."""
# T = tokens, M = hidden width, H = query heads, N = pairs that RoPE turns, R = other numbers.

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.replaced import OWN
from effconvert.surgery._regression import AttentionWindow, Queries, Rotation, Values, by_head, mixtures, solve
from effconvert.surgery._ridge import HELD_OUT, Moments, ridge
from effconvert.surgery.attention._mla import halves, interleaved, value_latents

PREFIX = f"attention.{OWN}"
NEGLIGIBLE = 1e-5  # relative error below which there is nothing to heal


class OneHead(ABC):
    """The head as parts of a layer. Matrices have their bias as a last column."""

    place: ClassVar[str]  # whose output is that of attention
    parts: ClassVar[tuple[str, ...]]  # that may change
    output: ClassVar[str]  # the output projection
    output_bias: ClassVar[str]
    biased: ClassVar[bool] = True  # whether queries have a bias

    def __init__(self, layer: Layer) -> None:
        self.layer, self.heads = layer, layer.config.heads

    @property
    @abstractmethod
    def pairs(self) -> int:
        """The pairs of a query that RoPE turns, N."""

    @abstractmethod
    def queries(self) -> Tensor:
        """Return q, [H * 2N, M + 1], all first numbers of a head's pairs before all second ones; [H * (2N + R), M + 1] where values are keys too."""

    @abstractmethod
    def assign_queries(self, weights: Tensor) -> None:
        """Assign q."""

    @abstractmethod
    def values(self) -> tuple[Tensor, int]:
        """Return what o reads before attention mixes tokens, as functions of the inputs, [G * D, M + 1], and G."""

    @abstractmethod
    def latents(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the values that are cached, [R, M + 1], what they and a constant add to the output, [M, H * R] and [M]; None where they are keys too."""

    @abstractmethod
    def assign_latents(self, weights: Tensor) -> None:
        """Assign the values that are cached."""


class OwnHead(OneHead):
    """The head of `narrow-kv`."""

    place = "attention"
    parts = tuple(f"{PREFIX}{name}" for name in ("q", "q_bias", "kv", "kv_bias", "o", "o_bias"))
    output, output_bias = f"{PREFIX}o", f"{PREFIX}o_bias"

    @property
    def pairs(self) -> int:
        """See `OneHead`."""
        return len(self.layer[f"{PREFIX}pairs"]) if f"{PREFIX}pairs" in self.layer else 0

    def queries(self) -> Tensor:
        """See `OneHead`."""
        return self._with_bias("q")

    def assign_queries(self, weights: Tensor) -> None:
        """See `OneHead`."""
        self._assign("q", weights)

    def values(self) -> tuple[Tensor, int]:
        """See `OneHead`."""
        return self._with_bias("kv")[2 * self.pairs :], 1

    def latents(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `OneHead`."""
        outputs = self.layer[self.output]
        if len(self.layer[f"{PREFIX}q"]) // self.heads > 2 * self.pairs:
            return None
        return self.values()[0], outputs, outputs.new_zeros(len(outputs))

    def assign_latents(self, weights: Tensor) -> None:
        """See `OneHead`."""
        self._assign("kv", torch.cat([self._with_bias("kv")[: 2 * self.pairs], weights]))

    def _with_bias(self, name: str) -> Tensor:
        return torch.cat([self.layer[PREFIX + name], self.layer[f"{PREFIX}{name}_bias"][:, None]], 1)

    def _assign(self, name: str, weights: Tensor) -> None:
        self.layer[PREFIX + name], self.layer[f"{PREFIX}{name}_bias"] = weights[:, :-1].float(), weights[:, -1].float()


class LatentHead(OneHead):
    """That of a family with latent attention without unturned keys, as `mla` writes it. Queries have no bias, and the last latent is a constant."""

    place = "o"
    parts = ("q", "kv_a", "kv_a.bias", "o")
    output, output_bias = "o", "o.bias"
    biased = False

    @property
    def pairs(self) -> int:
        """See `OneHead`."""
        return int(self.layer.config.get("qk_rope_head_dim")) // 2

    def queries(self) -> Tensor:
        """See `OneHead`; the last column is 0."""
        rows = halves(self.layer["q"].unflatten(0, (self.heads, -1)), self.pairs).flatten(0, 1)
        return torch.cat([rows, rows.new_zeros(len(rows), 1)], 1)

    def assign_queries(self, weights: Tensor) -> None:
        """See `OneHead`."""
        self.layer["q"] = interleaved(weights[:, :-1].unflatten(0, (self.heads, -1)), self.pairs).flatten(0, 1).float()

    def values(self) -> tuple[Tensor, int]:
        """See `OneHead`."""
        return self.layer["kv_b"] @ value_latents(self.layer), self.heads

    def latents(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `OneHead`."""
        by_head = torch.einsum("mhd,hdr->mhr", *(self.layer[part].unflatten(dim, (self.heads, -1)) for part, dim in (("o", 1), ("kv_b", 0))))
        return value_latents(self.layer)[:-1], by_head[..., :-1].flatten(1), by_head[..., -1].sum(1)

    def assign_latents(self, weights: Tensor) -> None:
        """See `OneHead`."""
        weight, bias = self.layer["kv_a"].clone(), self.layer["kv_a.bias"].clone()
        weight[: len(weights)], bias[: len(weights)] = weights[:, :-1], weights[:, -1]
        self.layer["kv_a"], self.layer["kv_a.bias"] = weight, bias


def kind_of(config: Config, index: int) -> type[OneHead] | None:
    """Return the kind of one head that a layer has by its config; None where it has another kind of attention."""
    if any(record.technique == "narrow-kv" for record in config.replaced_in(index)):
        return OwnHead
    return LatentHead if config.latent and not config.get("qk_nope_head_dim") and "attention" not in config.skips(index) else None


def one_head_of(layer: Layer) -> OneHead | None:
    """Return the one head of a layer; None where it has another kind of attention."""
    kind = kind_of(layer.config, layer.index)
    return kind(layer) if kind and (kind is OwnHead or {"q", "kv_a", "o"} <= {*layer}) else None


def refit_head(head: OneHead, original: int) -> None:
    """Fit q to the scores of the original's layer, then o and the values to its attention's output, on the same inputs."""
    windows = _windows(head, original)
    if _relative_error(head, windows) < NEGLIGIBLE:
        return
    _fit_queries(head, windows)
    _attend_anew(head, windows)
    _fit_output(head, windows)
    if latents := head.latents():
        values, outputs, constant = (rows.to(windows[0].inputs) for rows in latents)
        windows_of_values = [replace(window, target=window.target - constant) for window in windows]
        head.assign_latents(solve(Values(windows_of_values, outputs, head.heads, 1), values).cpu())
        _fit_output(head, windows)


def _windows(head: OneHead, original: int) -> list[AttentionWindow]:
    """Return each window inside the original's attention, on this layer's inputs."""
    layer = head.layer
    assert layer.activations
    windows: list[AttentionWindow] = []
    bias = layer[head.output_bias]
    own = next(iter(layer.activations.capture(layer, until=head.place)))
    for capture in layer.activations.original([original], ("q", "o"), until="o"):
        assert capture.query is not None
        assert capture.key is not None
        assert capture.weights is not None
        assert capture.scaling
        assert own.scaling
        inputs, targets = _with_ones(capture.inputs["q"]), capture.outputs["o"] - bias.to(capture.outputs["o"])
        queries = capture.query * (capture.scaling / own.scaling)
        windows += [AttentionWindow(*parts) for parts in zip(inputs, capture.weights.half(), queries, capture.key, targets, strict=True)]
    return windows


def _relative_error(head: OneHead, windows: Sequence[AttentionWindow]) -> float:
    """Return the distance of attention's output from its targets, relative to their norm."""
    layer = head.layer
    assert layer.activations
    captures = layer.activations.capture(layer, (head.place,), until=head.place)
    outputs = torch.cat([capture.outputs[head.place] for capture in captures]) - layer[head.output_bias].to(windows[0].target)
    error = sum(float((output - window.target).square().sum()) for output, window in zip(outputs, windows, strict=True))
    return float((error / max(sum(float(window.target.square().sum()) for window in windows), 1e-30)) ** 0.5)


def _fit_queries(head: OneHead, windows: Sequence[AttentionWindow]) -> None:
    layer = head.layer
    assert layer.activations
    weights = head.queries().to(windows[0].inputs)
    width = len(weights) // head.heads  # without what `Attending.attend` pads
    keys: list[Tensor] = []
    rotation: Rotation | None = None
    for capture in layer.activations.capture(layer, until=head.place):
        assert capture.query is not None
        assert capture.key is not None
        if rotation is None:
            before = torch.stack([by_head(window.inputs @ weights.T, head.heads) for window in windows[: len(capture.query)]])
            rotation = Rotation.estimate(before, capture.query[..., :width], 2 * head.pairs, "halves")
        keys += capture.key[:, :1, :, :width]
    if not rotation:
        return
    if head.biased:
        head.assign_queries(solve(Queries(windows, keys, rotation, head.heads), weights).cpu())
        return
    windows = [replace(window, inputs=window.inputs[:, :-1]) for window in windows]
    fitted = solve(Queries(windows, keys, rotation, head.heads), weights[:, :-1]).cpu()
    head.assign_queries(torch.cat([fitted, fitted.new_zeros(len(fitted), 1)], 1))


def _attend_anew(head: OneHead, windows: Sequence[AttentionWindow]) -> None:
    """Replace the original's attention weights in the windows by the layer's own."""
    layer = head.layer
    assert layer.activations
    weights = (weights for capture in layer.activations.capture(layer, until=head.place) for weights in capture.weights)
    for window, own in zip(windows, weights, strict=True):
        window.weights.copy_(own)


def _fit_output(head: OneHead, windows: Sequence[AttentionWindow]) -> None:
    """Ridge regression of the output projection."""
    moments, weights = (Moments(), Moments()), head.layer[head.output]
    rows, count = head.values()
    values, outputs = rows.to(windows[0].inputs), weights.to(windows[0].inputs)
    for index, window in enumerate(windows):
        mixed = mixtures(window, values, head.heads, count)
        moments[int((index + 1) % HELD_OUT == 0)].add(mixed, window.target - mixed @ outputs.T)
    if (change := ridge(*moments)) is not None:
        head.layer[head.output] = weights + change.float().cpu()


def _with_ones(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)
