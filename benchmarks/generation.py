"""Write tokens with an original and with what techniques make of it, by transformers' attention and by kernels: tokens a second against context.

    python benchmarks/generation.py -o results/generation-….csv        # on a GPU, with effconvert installed
    python benchmarks/generation.py --tiny                             # on a CPU, to see that it runs

A llama of Llama 3.2 1B's shape, but with as many KV heads as query heads, and random weights: speed does not depend on what they say. `effconvert bench`
has the models take turns, each decoding by transformers' own attention (reference) and by kernels (triton). Ratios are to the original by transformers'
attention in the same cell. With a static cache and CUDA graphs what is measured is the card; with a cache that grows it is what `generate` gives a user.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from on_gpu import Table

from effconvert.checkpoint.config import Config
from effconvert.eval.speed.bench import bench
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.families import FAMILIES
from effconvert.modeling.model import config_class, model_class
from effconvert.steps import load

FIELDS = ["technique", "kernels", "cache", "batch", "context", "ms", "ms_p20", "ms_p80", "tokens_s", "of_original", "prefill_tokens_s"]
FIELDS += ["cache_bytes", "peak_bytes", "failure"]
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32768}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 128}
LONGEST = 131072 + 64  # tokens
TECHNIQUES = {  # name: options; the original has none
    "original": None,
    "gqa --groups 8": {"groups": 8},
    "share-kv --layers 1-15/2": {"layers": "1-15/2"},
    "streaming --window 1024 --sinks 4": {"window": 1024, "sinks": 4},
    "linear --window 64": {"window": 64},
}
STOCK = ("original", "gqa --groups 8")  # opened by transformers' own class, which can have a static cache


def main():
    """Measure each cache, batch and context."""
    table = Table(FIELDS)
    if not table.cuda and not table.tiny:
        raise SystemExit("there is no GPU here; --tiny runs small models on a CPU")
    kernels = ("reference", "triton" if table.cuda else "auto")
    with TemporaryDirectory() as scratch:
        folders = {name: written(Path(scratch), name, table) for name in TECHNIQUES}
        cells = [(1, 16), (1, 24)] if table.tiny else [(1, 1024), (1, 4096), (1, 16384), (1, 65536), (1, 131072), (16, 1024), (16, 4096), (16, 16384)]
        for batch, context in cells:
            for cache, names in {"static": STOCK, "dynamic": tuple(TECHNIQUES)}.items():
                graphs = cache == "static" and table.cuda
                options = BenchOptions(batch=batch, context=context, rounds=3, cache=cache, graphs=graphs, kernels=kernels, device=table.device)
                for cell in bench([str(folders[name]) for name in names], options).cells:
                    technique, way = names[cell.subject // len(kernels)], kernels[cell.subject % len(kernels)]
                    row = {"technique": technique, "kernels": way, "cache": cache, "batch": batch, "context": context, "failure": cell.failure}
                    if cell.decode:
                        row |= {"tokens_s": f"{cell.decode_rate:.1f}", "prefill_tokens_s": f"{cell.prefill_rate:.0f}"}
                        row |= {"cache_bytes": cell.cache_bytes, "peak_bytes": cell.peak_bytes}
                    if ratio := cell.ratios.get("decode"):  # none where the original failed
                        row["of_original"] = f"{1 / ratio:.3f}"
                    table.add([1e3 * seconds for seconds in cell.decode.rounds] if cell.decode else [float("nan")], row)


def written(scratch, name, table):
    """Write a model with random weights, and return its folder."""
    made = transformers.LlamaConfig(**(TINY if table.tiny else SHAPE), max_position_embeddings=LONGEST)
    config = Config({**made.to_dict(), "architectures": ["LlamaForCausalLM"]}, FAMILIES["llama"])
    if (options := TECHNIQUES[name]) is not None:
        technique = load(name.split()[0])(**(options if not table.tiny or "layers" not in options else {"layers": "1"}))
        technique.check(config)
        config = technique.config(config)
    torch.manual_seed(0)
    if name in STOCK:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config.content))
    else:
        model = model_class("LlamaForCausalLM")(config_class("llama").from_dict(config.content))
    folder = scratch / name.replace(" ", "-").replace("/", "-")
    model.to(table.dtype).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
