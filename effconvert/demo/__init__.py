"""The demonstration: convert the embedded model, 8 KV heads to 2, by each rule of pooling."""

from pathlib import Path
from typing import get_args

from effconvert.convert.calibration import DOCSTRINGS
from effconvert.convert.run import Outcome, convert
from effconvert.options import RunOptions
from effconvert.progress import Progress
from effconvert.surgery.attention.gqa import Gqa, Pool

MODEL = Path(__file__).parent / "model"
GROUPS = 2
TOKENS = 8192  # for calibration: half of the default, to save time


def demo(folder: Path, progress: Progress) -> dict[str, Outcome]:
    """Convert into `folder`; return the outcome of each rule, and of the best one with a refit, by their options."""
    outcomes = {}
    ways = [(rule, False) for rule in reversed(get_args(Pool))] + [(get_args(Pool)[0], True)]
    for rule, refit in ways:
        name = f"{GROUPS}-{rule}{'-refit' * refit}"
        options = RunOptions(
            output=folder / name,
            overwrite=True,  # replaces only what an earlier demo wrote
            refit=refit,
            calibrate=DOCSTRINGS,  # like the text that is measured on
            calibration_tokens=TOKENS,
        )
        outcomes[f"--pool {rule}{' --refit' * refit}"] = convert(str(MODEL), (Gqa(groups=GROUPS, pool=rule),), options, progress)
    return outcomes
