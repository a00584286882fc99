"""Long convolutions with gates in place of attention (Hyena)."""
# B = batch, H = query heads, Hk = KV heads, G = Hk or H, T = tokens, N = tokens with those before, D = head width, F = filters, n = lags of a filter.
# With a recurrence N = numbers of its state.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from effconvert.errors import OptionError
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
    both sides. On a CPU reading a prompt of 2,048 tokens or more is faster than with softmax, and writing a token slower at every length measured.
    --recurrence makes each filter a sum of decaying waves, near to the mean of attention, and the conversion prints how near. Reading, training and writing
    use these same filters; a decoder's state has a fixed size, and it writes a token faster than softmax at 8,192 tokens, slower at 512 and 2,048.
    Poli et al. 2023, arXiv 2302.10866; one filter for all channels of a head, and the recurrence: Massaroli et al. 2023, arXiv 2310.18780.

    \b
    Examples:
      effconvert hyena --transfer ./SmolLM2-135M -o ./hyena
      effconvert hyena --length 512 --layers 1-29/2 --refit ./SmolLM2-135M
      effconvert hyena --recurrence 16 --transfer ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts("models that attend", saves="time on long texts; KV cache with --recurrence", native="", exact="")

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
    recurrence: int | None = Field(
        None,
        ge=2,
        le=256,
        description="Make each explicit filter a sum of N / 2 decaying waves: a decoder then keeps N numbers of a channel in place of all tokens.",
        json_schema_extra={"metavar": "N"},
    )

    @model_validator(mode="after")
    def _sound(self) -> Hyena:
        if self.length is not None and self.filter == "implicit":
            raise ValueError("--length belongs to --filter explicit; implicit filters have no end")
        if self.recurrence is None:
            return self
        if self.recurrence % 2:
            raise ValueError(f"--recurrence {self.recurrence} is odd, and each wave has two numbers; give {self.recurrence + 1}")
        if self.filter == "implicit":
            raise ValueError("--recurrence makes waves of explicit filters; leave --filter implicit out, or --recurrence")
        if self.length is not None:
            raise ValueError("--length cuts filters off, and the waves of --recurrence have no end; leave one of the two out")
        return self

    def check(self, config: Config) -> None:
        """Refuse models that do not say how long a text may be, where that decides, and a recurrence for encoders."""
        super().check(config)
        self._lags(config)
        if self.length and config.longest and self.length > config.longest:
            raise OptionError(f"--length {self.length} is more than the {config.longest} tokens that this model reads at most; leave it out, which means all")
        if self.recurrence and not config.decoder:
            raise OptionError(
                f"{config.kind} is an {config.role}, which sees later tokens too and keeps no state, so --recurrence is for decoders; leave it out"
            )

    def needs_calibration(self, config: Config) -> bool:
        """Always: the last filters are fitted to attention."""
        return True

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Short filters of each channel of values, keys and queries; and long ones: of each KV head for each gate by keys, then of each query head."""
        from effconvert.surgery.mixing import _implicit, _waves

        short = {
            "value_taps": (config.kv_heads, config.head_dim, SHORT),
            "key_taps": (self.order - 1, config.kv_heads, config.head_dim, SHORT),
            "query_taps": (config.heads, config.head_dim, SHORT),
        }
        count = (self.order - 1) * config.kv_heads + config.heads
        if self.recurrence:
            return {**short, **_waves.shapes(self.order, config.kv_heads, count, self.recurrence // 2)}
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

        from effconvert.surgery.mixing import _waves
        from effconvert.surgery.mixing._convolution import mean_by_lag

        assert layer.activations
        weights = (capture.weights for capture in layer.activations.capture(layer, ("o",), until="o"))
        closest, lags = mean_by_lag(filter(torch.is_tensor, weights), layer.config.decoder), torch.tensor(self._lags(layer.config))
        if self._endless:  # these filters continue beyond the lags that the text has
            lags = torch.arange(closest.first, closest.first + closest.taps.shape[1])
        last = closest.at(int(lags[0]), int(lags[-1])).float()
        values = {**values, **self._long(layer.config, layer.index, last, lags)}
        if self.recurrence:
            taps = _waves.Waves.stored(values, self.order - 1, self._rows(layer.config.kv_heads, self.order - 1)).taps(len(lags)).flatten(0, 1)
            layer.activations.note(layer.index, {"filters": float((taps - last).norm() / last.norm())})
        return values

    def cache_slots(self, config: Config) -> Slots:
        """The last tokens of the short convolutions; and of the long ones a state, or the tokens that --length says, or all, which grow from none."""
        if not config.decoder:
            return {}
        heads = {"value": config.kv_heads, "key": config.kv_heads, "query": config.heads}
        last = {f"near_{name}": ((count, SHORT - 1, config.head_dim), "model") for name, count in heads.items()}
        kept, kind = (self.recurrence, "float32") if self.recurrence else ((self.length or 1) - 1, "model")
        return {**last, **{f"past_{number}": ((config.kv_heads, kept, config.head_dim), kind) for number in range(self.order)}}

    def cache_bytes(self, config: Config, itemsize: int, context: int = 0) -> int:
        """Return the bytes of the slots, and where they grow, of what each long convolution keeps of the tokens that its filter reaches."""
        kept = context if self._endless else min(context, self._lags(config)[-1])
        return super().cache_bytes(config, itemsize) + kept * int(self.token_bytes(config, itemsize))

    def token_bytes(self, config: Config, itemsize: int) -> float:
        """Return the bytes that the long convolutions keep of a token, where they keep all."""
        grows = config.decoder and self.length is None and not self.recurrence
        return float(self.order * config.kv_heads * config.head_dim * itemsize) if grows else 0.0

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Convolve and gate in turn: z = gate * (filter conv z), first of the values."""
        from dataclasses import replace

        from effconvert.surgery.mixing._call import reorder
        from effconvert.surgery.mixing._near import near, short
        from effconvert.surgery.mixing._softmax import live_last

        if call.rotation:  # a gate should not turn with the position
            call = replace(call, query=call.rotation.undone(call.query), key=call.rotation.undone(call.key), rotation=None)
        call, order = live_last(call)
        value, key, query = (near(call, name, rows, SHORT) for name, rows in (("value", call.value), ("key", call.key), ("query", call.query)))
        mixed, gates = short(value, weights["value_taps"]), [*(short(key, taps) for taps in weights["key_taps"]), short(query, weights["query_taps"])]
        run = self._recur if self.recurrence else self._convolve
        for number, gate in enumerate(gates):
            mixed = (1 + gate) * run(weights, call, number, mixed)
        return mixed if order is None else reorder(mixed, order.argsort(1))

    def _convolve(self, weights: Mapping[str, Tensor], call: Call, number: int, mixed: Tensor) -> Tensor:
        """Run one long convolution over rows [B, Hk, T, D] and those that the cache keeps: [B, G, T, D]."""
        from effconvert.surgery.mixing._convolution import convolve
        from effconvert.surgery.mixing._near import behind

        most = None if self.filter == "implicit" else weights["filters"].shape[1] - 1
        least = 0 if call.state is None else (self.length or 1) - 1
        rows = behind(call, f"past_{number}", mixed.to(call.value.dtype), least, most)  # [B, Hk, N, D]
        return convolve(rows, self._filters(weights, call, number, rows.shape[2]), call.key.shape[2])

    def _recur(self, weights: Mapping[str, Tensor], call: Call, number: int, mixed: Tensor) -> Tensor:
        """Run one long convolution over rows [B, Hk, T, D] as a recurrence: [B, G, T, D]."""
        from effconvert.surgery.mixing._waves import Waves, recur

        assert self.recurrence
        name, groups = f"past_{number}", mixed.shape[1]
        waves = Waves.stored(weights, number, self._rows(groups, number))
        state = call.read(name, {name: ((groups, self.recurrence, mixed.shape[3]), "float32")})
        filtered, state = recur(waves, mixed.masked_fill(~call.live[:, None, :, None], 0), state, call.live if call.padded else call.live[:1])
        call.write(**{name: state})
        return filtered

    @property
    def _endless(self) -> bool:
        """Whether filters are functions of the distance, which have no end."""
        return self.filter == "implicit" or self.recurrence is not None

    def _rows(self, groups: int, number: int) -> slice:
        """Return which of all filters are those of one long convolution."""
        return slice(number * groups, None if number == self.order - 1 else (number + 1) * groups)

    def _lags(self, config: Config) -> range:
        """Return the distances for which an explicit filter has a number; of one without an end, those to which its initial values are fitted."""
        length = 512 if self._endless else self.length or config.stated_length
        return range(0 if config.decoder else 1 - length, length)

    def _long(self, config: Config, index: int, last: Tensor, lags: Tensor) -> Mapping[str, Tensor]:
        """Return the parameters of the long filters: the last ones [H, n] as they are given, and those before pass each token on."""
        import torch

        from effconvert.surgery.mixing import _implicit, _waves

        taps = torch.cat([(lags == 0).float().expand((self.order - 1) * config.kv_heads, -1), last])
        if self.recurrence:
            by_number = [taps[self._rows(config.kv_heads, number)].unflatten(0, (config.kv_heads, -1)) for number in range(self.order)]
            return _waves.fitted(by_number, self.recurrence // 2)
        return {"filters": taps * (1 + lags.abs())} if self.filter == "explicit" else _implicit.fitted(_implicit.initial(len(taps), index), taps, lags)

    def _filters(self, weights: Mapping[str, Tensor], call: Call, number: int, tokens: int) -> Filter:
        """Return the filters of one long convolution, over `tokens` tokens at most."""
        import torch

        from effconvert.surgery.mixing import _implicit
        from effconvert.surgery.mixing._convolution import Filter

        own = self._rows(call.key.shape[1], number)
        if self.filter == "explicit":  # divided by the distance: training moves all numbers alike, and a filter's far ones are small
            taps = weights["filters"][own].float()
            first = 0 if call.causal else -(taps.shape[1] // 2)
            return Filter(taps / (1 + torch.arange(first, first + taps.shape[1], device=taps.device).abs()), first)
        lags = torch.arange(0 if call.causal else 1 - tokens, tokens, device=call.key.device)
        return Filter(_implicit.taps(weights, lags, own), int(lags[0]))
