"""Safetensors files as ranges of bytes: read a header, read one tensor, copy a run, write a file front to back.

The safetensors library lacks two things that streaming needs: the offsets of a tensor's bytes, so that unchanged runs are copied without decoding,
and writing a file that is not in memory as a whole.
The format: 8 bytes little-endian length, a JSON header of that length, then the tensors' bytes without gaps.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from effconvert.errors import ModelError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EIGHT_BITS = ("I8", "U8", "BOOL", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0")
NUMBERS = {**FLOATS, "I64": torch.int64}  # what effconvert writes
OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "C64": 8, **dict.fromkeys(EIGHT_BITS, 1)}
ITEMSIZE = {**{code: dtype.itemsize for code, dtype in FLOATS.items()}, **OTHER_BYTES}
PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # several numbers share a byte
CHUNK = 1 << 24  # bytes read ahead, and sent to disk at a time
PIECE = 1 << 20  # bytes copied at a time
LARGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk: bytes `start` to `stop` of a safetensors file."""

    name: str
    file: Path
    dtype: str  # safetensors' code
    shape: tuple[int, ...]
    start: int
    stop: int

    def check_float(self) -> None:
        """Refuse weights that are no floating-point numbers.

        Raises:
            ModelError: they are of another type.
        """
        if self.dtype not in FLOATS:
            raise ModelError(_not_float(self.name, self.dtype))

    def read(self, device: str) -> torch.Tensor:
        """Return the tensor in float32, or only its shape where `device` is meta.

        Raises:
            ModelError: it holds no floating-point numbers, or NaN or infinity.
        """
        self.check_float()
        if device == "meta":
            return torch.empty(self.shape, device="meta")
        tensor = self._numbers().float()
        if not is_finite(tensor):
            raise ModelError(f"{self.name} in {self.file.name} holds NaN or infinity, so the model cannot be sound; fetch it again or ask its author")
        return tensor

    def own(self, device: str) -> torch.Tensor:
        """Return a tensor of a technique, likewise; whole numbers as they are."""
        if self.dtype in FLOATS:
            return self.read(device)
        return torch.empty(self.shape, dtype=NUMBERS[self.dtype], device="meta") if device == "meta" else self._numbers()

    def _numbers(self) -> torch.Tensor:
        """Return the tensor in its own type."""
        flat = torch.empty(self.stop - self.start, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            view = flat.numpy().data
            while len(view):
                view = view[file.readinto(view) or _truncated(self.file) :]
        return flat.view(NUMBERS[self.dtype]).view(self.shape)

    def rows(self, part: int, parts: int) -> "StoredTensor":
        """Return one of `parts` equal runs of rows, as a tensor of its own."""
        size = (self.stop - self.start) // parts
        return replace(self, shape=(self.shape[0] // parts, *self.shape[1:]), start=self.start + part * size, stop=self.start + (part + 1) * size)

    def mapped(self) -> torch.Tensor:
        """Return the tensor memory-mapped in its own type, for reading a few rows of a large one."""
        if self.start % ITEMSIZE[self.dtype]:  # an unusual header, without alignment
            return self._numbers()
        return torch.from_file(str(self.file), shared=False, size=self.stop, dtype=torch.uint8)[self.start :].view(NUMBERS[self.dtype]).view(self.shape)


def _not_float(name: str, dtype: str) -> str:
    return f"{name} is stored as {dtype}, and weights must be one of {', '.join(FLOATS)}; give an unquantised checkpoint"


def _truncated(file: Path) -> int:
    raise ModelError(f"{file} is shorter than its header says; it changed while it was read")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of `file`, by name, in the order of its bytes.

    Raises:
        ModelError: the file is missing, cut short, or no safetensors file.
    """
    damaged = f"{file} is damaged: "
    advice = "; fetch the file again"
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ModelError(f"{damaged}its header would need {length + 8} bytes and the file has {size}{advice}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        stored = [_entry(file, name, entry, 8 + length) for name, entry in header.items()]
    except PermissionError:
        raise ModelError(f"{file} may not be read; make it readable") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}){advice}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{damaged}its header is no safetensors header ({error}){advice}") from None
    stored.sort(key=lambda tensor: (tensor.start, tensor.stop))
    expected = 8 + length
    for tensor in stored:
        if tensor.start != expected or tensor.stop - tensor.start != math.prod(tensor.shape) * ITEMSIZE[tensor.dtype]:
            raise ModelError(f"{damaged}the bytes of {tensor.name!r} do not lie where its header says{advice}")
        expected = tensor.stop
    if expected != size:
        raise ModelError(f"{damaged}its header describes {expected} bytes and the file has {size}{advice}")
    return {tensor.name: tensor for tensor in stored}


def _entry(file: Path, name: str, entry: Mapping[str, Any], base: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] in PACKED:
        raise ModelError(_not_float(name, entry["dtype"]))
    if entry["dtype"] not in ITEMSIZE:
        raise ValueError(f"{name!r} is of the unknown type {entry['dtype']!r}")
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"{name!r} has a shape or an offset that is no whole number")
    return StoredTensor(name, file, entry["dtype"], shape, base + start, base + stop)


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the header of a file with `tensors` (name -> type code, shape) in that order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: torch.Tensor, dtype: str, name: str) -> memoryview:
    """Round `tensor` to the type `dtype`, and return its bytes in C order.

    Raises:
        ModelError: a finite number overflows in `dtype`.
    """
    stored = tensor.to(NUMBERS[dtype]).contiguous()
    if not is_finite(stored):
        raise ModelError(f"{name} as computed does not fit {dtype}: the largest number is {tensor.abs().max():.3g}; convert the model to BF16 first")
    return stored.reshape(-1).view(torch.uint8).numpy().data


def rounded(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return a tensor as it is read back after it was stored as `dtype`: in float32; whole numbers as they are."""
    stored = tensor.to(NUMBERS[dtype])
    return stored.float() if stored.is_floating_point() else stored


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of `tensor` is NaN or infinite. A finite sum proves it in a tenth of the time."""
    return math.isfinite(tensor.sum(dtype=torch.float32)) or bool(torch.isfinite(tensor).all())


def flush_behind(file: int, length: int) -> None:
    """Start to flush the first `length` bytes of `file` to disk, and free the page cache of those that are there.

    A shard counts as finished only when it is on disk. Flushing during the copy reuses pages of memory: a copy of 3.4 GB takes 2.5 s with its `fsync`,
    and 5.9 s if everything is flushed at the end (decision 6).
    """
    os.posix_fadvise(file, max(0, length - CHUNK), CHUNK, os.POSIX_FADV_DONTNEED)
    if length > 4 * CHUNK:
        os.posix_fadvise(file, 0, length - 4 * CHUNK, os.POSIX_FADV_DONTNEED)


def copy_run(source: FileIO, target: BinaryIO, start: int, stop: int, advance: Callable[[int], None]) -> None:
    """Append bytes `start` to `stop` of `source` to `target`, and call `advance` with their number.

    The buffer of one megabyte stays in the processor's cache. `sendfile` is half as fast where offsets within pages change, as they do after another
    header.
    """
    buffer = memoryview(bytearray(PIECE))
    source.seek(start)
    while start < stop:
        if sys.platform == "linux" and start % CHUNK < PIECE:
            os.posix_fadvise(source.fileno(), start + CHUNK, CHUNK, os.POSIX_FADV_WILLNEED)  # read ahead during the write
        count = source.readinto(buffer[: min(stop - start, PIECE)]) or _truncated(Path(source.name))
        target.write(buffer[:count])
        if sys.platform == "linux" and target.tell() % CHUNK < PIECE:
            flush_behind(target.fileno(), target.tell())
        advance(count)
        start += count
