"""The log of a training that docs/distill.md shows is what a user sees."""

import json
import re
from pathlib import Path

import effconvert
from effconvert.convert.run import convert
from effconvert.heal.distill import Distill
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa

ROOT = Path(__file__).parents[2]
LINE = re.compile(r" *([\d,]+) tokens, [\d,]+ s: held-out ([\d.]+)(?:, loss ([\d.]+))?")


def test_sixty_steps_on_the_embedded_model_have_the_losses_of_the_docs(tmp_path):
    page = (ROOT / "docs" / "distill.md").read_text()
    shown = [(int(match[1].replace(",", "")), float(match[2]), float(match[3] or 0)) for match in map(LINE.fullmatch, page.splitlines()) if match]
    assert len(shown) == 11
    steps = (Gqa(groups=1, pool="mean"), Distill(data=str(ROOT / "LICENSE"), window=64, batch_tokens=256, train_tokens=15360, rate=1e-3))
    out = tmp_path / "out"
    convert(str(Path(effconvert.__file__).parent / "demo" / "model"), steps, RunOptions(output=out, verify=False))
    curve = json.loads((out / "effconvert.json").read_text())["distillation"]["curve"]
    found = [(point["tokens"], point["held_out"], point["loss"] or 0.0) for point in curve]
    assert [tokens for tokens, *_ in found] == [tokens for tokens, *_ in shown]
    assert all(
        abs(one - other) < 1e-3 * max(1, other) for mine, theirs in zip(found, shown, strict=True) for one, other in zip(mine[1:], theirs[1:], strict=True)
    )
