"""What the tests of mixers' formulas are made of: configs without a model, random queries, keys and values."""

import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from effconvert.checkpoint.config import Config
from effconvert.families import FAMILIES
from effconvert.modeling.state import State
from effconvert.surgery.mixing._call import Call

HEADS, GROUPS, WIDTH = 4, 2, 8
EXACT = 1e-5  # of float32 values of about 1


def config(kind="bert", **keys):
    """A config of four layers; an encoder's as if it could have fewer KV heads: then the mixer is ready for the first that has."""
    raw = {"model_type": kind, "num_attention_heads": HEADS, "hidden_size": HEADS * WIDTH, "num_hidden_layers": 4, **keys}
    return Config(raw, dataclasses.replace(FAMILIES[kind], kv_heads_key="num_key_value_heads") if "num_key_value_heads" in keys else FAMILIES[kind])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(tokens, texts=2):
    """Queries, keys and values of some texts."""
    return [random(texts, heads, tokens, WIDTH, seed=seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS))]


def mixed(technique, query, key, value, live=None, split=None, causal=True, softcap=None):
    """What a mixer as it begins gives of all tokens, called once, or in parts with a state, which has to have the size that was planned."""
    padded = live is not None
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool) if live is None else live
    llama = config("llama", num_key_value_heads=GROUPS)
    state, made, at = State(technique.cache_slots(llama)) if split else None, [], 0
    for size in split or [key.shape[2]]:
        part = slice(at, at + size)
        at += size
        q, k, v = (tensor[:, :, part] for tensor in (query, key, value))
        if state:
            state.update(k, v)
        made.append(technique.mix(technique.initial_values(llama, 0), Call(q, k, v, WIDTH**-0.5, live[:, part], causal, state, q, None, softcap, padded)))
        if state:
            assert state.nbytes == len(key) * technique.cache_bytes(llama, 4, at)
    return torch.cat(made, 2)


def close(one, other, atol=EXACT):
    """Whether two tensors are the same but for rounding."""
    return torch.allclose(one, other.to(one.dtype), rtol=0, atol=atol)


def padding_changes_nothing(technique, reference, text):
    """Check that tokens that are not live take no place: a decoder's call puts its live tokens last, an encoder has them wherever they stand.

    Args:
        technique: a mixer.
        reference: what it gives of queries, keys, values, and whether causal, without padding.
        text: tokens.
    """
    left, live = 20, torch.ones(2, text, dtype=torch.bool)
    live[0, :left] = live[1] = False
    wild = [torch.where(live[:, None, :, None], tensor, 1e4) for tensor in rows(text)]
    expected = reference(*(tensor[:1, :, left:] for tensor in rows(text)))
    for split in (None, [5, 30, 15]):
        made = mixed(technique, *wild, live, split)
        assert close(made[:1, :, left:], expected), split
        assert made.isfinite().all()
    live[0] = random(text) > 0
    wild = [torch.where(live[:, None, :, None], tensor, 1e4) for tensor in rows(text)]
    made = mixed(technique, *wild, live, causal=False)
    assert close(made[:1, :, live[0]], reference(*(tensor[:1, :, live[0]] for tensor in rows(text)), causal=False))
    assert made.isfinite().all()


def capped_scores_are_capped_first(technique, reference, text):
    """Check that a mixer caps scores before their softmax, as `reference` does with `softcap`, and that it makes a difference."""
    query, key, value = rows(text)
    expected = reference(3 * query, key, value, softcap=2.0)
    for split in (None, [7, 1, text - 8]):
        assert close(mixed(technique, 3 * query, key, value, split=split, softcap=2.0), expected)
    assert not close(mixed(technique, 3 * query, key, value), expected, 0.1)


def gradients_are_those_of(technique, reference, text):
    """Check a mixer's gradients for queries, keys and values against those of `reference`."""
    gradients = []
    for form in (lambda *given: mixed(technique, *given), reference):
        given = [tensor.clone().requires_grad_() for tensor in rows(text)]
        (form(*given) * random(2, HEADS, text, WIDTH, seed=7)).sum().backward()
        gradients.append([tensor.grad for tensor in given])
    assert all(close(ours, theirs, 1e-4) for ours, theirs in zip(*gradients, strict=True))


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that anything gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.numbers = max(self.numbers, out.numel())
        return out


def cost(technique, tokens, text=None, **given):
    """Multiplications of a mixer for one text, random or given, and the numbers of its largest tensor, each for a token and a head."""
    with FlopCounterMode(display=False) as flops, _Largest() as largest:
        mixed(technique, *(text or rows(tokens, 1)), **given)
    return flops.get_total_flops() / tokens / HEADS / WIDTH / 4, largest.numbers / tokens / HEADS
