"""The demonstration: convert the embedded model, 8 KV heads to 2, by every rule of pooling there is."""

from pathlib import Path
from typing import get_args

from effconvert.convert.run import Outcome, convert
from effconvert.convert.watch import Watcher
from effconvert.options import RunOptions
from effconvert.surgery.gqa import Gqa, Pool

MODEL = Path(__file__).parent / "model"
GROUPS = 2


def demo(folder: Path, watcher: Watcher) -> dict[str, Outcome]:
    """Convert into `folder`, and return what came of each rule."""
    outcomes = {}
    for rule in get_args(Pool):
        options = RunOptions(output=folder / f"{GROUPS}-{rule}", overwrite=True)  # replaces only what an earlier demo wrote
        outcomes[rule] = convert(str(MODEL), (Gqa(groups=GROUPS, pool=rule),), options, watcher)
    return outcomes
