"""Long convolutions with gates in place of attention (Hyena)."""
# B = batch, H = query heads, Hk = KV heads, G = Hk or H, T = tokens, N = tokens with those before, D = head width, F = filters, n = lags of a filter.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call, Slots
    from effconvert.surgery.mixing._convolution import Filter

SHORT = 3  # tokens of the short convolutions


class Hyena(Mixing):
    """Long convolutions with gates in place of attention (Hyena).

    Values pass N long convolutions. After each a gate multiplies them: of keys, and after the last of queries. So only the gates know what tokens say, and
    filters the distance alone. The last filter of each head starts as the mean of its attention at each distance on the calibration text, over half of its
    window; all else starts neutral. Little is left of a pretrained model before --refit or --transfer, and it has to be trained on. Encoders have filters to
    both sides. Reading a prompt of 2,048 tokens or more is faster than with softmax, and writing a token slower at every length measured.
    Poli et al. 2023, arXiv 2302.10866; one filter for all channels of a head: Massaroli et al. 2023, arXiv 2310.18780.

    \b
    Examples:
      effconvert hyena --transfer ./SmolLM2-135M -o ./hyena
      effconvert hyena --length 512 --layers 1-29/2 --refit ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts("models that attend", saves="time on long texts", native="", exact="")

    softcaps = True  # there are no scores to cap

    order: int = Field(
        2, ge=2, le=8, description="Long convolutions, each followed by a gate: the last by queries, others by keys.", json_schema_extra={"metavar": "N"}
    )
    filter: Literal["explicit", "implicit"] = Field(
        "explicit",
        description="Long filters: a number for each distance (explicit); or a small network of the distance, for texts of any length (implicit).",
    )
    length: int | None = Field(
        None,
        ge=1,
        description="Distances of an explicit filter; tokens further away do not count, and a decoder does not keep them. Default: the longest text.",
        json_schema_extra={"metavar": "TOKENS"},
    )

    @model_validator(mode="after")
    def _sound(self) -> Hyena:
        if self.length is not None and self.filter == "implicit":
            raise ValueError("--length belongs to --filter explicit; implicit filters have no end")
        return self

    def check(self, config: Config) -> None:
        """Refuse models that do not say how long a text may be, where that decides."""
        super().check(config)
        self._lags(config)

    def needs_calibration(self, config: Config) -> bool:
        """Always: the last filters are fitted to attention."""
        return True

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Short filters of each channel of values, keys and queries; and long ones: of each KV head for each gate by keys, then of each query head."""
        from effconvert.surgery.mixing import _implicit

        short = {
            "value_taps": (config.kv_heads, config.head_dim, SHORT),
            "key_taps": (self.order - 1, config.kv_heads, config.head_dim, SHORT),
            "query_taps": (config.heads, config.head_dim, SHORT),
        }
        count = (self.order - 1) * config.kv_heads + config.heads
        return {**short, **({"filters": (count, len(self._lags(config)))} if self.filter == "explicit" else _implicit.shapes(count))}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Gates of 1, and filters that change nothing but the last: those are means of near tokens, with a reach that differs by head."""
        import torch

        shapes, lags = self.parameters(config), torch.tensor(self._lags(config))
        taps = {name: torch.zeros(shapes[name]) for name in ("value_taps", "key_taps", "query_taps")}
        taps["value_taps"][..., SHORT - 1 if config.decoder else SHORT // 2] = 1
        means = (-lags.abs() * 2.0 ** -(1 + torch.arange(config.heads) % 8)[:, None]).exp()
        return {**taps, **self._long(config, index, means / means.sum(1, keepdim=True), lags)}

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take the mean of attention at each distance for the last filters."""
        import torch

        from effconvert.surgery.mixing._convolution import mean_by_lag

        assert layer.activations
        weights = (capture.weights for capture in layer.activations.capture(layer, ("o",), until="o"))
        closest, lags = mean_by_lag(filter(torch.is_tensor, weights), layer.config.decoder), torch.tensor(self._lags(layer.config))
        if self.filter == "implicit":  # which continues beyond the lags that the text has
            lags = torch.arange(closest.first, closest.first + closest.taps.shape[1])
        return {**values, **self._long(layer.config, layer.index, closest.at(int(lags[0]), int(lags[-1])).float(), lags)}

    def cache_slots(self, config: Config) -> Slots:
        """The last tokens of the short convolutions, and what the long ones convolve: as many tokens as --length says, or it grows from nothing."""
        if not config.decoder:
            return {}
        heads = {"value": config.kv_heads, "key": config.kv_heads, "query": config.heads}
        near = {f"near_{name}": ((count, SHORT - 1, config.head_dim), "model") for name, count in heads.items()}
        return {**near, **{f"past_{number}": ((config.kv_heads, (self.length or 1) - 1, config.head_dim), "model") for number in range(self.order)}}

    def cache_bytes(self, config: Config, itemsize: int, context: int = 0) -> int:
        """Return the bytes of the slots, and where they grow, of what each long convolution keeps of the tokens that its filter reaches."""
        kept = context if self.filter == "implicit" else min(context, self._lags(config)[-1])
        return super().cache_bytes(config, itemsize) + kept * int(self.token_bytes(config, itemsize))

    def token_bytes(self, config: Config, itemsize: int) -> float:
        """Return the bytes that the long convolutions keep of a token, where they keep all."""
        return float(self.order * config.kv_heads * config.head_dim * itemsize) if config.decoder and self.length is None else 0.0

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Convolve and gate in turn: z = gate * (filter conv z), first of the values."""
        from dataclasses import replace

        from effconvert.surgery.mixing._call import reorder
        from effconvert.surgery.mixing._convolution import convolve
        from effconvert.surgery.mixing._softmax import live_last

        if call.rotation:  # a gate should not turn with the position
            call = replace(call, query=call.rotation.undone(call.query), key=call.rotation.undone(call.key), rotation=None)
        call, order = live_last(call)
        value, key, query = (_near(call, name, rows) for name, rows in (("value", call.value), ("key", call.key), ("query", call.query)))
        mixed, gates = _short(value, weights["value_taps"]), [*(_short(key, taps) for taps in weights["key_taps"]), _short(query, weights["query_taps"])]
        most = None if self.filter == "implicit" else weights["filters"].shape[1] - 1
        least = 0 if call.state is None else (self.length or 1) - 1
        for number, gate in enumerate(gates):
            rows = _behind(call, f"past_{number}", mixed.to(call.value.dtype), least, most)  # [B, Hk, N, D]
            filters = self._filters(weights, call, number, rows.shape[2])
            mixed = (1 + gate) * convolve(rows, filters, call.key.shape[2])
        return mixed if order is None else reorder(mixed, order.argsort(1))

    def _lags(self, config: Config) -> range:
        """Return the distances for which an explicit filter has a number; of an implicit one, those to which its initial values are fitted."""
        from effconvert.surgery.mixing.linformer import longest

        length = 512 if self.filter == "implicit" else self.length or longest(config)
        return range(0 if config.decoder else 1 - length, length)

    def _long(self, config: Config, index: int, last: Tensor, lags: Tensor) -> Mapping[str, Tensor]:
        """Return the parameters of the long filters: the last ones [H, n] as they are given, and those before pass each token on."""
        import torch

        from effconvert.surgery.mixing import _implicit

        taps = torch.cat([(lags == 0).float().expand((self.order - 1) * config.kv_heads, -1), last])
        return {"filters": taps * (1 + lags.abs())} if self.filter == "explicit" else _implicit.fitted(_implicit.initial(len(taps), index), taps, lags)

    def _filters(self, weights: Mapping[str, Tensor], call: Call, number: int, tokens: int) -> Filter:
        """Return the filters of one long convolution, over `tokens` tokens at most."""
        import torch

        from effconvert.surgery.mixing import _implicit
        from effconvert.surgery.mixing._convolution import Filter

        groups, last = call.key.shape[1], number == self.order - 1
        own = slice(number * groups, None if last else (number + 1) * groups)
        if self.filter == "explicit":  # divided by the distance: training moves all numbers alike, and a filter's far ones are small
            taps = weights["filters"][own].float()
            first = 0 if call.causal else -(taps.shape[1] // 2)
            return Filter(taps / (1 + torch.arange(first, first + taps.shape[1], device=taps.device).abs()), first)
        lags = torch.arange(0 if call.causal else 1 - tokens, tokens, device=call.key.device)
        return Filter(_implicit.taps(weights, lags)[own], int(lags[0]))


def _near(call: Call, name: str, rows: Tensor) -> Tensor:
    """Return rows [B, G, T, D] with those that a short convolution needs beside them, [B, G, T + 2, D]: two before, or one on each side."""
    from torch.nn.functional import pad

    if call.causal:
        return _behind(call, f"near_{name}", rows, SHORT - 1, SHORT - 1)[:, :, -rows.shape[2] - SHORT + 1 :]
    return pad(rows.masked_fill(~call.live[:, None, :, None], 0), (0, 0, SHORT // 2, SHORT // 2))


def _short(rows: Tensor, taps: Tensor) -> Tensor:
    """Convolve each channel of rows [B, G, T + 2, D] with its short filter, taps [G, D, 3]: [B, G, T, D] in float32."""
    tokens = rows.shape[2] - SHORT + 1
    sums: Tensor = sum(tap[:, None].float() * rows[:, :, at : at + tokens].float() for at, tap in enumerate(taps.unbind(-1)))  # type: ignore[assignment]
    return sums


def _behind(call: Call, name: str, rows: Tensor, least: int, most: int | None) -> Tensor:
    """Return rows [B, G, T, D] behind those of earlier tokens, with zeros for padding, which comes first; keep the last `most` of them, or all."""
    import torch

    from effconvert.surgery.mixing._call import padding_first, reorder

    old = call.read(name, {name: ((rows.shape[1], least, rows.shape[3]), "model")})
    both = torch.cat([old, rows.masked_fill(~call.live[:, None, :, None], 0)], 2)
    if call.padded and old.shape[2]:
        order = padding_first(torch.cat([call.live.new_ones(len(old), old.shape[2]), call.live], 1))
        both = reorder(both, order)
    call.write(**{name: both[:, :, 0 if most is None else max(both.shape[2] - most, 0) :].clone()})
    return both
