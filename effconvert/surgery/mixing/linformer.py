"""Project keys and values to a fixed number of them (Linformer)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, n = longest text, K = rank, U = Hk, or 1 where shared.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.errors import OptionError
from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call

ROPE_MEANS = "keys are mixed after RoPE rotated each by its position, so distant ones cancel: expect to train more than with learnt positions"


class Linformer(Mixing):
    """Project keys and values to a fixed number of them (Linformer).

    A query attends to K mixtures of keys and values. Two matrices of K x n make them, where n is the longest text that the model reads; longer texts
    are refused afterwards. A text of T tokens has about K T / n mixtures. Exact where K is n. Layers with a sliding window stay as they are.
    Wang et al. 2020, arXiv 2006.04768.

    \b
    Examples:
      effconvert linformer --rank 128 google-bert/bert-base-uncased
      effconvert linformer --rank 128 --share none --calibrate mine.txt ./MiniLM -o ./linformer
    """

    facts: ClassVar[Facts] = Facts("encoders", saves="time on long texts", native="", exact="with --rank as long as the text")

    no_decoders = (
        "mixes a text's keys over all of its tokens, later ones too, which a decoder must not see; linformer-causal mixes those of finished blocks, and "
        "streaming, linear, performer and retnet are for decoders"
    )
    leaves_windows = True

    rank: int = Field(ge=1, description="Mixtures of keys and values for the longest text, K.", json_schema_extra={"metavar": "K"})
    share: Literal["none", "headwise", "key-value"] = Field(
        "headwise",
        description="Matrices: one for keys and one for values, for each KV head (none) or for all heads of a layer (headwise); or one for both (key-value).",
    )
    projections: Literal["means", "data"] = Field(
        "data",
        description="Initial matrices: means of consecutive tokens (means); or such means for keys, and for values the least-squares fit to the attention on "
        "the calibration text (data). With --share key-value both are means.",
    )

    def check(self, config: Config) -> None:
        """Refuse a rank above the length of the longest text, and models that do not say how long that is."""
        super().check(config)
        limit = config.stated_length
        if self.rank > limit:
            raise OptionError(f"--rank {self.rank} is more than the {limit} tokens of this model's longest text; give at most {limit}, which is exact")

    def is_exact(self, config: Config) -> bool:
        """Where each mixture is one token."""
        return self.rank == config.longest

    def notes(self, config: Config) -> str:
        """Warn of mixtures of rotated keys."""
        return ROPE_MEANS if config.family.rope else ""

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The matrices, E for keys and F for values."""
        shape = (config.kv_heads if self.share == "none" else 1, self.rank, config.stated_length)
        return {"key_map": shape} if self.share == "key-value" else {"key_map": shape, "value_map": shape}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Means of consecutive tokens."""
        means = segment_means(self.rank, config.stated_length)
        return {name: means.expand(shape).clone() for name, shape in self.parameters(config).items()}

    def needs_calibration(self, config: Config) -> bool:
        """If the matrix for values is fitted and is not the identity."""
        return self.projections == "data" and self.share != "key-value" and self.rank < config.stated_length

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Fit F so that attention to the K mixtures, times F, is closest to attention to the tokens: ridge regression from the means.

        A column is fitted to the texts that have a token there, and stays a mean where none has. Fitting the output of attention instead would be a little
        better on long texts, and far worse on much shorter ones.
        """
        import torch

        from effconvert.surgery._ridge import HELD_OUT, Moments, ridge

        assert layer.activations
        value_map = values["value_map"].clone()
        ends = sorted({batch.shape[1] for batch in layer.activations.ids})
        parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]  # ranges of columns that the same texts have
        texts = [0] * len(parts)
        moments = [[(Moments(), Moments()) for _ in parts] for _ in value_map]  # of the texts to fit, and of held-out texts
        for capture in layer.activations.capture(layer, ("o",), until="o"):
            assert capture.query is not None
            assert capture.key is not None
            assert capture.scaling is not None
            assert capture.weights is not None
            query, tokens = capture.query.float().unflatten(1, (capture.key.shape[1], -1)), capture.key.shape[-2]  # [B, Hk, R, T, D]
            live = torch.ones(len(query), tokens, dtype=torch.bool, device=query.device)
            means, alive = columns(values["key_map"].to(query.device), live)  # [B, U, K, T]
            scores = query @ (means @ capture.key.float())[:, :, None].mT * capture.scaling
            few = scores.masked_fill(~alive[:, :, None, None], -torch.inf).softmax(-1)  # [B, Hk, R, T, K]
            scales = few * _segment_scales(self.rank, value_map.shape[-1], live)[:, None, None, None]  # as `columns` multiplies the fitted matrix
            residuals = capture.weights.float().unflatten(1, query.shape[1:3]) - few @ means[:, :, None]  # [B, Hk, R, T, T]
            for inputs, outputs in zip(scales, residuals, strict=True):
                for at, part in enumerate(parts[: ends.index(tokens) + 1]):
                    texts[at] += 1
                    held_out = texts[at] % HELD_OUT == 2  # from the second text on, as there are few long ones
                    for unit, pairs in enumerate(moments):
                        heads = slice(unit, unit + 1) if len(moments) > 1 else slice(None)
                        pairs[at][held_out].add(inputs[heads], outputs[heads][..., part])
        for rows, pairs in zip(value_map, moments, strict=True):
            for part, pair in zip(parts, pairs, strict=True):
                if (change := ridge(*pair)) is not None:
                    rows[:, part] += change.mT.to(rows)
        return {**values, "value_map": value_map}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Mix keys and values, and attend to the mixtures."""
        key_map = weights["key_map"]
        value_map = weights.get("value_map", key_map)
        _refuse_longer(call.live, key_map.shape[-1])
        keys, alive = columns(key_map, call.live)
        values, _ = columns(value_map, call.live)
        key, value = (matrix @ rows.float() for matrix, rows in ((keys, call.key), (values, call.value)))
        return masked_attention(call.grouped, key.to(call.key.dtype), value.to(call.value.dtype), alive, call.scaling)


def segment_means(rank: int, length: int) -> Tensor:
    """Return the matrix [K, n] of means of consecutive tokens: n / K tokens each, rounded up or down where K does not divide n."""
    import torch

    place = torch.arange(length)
    member = (place * rank // length == torch.arange(rank)[:, None]).float()
    return member / member.sum(-1, keepdim=True)


def columns(rows: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Select the columns of a matrix [U, K, n] for the live tokens of each text, counted from its first.

    Each row belongs to a segment of the longest text: that of its initial mean. A text that ends before the segment has no such mixture. A text that
    ends within it has the row scaled by the segment's tokens over those present.

    Returns:
        The matrix of each text, float32 [B, U, K, T], 0 for padding; and which mixtures exist, [B, 1, K].
    """
    scales = _segment_scales(rows.shape[-2], rows.shape[-1], live)
    place = (live.cumsum(1) - 1).clamp(0, rows.shape[-1] - 1)
    chosen = (rows.float()[..., place] * live).movedim(2, 0)
    return chosen * scales[:, None, :, None], (scales > 0)[:, None]


def _segment_scales(rank: int, length: int, live: Tensor) -> Tensor:
    """Return for each of K segments its tokens over those present, [B, K]; 0 where none is present."""
    import torch

    starts = -(-torch.arange(rank + 1, device=live.device) * length // rank)  # [K + 1]
    present = (live.sum(1, keepdim=True) - starts[:-1]).clamp_min(0).minimum(starts.diff())  # tokens of each segment
    scales: Tensor = starts.diff() / present.clamp_min(1) * (present > 0)
    return scales


def masked_attention(query: Tensor, key: Tensor, value: Tensor, alive: Tensor, scaling: float) -> Tensor:
    """Attend by softmax to the keys that are alive, or to all where none is.

    Args:
        query: [B, Hk, R, T, D].
        key: [B, Hk, K, D].
        value: [B, Hk, K, D].
        alive: [B, Hk or 1, K].
        scaling: of scores.

    Returns:
        [B, H, T, D].
    """
    from torch.nn import functional

    visible = (alive | ~alive.any(-1, keepdim=True))[:, :, None]
    out = functional.scaled_dot_product_attention(query.flatten(2, 3), key, value, visible, scale=scaling)
    output: Tensor = out.unflatten(2, query.shape[2:4]).flatten(1, 2)
    return output


def _refuse_longer(live: Tensor, limit: int) -> None:
    """Refuse texts longer than the matrices: they would be cut silently."""
    if live.shape[1] > limit and (most := int(live.sum(1).max())) > limit:
        raise ValueError(f"a text has {most} tokens, and linformer's matrices are for {limit} at most; cut it (truncation=True, max_length={limit})")
