"""What is taken for the same conversion, and what is not: by content, by the technique's code, and after a kill at any moment."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.digest import file_hash
from effconvert.convert import code, output
from effconvert.convert.originals import stand_for
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.errors import ModelError
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from tests.convert.test_seam import Plain
from tests.heal.healing import killed_saving, put, run, tensors
from tests.models import save, tiny


def twins(change=0.1):
    """Two models of the same names, sizes and times, and other numbers."""
    for name, extra in (("a", 0.0), ("b", change)):
        model = tiny("llama", num_hidden_layers=3)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.add_(extra)
        save(model, Path(name))
        for file in Path(name).iterdir():
            os.utime(file, ns=(10**18, 10**18))


def test_files_of_the_same_name_size_and_time_are_told_apart():
    twins()
    one, other = (plan(open_checkpoint(Path(name)), (Gqa(groups=2, pool="mean"),)) for name in "ab")
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == plan(open_checkpoint(Path("a")), (Gqa(groups=2, pool="mean"),)).fingerprint


def test_another_model_is_not_taken_for_what_is_there():
    twins()
    options = RunOptions(output=Path("out"), verify=False, overwrite=True)
    convert("a", (Gqa(groups=2, pool="mean"),), options, reuse=True)
    assert convert("a", (Gqa(groups=2, pool="mean"),), options, reuse=True).already_there
    assert not convert("b", (Gqa(groups=2, pool="mean"),), options, reuse=True).already_there


def test_a_technique_that_was_changed_is_another(monkeypatch, tmp_path):
    twins()
    before = plan(open_checkpoint(Path("a")), (Plain(),)).fingerprint
    copy = tmp_path / "plain.py"
    copy.write_text("# another version")
    monkeypatch.setattr("effconvert.convert.code.getfile", lambda _: str(copy))
    assert plan(open_checkpoint(Path("a")), (Plain(),)).fingerprint != before


@pytest.mark.parametrize("changed", ["_recall.py", "gqa.py", "_training.py"])
def test_a_technique_is_another_when_what_it_may_use_was_changed(changed, monkeypatch):
    twins()
    before = plan(open_checkpoint(Path("a")), (Plain(),)).fingerprint
    monkeypatch.setattr(code, "file_hash", lambda path: "another" if path.name == changed else file_hash(path))
    monkeypatch.setattr(code, "_own_code", code._own_code.__wrapped__)  # without its cache
    assert plan(open_checkpoint(Path("a")), (Plain(),)).fingerprint != before


def test_a_run_that_is_killed_at_its_very_end_is_ended_by_the_same_command(monkeypatch):
    twins()
    step, options = Gqa(groups=2, pool="mean"), RunOptions(output=Path("out"), verify=False)
    real = output.save_manifest

    def dying(folder, manifest):
        if folder.name == "out":
            raise KeyboardInterrupt
        real(folder, manifest)

    monkeypatch.setattr(output, "save_manifest", dying)
    with pytest.raises(KeyboardInterrupt):
        convert("a", (step,), options)
    assert Path("out").exists()
    monkeypatch.setattr(output, "save_manifest", real)
    assert convert("a", (step,), options).already_there
    assert "shards" not in json.loads(Path("out/effconvert.json").read_text())


def test_a_draft_that_was_damaged_is_made_again(monkeypatch):
    put(Path("model"), num_hidden_layers=3)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    step = Gqa(groups=2, pool="pca")
    run("model", step, place="whole")
    killed_saving(monkeypatch, 2, lambda: run("model", step), lambda file: file.write_bytes(file.read_bytes()[:-40]))
    run("model", step)
    assert all(torch.equal(tensor, tensors(Path("whole"))[name]) for name, tensor in tensors(Path("out")).items())


def test_shards_of_a_faulty_technique_are_not_used_by_the_mended_one(monkeypatch):
    twins()

    def broken(*_, **__):
        raise AttributeError("a bug of the technique")

    options = RunOptions(output=Path("out"), tokens=64, context=32)
    with monkeypatch.context() as patched:
        patched.setattr("effconvert.convert.run.verify", broken)
        with pytest.raises(AttributeError, match="a bug of the technique"):
            convert("a", (Gqa(groups=2, pool="mean"),), options)
    assert convert("a", (Gqa(groups=2, pool="mean"),), options).resumed == 0


def alike(folder="alike", layers=4):
    """A model whose layers have the same norms."""
    model = tiny("llama", num_hidden_layers=layers)
    for layer in model.model.layers:
        layer.load_state_dict({**layer.state_dict(), "input_layernorm.weight": torch.ones(32), "post_attention_layernorm.weight": torch.ones(32)})
    return save(model, Path(folder))


def test_layers_that_cannot_be_told_apart_are_not_healed():
    alike()
    convert("alike", (PruneLayers(layers="1"),), RunOptions(output=Path("less"), verify=False))
    with pytest.raises(ModelError, match=r"layer 0 of the student has the norms of layer 0 of the teacher and of layer 1, so it is unknown which"):
        stand_for(open_checkpoint(Path("less")), open_checkpoint(Path("alike")))
    shutil.copytree("alike", "same")
    assert stand_for(open_checkpoint(Path("same")), open_checkpoint(Path("alike"))) == [range(index, index + 1) for index in range(4)]


def test_layers_in_another_order_are_not_healed():
    model = tiny("llama", num_hidden_layers=3)
    save(model, Path("model"))
    model.model.layers = torch.nn.ModuleList(reversed(model.model.layers))
    save(model, Path("reversed"))
    with pytest.raises(ModelError, match=r"layer 0 of the student has the norms of layer 2 of the teacher"):
        stand_for(open_checkpoint(Path("reversed")), open_checkpoint(Path("model")))
