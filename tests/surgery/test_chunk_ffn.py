"""An FFN that runs some tokens at a time computes the same, and keeps less in memory."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.ffn.chunk_ffn import NATIVE, ChunkFfn
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.projections.low_rank import LowRank
from tests.heal import healing
from tests.mixers.mixing import converted, far, in_pieces, keep_no_activations, run, stock_config, tokens
from tests.models import tiny

KINDS = ["llama", "phi3", "gpt2", "gemma2", "distilbert", "modernbert"]


def pair(kind, size=7, **changes):
    """A tiny model, and it with chunks."""
    model = tiny(kind, **changes)
    return model, converted(model, ("chunk-ffn", {"size": size}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 20, 100])
def test_no_logit_changes_for_texts_of_any_length(kind, size):
    model, chunked = pair(kind, size)
    for length in (1, 20, 23):
        assert far(run(chunked, tokens(length=length)), run(model, tokens(length=length))) <= 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoding_in_pieces_equals_one_pass(kind):
    model, chunked = pair(kind)
    assert far(in_pieces(chunked, tokens(), (9, 1, 1, 9))[0], run(model, tokens())) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_the_same(kind, checkpointed):
    found = []
    for model in pair(kind, **({"hidden_dropout_prob": 0.0, "dropout": 0.0, "attention_dropout": 0.0} if kind == "distilbert" else {})):
        model = model.train()
        if kind == "gpt2":
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        if checkpointed:
            keep_no_activations(model)
        model(tokens(), labels=tokens()).loss.backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.allclose(found[1][name], grad, rtol=1e-4, atol=1e-6), name


def test_dropout_is_drawn_once():
    """The backward pass computes a chunk again, with the numbers that were dropped in the forward pass."""
    _, chunked = pair("gpt2", resid_pdrop=0.5)
    mlp = chunked.train().transformer.h[0].mlp
    hidden = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = mlp(hidden)
    out.sum().backward()
    dropped = (out == 0).float()  # of what goes into the last dropout
    assert 0.4 < dropped.mean() < 0.6
    assert torch.allclose(mlp.c_proj.bias.grad, 2 * (1 - dropped).sum((0, 1)))


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_no_tensor_has_the_ffn_of_all_tokens_and_none_is_kept_for_the_backward_pass():
    hidden = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(0))
    largest, kept = [], []
    for model in pair("llama", size=10, intermediate_size=1000):
        mlp = model.model.layers[0].mlp
        with _Largest() as found, torch.no_grad():
            mlp(hidden)
        largest.append(found.numbers)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, saved=saved: (saved.append(tensor.numel()), tensor)[1], lambda tensor: tensor):
            mlp(hidden)
        kept.append(sum(saved))
    assert largest == [200 * 1000, max(10 * 1000, 32 * 1000)]  # of the weights, or of a chunk
    assert kept[0] > 200 * 4 * 1000
    assert kept[1] == 200 * 32  # what goes in


def test_classes_of_transformers_that_have_chunks_are_named():
    """Of those that heed the key, each refuses a text that is no multiple of it."""
    for kind, family in FAMILIES.items():
        if family.decoder:
            assert not family.chunks_ffn
            continue
        model = tiny(kind, **{NATIVE: 4})
        run(model, tokens(length=8))
        if family.chunks_ffn:
            with pytest.raises(ValueError, match="has to be a multiple of the chunk size 4"):
                run(model, tokens(length=9))
        else:
            run(model, tokens(length=9))
        if not family.ffn:
            with pytest.raises(ModelError, match=f"set {NATIVE} in config.json" if family.chunks_ffn else "has no module of its own for ffn"):
                ChunkFfn.check_family(stock_config(model))


@pytest.mark.parametrize("steps", [(LowRank(ratio="0.5", parts="attention"), Refit()), (Linear(), Transfer(epochs=1))], ids=["refit", "transfer"])
def test_what_follows_sees_all_tokens_of_a_text_at_once(steps):
    """Refit fits the FFN's output projection to all tokens, and transfer has no FFN to train."""
    Path("text.txt").write_text(healing.prose())
    healing.put(Path("source"))
    healing.run("source", *steps, place="plain")
    healing.run("source", ChunkFfn(size=8), *steps, place="chunked")
    plain, chunked = healing.tensors(Path("plain")), healing.tensors(Path("chunked"))
    assert plain.keys() == chunked.keys()
    assert all(torch.equal(plain[name], chunked[name]) for name in plain)


def test_transfer_alone_has_nothing_to_train():
    Path("text.txt").write_text(healing.prose())
    healing.put(Path("source"))
    with pytest.raises(OptionError, match="nothing that transfer trains"):
        healing.run("source", ChunkFfn(size=8), Transfer())


@pytest.mark.parametrize(("options", "said"), [({}, "--size is needed"), ({"size": 0}, "--size is 0")])
def test_options_that_cannot_be(options, said):
    with pytest.raises(OptionError, match=said):
        ChunkFfn(**options)


def test_the_number_of_kv_heads_can_change_afterwards():
    config = stock_config(tiny("llama"))
    assert Gqa(groups=2).config(ChunkFfn(size=8).config(config)).kv_heads == 2
    with pytest.raises(ModelError, match="its linear fits 4 KV heads; change their number first"):
        Gqa(groups=2).config(Linear().config(ChunkFfn(size=8).config(config)))
