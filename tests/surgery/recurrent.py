"""What the tests of mixers with a recurrent state and parameters are made of."""

from types import SimpleNamespace

import torch

from effconvert.checkpoint.config import Config
from effconvert.families import FAMILIES
from effconvert.heal._capture import Capture
from effconvert.modeling.state import State
from effconvert.surgery.mixing._call import Call

HEADS, GROUPS, WIDTH, HIDDEN, TOKENS = 4, 2, 8, 24, 150  # more tokens than two chunks
SPLITS = [[TOKENS], [64, 86], [7, 1, 100, 42], [1] * TOKENS]


def config(kind="llama", heads=HEADS):
    raw = {"model_type": kind, "num_attention_heads": heads, "num_key_value_heads": GROUPS, "hidden_size": HIDDEN, "head_dim": WIDTH, "num_hidden_layers": 2}
    return Config(raw, FAMILIES[kind])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(tokens=TOKENS):
    """Queries, keys, values and hidden states of two texts."""
    return (
        random(2, HEADS, tokens, WIDTH),
        random(2, GROUPS, tokens, WIDTH, seed=1),
        random(2, GROUPS, tokens, WIDTH, seed=2),
        random(2, tokens, HIDDEN, seed=3),
    )


def shaken(technique, size=0.3):
    """Parameters as training might leave them."""
    begun = technique.initial_values(config(), 0)
    return {name: value + size * random(*value.shape, seed=seed) for seed, (name, value) in enumerate(begun.items())}


def mixed(technique, weights, query, key, value, hidden, live=None, split=None):
    """What the mixer gives of all tokens, called once, or in parts with a state."""
    padded = live is not None
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool) if live is None else live
    state = State(technique.cache_slots(config())) if split else None
    cuts = ((query, 2), (key, 2), (value, 2), (live, 1), (hidden, 1))
    made = []
    for q, k, v, alive, given in zip(*(tensor.split(split or key.shape[2], dim) for tensor, dim in cuts), strict=True):
        if state:
            state.update(k, v)
        made.append(technique.mix(weights, Call(q, k, v, WIDTH**-0.5, alive, True, state, given, None, padded=padded)))
    return torch.cat(made, 2)


def near(ours, theirs, tolerance=1e-5):
    """Whether outputs are the same in float32; they are about 1, but where a head's sum is nearly 0 and the norm magnifies what was rounded."""
    return float((ours - theirs).norm() / theirs.norm()) < tolerance


def same_gradients(technique, reference, tokens=20, tolerance=1e-4):
    """Check the gradients of all parameters and rows against those of a reference in float64."""
    found = []
    for form in (lambda *given: mixed(technique, *given), reference):
        weights = {name: weight.clone().requires_grad_() for name, weight in shaken(technique).items()}
        given = [tensor.clone().requires_grad_() for tensor in rows(tokens)]
        (form(weights, *given) * random(2, HEADS, tokens, WIDTH, seed=7)).sum().backward()
        found.append({**{name: weight.grad for name, weight in weights.items()}, **dict(zip("qkvx", (tensor.grad for tensor in given), strict=True))})
    for name, ours in found[0].items():
        theirs = found[1][name]
        assert (ours is None) == (theirs is None), name
        assert ours is None or near(ours, theirs, tolerance), name


def padding_changes_nothing(technique):
    """Check calls with padding in front of live tokens, as models hand them on; and a text that is nothing else."""
    sizes = [40, 60, 1, 49]
    live = torch.ones(2, TOKENS, dtype=torch.bool)
    live[0, :9] = live[0, 40:70] = live[0, 100] = live[1] = False
    query, key, value, hidden = rows()
    wild = [torch.where(live[:, None, :, None], tensor, 1e4) for tensor in (query, key, value)]
    noise = torch.where(live[..., None], hidden, 1e4)
    out = mixed(technique, shaken(technique), *wild, noise, live, sizes)
    kept = [tensor[:1, :, live[0]] for tensor in (query, key, value)]
    assert near(out[:1, :, live[0]], mixed(technique, shaken(technique), *kept, hidden[:1, live[0]]))
    assert out.isfinite().all()


def decaying(gammas, tokens=64, batch=2):
    """Attention [B, H, T, T] that falls by gamma with the distance."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    weights = torch.stack([torch.where(distance >= 0, gamma ** distance.clamp_min(0), 0.0) for gamma in gammas])
    return (weights / weights.sum(-1, keepdim=True)).expand(batch, -1, -1, -1)


def layer(*batches):
    """A layer whose activations show these weights, and outputs of size 1, 2, 3 and 4."""
    looks = []
    for weights in batches:
        outputs = torch.arange(1.0, 5).repeat_interleave(WIDTH).expand(*weights.shape[::3], -1)
        looks.append(Capture(torch.zeros(len(weights), weights.shape[-1], HIDDEN), inputs={"o": outputs}, weights=weights))
    return SimpleNamespace(config=config(), index=0, activations=SimpleNamespace(capture=lambda *_, **__: iter(looks)))
