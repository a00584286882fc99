"""Weigh values by keys and positions, without queries (AFT)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, P = tokens before these, D = head width, M = hidden width,
# N = longest text, W = window, S = distances in the window: W, or 2 W - 1 to both sides.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from effconvert.errors import OptionError
from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._additive import Terms
    from effconvert.surgery.mixing._call import Call, Slots
    from effconvert.surgery.mixing._channels import Bias

WINDOW, LONGEST = 64, 2048  # tokens: the default window, and the longest text that has a number for each pair
LARGEST = 40.0  # that a bias counts as: exp(2 x 40) is within float32


class Aft(Mixing):
    """Weigh values by keys and positions, without queries (AFT).

    A token's output is, channel by channel, the mean of the values it sees, weighted by exp(key + w), times a gate that depends on the token. Keys are
    new, and w depends on the two positions alone: 0 (simple); a number for each pair of positions (full), for pairs less than W apart (local), or for
    distances below W (conv), and 0 beyond. full and local are for texts as long as the model reads. Keys and w begin as what comes closest to the
    model's attention on the calibration text, and the gate at 1. What a query looks for is lost, so train afterwards. The projections of queries and
    keys stay and are not used. Each head has its own w; the paper's full and local have one for all. On a CPU conv and simple read a prompt more slowly than
    softmax up to 2,048 tokens, and faster at 8,192. Zhai et al. 2021, arXiv 2105.14103.

    \b
    Examples:
      effconvert aft --form conv --window 64 --layers 1-29/2 ./SmolLM2-135M -o ./aft
      effconvert aft --form full google-bert/bert-base-uncased
    """

    facts: ClassVar[Facts] = Facts("models that attend", saves="KV cache: a state of fixed size, but with --form full", native="", exact="")

    softcaps = True  # it is fitted to the weights that come of them
    leaves_windows = True

    form: Literal["simple", "full", "local", "conv"] = Field(description="What the positions of two tokens add to the key: see above.")
    window: int | None = Field(
        None,
        ge=1,
        description=f"Distances that positions count for, the token's own included, W (local and conv). Default: {WINDOW}.",
        json_schema_extra={"metavar": "W"},
    )

    @model_validator(mode="after")
    def _sound(self) -> Aft:
        if self.window is not None and self.form not in ("local", "conv"):
            raise ValueError(f"--window belongs to --form local and conv; --form {self.form} has none")
        return self

    def check(self, config: Config) -> None:
        """Refuse tables of positions that have no end, that have columns for no pair, or that would be larger than the model."""
        super().check(config)
        if self.form == "local" and self.window and self.window > (most := config.stated_length):
            raise OptionError(f"--window {self.window} is more than the {most} tokens that {config.kind} reads; give at most that, or leave it out")
        if self._absolute and config.stated_length > LONGEST and self.form == "full":
            raise OptionError(
                f"--form full has a number for each pair of the {config.longest} tokens that it reads; it does that up to {LONGEST}, so take local or conv"
            )

    @property
    def _absolute(self) -> bool:
        """Whether its table is for positions, not distances."""
        return self.form in ("full", "local")

    @property
    def _window(self) -> int:
        return self.window or WINDOW

    @property
    def _reach(self) -> int | None:
        """How far a bias other than 0 reaches; None: to all tokens."""
        return {"simple": 0, "full": None}.get(self.form, self._window - 1)

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The projections to keys and gates, and the table."""
        inner, distances = config.heads * config.head_dim, self._window if config.decoder else 2 * self._window - 1
        shapes: dict[str, tuple[int, ...]] = {"key": (inner, config.hidden), "gate": (inner, config.hidden)}
        if self.form != "simple":
            rows = (config.stated_length,) if self._absolute else ()
            shapes["table"] = (config.heads, *rows, *(rows if self.form == "full" else (distances,)))
        return shapes

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Equal weights, and gates of 1."""
        import torch

        return {name: torch.zeros(shape) for name, shape in self.parameters(config).items()}

    def needs_calibration(self, config: Config) -> bool:
        """Always: keys are fitted."""
        return True

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Fit keys and table to the layer's attention; see `_additive`."""

        from effconvert.surgery.mixing._additive import Terms, fit_cells, fit_terms, look

        config, texts, cells = layer.config, look(layer), None
        window = 0 if self.form == "simple" else self._window
        distances = window if config.decoder else max(0, 2 * window - 1)
        keys, near = (texts[0].inputs.new_zeros(config.heads, width) for width in (config.hidden, distances))
        terms = fit_terms(texts, Terms(keys, near, config.decoder), keys=False)
        if self._absolute:
            cells = fit_cells(layer, texts, terms, self._reach)
        terms = fit_terms(texts, terms, cells)
        fitted = {"key": terms.key.repeat_interleave(config.head_dim, 0).cpu()}
        if cells is not None:
            fitted["table"] = self._table(values["table"], terms, cells)
        elif self.form == "conv":
            fitted["table"] = terms.near.cpu()
        return {**values, **fitted}

    def _table(self, table: Tensor, terms: Terms, cells: Tensor) -> Tensor:
        """Return the table of positions [H, N, N or S] from what distances add and what cells [H, T, T] add to that; N may be more than T."""
        import torch

        length, tokens = table.shape[1], min(table.shape[1], cells.shape[-1])
        full = terms.bias(torch.arange(length, device=cells.device), length)
        full[:, :tokens, :tokens] += cells[:, :tokens, :tokens]
        if self.form == "full":
            return full.cpu()
        distance = torch.arange(table.shape[2], device=cells.device) - (0 if terms.causal else table.shape[2] // 2)
        keys = torch.arange(length, device=cells.device)[:, None] - distance  # [N, S]
        rows: Tensor = full.gather(2, keys.clamp(0, length - 1).expand(len(full), -1, -1))
        return rows.cpu()

    def cache_slots(self, config: Config) -> Slots:
        """The sums over tokens out of reach, and the keys and values of those within."""
        if not config.decoder:
            return {}
        kept = self._reach or 0  # all tokens grow from none
        slots: dict[str, tuple[tuple[int, ...], str]] = {}
        if self._reach != 0:
            slots |= {"past_key": ((config.heads, kept, config.head_dim), "model"), "past_value": ((config.kv_heads, kept, config.head_dim), "model")}
            slots |= {"past_live": ((kept,), "bool")}
        if self._reach is not None:
            slots |= dict.fromkeys(("mixed", "total", "highest"), ((config.heads, config.head_dim), "float32"))
        return {**slots, **({"count": ((), "int64")} if self._absolute else {})}

    def cache_bytes(self, config: Config, itemsize: int, context: int = 0) -> int:
        """Return the bytes of the slots, and with --form full those of each token."""
        return super().cache_bytes(config, itemsize) + round(context * self.token_bytes(config, itemsize))

    def token_bytes(self, config: Config, itemsize: int) -> float:
        """Return the bytes of a token's key and value where all are kept, and of whether it is live."""
        return (config.heads + config.kv_heads) * config.head_dim * itemsize + 1 if config.decoder and self._reach is None else 0

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Weigh the values, channel by channel, and gate what comes of it."""
        import torch
        from torch.nn import functional

        from effconvert.surgery.mixing._call import padding_first, reorder
        from effconvert.surgery.mixing._channels import look_around

        rows = (functional.linear(call.hidden, weights[name].to(call.hidden.dtype)) for name in ("gate", "key"))
        gate, key = (each.unflatten(-1, (call.query.shape[1], -1)).transpose(1, 2) for each in rows)  # [B, H, T, D]
        call = replace(call, key=key)
        if call.causal:
            mixed = self._look_back(weights, call)
        else:
            order = padding_first(~call.live) if call.padded else None  # padding last: a text's positions are its rows
            key, value, live = call.key, call.value, call.live
            if order is not None:
                key, value, live = reorder(key, order), reorder(value, order), live.gather(1, order)
            if self._absolute:
                _refuse_longer(weights["table"], live.shape[1], live.sum(1))
            start = torch.zeros(1, 1, dtype=torch.int64, device=key.device)
            mixed = look_around(*_prepared(key, value, live), self._reach, self._bias(weights, start, False))
            mixed = mixed if order is None else reorder(mixed, order.argsort(1))
        gated: Tensor = 2 * gate.float().sigmoid() * mixed
        return gated

    def _look_back(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Weigh the values of a decoder, whose call has padding in front; with a state, which is written."""
        import torch

        from effconvert.surgery.mixing._channels import Sums, look_back

        key, value, live = (call.key, call.value, call.live) if self._reach == 0 else call.with_window(self._reach)
        start = torch.zeros(1, 1, dtype=torch.int64, device=key.device)  # the position of the first row; where distances count, any will do
        if self._absolute:
            positions = call.positions()
            _refuse_longer(weights["table"], call.max_tokens, positions[:, -1] + 1)
            start = (positions[:, -1:] + 1 - key.shape[2])[: None if call.padded else 1]
        empty = dict.fromkeys(Sums._fields, (call.query.shape[1::2], "float32"))
        sums = Sums.stored(*(call.read(name, empty) if self._reach is not None else call.query.new_zeros(1, 1, 1).float() for name in Sums._fields))
        mixed, sums = look_back(*_prepared(key, value, live), call.query.shape[2], sums, self._reach, self._bias(weights, start, True))
        if self._reach is not None:
            call.write(**{name: tensor[:, :, 0] for name, tensor in sums._asdict().items()})
        return mixed

    def _bias(self, weights: Mapping[str, Tensor], start: Tensor, causal: bool) -> Bias | None:
        """Return what pairs of rows add to the key, where row 0 of each text has the position `start` [B or 1, 1]."""
        import torch

        if "table" not in weights:
            return None
        table = weights["table"].float().clamp(-LARGEST, LARGEST)
        last = table.shape[-1] - 1

        def bias(queries: range, keys: range) -> Tensor:
            query, key = (start + torch.arange(rows.start, rows.stop, device=table.device) for rows in (queries, keys))
            query, key = query[:, :, None], key[:, None]  # [B or 1, C, 1], [B or 1, 1, n]
            if self.form == "full":
                return table[:, query.clamp(0, last), key.clamp(0, last)].movedim(1, 0)
            distance = query - key + (0 if causal else self._window - 1)
            near, column = (distance >= 0) & (distance <= last), distance.clamp(0, last)
            rows = table[:, column] if self.form == "conv" else table[:, query.clamp(0, table.shape[1] - 1), column]
            return rows.movedim(1, 0).masked_fill(~near[:, None], 0)

        return bias


def _refuse_longer(table: Tensor, most: int, counts: Tensor) -> None:
    """Refuse texts longer than a table of positions; `most` is an upper bound of their numbers of tokens."""
    if most > (limit := table.shape[1]) and (count := int(counts.max())) > limit:
        raise ValueError(f"a text has {count} tokens, and aft's tables are for {limit} at most; cut it, or convert with --form conv")


def _prepared(key: Tensor, value: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values in float32, values for each query head: [B, H, P + T, D]. A token that is padding has keys of -inf."""
    import torch

    return key.float().masked_fill(~live[:, None, :, None], -torch.inf), value.float().repeat_interleave(key.shape[1] // value.shape[1], 1)
