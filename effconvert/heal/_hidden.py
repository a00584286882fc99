"""How far the hidden states of a student are from a teacher's."""
# N = tokens, M = hidden width.

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from effconvert.errors import ModelError


def hidden_states(base: torch.nn.Module, inputs: dict[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
    """Run a base model, and return its hidden states [B, T, M]: after each of some layers, and its last ones, which a final norm may have changed.

    Args:
        base: a base model of transformers, without its head.
        inputs: `input_ids` [B, T], and an `attention_mask` where there is padding.
        layers: their numbers, of all but the last layer.

    Raises:
        ModelError: transformers does not record the hidden states of this class.
    """
    more = {"use_cache": False} if "use_cache" in signature(type(base).forward).parameters else {}
    output = base(**inputs, **more, **({"output_hidden_states": True} if layers else {}))
    if not layers:
        return [output.last_hidden_state]
    states = output.hidden_states
    if states is None or len(states) <= max(layers) + 1:
        raise ModelError(f"transformers does not give the hidden states of all layers of {type(base).__name__}; leave --hidden out")
    return [*(states[layer + 1] for layer in layers), output.last_hidden_state]


def distance(own: Sequence[Tensor], theirs: Sequence[Tensor], kind: str) -> Tensor:
    """Return the mean over pairs of hidden states [N, M] of their distance.

    Args:
        own: the student's.
        theirs: the teacher's.
        kind: `mse`, the squared error as a share of the teacher's mean square, or `cosine`, one minus the cosine.
    """
    pairs = [(mine.float(), other.float()) for mine, other in zip(own, theirs, strict=True)]
    if kind == "mse":
        return torch.stack([(mine - other).square().mean() / other.square().mean() for mine, other in pairs]).mean()
    return torch.stack([(1 - cosine_similarity(mine, other, dim=-1)).mean() for mine, other in pairs]).mean()
