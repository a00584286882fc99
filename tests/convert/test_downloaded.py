"""The models of the Hub that are downloaded most: which techniques each allows, or why it is refused, by its config alone."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.shards import header
from effconvert.convert.inspection import applicable
from effconvert.errors import ModelError
from effconvert.families import FAMILIES

SAID = yaml.safe_load(Path(__file__).with_name("downloaded.yaml").read_text())
TECHNIQUES = {technique for group in SAID["accepted"] for technique in group["techniques"]}  # others go by more than the group
USUAL = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")


def config_of(row):
    """The config.json of a row: model_type, class, layers, width, query heads, KV heads, other keys. Only the first two are always there."""
    kind, name, *shape = row
    more = shape.pop() if isinstance(shape[-1], dict) else {}
    family = FAMILIES.get(kind)
    keys = (family.layers_key, family.hidden_key, family.heads_key, family.kv_heads_key) if family else USUAL
    return {"model_type": kind, **({"architectures": [name]} if name else {}), **dict(zip(keys, shape, strict=False)), **more}


def each(outcome):
    return [pytest.param(group, row, id=model) for group in SAID[outcome] for model, row in group["models"].items()]


def written(folder, row):
    (folder / "config.json").write_text(json.dumps(config_of(row)))
    return folder


@pytest.mark.parametrize(("group", "row"), each("accepted"))
def test_the_techniques_that_a_model_allows(group, row, tmp_path):
    config = read_config(written(tmp_path, row))
    allowed, refusals = applicable(config)
    assert allowed.keys() & TECHNIQUES == set(group["techniques"]), refusals
    theirs = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False).get_text_config()
    ours = (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim)
    shared = config.family.fixed_kv_heads or getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours == (theirs.num_hidden_layers, theirs.hidden_size, theirs.num_attention_heads, shared, width)


@pytest.mark.slow
def test_the_documents_count_the_models_of_techniques_that_go_by_more_than_the_group(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    counts = {name: int(number) for name, number in re.findall(r"`([a-z-]+)` takes (\d+)", page)}
    assert counts.keys() == {"rope", "rope-layout", "chunk-ffn"}
    rows = [row for group in SAID["accepted"] for row in group["models"].values()]
    assert counts == Counter(name for row in rows for name in applicable(read_config(written(tmp_path, row)))[0] if name in counts)


@pytest.mark.parametrize(("group", "row"), each("refused"))
def test_the_reason_why_a_model_is_refused(group, row, tmp_path):
    written(tmp_path, row)
    if name := group.get("tensor"):  # what gives a quantised model away
        (tmp_path / "model.safetensors").write_bytes(header({name: ("I32", (0,))}))
    with pytest.raises(ModelError, match=re.escape(group["reason"])) as error:
        open_checkpoint(tmp_path) if name else read_config(tmp_path).check_stored_apart()
    assert "; " in str(error.value)  # what to do


def test_the_table_in_the_documents_counts_these():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    counts = {name: int(number) for name, number in re.findall(r"^\| ([^|]+) \| (\d+) \| ", page, re.MULTILINE)}
    assert counts == {group["name"]: len(group["models"]) for outcome in ("accepted", "refused") for group in SAID[outcome]}
