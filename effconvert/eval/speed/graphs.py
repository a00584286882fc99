"""A step of decoding as a CUDA graph: all its kernels launched at once, so that a small model does not wait for Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effconvert.errors import ModelError

WARM = 2  # steps before the capture, in which libraries allocate their workspaces


@torch.inference_mode()
def capture(model: Any, tokens: Tensor, cache: Any) -> Callable[[Tensor], Tensor]:
    """Record a step of `model`, and return what replays it: tokens [B, 1] in, the next ones out, in the same memory each time.

    Args:
        model: a causal language model on a CUDA device.
        tokens: token ids [B, 1] to try it on, whose memory is used from now on.
        cache: a new static cache, which is left allocated and empty.

    Raises:
        ModelError: the cache's place is a Python number, which a graph would repeat instead of counting on.
    """
    from effconvert.modeling.transformers_internals import cache_name

    if any(layer.is_sliding for layer in cache.layers):
        raise ModelError("its sliding windows cannot be in a CUDA graph, as transformers counts their tokens in Python; leave --graphs out")

    given = {cache_name(model): cache}

    def step() -> None:
        tokens.copy_(model(tokens, **given, use_cache=True).logits[:, -1:].argmax(-1))

    with torch.cuda.device(tokens.device):
        step()  # has the cache allocated
        cache.reset()
        side = torch.cuda.Stream()  # where torch wants a graph to be warmed up
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        cache.reset()

    def replay(chosen: Tensor) -> Tensor:
        if chosen is not tokens:
            tokens.copy_(chosen)
        graph.replay()
        return tokens

    return replay
