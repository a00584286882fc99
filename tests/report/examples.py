"""Results as `eval` and `bench` write them, with invented numbers of the size of SmolLM2-135M's: data for tests, measured by nobody."""

import math
import random
from dataclasses import replace

from effconvert.eval.results import Benchmark, Cell, Evaluation, Row, ShapedSubject, Subject, Timing, Value

HOSTILE = "$x^{$<script>alert('1')</script>|`\"*[a](b)&amp;"  # of HTML, Markdown and TeX
DATE = "2026-11-22T12:00:00+00:00"
VERSIONS = {"python": "3.11.7", "effconvert": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
MACHINE = "An Invented Processor @ 2.50GHz, 2 cores, 8 GiB, 1 threads"

SMOLLM2 = ShapedSubject(
    name="SmolLM2-135M-Instruct",
    digest="5" * 64,
    commit="7e27bd9f95328f0f3b08261d1252705110c806f8",
    kind="llama",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    parameters=134_515_008,
    bytes=269_060_552,
    kv_bytes=23040,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    hidden=576,
    ffn=1536,
    vocabulary=49152,
    longest=8192,
    windows=(None,) * 30,
)
MQA = replace(SMOLLM2, name="smol-mqa", digest="a" * 64, commit=None, parameters=130_091_328, bytes=260_213_128, kv_bytes=7680, kv_heads=1)

TASKS = (
    # task, metric, better, chance, documents, original, converted, error of the difference
    ("hellaswag", "acc_norm", "higher", 0.25, 10042, 0.4312, 0.3987, 0.0041),
    ("piqa", "acc", "higher", 0.5, 1838, 0.6844, 0.6757, 0.0092),
    ("arc_easy", "acc", "higher", 0.25, 2376, 0.5476, 0.4945, 0.0096),
    ("arc_challenge", "acc_norm", "higher", 0.25, 1172, 0.2910, 0.2765, 0.0112),
    ("winogrande", "acc", "higher", 0.5, 1267, 0.5130, 0.5154, 0.0137),
    ("lambada_openai", "acc", "higher", None, 5153, 0.3291, 0.2486, 0.0062),
    ("passkey_1024", "exact_match", "higher", 0.0, 50, 0.94, 0.72, 0.0641),
    ("wikitext", "word_perplexity", "lower", None, 62, 33.41, 41.87, 0.93),
    ("text", "perplexity", "lower", None, 8, 7.5, 11.26, 0.35),
)


def evaluation(*subjects: Subject, tasks=TASKS, **changes) -> Evaluation:
    """The first subject's scores are the original's, and each next one has moved a little further."""
    rows = []
    for task, metric, better, chance, documents, first, last, error in tasks:
        values = [Value(first, math.sqrt(abs(first * (1 - first)) / documents) if better == "higher" else error * 3)]
        for step in range(1, len(subjects)):
            moved = (last - first) * step
            p = math.erfc(abs(moved) / error / math.sqrt(2))
            recovery = None if chance is None or first <= chance else (first + moved - chance) / (first - chance)
            values.append(Value(first + moved, values[0].error, moved, error, p, recovery))
        rows.append(Row(task, metric, better, chance, documents, "1.0", tuple(values)))
    steps = range(1, len(subjects))
    rows.append(Row("text", "kl", "lower", None, 8, "1", (None, *(Value(0.31 * step, 0.02) for step in steps))))
    rows.append(Row("text", "same_top_token", "higher", None, 8, "1", (None, *(Value(0.71 / step, 0.012) for step in steps))))
    written = ("the house on the hill, and the door was open.", "the house, and the the door was open to the")
    result = Evaluation(
        subjects=subjects,
        rows=tuple(rows),
        continuations=(written * len(subjects))[: len(subjects)],
        prompt="She walked slowly towards",
        notes=("invented data for tests",),
        settings={"tasks": [task for task, *_ in tasks], "num_fewshot": None, "seed": 0, "device": "cpu"},
        versions=VERSIONS,
        machine=MACHINE,
        date=DATE,
    )
    return replace(result, **changes)


def benchmark(*subjects: Subject, batches=(1, 4), contexts=(128, 512, 2048, 8192), **changes) -> Benchmark:
    """A machine that moves 12 GB a second, and is a little slower than that."""
    noise, bandwidth, cells = random.Random(0), 12e9, []

    def timing(seconds: float) -> Timing:
        rounds = tuple(seconds * (1 + 0.25 * noise.random()) for _ in range(5))
        return Timing(sorted(rounds)[2], min(rounds), max(rounds), rounds)

    for batch in batches:
        for context in contexts:
            firsts: dict[str, float] = {}
            for index, subject in enumerate(subjects):
                cache = subject.kv_bytes * context * batch
                prefill = batch * context * subject.parameters * 2 / 6e10 * (1 + context / 6000)
                predicted = (subject.bytes + cache) / bandwidth
                found = {"prefill": timing(prefill), "first": timing(prefill * 1.05), "decode": timing(predicted * 1.4)}
                peak = int(subject.bytes * 1.1 + 1.6 * cache + 4e4 * context)
                numbers = {**{what: held.median for what, held in found.items()}, "cache": cache, "peak": peak}
                firsts = numbers if index == 0 else firsts
                if batch == 4 and context == 8192 and index == 0:
                    cells.append(Cell(index, batch, context, None, None, None, None, None, None, None, {}, "out of memory: 3.1 GB are needed and 2.9 GB free"))
                    firsts = {}
                    continue
                ratios = {what: value / firsts[what] for what, value in numbers.items() if firsts.get(what)}
                cells.append(
                    Cell(index, batch, context, **found, predicted=predicted, weight_bytes=subject.bytes, cache_bytes=cache, peak_bytes=peak, ratios=ratios)
                )
    result = Benchmark(
        subjects=subjects,
        cells=tuple(cells),
        bandwidth=bandwidth,
        notes=("invented data for tests",),
        settings={"batch": list(batches), "context": list(contexts), "rounds": 5, "device": "cpu"},
        versions=VERSIONS,
        machine=MACHINE,
        date=DATE,
    )
    return replace(result, **changes)
