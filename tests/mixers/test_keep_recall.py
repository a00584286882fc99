"""--keep-recall: the layers that find what followed an earlier copy stay at softmax."""

from pathlib import Path

import pytest
import torch
import yaml

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.calibration import prepare
from effconvert.convert.plan import plan
from effconvert.errors import OptionError
from effconvert.modeling.loading import class_of
from effconvert.options import RunOptions
from effconvert.surgery.mixing.fnet import Fnet
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.mixing.streaming import Streaming
from tests.heal.healing import prose, put, run
from tests.models import tiny

TOKENS = 512


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def recalled(folder):
    """By transformers alone: for each layer, what its best head gives on average to the token after an earlier copy of the one that it reads."""
    checkpoint = open_checkpoint(folder)
    ids = prepare(plan(checkpoint, (Linear(window=6),)), RunOptions(calibrate="text.txt", calibration_tokens=TOKENS)).ids
    half = ids.shape[1] // 2
    model = class_of(checkpoint.config).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        attentions = model(torch.cat([ids[:, :half]] * 2, 1), output_attentions=True, use_cache=False).attentions
    again = range(half, 2 * half - 1)
    return [float(torch.stack([layer[:, :, token, token - half + 1] for token in again]).mean((0, 1)).max()) for layer in attentions]


@pytest.mark.parametrize(("kind", "step", "kept"), [("llama", Streaming(window=6, sinks=2, keep_recall=2), 2), ("qwen3", Linear(window=6, keep_recall=1), 1)])
def test_the_layers_that_look_back_most_to_what_followed_stay(kind, step, kept):
    source = put(Path("model"), kind, num_hidden_layers=4)
    scores = recalled(source)
    expected = sorted(sorted(range(4), key=lambda layer: -scores[layer])[:kept])
    outcome = run(source, step, calibration_tokens=TOKENS)
    (record,) = outcome.plan.config.replaced
    assert record.layers == tuple(layer for layer in range(4) if layer not in expected)
    assert not {"keep_recall", "keep_softmax"} & record.options.keys()
    (written,) = yaml.safe_load(Path("out/effconvert.yaml").read_text())["steps"]  # which converts to the same model again, without a choice
    assert written[step.name].get("keep-recall") is None
    assert str(written[step.name]["keep-softmax"]) == ",".join(map(str, expected))


def test_layers_that_were_named_stay_too():
    source = put(Path("model"), "llama", num_hidden_layers=4)
    best = max(range(3), key=recalled(source).__getitem__)
    outcome = run(source, Linear(window=6, keep_softmax="-1", keep_recall=1), calibration_tokens=TOKENS)
    assert outcome.plan.config.replaced[0].layers == tuple(layer for layer in range(3) if layer != best)


def test_layers_with_a_window_are_kept_last():
    """Though copies stand inside their windows here, and they find them best."""
    everywhere = put(Path("full"), "gemma3_text", num_hidden_layers=4, layer_types=["full_attention"] * 4, sliding_window=48)
    scores = recalled(everywhere)
    best = sorted(range(4), key=lambda layer: -scores[layer])[:2]
    kinds = ["sliding_attention" if layer in best else "full_attention" for layer in range(4)]
    source = put(Path("model"), "gemma3_text", num_hidden_layers=4, layer_types=kinds, sliding_window=48)
    again = recalled(source)
    assert min(again[layer] for layer in best) > max(again[layer] for layer in range(4) if layer not in best)
    outcome = run(source, Linear(window=0, keep_recall=2), calibration_tokens=TOKENS)
    assert set(outcome.plan.config.replaced[0].layers) == set(best)


def test_what_leaves_nothing_to_choose_is_refused(tmp_path):
    config = open_checkpoint(put(Path("model"), "llama", num_hidden_layers=4)).config
    with pytest.raises(OptionError, match="--keep-recall 4 leaves none of the 4 layers that could be changed; give at most 3"):
        Linear(window=6, keep_recall=4).check(config)
    with pytest.raises(OptionError, match="--keep-recall 2 leaves none of the 2 layers that could be changed; give at most 1"):
        Linear(window=6, layers="0-1", keep_recall=2).check(config)
    encoder = tiny("bert")
    encoder.save_pretrained(tmp_path / "bert")
    with pytest.raises(OptionError, match="--keep-recall is for decoders, whose layers look back, and bert is an encoder; name layers with --keep-softmax"):
        Fnet(keep_recall=1).check(open_checkpoint(tmp_path / "bert").config)
