"""The speed of low rank's pivoted factors beside plain ones: docs/low-rank.md.

    python benchmarks/low_rank_forms.py SmolLM2-135M-Instruct --ratio 0.75 --ratio 0.3

Speed does not depend on the numbers, so these are random. All projections of the FFNs have the greatest rank of either form at that share of their parameters;
the forms take turns with every step in one process, as in cheaper.py.
"""

from pathlib import Path

import click
import torch
from cheaper import compare

from effconvert.checkpoint.reading import read_config
from effconvert.modeling.loading import class_of
from effconvert.surgery.projections._parts import equal_rank
from effconvert.surgery.projections.low_rank import LowRank


@click.command()
@click.argument("model", type=Path)
@click.option("--ratio", "ratios", type=float, multiple=True, default=(0.75, 0.3))
@click.option("--equal-rank", is_flag=True, help="Give both forms the rank of the plain one.")
@click.option("--context", default=512, help="Tokens in the prompt.")
@click.option("--rounds", default=48, help="Steps of each model; results are medians.")
def main(model, ratios, equal_rank, context, rounds):
    """Print how many times as fast as plain factors pivoted ones are."""
    config = read_config(model)
    for ratio in ratios:
        ranks = [rank_at(config, ratio, pivoted=pivoted and not equal_rank) for pivoted in (False, True)]
        plain, pivoted = (random(config, rank, form) for rank, form in zip(ranks, ("plain", "pivoted"), strict=True))
        speed = compare(plain, pivoted, context, rounds)
        quartiles = f"{speed['decode_ratio_low']} to {speed['decode_ratio_high']}"
        click.echo(f"{ratio}: ranks {ranks[0]} and {ranks[1]}, decoding {speed['decode_ratio']} x ({quartiles}), prefill {speed['prefill_ratio']} x")


def rank_at(config, ratio, pivoted):
    """Return the greatest rank at a share of the parameters of an FFN's projections, which are alike but for which side is longer."""
    return equal_rank(config.ffn, config.hidden, ratio, pivoted)


def random(config, rank, form):
    """Return a model in bfloat16 with random weights, whose FFNs have factors of this form."""
    config = LowRank(rank=str(rank), form=form).config(config)
    kind = class_of(config)
    model = kind(kind.config_class.from_dict(config.content)).eval().bfloat16()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=draw)
    for name, buffer in model.named_buffers():
        if name.endswith(".order"):
            buffer.copy_(torch.randperm(len(buffer), generator=draw))
    return model


if __name__ == "__main__":
    main()
