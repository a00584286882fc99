import json
import re

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from effconvert.checkpoint.shards import FLOATS, ITEMSIZE, as_bytes, copy_run, header, read_header
from effconvert.errors import ModelError

TYPES = {
    **FLOATS,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
SHAPES = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0,), "flat": (4, 0, 2)}


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def sample(dtype, shape):
    values = torch.arange(torch.Size(shape).numel()) % 2 if dtype == torch.bool else torch.arange(torch.Size(shape).numel())
    return values.to(dtype).reshape(shape)


def write(path, entries, body=b""):
    """A safetensors file of any content: `entries` is the header as JSON or as text."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def test_every_type_is_in_the_table_of_these_tests():
    assert set(TYPES) == set(ITEMSIZE)


@pytest.mark.parametrize("code", TYPES)
def test_the_library_reads_what_was_written(code, tmp_path):
    tensors = {name: sample(TYPES[code], shape) for name, shape in SHAPES.items()}
    file = tmp_path / "model.safetensors"
    file.write_bytes(header({name: (code, tuple(tensor.shape)) for name, tensor in tensors.items()}) + b"".join(raw(tensor) for tensor in tensors.values()))
    found = load_file(file)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(found[name]) == raw(tensor)


@pytest.mark.parametrize("code", TYPES)
def test_what_the_library_wrote_is_read(code, tmp_path):
    tensors = {name: sample(TYPES[code], shape) for name, shape in SHAPES.items()}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "note": "anything"})
    found = read_header(file)
    content = file.read_bytes()
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        stored = found[name]
        assert (stored.name, stored.file, stored.dtype, stored.shape) == (name, file, code, tuple(tensor.shape))
        assert content[stored.start : stored.stop] == raw(tensor)


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_tensor_survives_being_read_and_turned_into_bytes(code, shape, tmp_path):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(FLOATS[code])
    save_file({"before": torch.ones(3), "t": tensor}, tmp_path / "f.safetensors")
    read = read_header(tmp_path / "f.safetensors")["t"].read("cpu")
    assert read.dtype == torch.float32
    assert torch.equal(read, tensor.float())
    assert bytes(as_bytes(read, code, "t")) == raw(read.to(FLOATS[code]))


def test_bytes_are_in_c_order_whatever_the_strides():
    tensor = torch.arange(6.0).view(2, 3)
    assert bytes(as_bytes(tensor.T, "F32", "t")) == raw(torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


def test_only_the_shape_is_read_on_the_meta_device(tmp_path):
    save_file({"t": torch.full((2, 3), torch.nan)}, tmp_path / "f.safetensors")
    tensor = read_header(tmp_path / "f.safetensors")["t"].read("meta")
    assert (tensor.device.type, tuple(tensor.shape)) == ("meta", (2, 3))


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    file = write(tmp_path / "f.safetensors", {"b": entry(8, 16), "a": entry(0, 8)}, bytes(16))
    assert list(read_header(file)) == ["a", "b"]


def test_the_first_tensor_begins_on_a_multiple_of_eight_bytes():
    assert all(len(header({"x" * length: ("F32", (1,))})) % 8 == 0 for length in range(1, 10))


def test_a_run_of_bytes_is_copied_and_counted(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "source").write_bytes(content)
    counted = []
    with (tmp_path / "source").open("rb", buffering=0) as source, (tmp_path / "target").open("wb") as target:
        target.write(b"head")
        copy_run(source, target, 7, len(content) - 3, counted.append)
        target.write(b"tail")
    assert (tmp_path / "target").read_bytes() == b"head" + content[7:-3] + b"tail"
    assert sum(counted) == len(content) - 10


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
DAMAGED = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "header of exabytes": b"\xff" * 8,
    "no JSON": (5).to_bytes(8, "little") + b"hello",
    "no UTF-8": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "header cut": (1).to_bytes(8, "little") + b"{}",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "null": (4).to_bytes(8, "little") + b"null",
    "nested beyond reason": (100_000).to_bytes(8, "little") + b"[" * 100_000,
}
WRONG = {
    "a byte appended": (GOOD, 17),
    "a byte missing": (GOOD, 15),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
    "hole at the start": ({"a": entry(4, 12)}, 12),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8),
    "shape larger than its bytes": ({"a": entry(0, 8, (3,))}, 8),
    "negative shape": ({"a": entry(0, 8, (-1, -2))}, 8),
    "negative offset": ({"a": entry(-8, 0)}, 0),
    "backwards": ({"a": entry(8, 0)}, 8),
    "fractional shape": ({"a": entry(0, 8, (2.0,))}, 8),
    "boolean shape": ({"a": entry(0, 8, (True, 2))}, 8),
    "unknown type": ({"a": entry(0, 8, dtype="F33")}, 8),
    "type that is no text": ({"a": entry(0, 8, dtype=["F32"])}, 8),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "entry is a number": ({"a": 3}, 8),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_name(content, tmp_path):
    file = tmp_path / "f.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(str(file))):
        read_header(file)
    with pytest.raises(SafetensorError):  # the library agrees
        load_file(file)


@pytest.mark.parametrize(("entries", "size"), WRONG.values(), ids=WRONG)
def test_a_header_that_lies_is_refused_by_name(entries, size, tmp_path):
    file = write(tmp_path / "f.safetensors", entries, bytes(size))
    with pytest.raises(ModelError, match=re.escape(str(file))):
        read_header(file)


def test_the_header_that_the_lies_are_made_from_is_accepted(tmp_path):
    assert set(read_header(write(tmp_path / "f.safetensors", GOOD, bytes(16)))) == {"a", "b"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"gone\.safetensors cannot be read \(No such file"):
        read_header(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("code", FLOATS)
def test_nan_and_infinity_are_named_when_read(bad, code, tmp_path):
    tensor = torch.ones(3, 3)
    tensor[1, 2] = bad
    save_file({"good": torch.ones(2), "layer.bad": tensor.to(FLOATS[code])}, tmp_path / "f.safetensors")
    found = read_header(tmp_path / "f.safetensors")
    assert torch.equal(found["good"].read("cpu"), torch.ones(2))
    with pytest.raises(ModelError, match=r"layer\.bad in f\.safetensors holds NaN or infinity"):
        found["layer.bad"].read("cpu")


@pytest.mark.parametrize("code", sorted(set(TYPES) - set(FLOATS)))
def test_a_type_that_cannot_be_computed_with_is_named_when_read(code, tmp_path):
    save_file({"t": sample(TYPES[code], (2,))}, tmp_path / "f.safetensors")
    with pytest.raises(ModelError, match=f"t is stored as {code}"):
        read_header(tmp_path / "f.safetensors")["t"].read("cpu")


def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path):
    save_file({"t": torch.ones(100)}, tmp_path / "f.safetensors")
    stored = read_header(tmp_path / "f.safetensors")["t"]
    with (tmp_path / "f.safetensors").open("r+b") as file:
        file.truncate(stored.stop - 4)
    with pytest.raises(ModelError, match=r"f\.safetensors is shorter than its header says"):
        stored.read("cpu")


def test_a_number_too_large_for_float16_is_named():
    with pytest.raises(ModelError, match=r"layer\.k as computed does not fit F16: the largest number is 7e\+04"):
        as_bytes(torch.tensor([1.0, 70000.0]), "F16", "layer.k")
    assert bytes(as_bytes(torch.tensor([65504.0]), "F16", "layer.k")) == raw(torch.tensor([65504.0], dtype=torch.float16))
