"""Recover quality without training: least squares on q, v and o."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from typing import TYPE_CHECKING

from effconvert.checkpoint.replaced import overlap
from effconvert.errors import OptionError
from effconvert.heal._healing import Healing
from effconvert.surgery.projections._parts import FACTORED

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model

FFN = ("ffn", "gate", "up", "down")  # places of a layer's FFN


class Refit(Healing):
    """Refit a converted model to the outputs of the original.

    Linear algebra, no gradients. Layers are refitted one by one, on the output of the refitted layers below. Queries are fitted to the attention
    scores of the original's layer, values and the output projection to its attention's output. A layer with a mixer refits its output projection
    alone; a layer without any attention fits its MLP to the output of the original's layer. After a factorised embedding, dropped layers, low-rank
    projections and shared layers, attention and MLP outputs are also fitted to the original's hidden states, and so are the outputs of narrow FFNs and
    of experts that one was split into. Where RoPE is in place of a position table, the original's layers run on its own inputs, as theirs know positions.
    Parameters that layers share stay as they are. A change that does not improve held-out windows is not kept. MODEL is the converted model.

    \b
    Examples:
      effconvert refit ./SmolLM2-135M-gqa-1 --teacher ./SmolLM2-135M -o ./refitted
      effconvert refit --calibrate mine.txt --calibration-tokens 65536 ./mqa --teacher HuggingFaceTB/SmolLM2-135M
    """

    def notes(self, config: Config) -> str:
        """Say what norms and mixers rule out."""
        notes = ["its queries go through a norm, so they are not refitted to scores; values and outputs are"] if config.normed else []
        notes += ["its queries are clipped (clip_qkv): where the text shows that, only values and outputs are refitted"] if config.get("clip_qkv") else []
        notes += (
            ["a norm follows its MLP, so refit makes up for little of dropped layers, attention or neurons"] if "mlp_post_norm" in config.family.parts else []
        )
        from effconvert.surgery._placed import unchunked

        return "; ".join(notes + _notes_by_place(unchunked(config)))

    @property
    def keeps_attention(self) -> bool:
        """Always: queries are fitted to its scores."""
        return True

    def changes(self, layer: Layer, originals: range) -> list[str]:
        """Queries, values and outputs of attention; the MLP's output where a technique replaces all of attention."""
        from effconvert.heal._one_head import one_head_of

        if head := one_head_of(layer):
            return [*head.parts]
        changing = ["q", "q.bias", "v", "v.bias", "o", *(["down"] if _without_attention(layer) else [])]
        return [] if any(layer.config.shares(layer.index, part) for part in changing) else changing

    def heal(self, layer: Layer, originals: range) -> None:
        """See `_layer`."""
        from effconvert.heal._layer import refit_attention, refit_output
        from effconvert.heal._one_head import one_head_of, refit_head

        if not self.changes(layer, originals):
            return
        if head := one_head_of(layer):
            refit_head(head, originals[0])
        elif _without_attention(layer):
            refit_output(layer, originals)
        else:
            refit_attention(layer, originals[0])

    def rewrite(self, model: Model) -> None:
        """Refit each layer to the original's layers that it stands for; after gaps and low rank, and for narrow FFNs and experts, also to its stream."""
        check_heads(model)
        super().rewrite(model)
        narrow = {"down"} if model.config.ffn < model.original.ffn and not model.original.experts else set()
        narrow |= {"o"} if model.config.heads < model.original.heads else set()
        for layer, steps in zip(model.layers, after_gaps(model), strict=True):
            following = {"o": 2 * layer.originals[0] + 1, "down": 2 * layer.originals[-1] + 2}
            steps = {part: steps.get(part, step) for part, step in following.items() if part in steps or part in narrow}
            layer.later(partial(self._follow, steps=steps))
        for layer in model.layers:
            split = model.config.active_ffn < model.original.ffn  # else the experts are copies of the whole FFN
            if split and model.config.sparse(layer.index) and not model.original.sparse(layer.originals[0]):
                layer.later(partial(self._refit_experts, originals=layer.originals))

    def _refit_experts(self, layer: Layer, originals: range) -> None:
        # In the order of the router's rows: a stored layer begins with the shared expert.
        outputs = [f"experts.{expert}.down" for expert in range(layer.config.experts)]
        outputs += ["shared_down"] if "shared_down" in layer else []
        for part in outputs:
            layer[part] = layer[part]
        if layer.activations:
            from effconvert.heal._experts import refit_experts

            refit_experts(layer, outputs, originals)

    def _follow(self, layer: Layer, steps: dict[str, int]) -> None:
        from effconvert.surgery.projections._factors import fitted_of

        for part, step in steps.items():
            if names := fitted_of(layer, part):
                for name in names:
                    layer[name] = layer[name]
                if layer.activations:
                    from effconvert.heal._layer import refit_stream

                    refit_stream(layer, part, step)


def check_heads(model: Model) -> None:
    """Refuse to fit one head for all keys and values to a teacher that has the same, or other query heads.

    Raises:
        OptionError: the teacher is such a model.
    """
    from effconvert.heal._one_head import kind_of

    for layer in model.layers:
        if not kind_of(model.config, layer.index):  # by its config: reading a layer here would convert it before its turn
            continue
        if record := model.original.replaced_at(layer.originals[0], "attention"):
            raise OptionError(
                f"layer {layer.originals[0]} of the teacher has {record.technique} too, so nothing is left to fit; name the model before that as --teacher"
            )
        if model.config.heads != model.original.heads:
            raise OptionError(
                f"the model has {model.config.heads} query heads and the teacher {model.original.heads}, so its one head of keys and values cannot be fitted; "
                "refit after each of the two steps, in conversions of their own"
            )


def _without_attention(layer: Layer) -> bool:
    """Whether a technique replaces all of a layer's attention, with its output projection."""
    return any("o" in record.drops and record.place != "o" for record in layer.config.replaced_in(layer.index))


def _notes_by_place(config: Config) -> list[str]:
    """Say what is refitted in layers with techniques, by where these run."""
    notes = []
    if any(record.what not in ("cache", "weights") for record in config.shared):
        notes.append(
            "layers that share parameters stay as they are; in those after them the outputs of attention and MLP are fitted to the original's hidden states"
        )
    for record in config.replaced:
        places = [other.place for other in config.replaced if other.technique == record.technique and {other.place, record.place} <= {*FFN}]
        name = f"{record.technique} in place of their {', '.join(dict.fromkeys(places or [record.place]))}"
        linear = "down" in config.parts and not any("down" in other.drops for index in record.layers for other in config.replaced_in(index))
        if record.place == "embed" and all(config.shares(layer, "o") and config.shares(layer, "down") for layer in range(config.layers)):
            notes.append(f"all layers share the parameters that would make up for {record.technique}, so nothing is refitted")
        elif record.place == "embed" and not ("mlp_post_norm" in config.parts or config.norms_stream):
            notes.append(f"after {record.technique} the outputs of attention and MLP are fitted to the original's hidden states")
        elif record.place == "embed":
            notes.append(f"a norm follows its attention and MLP, so nothing makes up for {record.technique}")
        elif record.technique == "recursive":
            notes.append("of layers that share their matrices the differences of the outputs of attention and MLP are fitted to the original's hidden states")
        elif record.technique == "low-rank" and ("mlp_post_norm" in config.parts or config.norms_stream):
            notes.append("a norm follows its attention and MLP, so nothing makes up for low-rank; use transfer")
        elif record.technique == "low-rank":
            notes.append("from the first low-rank projection on, the outputs of attention and MLP are fitted to the original's hidden states")
        elif record.technique == "narrow-kv":
            notes.append("of narrow-kv queries and outputs are refitted, and values where they are not a part of the keys as well")
        elif record.place == "scores":
            notes.append("in layers with a mixer only the output projection is refitted; transfer does more")
        elif "o" in record.drops and linear and "mlp_post_norm" not in config.parts:
            notes.append(f"in layers with {name} only the MLP's output projection is refitted; transfer does more")
        elif "o" in record.drops:
            notes.append(f"in layers with {name} nothing is refitted; use transfer")
        elif record.place in FFN:
            notes.append(f"nothing makes up for {name}: attention is refitted where it differs from the original's, and else nothing is; use transfer")
        elif record.place in ("q", "k", "v"):
            notes.append(f"in layers with {name} that stays as it is, and the rest of attention is refitted")
    return list(dict.fromkeys(notes))


def after_gaps(model: Model) -> list[dict[str, int]]:
    """Return for each layer its parts that write to the stream just before a gap, at a low-rank or shared projection, or after; and the step that follows.

    After a technique in place of the embedding, or without the original's position table, that is every part.

    Step 2 l of the original is the input of its layer l, step 2 l + 1 the stream between its attention and its FFN.
    """
    half = {"attention": ("o", 0), "ffn": ("down", 1)}
    writers = [
        (layer.index, part, 2 * layer.originals.start + second)
        for layer in model.layers
        for place, (part, second) in half.items()
        if place not in model.config.skips(layer.index)
    ]
    steps = {2 * layer + second for layer in range(model.original.layers) for place, (_, second) in half.items() if place not in model.original.skips(layer)}
    targets: list[dict[str, int]] = [{} for _ in model.layers]
    thin = [
        {int(overlap(record.place, "ffn")) for record in model.config.replaced_in(layer.index) if record.technique in FACTORED}
        | {second for part, second in half.values() if model.config.shares(layer.index, part)}
        for layer in model.layers
    ]
    embeds_otherwise = model.config.replaced_outside("embed") is not None or model.config.lacks_table_of(model.original)
    dropped = embeds_otherwise or not steps.isdisjoint(range(writers[0][2]))
    for (index, part, step), (_, _, following) in zip(writers, [*writers[1:], (0, "", 2 * model.original.layers)], strict=True):
        dropped = dropped or step % 2 in thin[index] or not steps.isdisjoint(range(step + 1, following))
        if dropped:
            targets[index][part] = following
    return targets
