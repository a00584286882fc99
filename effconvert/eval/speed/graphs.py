"""A decoding step as a CUDA graph: all kernels are launched at once, so that a small model does not wait for Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effconvert.errors import ModelError

WARM = 2  # steps before the capture, in which libraries allocate their workspaces


@torch.inference_mode()
def capture(model: Any, tokens: Tensor, cache: Any) -> Callable[[Tensor], Tensor]:
    """Record a step of `model`, and return a function that replays it: tokens [B, 1] in, the next ones out, in the same memory each time.

    Args:
        model: a causal language model on a CUDA device.
        tokens: token ids [B, 1] for the recording; replays use their memory.
        cache: a new static cache; it is allocated and empty afterwards.

    Raises:
        ModelError: the cache counts its tokens in Python, and a graph would repeat the number.
    """
    from effconvert.modeling.transformers_internals import cache_name

    if any(layer.is_sliding for layer in cache.layers):
        raise ModelError("its sliding windows cannot be in a CUDA graph, as transformers counts their tokens in Python; leave --graphs out")

    cache_argument = {cache_name(model): cache}

    def step() -> None:
        tokens.copy_(model(tokens, **cache_argument, use_cache=True).logits[:, -1:].argmax(-1))

    with torch.cuda.device(tokens.device):
        step()  # allocates the cache
        cache.reset()
        stream = torch.cuda.Stream()  # torch warms up graphs on a stream of their own
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                step()
        torch.cuda.current_stream().wait_stream(stream)
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
