"""Parts of a model as a lazy mapping. A part is read from disk when it is first used; the bytes of unassigned parts are copied."""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.shards import FLOATS, StoredTensor, rounded
from effconvert.errors import ModelError

ROWS = 8192  # of a tensor that is computed some rows at a time


@dataclass(frozen=True)
class Deferred:
    """A tensor that is computed when it is written, so that a layer of many large ones is never in memory whole."""

    compute: Callable[[], torch.Tensor]  # float32, on the CPU
    in_pieces: Callable[[], Iterator[torch.Tensor]] | None = None  # the same numbers in the same order, for large tensors
    rows: Callable[[torch.Tensor], torch.Tensor] | None = None  # some rows of it, by their numbers

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yield the tensor in pieces."""
        yield from self.in_pieces() if self.in_pieces else [self.compute()]


class Parts(MutableMapping[str, torch.Tensor]):
    """Named tensors in float32 on the CPU, or on the meta device for shapes alone; `parts["k.bias"]` is the bias of part k.

    Reading gives a copy: to change a part, assign it. Each surgery has its own parts on top of those of the surgery before, so that deferred
    changes still see these.

    Attributes:
        config: the shape of the model.
    """

    def __init__(self, config: Config, stored: Mapping[str, StoredTensor], device: str, below: Self | None = None) -> None:
        self.config = config
        self._source: Config = config if below is None else below._source
        self._stored, self._device, self._below = stored, device, below
        self._assigned: dict[str, torch.Tensor | Deferred] = {}
        self._copies: dict[str, str] = {}  # part -> the part that it copies, from before this surgery
        self._deleted: set[str] = set()
        self._borrowed: dict[str, Self] = {}  # part -> the layer that it shares this part with
        self._pending: list[Callable[[Any], None]] = []
        self._touched: dict[str, int] = {}  # part that was read or assigned -> bytes in float32

    @property
    def shapes_only(self) -> bool:
        """Whether tensors have shapes but no numbers, as in a plan."""
        return self._device == "meta"

    @property
    def touched(self) -> int:
        """Bytes in float32 of all parts that were read or assigned so far, for the estimate of peak memory."""
        return sum(self._touched.values()) + (0 if self._below is None else self._below.touched)

    @property
    def assigned(self) -> set[str]:
        """The parts that this surgery assigns, copies or shares."""
        self._catch_up()
        return {*self._assigned, *self._copies, *self._borrowed}

    def later(self, change: Callable[[Self], None]) -> None:
        """Call `change` with these parts before they are first used."""
        self._pending.append(change)

    def copy(self, part: str, to: str) -> None:
        """Make `to` a copy of `part`, which may be changed or deleted afterwards. Unchanged parts on disk are copied as bytes."""
        self._catch_up()
        if part in self.assigned:
            self[to] = self[part]
        else:
            self._forget(to)
            self._copies[to] = part

    def defer(self, part: str, shape: tuple[int, ...], compute: Callable[[], torch.Tensor]) -> None:
        """Assign the tensor of `shape` that `compute` returns; it is called when the part is written."""
        self._catch_up()
        self._forget(part)
        self._assigned[part] = torch.empty(shape, device="meta") if self.shapes_only else Deferred(compute)
        self._touched["deferred"] = max(self._touched.get("deferred", 0), 4 * math.prod(shape))

    def defer_rows(self, part: str, shape: tuple[int, ...], rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Assign the tensor of `shape` of which `rows` returns the rows with these numbers; it is written some rows at a time."""
        self._catch_up()
        self._forget(part)

        def pieces() -> Iterator[torch.Tensor]:
            for numbers in torch.arange(shape[0]).split(ROWS):
                yield rows(numbers)

        self._assigned[part] = torch.empty(shape, device="meta") if self.shapes_only else Deferred(lambda: torch.cat(list(pieces())), pieces, rows)
        self._touched["deferred rows"] = max(self._touched.get("deferred rows", 0), 4 * min(ROWS, shape[0]) * math.prod(shape[1:]))

    def before(self, part: str) -> torch.Tensor:
        """Return a part as it was before this surgery, even if it was changed since."""
        if self._below is not None:
            return self._below._rounded(part)
        tensor = self._read(part)
        self._touched[part] = 4 * tensor.numel()
        return tensor

    def __getitem__(self, part: str) -> torch.Tensor:
        if part not in self:
            raise ModelError(f"{self._where()} of this {self._source.kind} has no part {part!r}; it has {', '.join(self)}")
        if part in self._borrowed:
            return self._borrowed[part][part]
        if part in self._assigned:
            value = self._assigned[part]
            return value.compute() if isinstance(value, Deferred) else value
        return self.before(self._copies.get(part, part))

    def __setitem__(self, part: str, tensor: torch.Tensor) -> None:
        self._catch_up()
        self._forget(part)
        self._assigned[part] = tensor
        self._touched[f"assigned {part}"] = 4 * tensor.numel()

    def __delitem__(self, part: str) -> None:
        self._catch_up()
        self._forget(part)
        self._deleted.add(part)

    def __iter__(self) -> Iterator[str]:
        self._catch_up()
        known = self._stored_parts() if self._below is None else list(self._below)
        yield from (part for part in dict.fromkeys([*known, *self._copies, *self._assigned, *self._borrowed]) if part in self)

    def __contains__(self, part: object) -> bool:
        self._catch_up()
        if isinstance(part, str) and part in self._borrowed:
            return part in self._borrowed[part]
        if part in self._assigned or part in self._copies or part in self._deleted or not isinstance(part, str):
            return part in self._assigned or part in self._copies
        return self._name(part, self._source) in self._stored if self._below is None else part in self._below

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @abstractmethod
    def tensors(self, stored: bool = False) -> Iterator[tuple[str, StoredTensor, torch.Tensor | Deferred | None]]:
        """Yield these parts in the layout of their config: a name, the tensor on disk it comes from, and its new value.

        The value is None where nothing changed, so that the bytes on disk can be copied.

        Args:
            stored: leave out tensors that an earlier layer stores.

        Raises:
            ModelError: the layout has no place for a part.
        """

    @abstractmethod
    def _where(self) -> str:
        """Name these parts in a message."""

    @abstractmethod
    def _name(self, part: str, config: Config) -> str:
        """Return the name of a part on disk in the layout of `config`."""

    @abstractmethod
    def _stored_parts(self) -> list[str]:
        """Name the parts on disk."""

    @abstractmethod
    def _read(self, part: str) -> torch.Tensor:
        """Return a part that is on disk."""

    def _forget(self, part: str) -> None:
        self._assigned.pop(part, None)
        self._copies.pop(part, None)
        self._borrowed.pop(part, None)
        self._deleted.discard(part)

    def _catch_up(self) -> None:
        """Apply pending changes in order. The list is emptied first, since changes use these parts."""
        changes, self._pending = self._pending, []
        for change in changes:
            change(self)

    def _changed(self, part: str) -> bool:
        """Whether any surgery assigned or deleted `part`."""
        self._catch_up()
        return part in self.assigned or part in self._deleted or (self._below is not None and self._below._changed(part))

    def _on_disk(self, part: str) -> str | None:
        """Return the part on disk with the unchanged bytes of this part; None where it is computed."""
        self._catch_up()
        if part in self._assigned or part in self._deleted or part in self._borrowed:
            return None
        part = self._copies.get(part, part)
        return part if self._below is None else self._below._on_disk(part)

    def _rounded(self, part: str) -> torch.Tensor:
        """Return `part` as it would be read from disk after the surgery of these parts.

        So a recipe without calibration gives the same bytes as its commands one after the other. With calibration it does not: there, inputs come from
        layers below after all steps.
        """
        tensor = self[part]
        if not self._changed(part) or tensor.is_meta:
            return tensor
        return rounded(tensor, self._type_of(tensor, self._origin([part])).dtype)

    def _origin(self, parts: Sequence[str]) -> StoredTensor:
        """Return the tensor on disk that these parts, fused in one, come from; for new parts a neighbour, usually the queries."""
        names = [self._name(part, self._source) for part in (*parts, *filter(None, map(self._copy_source, parts)))]
        return next((self._stored[name] for name in names if name in self._stored), self._neighbour)

    @staticmethod
    def _type_of(value: torch.Tensor | Deferred | None, origin: StoredTensor) -> StoredTensor:
        """Return `origin` with the type for a new value: whole numbers keep theirs."""
        whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
        return replace(origin, dtype="I64") if whole else origin

    def _copy_source(self, part: str) -> str:
        """Return the part that this one was copied from."""
        return self._copies.get(part) or ("" if self._below is None else self._below._copy_source(part))

    @property
    def _neighbour(self) -> StoredTensor:
        """A tensor on disk with the type for new ones: the queries, or else one of the most common type."""
        floats = {name: stored for name, stored in self._stored.items() if stored.dtype in FLOATS and name not in self._source.family.buffers}
        if not floats:
            raise ModelError(f"{self._where()} of this {self._source.kind} has no tensor of floating-point numbers on disk")
        common = Counter(stored.dtype for stored in floats.values()).most_common(1)[0][0]
        first = floats.get(self._name("q", self._source))
        return first or next(stored for stored in floats.values() if stored.dtype == common)
