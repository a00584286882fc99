"""Draw what benchmarks/refit.py measured: loss against KV heads, each pooling rule before (dashed) and after (solid) refit.

python benchmarks/plot_refit.py benchmarks/results/refit-….csv docs/gqa.svg
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = {"first": "#8a8a8a", "mean": "#c44e52", "aligned": "#dd8f2a", "pca": "#2a6fbb"}


def main(source, target):
    """Read the CSV and write the picture."""
    rows = list(csv.DictReader(Path(source).read_text().splitlines()))
    plt.rcParams["svg.hashsalt"] = "effconvert"  # the same picture from the same numbers
    figure, axes = plt.subplots(figsize=(6.4, 3.8), constrained_layout=True)
    for rule, colour in COLOURS.items():
        for refit in (False, True):
            chosen = f"--pool {rule}{' --refit' * refit}"
            points = sorted((int(row["groups"]), float(row["loss"])) for row in rows if row["options"] == chosen)
            if points:
                style = "o-" if refit else "o--"
                axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4, linewidth=1.6, label=f"{rule}, refitted" if refit else rule)
    original = next(float(row["loss"]) for row in rows if row["options"] == "original")
    axes.axhline(original, color="black", linewidth=0.8)
    axes.text(1.5, original, "original", va="top", fontsize=8)
    axes.set(xlabel="KV heads (of 8)", ylabel="held-out loss, nats a token", xticks=sorted({int(row["groups"]) for row in rows if row["groups"]}))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2, handlelength=3)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
