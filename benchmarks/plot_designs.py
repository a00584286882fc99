"""Write docs/designs.md and draw docs/designs.svg from what the other benchmarks measured; nothing is measured here.

    python benchmarks/plot_designs.py docs

What a design is for, what opens it and when it is exact comes from the technique itself, as `effconvert list` says it.
"""

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from effconvert import steps
from effconvert.checkpoint.reading import read_config
from effconvert.modeling.caches import kv_bytes
from effconvert.report.drawing import MARKERS, plain, style, svg

RESULTS = Path(__file__).parent / "results"
MODEL = Path(__file__).parent.parent / "effconvert" / "demo" / "model"
EMBEDDED = "designs-embedded-2026-11-30.csv"
STARTS, EARLIER = "designs-starts-embedded-2026-12-01.csv", "designs-starts-embedded-2026-11-29.csv"
HALF = "--layers 1-29/2"
CONTEXTS = ("512", "2048", "8192", "16384")
# technique: what a text of T tokens costs, and what its paper says of it (all by their authors, for models trained so from the start)
DESIGNS = {
    "streaming": ("T W", "Llama-2-13B, cache of 1,024: perplexity 5.40 with 4 sinks, 5,158 without (Xiao et al. 2023)"),
    "linear": ("T m D + T W D", "LoLCATs: 7B models trained on 40 M tokens come near their originals' tasks (Zhang et al. 2024)"),
    "performer": ("T m D", "as accurate at linear cost on proteins and ImageNet64 (Choromanski et al. 2020)"),
    "retnet": ("T (C + D) D", "6.7B, 8k tokens: 8.4 x the throughput, 3.4 x less memory (Sun et al. 2023)"),
    "deltanet": ("T (C + D) D", "gated DeltaNet 1.3B, 100 B tokens: WikiText perplexity 16.4, Mamba-2 16.6 (Yang et al. 2024)"),
    "rwkv": ("T D D (version 4: T M)", "on a par with Transformers of its size up to 14B (Peng et al. 2023)"),
    "aft": ("T M (conv, local: T W M; full: T T M)", "enwik8 1.209 bits a byte at linear memory (Zhai et al. 2021)"),
    "hyena": (
        "T M log T (with --recurrence: T M (C + N))",
        "as good as a Transformer with 20 % less compute at 2k tokens, 100 x as fast as attention at 64k (Poli et al. 2023)",
    ),
    "monarch-mixer": ("T M log T, and T K (M + F) in the FFN", "M2-BERT 80M: GLUE 79.9, BERT 110M 79.6, 9.1 x its throughput at 4k tokens (Fu et al. 2023)"),
    "linformer": ("T k D", "1.5 x as fast at 512 tokens with k = 128, a few tenths of a point of RoBERTa (Wang et al. 2020)"),
    "linformer-causal": ("T (T k / S + S)", ""),
    "nystrom": ("T m D", "IMDB 93.2, SST-2 91.4, like BERT-base (Xiong et al. 2021)"),
    "fnet": ("T M log T", "92 to 97 % of BERT's GLUE, trains 80 % faster (Lee-Thorp et al. 2022)"),
    "sparse": ("T sqrt T (log: T log T)", "enwik8 0.99 bits a byte (Child et al. 2019)"),
    "lsh": ("T log T", "enwik8 1.05 bits a byte with 12 layers, and matches full attention at 64k tokens (Kitaev et al. 2020)"),
    "longnet": ("T sum W / R^2", "The Stack at 32k tokens: perplexity 3.01, sparse attention more (Ding et al. 2023)"),
}


def page():
    """Return docs/designs.md."""
    parts = [HEAD, *kinds(), QUALITY, *quality(), BEGIN, *starts(STARTS), BEFORE, *starts(EARLIER), COST, *cost(), SMOLLM2, *smollm2(), MINILM, *minilm()]
    return "\n".join(parts).rstrip() + "\n"


def kinds():
    """Yield a row for each design: what it is."""
    yield "| command | for | a text of T tokens costs | saves | opens as | exact | the paper says |"
    yield "|---|---|---|---|---|---|---|"
    for name, (time, headline) in DESIGNS.items():
        facts = steps.load(name).facts
        yield f"| `{name}` | {facts.applies} | {time} | {facts.saves} | {facts.native or 'needs effconvert'} | {facts.exact or 'never'} | {headline} |"


def quality():
    """Yield a row for each design on the embedded model: KL after each way of healing."""
    yield "| design | cache at 512 tokens | converted | `--refit` | `--transfer` | then distilled |"
    yield "|---|---|---|---|---|---|"
    for command, found in by_command(EMBEDDED).items():
        cells = [number(found, heal) for heal in ("", "--refit", "--transfer", "--transfer --distill")]
        state = next(iter(found.values()))["state"]
        yield f"| `{command}` | {int(state) / 1000:,.0f} kB | {' | '.join(cells)} |"


def starts(file):
    """Yield a row for each design on the embedded model: KL after more and more tokens of transfer, from both starts."""
    tokens = sorted({int(row["tokens"]) for row in rows(file)})
    yield f"| design | {' | '.join(f'{count:,}' for count in tokens)} | {' | '.join(f'random, {count:,}' for count in tokens)} |"
    yield "|---" * (1 + 2 * len(tokens)) + "|"
    for command in dict.fromkeys(row["command"] for row in rows(file)):
        found = {(row["start"], int(row["tokens"])): f"{float(row['kl']):.3f}" for row in rows(file) if row["command"] == command}
        yield f"| `{command}` | {' | '.join(found.get((start, count), '') for start in ('fitted', 'random') for count in tokens)} |"


def cost():
    """Yield a row for each design measured by scaling.py, from its run with most lengths: time and memory, times softmax in the same run."""
    runs = {}
    for file in sorted(RESULTS.glob("scaling-*.csv")):
        found = {(row["mixer"].replace("-64", " 64").replace("-elu", " elu"), row["context"]): row for row in rows(file.name)}
        for mixer in dict.fromkeys(mixer for (mixer, _), row in found.items() if mixer != "softmax" and row["decode_s"]):  # encoders write none
            here = [(found[mixer, context], found["softmax", context]) for context in CONTEXTS if (mixer, context) in found]
            if len(here) >= len(runs.get(mixer, ())) and here:
                runs[mixer] = here
    yield f"| mixer | reading, x softmax: {', '.join(f'{int(context):,}' for context in CONTEXTS)} | writing a token, x | cache at the longest, x |"
    yield "|---|---|---|---|"
    for mixer, here in runs.items():
        read, written = ([f"{float(row[key]) / float(softmax[key]):.2f}" for row, softmax in here] for key in ("prefill_s", "decode_s"))
        cache = float(here[-1][0]["cache_mb"]) / float(here[-1][1]["cache_mb"])
        yield f"| {mixer} | {', '.join(read)} | {', '.join(written)} | {cache:.2g} at {int(here[-1][0]['context']):,} |"


def smollm2():
    """Yield a row for each design on SmolLM2: perplexity, times the original's on the same text."""
    yield f"| design | converted | `--refit` | `--transfer` | in every second layer (`{HALF}`), `--refit` | `--transfer` |"
    yield "|---|---|---|---|---|---|"
    found = {}
    for file in sorted(RESULTS.glob("mixers-*smollm2*.csv")):
        for row in rows(file.name):
            if "before" in row:  # results of `effconvert eval` have other columns
                command, half = row["command"].removesuffix(f" {HALF}"), row["command"].endswith(HALF)
                found.setdefault(command, {})[half, row["heal"]] = f"{float(row['after']) / float(row['before']):,.2f}"
    shown = [(False, ""), (False, "--refit"), (False, "--transfer"), (True, "--refit"), (True, "--transfer")]
    for command, healed in found.items():
        if any(key in healed for key in shown):
            yield f"| `{command}` | {' | '.join(healed.get(key, '') for key in shown)} |"


def minilm():
    """Yield a row for each design on MiniLM: correlation on STS-B."""
    yield "| design | converted | `--refit` | `--transfer` |"
    yield "|---|---|---|---|"
    found = {}
    for file in sorted(RESULTS.glob("sentences-*.csv")):
        for row in rows(file.name):
            if row["command"].split()[0] in DESIGNS:
                found.setdefault(row["command"], {})[row["heal"]] = row["spearman"]
    for command, healed in found.items():
        yield f"| `{command}` | {' | '.join(healed.get(heal, '') for heal in ('', '--refit', '--transfer'))} |"


def picture():
    """Return the picture: bytes of the cache after 512 tokens against KL, before healing and after all of it."""
    with style(**plain()):
        canvas = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = canvas.add_subplot()
        for place, (command, found) in enumerate(by_command(EMBEDDED).items()):
            kilobytes = int(found[""]["state"]) / 1000
            raw, healed = (float(found[heal]["kl"]) for heal in ("", max(found, key=len)))
            marker = MARKERS[place % len(MARKERS)]
            (line,) = axes.plot([kilobytes] * 2, [raw, healed], color=f"C{place % 3}", linewidth=1, zorder=1)
            axes.plot(kilobytes, raw, marker, markerfacecolor="none", color=line.get_color())
            axes.plot(kilobytes, healed, marker, color=line.get_color())
            axes.annotate(short(command), (kilobytes, healed), xytext=(7, -3), textcoords="offset points", fontsize=8.5)
        axes.set(xscale="log", yscale="log", xlabel="cache of 512 tokens, kB", ylabel="KL from the original, nats a token")
        axes.margins(x=0.2)
        whole = kv_bytes(read_config(MODEL), 2, 512) / 1000
        axes.axvline(whole, color="C3", linewidth=0.8, linestyle="--", zorder=0)
        axes.annotate("original", (whole, axes.get_ylim()[1]), xytext=(-6, -12), textcoords="offset points", ha="right", fontsize=8.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())
        return svg(canvas, "designs", "Cache of each design against its distance from the original, converted (hollow) and healed (filled)")


def short(command):
    """Return a command for a label."""
    name, _, options = command.partition(" --")
    return f"{name} {options.split(' --')[0].rpartition(' ')[2]}".strip()


def number(found, heal):
    """Return the KL of a row, if it was measured."""
    return f"{float(found[heal]['kl']):.3f}" if heal in found else ""


def by_command(name):
    """Return the rows of a CSV by command and healing."""
    found = {}
    for row in rows(name):
        found.setdefault(row["command"], {})[row["heal"]] = row
    return found


def rows(name):
    """Return the rows of a CSV."""
    return list(csv.DictReader((RESULTS / name).read_text(encoding="utf-8").splitlines()))


HEAD = """# Designs that mix tokens, side by side

Written by `python benchmarks/plot_designs.py docs` from the CSVs in benchmarks/results; [mixers.md](mixers.md) explains
the designs and has more numbers. What a paper says is quoted from its authors, who train from the start, or on millions
of tokens. Our numbers are conversions of a trained model.

## What there is
"""
QUALITY = f"""
m: features or landmarks; W: window; S: block; D: width of a head; C: chunk; M: width of the stream; R: dilation.

## Quality: the embedded model, all layers
KL from the original in nats a token, on 4,096 tokens of docstrings in windows of 512, float32. Calibrated on 8,192 tokens
of other docstrings; distilled on 65,536 tokens after `--transfer`. `python benchmarks/designs.py quality -o …`
([CSV](../benchmarks/results/{EMBEDDED})). One run, one text, a small model: differences of a tenth mean nothing.

![Cache of each design against its distance from the original](designs.svg)

Hollow: converted. Filled: after all healing in the table.
"""
BEGIN = f"""
## What the start from trained weights saves
KL after `--transfer` on so many tokens, eight passes over them: from the conversion, whose fits see as many tokens (8,192
where it is not healed), and from random numbers in place of q, k, v, o and all that the design adds.
`python benchmarks/designs.py starts -o …`, 2026-12-01 ([CSV](../benchmarks/results/{STARTS})).

**The start saves three quarters of 8,192 tokens**: from random numbers no design but `rwkv --version 4` is there as near as
it is from trained weights at 2,048. More text makes up for it in five of the seventeen: at 32,768 RetNet, DeltaNet,
`rwkv --version 4`, `hyena` and `monarch-mixer` are nearer than from trained weights at 8,192, the others not.
"""
BEFORE = f"""
The same as `transfer` was until 2026-11-30, with two windows in a step and 3e-3 in all layers
([CSV](../benchmarks/results/{EARLIER})). Empty: not measured.
"""
COST = """
## Time and memory
Two layers of SmolLM2's shape with random weights, one text, one thread of a CPU, times softmax in the same run; plain
PyTorch, no kernels. Below 1 is faster. Lengths are those that were measured, from the left. `python benchmarks/scaling.py --layers 2 …`; the CSVs are
those in benchmarks/results whose names begin with `scaling-`. Runs differ by a fifth.
"""
SMOLLM2 = """
## Quality: SmolLM2-135M-Instruct
Perplexity on Wikipedia, times the original's on the same text, with the design in all 30 layers or in every second one.
Rows come from several days, texts and calibrations; [mixers.md](mixers.md) says which. Empty: not measured.
"""
MINILM = """
## Quality: MiniLM, an encoder
Spearman's rank correlation on STS-B's 1,500 development pairs; original 0.8672. `python benchmarks/sentences.py …`, 16,384
tokens where something is calibrated.
"""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "designs.md").write_text(page(), encoding="utf-8")
    (folder / "designs.svg").write_text(picture(), encoding="utf-8")
