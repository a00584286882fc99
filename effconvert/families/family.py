"""The row of data for a family: where its models have their parts.

A *part* is named by its function: q, k, v, o, gate, up, down. The norms of a layer are named by position (`attn_norm` before
attention, `attn_post_norm` after it, likewise `mlp_...`). Several parts with one module are fused in it, in the order of the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

EXPERTS_KEYS = ("num_local_experts", "num_experts")  # of config.json: transformers treats them as the same


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: names relative to the base model, and the config keys that give its shape."""

    base: str  # class of the bare model
    lm: str  # class with the head of its pretraining
    prefix: str  # of the base model inside `lm`; a checkpoint may be saved with or without it
    layers: str  # path of the list of layers
    parts: Mapping[str, str]  # in a layer: part -> module
    outer: Mapping[str, str]  # outside the layers, inside the base model: part -> module
    head: Mapping[str, str]  # outside the base model: part -> module
    loose: frozenset[str] = frozenset()  # parts that are no module's weight: in `parts` is the name of the parameter itself
    optional: frozenset[str] = frozenset()  # parts that some models of the family lack
    lacking: Mapping[str, tuple[str, object]] = field(default_factory=dict)  # parts that a model lacks if its config has this: part -> key, value
    first_lacks: frozenset[str] = frozenset()  # parts that layer 0 lacks and all others have
    norms_stream: bool = False  # whether layers normalise the residual stream itself
    buffers: tuple[str, ...] = ()  # tensors that are no trained parameters: constants of its class, or what old versions of transformers saved

    aliases: Mapping[str, str] = field(default_factory=dict)  # in names of tensors: another spelling that transformers reads -> this row's
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # likewise, modules that transformers splits into equal rows -> this row's, in order

    per_head: bool = False  # fused q, k, v: head 0's q, k, v, then head 1's, ... instead of all q, all k, all v
    blocks: int = 0  # likewise, by this many blocks of heads, each with q, k and v in order
    transposed: bool = False  # projections are stored [in, out] (Conv1D)
    per_kv_head: tuple[str, ...] = ("k", "v")  # parts whose rows are sorted by KV head

    rope: str = ""  # the pairs of dimensions of a head that RoPE turns: "halves" (j, j + n/2), "interleaved" (2j, 2j + 1), none
    rotary_key: str = "partial_rotary_factor"  # the fraction of a head that RoPE turns
    rotary_counts: bool = False  # `rotary_key` is a number of dimensions, not a fraction
    rope_types: tuple[str, ...] = ()  # the types of RoPE that its config takes; empty: all
    turned_key: str = ""  # a list with 1 for each layer with RoPE, else 0; without it, every n-th layer has no RoPE, by `unturned_key`
    unturned_key: str = ""
    turns_windows: bool = False  # only layers with a window have RoPE
    turns_without: bool = False  # models without any window have RoPE in all layers
    norms_turned: bool = False  # the norm of queries and keys comes after RoPE, not before
    scales_queries: bool = False  # whether queries are scaled by their position in the text

    decoder: bool = True
    decoder_layers: str = ""  # in families with an encoder and a decoder, the path of the decoder's layers; `layers` are the encoder's
    both_ways_key: str = ""  # a key that makes a decoder's attention bidirectional and halves its window; classes have `is_causal` too
    always_causal: bool = False  # whether its class does not heed `is_causal`
    refused: Mapping[str, tuple[bool, str]] = field(default_factory=dict)  # switches: key -> the value that they may not have, and why
    own_attention: bool = False  # attention is not called through transformers' AttentionInterface, so `scores` cannot be replaced
    adds_inside: frozenset[str] = frozenset()  # places whose module adds to the residual stream itself: attention, ffn
    kinds_key: str = ""  # a list of [[kinds of attention], repetitions], which gives the layers in order
    packs: bool = True  # whether a decoder's class separates texts that share a row, by position_ids that restart
    heads_key: str = "num_attention_heads"
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    embed_key: str = ""  # width of the embeddings, in models that have a projection (`project_in`) between them and the layers
    positions_key: str = "max_position_embeddings"
    positions_after_padding: bool = False  # positions start after the padding token's id, so the longest text is that much shorter
    ffn_key: str = "intermediate_size"
    kv_heads_key: str = "num_key_value_heads"  # empty: the family has no such key, and `fixed_kv_heads` or one per query head
    fixed_kv_heads: int = 0
    fixed_head_width: bool = False  # whether its class divides the width of the stream by the number of heads, whatever `head_dim` says
    caches_query_heads: bool = False  # whether its class repeats keys and values for each query head before it caches them
    shares_kv_in_our_class: bool = False  # query heads share KV heads, in a class of effconvert: transformers has none for this family
    ffn: str = ""  # the FFN module of a layer; empty: its projections are in the layer itself
    chunks_ffn: bool = False  # whether its class runs the FFN some tokens at a time, by `chunk_size_feed_forward`
    expert_ffn_key: str = ""  # width inside an expert, if not `ffn_key`
    shared_ffn_key: str = ""  # width of the expert that runs for every token, where there is one
    experts_key: str = ""  # number of experts of a layer; `parts` has them as experts.*.gate
    experts_stacked: bool = False  # all experts of a layer are in one tensor [E, out, in]
    dense_layers_key: str = ""  # numbers of the layers with an FFN instead of experts; empty: all layers have experts
    upcycled: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # families that are this one with experts, the best first -> keys that they need
    spellings: Mapping[str, str] = field(default_factory=dict)  # other names that transformers reads for keys of config.json -> the row's: see `renamed`
    scale_key: str = ""  # the factor of attention scores; empty: one over the root of a head's width
    multi_query: str = ""  # the family that is this one with a single KV head
    window_key: str = "sliding_window"
    pattern_key: str = "sliding_window_pattern"  # n, where every n-th layer has no window
    pattern: int = 0  # the default of `pattern_key`; 0: all layers have the window
    pattern_from: int = 1  # the number of the first layer in this count
    windowed: str = ""  # the family that is this one with a sliding window, maybe itself
    window_keys: Mapping[str, object] = field(default_factory=dict)  # other keys of its config
    fourier: str = ""  # the family that is this one with Fourier transforms in place of attention
    stored_once: str = ""  # the family that is this one with layers that are stored once and run many times
    groups_key: str = ""  # how many layers are stored; each runs in place of a group of neighbours: see `Layout.layer_path`
    group_layer: str = ""  # in such a family, the layer inside the module of its group
    latent: str = ""  # the family that is this one with latent attention
    with_rope: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # those that are this one with RoPE, not a table -> keys it leaves out
    relaid: tuple[str, ...] = ()  # those that are this one but for the pairs that RoPE turns and for biases, the best first
    biased: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of these: key -> parts that have a bias by it; "" -> those that always have
    dense_first_key: str = ""  # how many layers have an FFN, before those with experts, of which the row knows nothing: it must be all
    tokenizer: str = ""  # the tokenizer's class where the files name none; a related family has another default
    float32_only: bool = False  # whether its class computes in float32 alone
    layers_alike: bool = False  # whether all layers have the window, or none
    first_windowed: bool = False  # the first `max_window_layers` layers have the window, instead of those after them
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' defaults
    constants: Mapping[str, object] = field(default_factory=dict)  # values that the config must have
    absent: Mapping[str, object] = field(default_factory=dict)  # keys of related families that it lacks, and the value that it behaves like
    variants: tuple[tuple[Mapping[str, object], Mapping[str, Any]], ...] = ()  # keys with values -> what differs here in models that have them, in turn

    def of(self, raw: Mapping[str, Any]) -> "Family":
        """Return this row as it is for a model with the config.json `raw`: its variants hold where all of their keys have these values."""
        changes: dict[str, Any] = {}
        for keys, differing in self.variants:
            if all(raw.get(key, self.defaults.get(key)) == value for key, value in keys.items()):
                changes |= differing
        return replace(self, **changes) if changes else self

    def is_buffer(self, name: str) -> bool:
        """Whether the tensor `name`, in a layer or outside, is no trained parameter."""
        return f".{name}".endswith(tuple(f".{buffer}" for buffer in self.buffers))

    @property
    def attention(self) -> str:
        """The attention module of a layer, which has its queries; empty without attention."""
        return self.parts.get("q", "").rpartition(".")[0]

    def renamed(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json with its keys as the row has them. Classes with names of their own for the shape read the usual ones too, and those first."""
        usual = {"num_attention_heads": self.heads_key, "num_hidden_layers": self.layers_key, "hidden_size": self.hidden_key}
        names = {other: key for other, key in self.spellings.items() if key not in raw} | {other: key for other, key in usual.items() if key}
        return {names.get(key, key): value for key, value in raw.items()} | {key: raw[other] for other, key in usual.items() if key and other in raw}

    @property
    def grouped(self) -> "Family":
        """This family with query heads that share KV heads; where transformers has none, a class of effconvert with a key for their number."""
        return self if self.kv_heads_key else replace(self, kv_heads_key="num_key_value_heads", per_head=False, shares_kv_in_our_class=True)
