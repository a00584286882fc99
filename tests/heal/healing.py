"""What the tests of healing are made of: random models with a tokenizer of letters, texts, and how far two models are apart."""

import random
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from effconvert.checkpoint.reading import read_config
from effconvert.convert import drafts
from effconvert.convert.run import convert
from effconvert.families import FAMILIES
from effconvert.heal import _distilling
from effconvert.modeling.loading import class_of
from effconvert.options import RunOptions
from tests.models import save, tiny

TOKENS = 1024  # of calibration: 16 windows of 64, two of them held out
WORDS = ("sun", "moon", "sea", "hill", "tree", "bird", "rain", "wind", "stone", "river", "night", "fire", "and", "the", "of", "under", "over", "we")


def prose(length=4 * TOKENS, seed=0):
    """Random words."""
    draw, text = random.Random(seed), ""
    while len(text) < length:
        text += draw.choice(WORDS) + draw.choice(("  ", " ", ", ", ".\n"))
    return text[:length]


def letters():
    """A tokenizer of one token a character, for models with 128 of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="</s>")


def put(folder, kind="llama", noise=0.0, only="", **changes):
    """Write a tiny model with its tokenizer, with noise of this size added to the matrices whose name ends with `only`, and return the folder."""
    model = tiny(kind, **changes)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if noise and name.endswith(only):
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=draw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says while it saves is not what is tested
        save(model, folder)
        letters().save_pretrained(folder)
    return folder


def heldout():
    """Windows of a text that nobody was calibrated on, [N, T]."""
    return torch.tensor(letters()(prose(16 * 60, seed=1)).input_ids).view(16, 60)


def load(folder):
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    return getattr(transformers, FAMILIES[kind].lm).from_pretrained(folder, dtype=torch.float32).eval()


def opened(folder="out", **how):
    """A model of transformers or of effconvert, with nothing missing and nothing left over."""
    model, info = class_of(read_config(Path(folder))).from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.inference_mode()
def apart(original, *folders):
    """Return the mean KL(original || model) in nats a token for each model, on held-out text."""
    ids = heldout()
    expected, *found = (opened(folder, dtype=torch.float32)(ids).logits.log_softmax(-1) for folder in (original, *folders))
    return [float((expected.exp() * (expected - other)).sum(-1).mean()) for other in found]


def tensors(folder):
    """All tensors of a model, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def goes_on_after_a_kill(monkeypatch, *steps):
    """Convert once in one go and once with a kill between, and hold the results against each other, byte for byte."""
    run("source", *steps, place="whole")
    killed_saving(monkeypatch, 1, lambda: run("source", *steps, place="resumed"))
    run("source", *steps, place="resumed")
    whole, resumed = tensors(Path("whole")), tensors(Path("resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def killed_saving(monkeypatch, number, convert, damage=lambda file: None):
    """Convert in a run that is killed when it has saved so many drafts of layers, after some damage to the last one."""
    real, left = drafts.save, [number]

    def dying(file, *rest):
        real(file, *rest)
        left[0] -= 1
        if not left[0]:
            damage(file)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(drafts, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            convert()


def stopped_at(monkeypatch, step, train):
    """Begin a training, and stop it as Ctrl-C does, at the end of a step."""
    real = _distilling.Reporter.on_step_end

    def stop(self, args, state, control, **more):
        real(self, args, state, control, **more)
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_distilling.Reporter, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train()


def run(model, *steps, place="out", **more):
    """Convert a model, looking at the text of the fixture."""
    given = {"calibrate": "text.txt", "calibration_tokens": TOKENS, "verify": False, **more}
    return convert(str(model), steps, RunOptions(output=Path(place), **given))
