"""What a family is: one row of data that says where its models keep their parts.

A *part* is named by what it does: q, k, v, o, gate, up, down; the norms of a layer by where they stand (`attn_norm` before
attention, `attn_post_norm` after it, likewise `mlp_...`). Several parts under one module are fused in it, in the order given.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

EXPERTS_KEYS = ("num_local_experts", "num_experts")  # of config.json: transformers reads the one for the other


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: names relative to the base model, and the config keys that give its shape."""

    base: str  # class of the bare model
    lm: str  # class with the head it was pretrained with
    prefix: str  # of the base model inside `lm`; a checkpoint may be saved with or without it
    layers: str  # path of the list of layers
    parts: Mapping[str, str]  # in a layer: part -> module
    outer: Mapping[str, str]  # outside the layers, inside the base model: part -> module
    head: Mapping[str, str]  # outside the base model: part -> module
    optional: frozenset[str] = frozenset()  # parts that some models of the family lack
    lacking: Mapping[str, tuple[str, object]] = field(default_factory=dict)  # parts that models lack whose config says so: part -> key, value
    first_lacks: frozenset[str] = frozenset()  # parts that layer 0 lacks and all others have
    norms_stream: bool = False  # whether layers normalise what they add to
    buffers: tuple[str, ...] = ()  # what old versions of transformers saved in a layer and nobody reads

    aliases: Mapping[str, str] = field(default_factory=dict)  # in names of tensors: what transformers reads too -> what this row says

    per_head: bool = False  # fused q, k, v: head 0's q, k, v, then head 1's, ... instead of all q, all k, all v
    blocks: int = 0  # likewise, in so many blocks of heads, each with the parts in their order
    transposed: bool = False  # projections are stored [in, out] (Conv1D)
    per_kv_head: tuple[str, ...] = ("k", "v")  # parts whose rows come KV head by KV head

    rope: str = ""  # which two dimensions of a head RoPE turns together: "halves" (j, j + n/2), "interleaved" (2j, 2j + 1), none
    rotary_key: str = "partial_rotary_factor"  # which part of a head it turns
    rotary_counts: bool = False  # that is a number of dimensions, and not a part
    turned_key: str = ""  # a list that says of each layer whether RoPE turns there, 1 or 0; without it no n-th layer is turned, by `unturned_key`
    unturned_key: str = ""
    turns_windows: bool = False  # RoPE turns only in layers with a window
    turns_without: bool = False  # that holds of models with windows alone: in those without any it turns everywhere
    norms_turned: bool = False  # queries and keys go through their norm after RoPE, and not before
    scales_queries: bool = False  # by their position in the text

    decoder: bool = True
    both_ways_key: str = ""  # what says that a decoder attends both ways, and so halves its window, beside `is_causal`, which all heed
    not_on: Mapping[str, str] = field(default_factory=dict)  # switches that may not be on: key -> why
    own_attention: bool = False  # its attention is not called through transformers' AttentionInterface: nothing can stand between its projections
    adds_inside: frozenset[str] = frozenset()  # places whose module adds to the stream itself: attention, ffn
    kinds_key: str = ""  # a list of [[kinds of attention], how often], one after the other the layers'
    packs: bool = True  # whether a decoder's class keeps texts apart that share a row: position_ids that begin anew
    heads_key: str = "num_attention_heads"
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    embed_key: str = ""  # width of the embeddings, in models that have a projection (`project_in`) between them and the layers
    positions_key: str = "max_position_embeddings"
    positions_after_padding: bool = False  # position 0 of a text is the one after the padding token's: so many positions fewer can be read
    ffn_key: str = "intermediate_size"
    kv_heads_key: str = "num_key_value_heads"  # empty: the family cannot say, and has `fixed_kv_heads` or one per query head
    fixed_kv_heads: int = 0
    shares_kv_in_our_class: bool = False  # query heads share KV heads, which no class of transformers for this family can
    ffn: str = ""  # the module of a layer that is its FFN; empty: there is none, its projections stand in the layer itself
    expert_ffn_key: str = ""  # width inside an expert, where it is not that of `ffn_key`
    shared_ffn_key: str = ""  # width of the expert that runs for every token, where there is one
    experts_key: str = ""  # number of experts of a layer, of which `parts` speaks as experts.*.gate
    experts_stacked: bool = False  # all experts of a layer lie in one tensor [E, out, in], and not each in its own
    dense_layers_key: str = ""  # numbers of the layers that have an FFN and no experts; empty: all layers have experts
    upcycled: Mapping[str, Mapping[str, object]] = field(
        default_factory=dict
    )  # the families that are this one with experts, the best first: what they need said
    scale_key: str = ""  # what scores are multiplied by; empty: one over the root of a head's width
    multi_query: str = ""  # the family that is this one with a single KV head
    window_key: str = "sliding_window"
    pattern_key: str = "sliding_window_pattern"  # n, where every n-th layer has no window
    pattern: int = 0  # where the config is silent; 0: all layers have the window
    pattern_from: int = 1  # the number of the first layer, as that counts
    windowed: str = ""  # the family that is this one with a sliding window, maybe itself
    window_keys: Mapping[str, object] = field(default_factory=dict)  # what else its config says then
    fourier: str = ""  # the family that is this one with Fourier transforms in place of attention
    tokenizer: str = ""  # the tokenizer's class where the files name none, which a related family would look for elsewhere
    float32_only: bool = False  # whether its class computes in float32 alone
    layers_alike: bool = False  # whether its window holds in all layers or in none
    first_windowed: bool = False  # the first `max_window_layers` layers have the window, and not those after them
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers takes where the config is silent
    constants: Mapping[str, object] = field(default_factory=dict)  # config values that this row takes for granted
    absent: Mapping[str, object] = field(default_factory=dict)  # keys of its relatives that it lacks, and what it does instead

    @property
    def attention(self) -> str:
        """The module of a layer that attends: where its queries are made; empty where nothing attends."""
        return self.parts.get("q", "").rpartition(".")[0]

    @property
    def grouped(self) -> "Family":
        """This family with query heads that share KV heads, where transformers' has none: a class of ours, with a key for their number."""
        return self if self.kv_heads_key else replace(self, kv_heads_key="num_key_value_heads", per_head=False, shares_kv_in_our_class=True)
