"""Time and memory of reading a prompt and of writing one token, against context, for mixers beside softmax: random weights, one shape.

    python benchmarks/scaling.py --contexts 512,2048,8192 -o results/scaling-….csv

Speed does not depend on what weights say, so a random model of SmolLM2's shape (or MiniLM's) with fewer layers is measured. Each mixer and context is a process
of its own, and its peak memory (ru_maxrss, less what one token took) is its own. Ratios are to the softmax row of the same run and context.
"""

import csv
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

FIELDS = ["mixer", "context", "prefill_s", "decode_s", "peak_mb", "cache_mb", "layers", "threads", "date", "cores", "torch", "transformers"]
DECODERS = {
    "softmax": None,
    "streaming": {"window": 1024, "sinks": 4},
    "streaming 64": {"window": 64, "sinks": 4},
    "linear": {"window": 64},
    "linear elu": {"feature": "elu"},
    "performer": {"features": 256},
    "retnet": {"decay": "paper"},
    "deltanet": {},
    "rwkv 7": {"version": "7"},
    "rwkv 4": {"version": "4"},
    "linformer-causal": {"rank": 8},
    "sparse strided": {"pattern": "strided", "block": 64},
    "sparse fixed": {"pattern": "fixed", "block": 64},
    "sparse log": {"pattern": "log", "block": 16},
    "hyena": {},
    "monarch-mixer": {"blocks": 96},
    "hyena recurrence 4": {"recurrence": 4},
    "hyena recurrence 16": {"recurrence": 16},
    "hyena recurrence 32": {"recurrence": 32},
    "longnet": {"segments": [64, 512, 4096], "dilations": [1, 4, 16]},
    "aft simple": {"form": "simple"},
    "aft conv": {"form": "conv", "window": 64},
    "lsh": {"buckets": 64, "rounds": 4, "chunk": 16},
    "chunk-ffn": {"size": 256},
}
ENCODERS = {"softmax": None, "linformer": {"rank": 128}, "linformer 256": {"rank": 256}, "nystrom": {"landmarks": 64}, "performer": {"features": 256}}

ONE = """
import json, resource, sys, time
import torch, transformers
from effconvert.checkpoint.config import Config
from effconvert.eval.quality.perplexity import cache_bytes
from effconvert.families import FAMILIES
from effconvert.modeling.model import config_class, model_class
from effconvert.modeling.transformers_internals import cache_among, cache_name
from effconvert.steps import load
kind, name, options, context, layers, clock = json.loads(sys.argv[1])
seconds = getattr(time, clock)
alike = {"num_hidden_layers": layers, "vocab_size": 256, "intermediate_size": 1536}
if kind == "llama":
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 1 << 17}
    made = transformers.LlamaConfig(**alike, **shape)
else:
    made = transformers.BertConfig(**alike, hidden_size=384, num_attention_heads=12, max_position_embeddings=context)
family = FAMILIES[kind]
torch.manual_seed(0)
if options is None:
    model = getattr(transformers, family.lm)(made)
else:
    config = Config({**made.to_dict(), "architectures": [family.lm]}, family)
    technique = load(name.split()[0])(**options)
    technique.check(config)
    model = model_class(family.lm)(config_class(kind).from_dict(technique.config(config).content))
    for name, weight in model.named_parameters():
        if name.endswith((".left", ".right")): torch.nn.init.normal_(weight, std=0.02)  # factors of matrices have no values of their own to begin with
model = model.eval()
decoder = kind == "llama"
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
def run(ids):
    options = {"use_cache": True, "logits_to_keep": 1} if decoder else {}
    start = seconds(); out = model(ids, **options); return out, seconds() - start
with torch.inference_mode():
    ids = torch.randint(256, (1, context), generator=torch.Generator().manual_seed(1))
    run(ids[:, :1]); base = peak()
    out, prefill = run(ids)
    if context <= 4096: out, prefill = min((run(ids) for _ in range(2)), key=lambda pair: pair[1])
    found = {"prefill_s": prefill, "peak_mb": peak() - base}
    if decoder:
        cache, steps = cache_among(out.values()), []
        for step in range(9):
            start = seconds(); model(ids[:, :1], use_cache=True, **{cache_name(model): cache}); steps.append(seconds() - start)
        found |= {"decode_s": sorted(steps)[4], "cache_mb": cache_bytes(cache) / 1e6}
print(json.dumps({**found, "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}))
"""


@click.command()
@click.option("--contexts", default="512,1024,2048,4096,8192,16384")
@click.option("--kind", type=click.Choice(["llama", "bert"]), default="llama", help="A decoder of SmolLM2's shape, or an encoder of MiniLM's.")
@click.option("--layers", default=4)
@click.option("--only", help="Some of the mixers, with commas between.")
@click.option("--busy", is_flag=True, help="Count seconds of the processor, not of the clock: for a machine that has other work. Give one thread.")
@click.option("-o", "--output", type=Path, required=True)
def main(contexts, kind, layers, only, busy, output):
    """Measure and append to a CSV."""
    fresh, clock = not output.exists(), "process_time" if busy else "perf_counter"
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for context in map(int, contexts.split(",")):
            for name, options in (DECODERS if kind == "llama" else ENCODERS).items():
                if only and name not in only.split(","):
                    continue
                done = subprocess.run([sys.executable, "-c", ONE, json.dumps([kind, name, options, context, layers, clock])], capture_output=True, text=True)
                if done.returncode:
                    click.echo(f"{name} {context}: {done.stderr.strip().splitlines()[-1]}")
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                row = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in found.items()}
                writer.writerow({"mixer": name, "context": context, "layers": layers, "date": datetime.now(UTC).date(), "cores": os.cpu_count(), **row})
                file.flush()
                click.echo(f"{name:14} {context:6} {row}")


if __name__ == "__main__":
    main()
