"""The layout of a model: which module of a layer has each part, how large its tensors are, and what they are named on disk."""
# L = layers, M = hidden width, H = query heads, Hk = KV heads, D = head width, F = width of the FFN, E = experts.

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from effconvert.checkpoint.shape import DECODER_SKIPS, Shape

ATTENTION_PARTS = ("q", "k", "v", "kv_a", "kv_a_norm", "kv_b", "o", "q_norm", "k_norm", "attn_norm", "attn_post_norm")  # the parts of attention, with its norms


@dataclass(frozen=True)
class Layout(Shape):
    """A shape with the modules and tensors that follow from it."""

    @cached_property
    def parts(self) -> dict[str, str]:
        """The modules of a layer's parts: part -> module. `experts.*.gate` in the family's row is repeated for each expert."""
        missing = {part for part, (key, value) in self.family.lacking.items() if self.get(key) == value}
        modules = {part: module for part, module in self.family.parts.items() if "*" not in part and part not in missing}
        of_expert = {part: module for part, module in self.family.parts.items() if "*" in part}
        for number in map(str, range(self.experts)):
            modules |= {part.replace("*", number): module.replace("*", number) for part, module in of_expert.items()}
        return modules

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shape [out, in] of each projection of a layer: part -> rows, columns."""
        rows, kv_rows, width, ffn, inner = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.ffn, self.expert_ffn
        shapes = {"q": (rows, width), "k": (kv_rows, width), "v": (kv_rows, width), "o": (width, rows)}
        shapes |= {"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn), "router": (self.experts, width), "shared_router": (1, width)}
        if self.latent:
            rank, turned, value = (self._integer(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim"))
            unturned = int(self.get("qk_nope_head_dim"))
            shapes |= {"q": (self.heads * (unturned + turned), width), "o": (width, self.heads * value)}
            shapes |= {"kv_a": (rank + turned, width), "kv_b": (self.heads * (unturned + value), rank)}
        for number in range(self.experts):
            shapes |= {f"experts.{number}.gate": (inner, width), f"experts.{number}.up": (inner, width), f"experts.{number}.down": (width, inner)}
        return shapes

    def stacked(self, parts: Sequence[str]) -> bool:
        """Whether these parts are fused in a tensor [E, out, in], as the experts of some families are."""
        return self.family.experts_stacked and parts[0].startswith("experts.")

    def stored_shape(self, parts: Sequence[str]) -> tuple[int, ...]:
        """Return the shape on disk of the tensor that these parts are fused in."""
        rows, columns = sum(self.matrices[part][0] for part in parts), self.matrices[parts[0]][1]
        if self.stacked(parts):
            return self.experts, rows // self.experts, columns
        return (columns, rows) if self.family.transposed else (rows, columns)

    @cached_property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """Map each module of a layer to the parts that are fused in it, in order."""
        fused: dict[str, tuple[str, ...]] = {}
        for part, module in self.parts.items():
            fused[module] = (*fused.get(module, ()), part)
        return fused

    def layer_path(self, index: int) -> str:
        """Return the module of a layer in the base model; of a family that stores layers once, that which runs in its place."""
        family = self.family
        inside = f".{family.group_layer}" if family.group_layer else ""
        return f"{family.layers}.{self.group_of(index)}{inside}"

    @property
    def layer_pattern(self) -> str:
        """A pattern for `layer_path`, in which the number is a group."""
        inside = f".{self.family.group_layer}" if self.family.group_layer else ""
        return rf"{re.escape(self.family.layers)}\.(\d+){re.escape(inside)}"

    def group_of(self, index: int) -> int:
        """Return the number under which a layer is stored: its own, or that of its group of neighbours, as albert's class counts them."""
        return int(index / (self.layers / self._integer(self.family.groups_key))) if self.family.groups_key else index

    def tensor_name(self, part: str) -> str:
        """Return the name in a layer of the tensor that a part is in; that of a bias for "k.bias"."""
        stem = part.removesuffix(".bias")
        place = self.parts.get(stem, stem)
        return place if part in self.family.loose else f"{place}.{'weight' if part == stem else 'bias'}"

    def parts_in(self, name: str) -> tuple[str, ...]:
        """Return the parts that are fused in the tensor `name` of a layer, in order, without `.bias`; none where the family has no such tensor."""
        return self._parts_in.get(name, ())

    @cached_property
    def _parts_in(self) -> dict[str, tuple[str, ...]]:
        return {self.tensor_name(parts[0] + suffix): parts for parts in self.modules.values() for suffix in ("", ".bias")}

    @property
    def decoder_lacks(self) -> tuple[str, ...]:
        """The modules that each layer of the decoder behind an encoder lacks: none, or those of its FFN with the norm before it.

        A norm behind the FFN stays, as it norms the stream, which later layers were trained on (decision 42).
        """
        if not (self.encoder_decoder and self.get(DECODER_SKIPS)):
            return ()
        return tuple(self.family.parts[part] for part in ("mlp_norm", "up", "down") if part in self.family.parts)

    @property
    def blocks(self) -> int:
        """Blocks of heads in a tensor of fused queries, keys and values; each block has a share of every part."""
        return self.kv_heads if self.family.per_head else self.family.blocks or 1

    def sublayer(self, place: str) -> set[str]:
        """Return the parts of a layer's attention or ffn, with the norms that serve it alone."""
        attention = self.parts.keys() & ATTENTION_PARTS
        if not any(part.startswith("mlp_") for part in self.parts):
            attention -= {"attn_norm"}  # parallel attention and FFN share this norm
        return attention if place == "attention" else self.parts.keys() - attention - {"attn_norm"}

    @property
    def normed(self) -> bool:
        """Whether queries and keys go through a norm."""
        return "q_norm" in self.parts
