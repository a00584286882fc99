"""Faults that a reader who did not know the tree reproduced: files of somebody else, or edited by hand, and repeated runs."""

import json
from pathlib import Path

import pytest

from effconvert.checkpoint.sources import cache
from effconvert.convert.run import convert
from effconvert.errors import EffconvertError
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.mixing.fnet import Fnet
from effconvert.surgery.mixing.linear import Linear
from tests.heal.healing import put
from tests.models import save, tiny


def edit(file, **keys):
    path = Path(file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def bert():
    """A bert whose tokenizer's config names no class, so that it has to be named where it becomes an fnet."""
    put(Path("model"), "bert")
    content = json.loads(Path("model/tokenizer_config.json").read_text())
    content.pop("tokenizer_class")
    Path("model/tokenizer_config.json").write_text(json.dumps(content))


def test_a_conversion_that_edits_the_tokenizer_is_found_again():
    bert()
    options = RunOptions(output=Path("out"), verify=False)
    convert("model", (Fnet(),), options, reuse=True)
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "fnet"
    assert convert("model", (Fnet(),), options, reuse=True).already_there


@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_a_tokenizers_config_that_is_none_is_refused_in_the_plan(text):
    bert()
    Path("model/tokenizer_config.json").write_text(text)
    with pytest.raises(EffconvertError, match=r"tokenizer_config\.json"):
        convert("model", (Fnet(),), RunOptions(output=Path("out"), verify=False, dry_run=True))


@pytest.mark.parametrize(("key", "value"), [("rope_parameters", "x"), ("rope_parameters", {"partial_rotary_factor": "x"}), ("partial_rotary_factor", "x")])
def test_rope_that_makes_no_sense_is_refused(key, value, command):
    save(tiny("llama"), Path("model"))
    edit("model/config.json", **{key: value})
    result = command("inspect", "model")
    assert result.exit_code == 1
    assert key in result.output


@pytest.mark.parametrize("value", [3, [1], "x"])
def test_classes_of_a_converted_model_that_are_no_names_are_refused(value, command):
    save(tiny("llama"), Path("model"))
    convert("model", (Linear(),), RunOptions(output=Path("out"), verify=False))
    edit("out/config.json", architectures=value)
    result = command("inspect", "out")
    assert result.exit_code == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("key", ["model", "revision", "commit"])
@pytest.mark.parametrize("value", [1, [1], {}])
def test_a_manifest_edited_by_hand_is_no_traceback_after_the_work(key, value):
    save(tiny("llama"), Path("model"))
    convert("model", (Gqa(groups=2, pool="mean"),), RunOptions(output=Path("one"), verify=False))
    manifest = json.loads(Path("one/effconvert.json").read_text())
    edit("one/effconvert.json", source={**manifest["source"], key: value})
    convert("one", (Gqa(groups=1, pool="mean"),), RunOptions(output=Path("two"), verify=False))
    assert Path("two/README.md").exists()


def test_an_empty_name_of_the_cache_is_the_usual_one(monkeypatch):
    monkeypatch.setenv("EFFCONVERT_CACHE", "")
    assert cache() == Path.home() / ".cache/effconvert"
