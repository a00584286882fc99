"""Draw what benchmarks measured on SmolLM2: bytes of cache a token against what a conversion adds to the loss.

python benchmarks/plot_cache.py docs/cache.svg

Losses are those of the CSVs in benchmarks/results, each against the original on the same text in windows of 512 tokens. The size of a cache follows from
the shape alone: it is what a plan promises and verification measures, at 512 tokens.
"""

import csv
import math
import sys
from pathlib import Path

from effconvert import steps
from effconvert.checkpoint.config import Config
from effconvert.families import FAMILIES
from effconvert.modeling.caches import kv_bytes

RESULTS = Path(__file__).parent / "results"
FRONTIER = "frontier-smollm2-2026-11-29.csv"
CONTEXT = 512
SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
}
POINTS = {  # command: what is written beside it, where (in units of the picture, from the healed point)
    "gqa --groups 1": ("gqa --groups 1", -10, -3),
    "streaming --window 64 --sinks 4": ("streaming --window 64", 10, 5),
    "linear --window 64": ("linear --window 64", 10, 16),
    "linformer-causal --rank 8": ("linformer-causal", -10, 5),
    "retnet": ("retnet", 10, 4),
    "performer --features 256": ("performer", 10, 4),
    "share-kv --layers 1-29/2": ("share-kv, pairs", 10, -4),
    "narrow-kv --keep 0.5": ("narrow-kv 0.5, mla", 10, -3),
    "narrow-kv --keep 0.333": ("0.333", -10, 4),
    "narrow-kv --keep 0.25": ("narrow-kv 0.25", -10, 5),
    "narrow-kv --keep 0.125": ("0.125", -10, 5),
    "gqa --groups 1;share-kv --layers 1-29/2": ("gqa, share-kv", -10, 5),
    "mla --rank 115 --rope-dims 76": ("", 0, 0),
    "prune-layers --drop 15 --only attention": ("15 attentions dropped", 10, 8),
    "prune-layers --drop 8 --only attention": ("8 attentions", 10, 5),
    "prune-layers --drop 2": ("prune-layers --drop 2", -10, 0),
    "prune-layers --drop 4": ("--drop 4", -10, 6),
    "prune-layers --drop 8": ("prune-layers --drop 8", 10, 6),
}
LEFT, TOP, WIDTH, HEIGHT = 74, 44, 640, 330
MOST, LOW, HIGH = 25, 0.08, 14  # kB a token; nats a token
STYLE = """
text{font:15px sans-serif;fill:#1f2328}.small{font-size:13px;fill:#59636e}.bold{font-weight:bold}
.page{fill:#fff}.grid{stroke:#d1d9e0}.line{stroke:#0969da;stroke-width:1.5}.done{fill:#0969da}.raw{fill:#fff;stroke:#0969da;stroke-width:1.5}
@media (prefers-color-scheme:dark){text{fill:#f0f6fc}.small{fill:#9198a1}.page{fill:#0d1117}.grid{stroke:#3d444d}.line{stroke:#4493f8}
.done{fill:#4493f8}.raw{fill:#0d1117;stroke:#4493f8}}
"""


def measured():
    """Yield (command, how it was healed, nats a token more than the original) of each row."""
    for name in ("mixers-smollm2-2026-11-22.csv", "mixers-smollm2-2026-11-23.csv"):
        for row in rows(name):
            yield row["command"], row["heal"], math.log(float(row["after"]) / float(row["before"]))
    for name, command in (("refit-smollm2-2026-11-22.csv", "gqa --groups {groups}"), ("prune-smollm2-2026-11-28.csv", "prune-layers --drop {drop}")):
        original = next(float(row["loss"]) for row in rows(name) if row["options"] == "original")
        for row in rows(name):
            if row["options"] != "original":
                yield command.format(**row), row["options"], float(row["loss"]) - original
    frontier = rows(FRONTIER)
    original = next(float(row["loss"]) for row in frontier if not row["commands"])
    for row in frontier:
        if row["commands"] and row["commands"] != "gqa --groups 1 --refit":  # which another CSV has, beside what it was before refit
            yield short(row), "--refit", float(row["loss"]) - original


def short(row):
    """Return the commands of a row of the frontier without what all of them have."""
    return row["commands"].replace(" --by influence", "").replace(" --refit", "").removesuffix(";refit --teacher {model}")


def rows(name):
    """Return the rows of a CSV."""
    return list(csv.DictReader((RESULTS / name).read_text(encoding="utf-8").splitlines()))


def cache(command):
    """Return kB of cache a token of the converted model."""
    if known := [float(row["cache"]) for row in rows(FRONTIER) if short(row) == command]:
        return known[0]
    original = Config(SMOLLM2, FAMILIES["llama"])
    name, *words = command.split()
    options = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    if name == "prune-layers":
        return (1 - int(options["drop"]) / original.layers) * kv_bytes(original, 2, CONTEXT) / CONTEXT / 1000
    converted = steps.load(name)(**options).config(original)
    return kv_bytes(converted, 2, CONTEXT) / CONTEXT / 1000


def picture():
    """Return the picture as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {TOP + HEIGHT + 62}" role="img">',
        "<title>Cache of a converted SmolLM2-135M-Instruct against what the conversion adds to its loss</title>",
        f'<style>{STYLE}</style><rect class="page" width="100%" height="100%"/>',
        '<text class="bold" x="12" y="24">SmolLM2-135M-Instruct: smaller cache, larger loss</text>',
    ]
    for nats in (0.1, 0.3, 1, 3, 10):
        lines.append(
            f'<path class="grid" d="M{LEFT} {y(nats):.1f}h{WIDTH}"/><text class="small" x="{LEFT - 8}" y="{y(nats) + 5:.1f}" text-anchor="end">+{nats:g}</text>'
        )
    for kilobytes in range(0, MOST + 1, 5):
        lines.append(f'<text class="small" x="{x(kilobytes):.1f}" y="{TOP + HEIGHT + 20}" text-anchor="middle">{kilobytes}</text>')
    lines.append(f'<text class="small" x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 42}" text-anchor="middle">cache, kB a token, at {CONTEXT} tokens</text>')
    lines.append(f'<text class="small" transform="translate(18 {TOP + HEIGHT / 2}) rotate(-90)" text-anchor="middle">loss added, nats a token</text>')
    whole = kv_bytes(Config(SMOLLM2, FAMILIES["llama"]), 2, CONTEXT) / CONTEXT / 1000
    lines.append(f'<path class="grid" stroke-dasharray="4" d="M{x(whole):.1f} {TOP}v{HEIGHT}"/>')
    lines.append(f'<text class="small" x="{x(whole):.1f}" y="{TOP + 14}" text-anchor="end" dx="-6">original</text>')
    found = list(measured())
    for command, (label, dx, dy) in POINTS.items():
        points = [(heal, added) for measured_command, heal, added in found if measured_command == command and "influence" not in heal and "angular" not in heal]
        healed = min(added for heal, added in points if "--refit" in heal or "--transfer" in heal)
        raw = [added for heal, added in points if "--refit" not in heal and "--transfer" not in heal]
        at = x(cache(command))
        lines += [f'<path class="line" d="M{at:.1f} {y(max(raw)):.1f}V{y(healed):.1f}"/>'] if raw else []
        lines += [f'<circle class="raw" cx="{at:.1f}" cy="{y(added):.1f}" r="4.5"/>' for added in raw]
        anchor = "end" if dx < 0 else "start"
        lines.append(f'<circle class="done" cx="{at:.1f}" cy="{y(healed):.1f}" r="5"/>')
        lines.append(f'<text x="{at + dx:.1f}" y="{y(healed) + dy:.1f}" text-anchor="{anchor}">{label}</text>')
        if command == "gqa --groups 1":
            notes = zip((max(raw), min(raw)), ("mean of heads, as in the paper", "--pool pca"), strict=True)
            lines += [f'<text class="small" x="{at - 10:.1f}" y="{y(added) + 5:.1f}" text-anchor="end">{note}</text>' for added, note in notes]
    right = LEFT + WIDTH
    lines.append(f'<circle class="raw" cx="{right - 250}" cy="19" r="4.5"/><text class="small" x="{right - 240}" y="24">converted</text>')
    lines.append(f'<circle class="done" cx="{right - 160}" cy="19" r="5"/><text class="small" x="{right - 150}" y="24">then --refit or --transfer</text>')
    return "\n".join([*lines, "</svg>\n"])


def x(kilobytes):
    """Return where a size of cache is."""
    return LEFT + WIDTH * kilobytes / MOST


def y(nats):
    """Return where a loss is, on a logarithmic scale."""
    return TOP + HEIGHT * math.log(HIGH / nats) / math.log(HIGH / LOW)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
