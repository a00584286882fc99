"""Writing: the order of a file's tensors changes neither the result nor how much waits in memory."""

import json

import torch
from safetensors.torch import load_file

from effconvert.checkpoint.shards import header
from effconvert.convert import write as stream
from effconvert.convert.run import convert
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from tests.models import save, tiny


def test_a_file_that_holds_its_tensors_kind_by_kind_gives_the_same_and_keeps_few_layers(tmp_path, monkeypatch):
    source = save(tiny("llama", num_hidden_layers=6), tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    by_kind = dict(sorted(tensors.items(), key=lambda item: (item[0].split(".")[3:], item[0])))
    options = {"verify": False}
    convert(str(source), (Gqa(groups=2, pool="mean"),), RunOptions(output=tmp_path / "by-layer", **options))
    shapes = {name: ("F32", tuple(tensor.shape)) for name, tensor in by_kind.items()}
    file.write_bytes(header(shapes) + b"".join(tensor.numpy().tobytes() for tensor in by_kind.values()))

    real, waiting = stream._Layers.take, []

    def watched(self, target):
        tensor = real(self, target)
        waiting.append(len(self.ready))
        return tensor

    monkeypatch.setattr(stream._Layers, "take", watched)
    convert(str(source), (Gqa(groups=2, pool="mean"),), RunOptions(output=tmp_path / "by-kind", **options))
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("by-layer", "by-kind"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert max(waiting) <= 2
    assert json.loads((tmp_path / "by-kind/config.json").read_text())["num_key_value_heads"] == 2
