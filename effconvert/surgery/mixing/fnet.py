"""Mix tokens by Fourier transforms in place of attention (FNet)."""
# B = batch, T = tokens of the longest text of a batch, M = hidden width, n = longest text that the model reads, made even.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from effconvert.errors import ModelError
from effconvert.surgery.mixing._mixing import TokenMixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.checkpoint.outer import Outer
    from effconvert.surgery._replacement import Around

# What a config of BERT means where it is silent, and one of the native family does not.
SILENT = {"hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
OF_ATTENTION = ("num_attention_heads", "num_key_value_heads", "attention_probs_dropout_prob", "use_cache", "torch_dtype")
LOUD = "the transform's output is some sqrt(T M / 2) times larger than what it is added to, and a norm follows: little of the residual is left before training"
NATIVE = (
    "transformers' fnet ignores attention_mask, so padding changes every output: batch texts of one length, or pad all of them to one; it computes in "
    "float32 alone, and config.json says so"
)
TURNED = "its positions were in the rotations of its attention: where none is left, the order of tokens is in the phases of the transform alone"
HELD_OUT = 8  # every eighth text chooses the strength of a ridge
TINY = 1e-30  # what is divided by where all is zero
STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the mean power of a channel's frequencies


class Fnet(TokenMixing):
    """Mix tokens by Fourier transforms in place of attention (FNet).

    A token gets the real part of the transform of a text over its tokens and over their channels: no parameters, and q, k, v and o are gone. Nothing
    of attention is left that could be kept, so this is where training begins and not where it ends; --keep-softmax leaves some layers as they are.
    A BERT of which all layers change becomes transformers' own fnet; everything else opens with effconvert, and there each text is transformed over its
    own length, whatever its batch is padded to. Lee-Thorp et al. 2022, arXiv 2105.03824; filters: Rao et al. 2021, arXiv 2107.00645.

    \b
    Examples:
      effconvert fnet --keep-softmax -1,-2 --filter gfnet --transfer ./MiniLM
      effconvert fnet google-bert/bert-base-uncased -o ./fnet
    """

    place = "attention"
    drops = ("q", "k", "v", "o")
    transfer_place = "layer"  # few or no parameters at its own place could reproduce the output of attention
    no_decoders = (
        "mixes a text over all of its tokens, later ones too, which a decoder must not see; linear, performer and retnet are for decoders, and streaming "
        "and linformer-causal keep softmax"
    )

    filter: Literal["none", "scale", "gfnet"] = Field(
        "none",
        description="What is learnable: nothing, as in FNet (none); a number that the transform is multiplied by (scale); or a filter of each channel's "
        "frequencies over the tokens, transformed back (gfnet). What is learnable begins as what comes closest to the attention on the calibration text.",
    )

    def native(self, config: Config) -> Config | None:
        """Return the config of the family of transformers that this makes of the model, None where there is none."""
        whole = self.filter == "none" and not config.replaced and len(self.chosen(config)) == config.layers
        if not whole or not config.family.fourier:
            return None
        with suppress(ModelError):  # a class with a head that only its own family has
            made = config.become(config.family.fourier)
            kept = {key: value for key, value in made.raw.items() if key not in OF_ATTENTION}
            return replace(made, raw={**SILENT, **kept, "dtype": "float32"})
        return None

    def config(self, config: Config) -> Config:
        """Become the native family, or put it into the chosen layers."""
        return self.native(config) or super().config(config)

    def needs_calibration(self, config: Config) -> bool:
        """Where something is learnable."""
        return self.filter != "none"

    def notes(self, config: Config) -> str:
        """Say what is lost."""
        told = [LOUD] if self.filter == "none" else []
        told += [NATIVE] if self.native(config) else []
        return "; ".join(told + ([TURNED] if config.family.rope else []))

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """A number, or for each frequency and channel a complex one, as its real and imaginary part."""
        if self.filter == "gfnet":
            return {"filter": (frequencies(config), config.hidden, 2)}
        return {"scale": (1,)} if self.filter == "scale" else {}

    def begin(self, config: Config, index: int) -> Mapping[str, Tensor]:
        """Nothing is added to a token."""
        import torch

        return {name: torch.zeros(shape) for name, shape in self.parameters(config).items()}

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Fit what is learnable to what the attention gives of the same inputs, by least squares."""
        assert layer.activations
        seen = ((look.inputs["q"].float(), look.outputs["o"].float()) for look in layer.activations.capture(layer, ("q", "o"), until="o"))
        return {"filter": fitted_filter(seen, frequencies(layer.config))} if self.filter == "gfnet" else {"scale": fitted_scale(seen)}

    def outer(self, outer: Outer) -> None:
        """Add what the native family has beside a BERT: a projection of the embeddings, and a pooler in each of its classes."""
        if self.native(outer.config) is None:
            return
        import torch

        width, device = outer.config.hidden, "meta" if outer.shapes_only else "cpu"
        outer["embed_projection"], outer["embed_projection.bias"] = torch.eye(width, device=device), torch.zeros(width, device=device)
        if "pooler.dense.weight" not in outer:
            outer["pooler.dense.weight"], outer["pooler.dense.bias"] = torch.zeros(width, width, device=device), torch.zeros(width, device=device)

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, around: Around) -> Tensor:
        """Transform each text over its own tokens; in float32 at least, as torch has no transform in less."""
        import torch

        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mixed = filtered(wide, around.live, weights["filter"]) if self.filter == "gfnet" else fourier(wide, around.live)
        out: Tensor = mixed * weights["scale"] if self.filter == "scale" else mixed
        return out.to(hidden.dtype)


def fourier(rows: Tensor, live: Tensor) -> Tensor:
    """Return the real part of the transform of each text's live rows over tokens and channels, [B, T, M]; 0 for padding."""
    import torch

    if bool(live.all()):
        whole: Tensor = torch.fft.fft2(rows).real
        return whole
    out, lengths = torch.zeros_like(rows), live.sum(1)
    for length in filter(None, lengths.unique().tolist()):
        there = live & (lengths == length)[:, None]
        out[there] = torch.fft.fft2(rows[there].unflatten(0, (-1, length))).real.flatten(0, 1)
    return out


def filtered(rows: Tensor, live: Tensor, response: Tensor) -> Tensor:
    """Multiply each channel's frequencies by its response [n / 2 + 1, M, 2]: a convolution over the tokens, around a circle of n places.

    Texts are as if padded with zeros to n tokens, so that a filter means the same in all of them.
    """
    import torch

    from effconvert.surgery.mixing._call import ordered, padding_first

    places = 2 * (len(response) - 1)
    if live.shape[1] > places and int(live.sum(1).max()) > places:
        raise ValueError(f"a text has {int(live.sum(1).max())} tokens, and this filter is for {places} at most; cut it (truncation=True, max_length={places})")
    order = padding_first(live)  # what stands between tokens does not keep them apart
    rows = ordered(rows.masked_fill(~live[..., None], 0), order)[:, -places:]
    spectrum = torch.fft.rfft(rows, places, dim=1) * torch.view_as_complex(response.to(rows.dtype))
    made = torch.fft.irfft(spectrum, places, dim=1)[:, : rows.shape[1]]
    made = torch.nn.functional.pad(made, (0, 0, live.shape[1] - rows.shape[1], 0))
    back: Tensor = ordered(made, order.argsort(1)) * live[..., None]
    return back


def fitted_scale(seen: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the number [1] by which transforms of what attention read, [B, T, M], come closest to what it gave."""
    import torch

    along = power = 0.0
    for read, given in seen:
        mixed = torch.fft.fft2(read).real
        along, power = along + float((mixed * given).sum()), power + float(mixed.square().sum())
    return torch.tensor([along / max(power, TINY)])


def fitted_filter(seen: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return the response [count, M, 2] that comes closest to attention: a ridge for each frequency of each channel.

    The strength is the one that does best on texts held out; where none does better than nothing, nothing it is.
    """
    import torch

    power, power_held, cross, cross_held = torch.zeros(4)  # of what attention read; of what it read with what it gave; [n / 2 + 1, M] each
    texts = 0
    for read, given in seen:
        inputs, outputs = (torch.fft.rfft(rows, 2 * (count - 1), dim=1) for rows in (read, given))
        held = (torch.arange(texts, texts + len(read), device=read.device) % HELD_OUT == HELD_OUT - 1)[:, None, None]
        powers, crosses, texts = inputs.abs().square(), inputs.conj() * outputs, texts + len(read)
        power, power_held = power + (powers * ~held).sum(0), power_held + (powers * held).sum(0)
        cross, cross_held = cross + (crosses * ~held).sum(0), cross_held + (crosses * held).sum(0)
    best, response = 0.0, torch.zeros_like(cross)
    for strength in STRENGTHS:
        tried = cross / (power + strength * power.mean(0) + TINY)
        gain = float((2 * (tried.conj() * cross_held).real - tried.abs().square() * power_held).sum())
        if gain > best:
            best, response = gain, tried
    return torch.view_as_real(response).cpu()


def frequencies(config: Config) -> int:
    """Return how many frequencies a filter has: of texts as long as the model reads, or one token longer where that is odd."""
    from effconvert.surgery.mixing.linformer import longest

    return (longest(config) + 1) // 2 + 1
