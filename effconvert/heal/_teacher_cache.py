"""A teacher's predictions on disk, so that it need not be in memory while a student is trained, and computes only once.

A folder has shards of windows in the order in which runs use them; a longer run on the same windows adds shards. Each shard has the windows' token ids
beside what is kept of the predictions (`_kept`), is written under another name first, and is computed anew after a kill. Of the held-out windows the
teacher's last hidden states and its head are kept, whole: KL on these is exact, whatever is kept of the others.
"""
# T = tokens in a window, N = those that count, M = hidden width, K = ids kept of a prediction, V = vocabulary, C = tokens at a time.

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from effconvert.checkpoint.manifest import DRAFT, to_disk
from effconvert.errors import ModelError, OptionError
from effconvert.heal._hidden import hidden_states
from effconvert.heal._kept import Kept
from effconvert.heal._objective import SCALING, Head, gives, head_of, scaled
from effconvert.heal._windows import Item, Windows

SHARD = 32768  # tokens in a shard
BATCH = 2048  # tokens that the teacher reads at a time
ROWS = 64  # C; their distributions are in float64
HELD_OUT = "held-out.safetensors"
OPEN = 8  # shards that are kept open
FACTS = "effconvert"  # the entry of a file's metadata


def per_shard(window: int) -> int:
    """Return how many windows of so many tokens are in a shard."""
    return max(1, SHARD // window)


@dataclass(frozen=True)
class TeacherCache:
    """A folder of predictions, and the windows that it has to have."""

    folder: Path
    kept: Kept
    temperature: float
    train: Sequence[Item]  # in the folder's order; a run that needs fewer takes the first
    needed: int  # windows for this run
    held_out: Sequence[Item]

    @property
    def per_shard(self) -> int:
        """Windows in a shard."""
        return per_shard(len(self.train[0]["input_ids"]))

    @property
    def shards(self) -> dict[Path, range]:
        """The files that this run needs, with their windows."""
        size = self.per_shard
        return {
            self.folder / f"windows-{start // size:06}.safetensors": range(start, min(start + size, len(self.train))) for start in range(0, self.needed, size)
        }

    @property
    def missing(self) -> dict[Path, int]:
        """The files that are not there yet, with their tokens."""
        files = {self.folder / HELD_OUT: _tokens(self.held_out)} | {file: _tokens(self.windows(rows)) for file, rows in self.shards.items()}
        return {file: tokens for file, tokens in files.items() if not file.exists()}

    def windows(self, rows: range) -> Sequence[Item]:
        """Return the windows of a shard."""
        return self.train[rows.start : rows.stop]

    def fill(self, teacher: Any, advance: Callable[[int], None]) -> None:
        """Compute the files that are missing.

        Args:
            teacher: a language model in evaluation mode.
            advance: called with the number of tokens done.

        Raises:
            ModelError: it computes NaN, or its logits in a way that is not known.
        """
        missing, head = self.missing, head_of(teacher)
        with torch.inference_mode():
            if self.folder / HELD_OUT in missing:
                hidden = torch.cat([states.cpu() for states in _states(teacher, self.held_out)])
                weights, settings = _head_tensors(teacher, self.kept.vocabulary)
                head_again = _head_from(weights, settings, teacher.device)
                some = hidden[0, :ROWS].to(teacher.device)
                if not gives(head_again, some, head(some)[:, : self.kept.vocabulary]):
                    raise ModelError(f"the head of {type(teacher).__name__} is more than a matrix, so a cache cannot keep it; leave --cache-teacher out")
                _save(self.folder / HELD_OUT, {"tokens": _stacked(self.held_out), "hidden": hidden, **weights}, settings)
                advance(_tokens(self.held_out))
            for file, rows in self.shards.items():
                if file in missing:
                    self._fill_shard(file, rows, teacher, head, advance)

    def _fill_shard(self, file: Path, rows: range, teacher: Any, head: Head, advance: Callable[[int], None]) -> None:
        items, packed = self.windows(rows), list[dict[str, Tensor]]()
        for states in _states(teacher, items):
            for hidden in states:  # [T, M]
                generator = torch.Generator().manual_seed(rows.start + len(packed))  # of the window: a shard has the same bytes whenever it is computed
                counts = items[len(packed)]["counts"].to(hidden.device)
                parts = [self._keep(head(chunk), generator) for chunk in hidden[counts].split(ROWS)]
                packed.append(self.kept.pack(*(torch.cat(part).cpu() for part in zip(*parts, strict=True))))
            advance(states.shape[0] * states.shape[1])
        tensors = {"tokens": _stacked(items)}
        for name in packed[0]:  # windows may have different numbers of rows: `bounds` says where each begins
            lengths = torch.tensor([0, *(len(window[name]) for window in packed)])
            tensors |= {name: torch.cat([window[name] for window in packed]), f"{name}.bounds": lengths.cumsum(0)}
        _save(file, tensors)

    def _keep(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if not logits.isfinite().all():
            raise ModelError("the teacher computes NaN or infinity on this text; try another --data, or a teacher in another type")
        return self.kept.keep((logits[:, : self.kept.vocabulary].float() / self.temperature).log_softmax(-1), generator)

    def check(self) -> None:
        """Read the files through that this run needs.

        Raises:
            OptionError: one is damaged, or of other windows.
        """
        for file, rows in self.shards.items():
            _check(file, _stacked(self.windows(rows)))
        _check(self.folder / HELD_OUT, _stacked(self.held_out))

    @property
    def disk(self) -> int:
        """Bytes of the windows' shards that this run needs."""
        return sum(file.stat().st_size for file in self.shards)


def windows_of(cache: TeacherCache) -> Windows:
    """Return the windows of a run, with what the cache has for them."""
    return Windows(CachedWindows(cache), HeldOutWindows(cache))


class _ReadWhenAsked(Sequence[Item]):
    """Items that are read from disk one at a time."""

    @abstractmethod
    def _item(self, index: int) -> Item:
        """Read an item."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        """Return an item, or a list of them."""
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        return self._item(index)


class CachedWindows(_ReadWhenAsked):
    """The windows of a run with what was kept of the teacher's predictions, read from disk when they are asked for."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache, self.files = cache, [*cache.shards]
        self._open: Callable[[Path], Any] = lru_cache(OPEN)(_opened)

    def __len__(self) -> int:
        """Return the number of windows."""
        return self.cache.needed

    def _item(self, index: int) -> Item:
        """Return an item with ids [T, K] and numbers that were kept of each prediction; those of tokens that do not count are 0."""
        number, row = divmod(index, self.cache.per_shard)
        file = self._open(self.files[number])
        names = [name.removesuffix(".bounds") for name in file.keys() if name.endswith(".bounds")]  # noqa: SIM118
        stored = {}
        for name in names:
            start, stop = file.get_slice(f"{name}.bounds")[row : row + 2].tolist()
            stored[name] = file.get_slice(name)[start:stop]
        item = self.cache.train[index]
        counts, both = item["counts"], self.cache.kept.unpack(stored)
        ids, numbers = (kept.new_zeros(len(counts), kept.shape[1]).index_put((counts,), kept) for kept in both)
        return {**item, "ids": ids, "numbers": numbers}


class HeldOutWindows(_ReadWhenAsked):
    """The held-out windows with the teacher's last hidden states."""

    def __init__(self, cache: TeacherCache) -> None:
        self.items, self.file = cache.held_out, _opened(cache.folder / HELD_OUT)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.items)

    def _item(self, index: int) -> Item:
        """Return an item with hidden states [T, M]."""
        return {**self.items[index], "hidden": self.file.get_slice("hidden")[index : index + 1][0]}

    def head(self, device: torch.device) -> Head:
        """Return the teacher's function from hidden states to logits."""
        names = [name for name in ("weight", "bias") if name in self.file.keys()]  # noqa: SIM118
        return _head_from({name: self.file.get_tensor(name) for name in names}, json.loads(self.file.metadata()[FACTS])["settings"], device)


def _head_from(weights: Mapping[str, Tensor], settings: Sequence[float | None], device: torch.device) -> Head:
    weight, *bias = (weights[name].to(device) for name in ("weight", "bias") if name in weights)
    cap, divisor, factor = settings
    return Head(lambda hidden: scaled(nn.functional.linear(hidden, weight, *bias), cap, divisor, factor))


def _stacked(items: Sequence[Item]) -> Tensor:
    """Return the token ids of windows, [n, T]."""
    return torch.stack([item["input_ids"] for item in items]).int()


def _tokens(items: Sequence[Item]) -> int:
    return sum(len(item["input_ids"]) for item in items)


def _opened(file: Path) -> Any:
    return safe_open(file, framework="pt")


def _states(teacher: Any, items: Sequence[Item]) -> Iterator[Tensor]:
    """Yield the last hidden states of some windows at a time, [n, T, M]."""
    size = max(1, BATCH // len(items[0]["input_ids"]))
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        inputs: dict[str, Tensor] = {
            key: torch.stack([item[key] for item in batch]).to(teacher.device) for key in ("input_ids", "attention_mask") if key in batch[0]
        }
        yield hidden_states(teacher.base_model, inputs, ())[-1]


def _head_tensors(teacher: Any, vocabulary: int) -> tuple[dict[str, Tensor], list[float | None]]:
    """Return the matrix of a model's head, and its bias, and what it does to the products."""
    output, config = teacher.get_output_embeddings(), teacher.config.get_text_config()
    if isinstance(output, nn.Linear):
        weight, bias = output.weight, output.bias
    else:  # something of a technique's in its place: what it does to each unit vector is a column
        unit = torch.eye(config.hidden_size, dtype=teacher.dtype, device=teacher.device)
        bias = output(torch.zeros_like(unit[:1]))[0]
        weight = (output(unit) - bias).T
    tensors = {"weight": weight[:vocabulary]} | ({"bias": bias[:vocabulary]} if bias is not None else {})
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, [getattr(config, key, None) for key in SCALING]


def _save(file: Path, tensors: Mapping[str, Tensor], settings: Sequence[float | None] = ()) -> None:
    """Write a file that is there whole or not at all."""
    draft = file.with_name(file.name + DRAFT)
    facts = json.dumps({"sha256": _sha256(tensors), "settings": settings})  # in one entry: safetensors writes several in any order
    draft.write_bytes(save(dict(tensors), {FACTS: facts}))  # `save_file` would let nobody else read it
    to_disk(draft)
    draft.replace(file)
    to_disk(file.parent)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check(file: Path, tokens: Tensor) -> None:
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    with suppress(SafetensorError, OSError, KeyError, TypeError, ValueError):
        opened = _opened(file)
        facts = json.loads(opened.metadata()[FACTS])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if "tokens" not in tensors or facts.get("sha256") != _sha256(tensors):
        raise OptionError(f"{file} is damaged; remove that file, and the same command computes it again")
    if not torch.equal(tensors["tokens"].long(), tokens):
        raise OptionError(f"{file} has predictions for other windows of text; remove the folder {file.parent}, or give another --cache-teacher")
