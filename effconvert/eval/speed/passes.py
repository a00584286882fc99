"""One timed pass of one model: read prompts, then write tokens. Also the time of a pass that only reads memory."""
# B = batch, T = context.

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from effconvert.checkpoint.config import Config
from effconvert.errors import OptionError
from effconvert.eval.quality.perplexity import cache_bytes
from effconvert.eval.speed import memory
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.eval.speed.graphs import capture
from effconvert.eval.subject import Opened

SEED = 0  # of the prompts: speed does not depend on their text
BUFFER = 512 * 2**20  # bytes for measuring the memory's bandwidth: far more than processor caches
SWEEPS = 7  # times that the buffer is read


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    index: int  # among the models
    opened: Opened
    model: Any

    @property
    def own_bytes(self) -> int:
        """Bytes of its parameters and buffers."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    def read(self, batch: int) -> int:
        """Return the bytes of weights that a decoding step reads for `batch` sequences: all but embedding tables, unless one is also the head.

        Shared parameters count once, as they may still be in a processor cache. Of experts only those that the tokens are routed to count.
        """
        chosen = getattr(self.model.config.get_text_config(), "num_experts_per_tok", None)
        sizes: dict[int, int] = {}  # address of a tensor -> bytes read of it
        for module in self.model.modules():
            share = _share_of_experts(module, chosen, batch)
            for parameter in () if isinstance(module, nn.Embedding) else module.parameters(recurse=False):
                sizes[parameter.data_ptr()] = round(share * parameter.nbytes)
        return sum(sizes.values())


def _share_of_experts(module: nn.Module, chosen: int | None, batch: int) -> float:
    """Return the share of a module that `batch` tokens need, each routed to `chosen` of its experts; 1 for a module without experts.

    Experts are taken as equally likely, since the routing is not known before the model runs.
    """
    count = getattr(module, "num_experts", None)  # transformers' classes with stacked experts [E, out, in] have this; so do routers, which are matrices
    stacked = count and any(parameter.ndim == 3 and len(parameter) == count for parameter in module.parameters(recurse=False))
    return 1 - (1 - chosen / count) ** batch if chosen and count and stacked else 1


@dataclass(frozen=True)
class Job:
    """The task of a model in one cell of the results."""

    batch: int
    context: int
    vocabulary: int  # tokens that all models know
    options: BenchOptions
    device: str


@dataclass(frozen=True)
class Seconds:
    """The times of one pass."""

    prefill: float
    first: float | None = None
    decode: float | None = None  # one step


class Runner:
    """Runs a model on prompts, each time from an empty cache."""

    @torch.inference_mode()
    def __init__(self, loaded: Loaded, job: Job) -> None:
        from transformers import StaticCache

        from effconvert.modeling.transformers_internals import cache_name, takes_cache

        self.model, self.job, self.wait, self.writes = loaded.model, job, _waiter(job.device), writes(loaded.opened)
        prompts = torch.randint(job.vocabulary, (job.batch, job.context), generator=torch.Generator().manual_seed(SEED))
        self.prompts = prompts.to(job.device)  # [B, T]; there is no padding, so no mask
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}  # as serving does: not [B, T, V]
        known, takes = loaded.opened.known, self.writes and (loaded.opened.known is not None or takes_cache(self.model))
        static = takes and job.options.cache == "static"
        if static and known:
            _check_static(loaded.opened.subject.name, known)
        self.cache_name = cache_name(self.model) if takes else ""
        self.static_cache = StaticCache(config=self.model.config, max_cache_len=job.context + job.options.new_tokens) if static else None
        self.replay = capture(self.model, self.prompts[:, :1].clone(), self.static_cache) if job.options.graphs and static else None
        self.cache_bytes: int | None = None

    @torch.inference_mode()
    def run(self) -> Seconds:
        """Read the prompts, then write tokens one by one. A model that hands no cache on writes the first only."""
        from effconvert.modeling.transformers_internals import cache_among

        if self.static_cache is not None:
            self.static_cache.reset()
        options: dict[str, Any] = {"use_cache": True, **self.last} if self.writes else {}
        if self.static_cache is not None:
            options[self.cache_name] = self.static_cache
        self.wait()
        start = time.perf_counter()
        output = self.model(self.prompts, **options)
        self.wait()
        prefill = time.perf_counter() - start
        if not self.writes:
            return Seconds(prefill)
        tokens = output.logits[:, -1:].argmax(-1)  # [B, 1]
        self.wait()
        first = time.perf_counter() - start
        cache = cache_among(output.values()) if self.cache_name else None
        del output
        if cache is None:
            return Seconds(prefill, first)
        self.cache_bytes = cache_bytes(cache)
        start = time.perf_counter()
        for _ in range(self.job.options.new_tokens):
            tokens = self.replay(tokens) if self.replay else self.model(tokens, **{self.cache_name: cache}, use_cache=True).logits[:, -1:].argmax(-1)
        self.wait()
        return Seconds(prefill, first, (time.perf_counter() - start) / self.job.options.new_tokens)


def _check_static(name: str, config: Config) -> None:
    """Refuse a static cache for layers of effconvert's.

    Raises:
        OptionError: it would not hold what they keep.
    """
    if config.plain_outside.replaced:
        raise OptionError(f"--cache static cannot keep the states of the mixers of {name}; leave it out")
    if any("attention" in config.skips(index) for index in range(config.layers)):
        raise OptionError(f"--cache static would allocate layers of {name} that have no attention; leave it out")
    if config.family.shares_kv_in_our_class:
        raise OptionError(f"--cache static would store the shared KV heads of {name} once for each query head; leave it out")


def writes(opened: Opened) -> bool:
    """Whether a model predicts the next token."""
    return opened.decoder and opened.head


def bandwidth(device: str) -> float:
    """Measure how many bytes a second `device` reads from its memory, with as many threads as models have.

    A sum reads everything and writes nothing, which is close to decoding. (A matrix-vector product would be closer, but MKL on CPUs reaches only half
    the bandwidth of a sum, and models would beat the prediction.) The fastest sweep counts, as the least disturbed.
    """
    size = min(BUFFER, memory.free(device) // 4)
    buffer, wait, seconds = torch.ones(size // 4, device=device), _waiter(device), []
    buffer.sum()
    for _ in range(SWEEPS):
        wait()
        start = time.perf_counter()
        buffer.sum()
        wait()
        seconds.append(time.perf_counter() - start)
    return buffer.nbytes / min(seconds)


def _waiter(device: str) -> Callable[[], None]:
    """Return a function that waits until `device` has finished its work."""
    return (lambda: None) if device == "cpu" else partial(torch.accelerator.synchronize, device)
