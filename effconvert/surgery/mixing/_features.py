"""Attention by features of causal mixers: as a kernel, or by the reference."""

from torch import Tensor

from effconvert.kernels.choice import cannot, runs_triton
from effconvert.kernels.linear_attention import Window, chunked_attention_reference


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    fall: Tensor | None = None,
    least: float | None = None,
    window: Window | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run `chunked_attention`, which has the arguments of its reference: by its kernels where they are asked for, and by the reference elsewhere.

    Raises:
        ValueError: the kernels are asked for, and do not cover this call.
    """
    if not runs_triton(query.device, "chunked_attention", kernels):
        return chunked_attention_reference(query, key, value, state, fall, least, window)
    from effconvert.kernels.chunked_attention import chunked_attention, uncovered  # imports triton

    if why := uncovered(query, value, window):
        cannot("chunked_attention", why, kernels)
        return chunked_attention_reference(query, key, value, state, fall, least, window)
    return chunked_attention(query, key, value, state, fall, least, window)
