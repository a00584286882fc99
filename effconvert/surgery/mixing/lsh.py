"""Attend to near tokens and to those in the same hash bucket (Reformer)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, N = tokens with those before, D = head width, J = rounds, C = chunk,
# S = sinks.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call, Slots
    from effconvert.surgery.mixing._softmax import Text

KEPT = ("key", "value", "bucket")  # slots of each token
LEAST = 1e-4  # of eigenvalues, relative to the largest
STEP = 1 / 32  # of random numbers: few bits, which every type has, so that buckets depend on no type


class Lsh(Mixing):
    """Attend to near tokens and to those in the same hash bucket (Reformer).

    A round turns queries and keys by a random rotation, and their bucket is the direction that they are nearest to (N directions, two opposite ones for
    each axis). A bucket's tokens are cut into chunks of C by position: a token sees its chunk up to itself and the chunk before. Before these rounds
    comes one with a single bucket: so each token sees near ones, as in the paper's local layers. One softmax covers all rounds, a key once. All tokens also
    see the first S of the text (--sinks), which are not in the paper. Queries and keys stay the model's own, where the paper has one projection for
    both; for their buckets they are brought to the same spread on the calibration text. Encoders see the chunk after theirs too. A decoder's token
    sees at most 2 C (J + 1) + S keys, however long the text. Still prompts took longer than with softmax below some 8,192 tokens, and writing a token
    at all lengths measured. The KV cache keeps all tokens and their buckets. Exact where C is as long as the longest text. Layers with a sliding window
    stay as they are. Kitaev et al. 2020, arXiv 2001.04451.

    \b
    Examples:
      effconvert lsh --buckets 16 --rounds 4 --chunk 16 ./SmolLM2-135M -o ./lsh
      effconvert lsh --buckets 32 --keep-softmax 0,-1 ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts("models that attend", saves="time of long prompts", native="", exact="with --chunk as long as the text")

    softcaps = True
    leaves_windows = True
    frozen = ("key_directions", "query_directions", "key_offsets")

    buckets: int = Field(ge=2, le=4096, description="Buckets of a round, an even number.", json_schema_extra={"metavar": "N"})
    rounds: int = Field(4, ge=1, le=64, description="Rounds of hashing, J: more find more of the keys that matter.")
    chunk: int = Field(64, ge=1, description="Tokens of a chunk, C: a token sees C to 2 C - 1 near ones, and in each round up to as many of its bucket.")
    sinks: int = Field(4, ge=0, description="First tokens of the text that all tokens see, S.")
    seed: int = Field(0, ge=0, lt=2**31, description="Random seed of the rotations.")

    @model_validator(mode="after")
    def _sound(self) -> Lsh:
        if self.buckets % 2:
            raise ValueError(f"--buckets {self.buckets} is odd, and buckets come in pairs of opposite directions; give {self.buckets + 1}")
        return self

    def is_exact(self, config: Config) -> bool:
        """Where a chunk is as long as the longest text."""
        return config.longest is not None and self.chunk >= config.longest

    def notes(self, config: Config) -> str:
        """Say that the cache becomes no smaller."""
        return "the KV cache keeps all tokens, since later ones may see any of them, and their buckets" if config.decoder else ""

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The axes of each KV head's buckets, for keys and for its queries, and where the middle of the keys is on them."""
        axes = self.buckets // 2
        directions = (config.kv_heads, self.rounds, config.head_dim, axes)
        return {"key_directions": directions, "query_directions": directions, "key_offsets": (config.kv_heads, self.rounds, axes)}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Random axes, different for each layer, the same for keys and queries."""
        import torch

        shapes = self.parameters(config)
        drawn = torch.randn(shapes["key_directions"], generator=torch.Generator().manual_seed((self.seed << 16) + index))
        directions = (drawn / STEP).round() * STEP
        return {"key_directions": directions, "query_directions": directions, "key_offsets": torch.zeros(shapes["key_offsets"])}

    def needs_calibration(self, config: Config) -> bool:
        """To bring queries and keys to the same spread, unless every key is seen."""
        return not self.is_exact(config)

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take the mean from the keys, which changes no softmax, and stretch keys and queries so that both have the same second moments.

        Sinks, which all tokens see, are left out: they are far from all other keys.
        """
        import torch

        assert layer.activations
        queries = keys = means = torch.zeros(())  # sums over tokens, [Hk, D, D] and for the means [Hk, D]
        count = 0
        for capture in layer.activations.capture(layer, ("o",), until="o"):
            assert capture.query is not None
            assert capture.key is not None
            key = capture.key[:, :, self.sinks :].transpose(0, 1).flatten(1, 2).double().cpu()  # [Hk, B T, D]
            query = capture.query[:, :, self.sinks :].transpose(0, 1).unflatten(0, (len(key), -1)).flatten(1, 3).double().cpu()  # [Hk, R B T, D]
            queries, keys, means, count = queries + query.mT @ query, keys + key.mT @ key, means + key.sum(1), count + key.shape[1]
        if not count:
            return values
        mean = means / count
        stretch, shrink = balance(keys / count - mean[:, :, None] * mean[:, None], queries / count)
        key_directions = stretch[:, None] @ values["key_directions"].double()
        return {
            "key_directions": key_directions.float(),
            "query_directions": (shrink[:, None] @ values["query_directions"].double()).float(),
            "key_offsets": (mean[:, None, None] @ key_directions)[:, :, 0].float(),
        }

    def cache_slots(self, config: Config) -> Slots:
        """Keys, values and buckets of all tokens, which grow from none."""
        if not config.decoder:
            return {}
        rows = ((config.kv_heads, 0, config.head_dim), "model")
        return {"count": ((), "int64"), "key": rows, "value": rows, "bucket": ((config.kv_heads, 0, self.rounds), "int64")}

    def cache_bytes(self, config: Config, itemsize: int, context: int = 0) -> int:
        """Return the bytes of the count, and of `context` tokens."""
        return super().cache_bytes(config, itemsize) + context * self._row_bytes(config, itemsize)

    def token_bytes(self, config: Config, itemsize: int) -> float:
        """Return the bytes of a token's key, value and buckets."""
        return self._row_bytes(config, itemsize)

    def _row_bytes(self, config: Config, itemsize: int) -> int:
        return config.kv_heads * (2 * config.head_dim * itemsize + 8 * self.rounds) if config.decoder else 0

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """One softmax over the near keys, those of each round's bucket, and the sinks."""
        import torch
        from torch.nn import functional

        from effconvert.surgery.mixing._buckets import Seen
        from effconvert.surgery.mixing._call import reorder
        from effconvert.surgery.mixing._softmax import combine, live_last

        call, order = live_last(call.prescaled)
        positions, query = call.positions(), call.grouped.flatten(2, 3)  # [B, T], [B, Hk, R T, D]
        count = positions[:, -1:] + 1  # [B, 1], live tokens so far
        text, bucket = self._remember(weights, call, count)
        row = torch.arange(text.key.shape[2], device=query.device)
        hidden = (row < text.shift) | (row >= text.shift + count)  # padding, [B, N]
        keys, queries = (functional.pad(each, (0, 0, 1, 0)) for each in (bucket.mT, self._hash(weights, query, "query")))  # one bucket in the first round
        place = positions.repeat(1, call.grouped.shape[2])  # [B, R T]
        seen = Seen.by_bucket(keys.masked_fill(hidden[:, None, None], self.buckets), queries, place + text.shift, self.chunk, call.causal)
        parts = list(seen.attend(call, query, text.key, text.value, self.chunk, self.buckets))
        if self.sinks:
            at = torch.arange(self.sinks, device=query.device)[None]
            before = place + 1 if call.causal else count.expand_as(place)
            parts.append(seen.attend_shared(call, query, *text.at(at), (at + text.shift).clamp(0, len(row) - 1), before))
        out = combine(parts).unflatten(2, call.grouped.shape[2:4]).flatten(1, 2)  # [B, H, T, D]
        return out if order is None else reorder(out, order.argsort(1))

    def _remember(self, weights: Mapping[str, Tensor], call: Call, count: Tensor) -> tuple[Text, Tensor]:
        """Return the text so far, and the buckets of its keys [B, Hk, N, J]; both go into the state."""
        from effconvert.surgery.mixing._call import extended
        from effconvert.surgery.mixing._softmax import Text

        rows, start = (call.key, call.value, self._hash(weights, call.key, "key").mT), count - call.key.shape[2]
        if call.state is None:
            return Text(*rows[:2], -start), rows[2]
        begin = count - call.live.sum(1, keepdim=True)
        kept = {name: extended(call.state.tensors[name], new, start, begin, call.max_tokens) for name, new in zip(KEPT, rows, strict=True)}
        call.write(**kept)
        return Text(kept["key"], kept["value"], count * 0), kept["bucket"]

    def _hash(self, weights: Mapping[str, Tensor], rows: Tensor, kind: str) -> Tensor:
        """Return the bucket of keys or queries [B, Hk, n, D] in each round, [B, Hk, J, n]: the axis with the largest product, and its sign."""
        import torch

        products = rows.float()[:, :, None] @ weights[f"{kind}_directions"].float()  # [B, Hk, J, n, N / 2]
        if kind == "key":
            products = products - weights["key_offsets"].float()[:, :, None]
        return torch.cat([products, -products], -1).argmax(-1)


def balance(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return a symmetric map of keys and its inverse for queries, with which both have the same second moments; products of keys and queries stay.

    That map is the square root of the geometric mean of the queries' moments and the inverse of the keys'.

    Args:
        keys: second moments of keys, [Hk, D, D].
        queries: of queries, [Hk, D, D].
    """
    root, inverse = power(keys, 0.5), power(keys, -0.5)
    mean = inverse @ power(root @ queries @ root, 0.5) @ inverse
    return power(mean, 0.5), power(mean, -0.5)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of symmetric matrices [..., D, D] without negative eigenvalues; tiny ones are made larger."""
    import torch

    values, vectors = torch.linalg.eigh(matrix)
    least = (LEAST * values[..., -1:]).clamp_min(torch.finfo(values.dtype).tiny)
    raised: Tensor = (vectors * torch.maximum(values, least).pow(exponent)[..., None, :]) @ vectors.mT
    return raised
