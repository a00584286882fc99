"""Mix tokens by Fourier transforms in place of attention (FNet)."""
# B = batch, T = tokens of the longest text of a batch, M = hidden width, n = longest text that the model reads, made even.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.errors import ModelError
from effconvert.families.encoders import BERT_DEFAULTS
from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import TokenMixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.checkpoint.outer import Outer
    from effconvert.surgery._replacement import PlaceContext

ATTENTION_KEYS = ("num_attention_heads", "num_key_value_heads", "attention_probs_dropout_prob", "use_cache", "torch_dtype")
LARGE_OUTPUT = "the transform's output is about sqrt(T M / 2) times the residual, and a norm follows: little of the residual is left before training"
NATIVE = (
    "transformers' fnet ignores attention_mask, so padding changes every output: batch texts of one length, or pad all of them to one; it computes in "
    "float32 alone, and config.json says so"
)
ROPE_LOST = "its positions were in the RoPE of its attention: without attention, only the transform's phases carry the order of tokens"
HELD_OUT = 8  # every eighth text chooses the strength of a ridge
TINY = 1e-30  # least divisor
STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the mean power of a channel's frequencies


class Fnet(TokenMixing):
    """Mix tokens by Fourier transforms in place of attention (FNet).

    The mixer is the real part of a text's Fourier transform over tokens and channels. It has no parameters, and q, k, v and o are dropped. Nothing
    of the attention is kept, so the model needs training; --keep-softmax leaves some layers as they are. A BERT becomes transformers' own fnet if all
    layers change. Other results open with effconvert, which transforms each text over its own length, however its batch is padded.
    Lee-Thorp et al. 2022, arXiv 2105.03824; filters: Rao et al. 2021, arXiv 2107.00645.

    \b
    Examples:
      effconvert fnet --keep-softmax -1,-2 --filter gfnet --transfer ./MiniLM
      effconvert fnet google-bert/bert-base-uncased -o ./fnet
    """

    facts: ClassVar[Facts] = Facts("encoders", saves="time on long texts", native="fnet for a bert (others need effconvert)", exact="")

    place = "attention"
    drops = ("q", "k", "v", "o")
    transfer_place = "layer"  # few or no parameters at its own place could reproduce the output of attention
    no_decoders = (
        "mixes a text over all of its tokens, later ones too, which a decoder must not see; linear, performer and retnet are for decoders, and streaming "
        "and linformer-causal keep softmax"
    )

    filter: Literal["none", "scale", "gfnet"] = Field(
        "none",
        description="Learnable parameters: none, as in FNet (none); one factor for the transform (scale); or a filter of each channel's frequencies over the "
        "tokens (gfnet). They start as the least-squares fit to the attention on the calibration text.",
    )

    def native(self, config: Config) -> Config | None:
        """Return the config of transformers' own family for the result, None where there is none."""
        whole = self.filter == "none" and not config.replaced and len(self.chosen(config)) == config.layers
        if not whole or not config.family.fourier:
            return None
        with suppress(ModelError):  # a class with a head that the native family lacks
            fourier_config = config.become(config.family.fourier)
            return fourier_config.with_keys({**BERT_DEFAULTS, **fourier_config.raw, "dtype": "float32"}).without(*ATTENTION_KEYS)
        return None

    def config(self, config: Config) -> Config:
        """Become the native family, or record the technique for the chosen layers."""
        return self.native(config) or super().config(config)

    def needs_calibration(self, config: Config) -> bool:
        """If there are learnable parameters."""
        return self.filter != "none"

    def notes(self, config: Config) -> str:
        """Say what is lost."""
        notes = [LARGE_OUTPUT] if self.filter == "none" else []
        notes += [NATIVE] if self.native(config) else []
        return "; ".join(notes + ([ROPE_LOST] if config.family.rope else []))

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """One number, or a complex number for each frequency and channel, as real and imaginary part."""
        if self.filter == "gfnet":
            return {"filter": (frequencies(config), config.hidden, 2)}
        return {"scale": (1,)} if self.filter == "scale" else {}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Zeros: the mixer adds nothing to a token."""
        import torch

        return {name: torch.zeros(shape) for name, shape in self.parameters(config).items()}

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Fit the parameters to the output of attention on the same inputs, by least squares."""
        assert layer.activations
        pairs = ((capture.inputs["q"].float(), capture.outputs["o"].float()) for capture in layer.activations.capture(layer, ("q", "o"), until="o"))
        return {"filter": fit_filter(pairs, frequencies(layer.config))} if self.filter == "gfnet" else {"scale": fit_scale(pairs)}

    def outer(self, outer: Outer) -> None:
        """Add the tensors that the native family has and BERT lacks: a projection of the embeddings, and a pooler in each of its classes."""
        if self.native(outer.config) is None:
            return
        import torch

        width, device = outer.config.hidden, "meta" if outer.shapes_only else "cpu"
        outer["embed_projection"], outer["embed_projection.bias"] = torch.eye(width, device=device), torch.zeros(width, device=device)
        if "pooler.dense.weight" not in outer:
            outer["pooler.dense.weight"], outer["pooler.dense.bias"] = torch.zeros(width, width, device=device), torch.zeros(width, device=device)

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Transform each text over its own tokens; in float32 or wider, as torch has no transform in narrower types."""
        import torch

        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mixed = apply_filter(wide, context.live, weights["filter"]) if self.filter == "gfnet" else fourier(wide, context.live)
        out: Tensor = mixed * weights["scale"] if self.filter == "scale" else mixed
        return out.to(hidden.dtype)


def fourier(rows: Tensor, live: Tensor) -> Tensor:
    """Return the real part of the Fourier transform over tokens and channels of each text's live rows, [B, T, M]; 0 for padding."""
    import torch

    if bool(live.all()):
        whole: Tensor = torch.fft.fft2(rows).real
        return whole
    out, lengths = torch.zeros_like(rows), live.sum(1)
    for length in filter(None, lengths.unique().tolist()):
        mask = live & (lengths == length)[:, None]
        out[mask] = torch.fft.fft2(rows[mask].unflatten(0, (-1, length))).real.flatten(0, 1)
    return out


def apply_filter(rows: Tensor, live: Tensor, response: Tensor) -> Tensor:
    """Multiply each channel's frequencies by its response [n / 2 + 1, M, 2]: a circular convolution over n tokens.

    Texts are treated as padded with zeros to n tokens, so that a filter means the same for every length.
    """
    import torch

    from effconvert.surgery.mixing._call import padding_first, reorder

    places = 2 * (len(response) - 1)
    if live.shape[1] > places and int(live.sum(1).max()) > places:
        raise ValueError(f"a text has {int(live.sum(1).max())} tokens, and this filter is for {places} at most; cut it (truncation=True, max_length={places})")
    order = padding_first(live)  # padding between tokens must not change their distance
    rows = reorder(rows.masked_fill(~live[..., None], 0), order)[:, -places:]
    spectrum = torch.fft.rfft(rows, places, dim=1) * torch.view_as_complex(response.to(rows.dtype))
    outputs = torch.fft.irfft(spectrum, places, dim=1)[:, : rows.shape[1]]
    outputs = torch.nn.functional.pad(outputs, (0, 0, live.shape[1] - rows.shape[1], 0))
    result: Tensor = reorder(outputs, order.argsort(1)) * live[..., None]
    return result


def fit_scale(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the factor [1] that brings the transforms of attention's inputs, [B, T, M], closest to its outputs."""
    import torch

    along = power = 0.0
    for inputs, targets in pairs:
        mixed = torch.fft.fft2(inputs).real
        along, power = along + float((mixed * targets).sum()), power + float(mixed.square().sum())
    return torch.tensor([along / max(power, TINY)])


def fit_filter(pairs: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return the response [count, M, 2] that comes closest to attention: a ridge regression for each frequency of each channel.

    Held-out texts choose the strength; the response is zero where no strength improves on them.
    """
    import torch

    power, held_out_power, cross, held_out_cross = torch.zeros(4)  # of attention's inputs; of its inputs with its outputs; [n / 2 + 1, M] each
    texts = 0
    for states, targets in pairs:
        inputs, outputs = (torch.fft.rfft(rows, 2 * (count - 1), dim=1) for rows in (states, targets))
        held_out = (torch.arange(texts, texts + len(inputs), device=inputs.device) % HELD_OUT == HELD_OUT - 1)[:, None, None]
        powers, crosses, texts = inputs.abs().square(), inputs.conj() * outputs, texts + len(inputs)
        power, held_out_power = power + (powers * ~held_out).sum(0), held_out_power + (powers * held_out).sum(0)
        cross, held_out_cross = cross + (crosses * ~held_out).sum(0), held_out_cross + (crosses * held_out).sum(0)
    best, response = 0.0, torch.zeros_like(cross)
    for strength in STRENGTHS:
        candidate = cross / (power + strength * power.mean(0) + TINY)
        gain = float((2 * (candidate.conj() * held_out_cross).real - candidate.abs().square() * held_out_power).sum())
        if gain > best:
            best, response = gain, candidate
    return torch.view_as_real(response).cpu()


def frequencies(config: Config) -> int:
    """Return the number of frequencies of a filter: for the model's longest text, or one token more where that is odd."""
    return (config.stated_length + 1) // 2 + 1
