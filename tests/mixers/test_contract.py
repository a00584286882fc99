"""What every mixer owes in every family that can have it: a row in `mixing.ROWS`, and nothing else."""

import copy

import pytest
import torch

from effconvert.errors import ModelError
from effconvert.families import FAMILIES
from effconvert.modeling.attention import Mixer
from effconvert.modeling.caches import growth_bytes, state_bytes
from effconvert.modeling.model import model_class
from effconvert.modeling.state import State
from effconvert.steps import load, techniques
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing._mixing import Mixing
from tests.mixers.mixing import (
    FORMS,
    MATRIX,
    NEUTRAL,
    PIECES,
    ROWS,
    SAME,
    UNLIKE,
    converted,
    far,
    in_pieces,
    keep_no_activations,
    names,
    neutral,
    pair,
    positions,
    run,
    small,
    stock_config,
    tokens,
    wide,
)
from tests.models import DECODERS, tiny

CAUSAL = [(name, kind) for name, kind in FORMS if kind in DECODERS]
FEW = [(name, kind) for name, kind in MATRIX if kind in UNLIKE]
FEW_CAUSAL = [case for case in FEW if case in CAUSAL]
REFUSED = [(name, kind) for name, row in ROWS.items() for kind in row.refused]


@pytest.fixture(scope="module")
def models():
    """A tiny model of a family, and it with a mixer: each made once."""
    made = {}

    def find(name, kind):
        if (name, kind) not in made:
            made[name, kind] = pair(kind, (name, small(name, kind)))
        return made[name, kind]

    return find


def test_the_table_names_every_mixer_and_every_family():
    assert set(ROWS) == {name for name in techniques() if issubclass(load(name), Mixing)}
    for name, row in ROWS.items():
        assert sorted([*row.kinds, *row.refused]) == sorted(FAMILIES), name


@pytest.mark.parametrize(("name", "kind"), NEUTRAL)
def test_neutral_options_change_no_logit(name, kind):
    model, other = pair(kind, (name, neutral(name, kind)))
    mixing = [index for index, module in enumerate(layers(other)) if has_mixer(module)]
    assert mixing
    assert load(name)(**neutral(name, kind)).is_exact(stock_config(model))
    assert far(run(other, tokens(length=60)), run(model, tokens(length=60))) <= SAME
    if kind in DECODERS:
        assert far(in_pieces(other, tokens(), PIECES)[0], run(model, tokens())) <= SAME


def layers(model):
    family = FAMILIES[model.config.model_type.removeprefix("effconvert_")]
    return model.base_model.get_submodule(family.layers)


def has_mixer(layer):
    return any(name.endswith("effconvert") for name, _ in layer.named_modules())


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_small_options_change_what_is_computed_and_are_not_called_exact(models, name, kind):
    model, other = models(name, kind)
    assert far(run(other, tokens()), run(model, tokens())) > 1e-3
    assert not load(name)(**small(name, kind)).is_exact(stock_config(model))


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_a_batch_computes_what_its_rows_compute_alone(models, name, kind):
    _, model = models(name, kind)
    together = run(model, tokens(3))
    alone = torch.cat([run(model, row[None]) for row in tokens(3)])
    assert far(together, alone) <= SAME


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_padding_on_the_right_changes_nothing(models, name, kind):
    _, model = models(name, kind)
    ids, mask = torch.cat([tokens(), tokens(length=5, seed=1)], 1), torch.ones(2, 25, dtype=torch.long)
    mask[:, 20:] = 0
    expected = run(model, ids[:, :20])
    assert far(run(model, ids, attention_mask=mask)[:, :20], expected) <= SAME
    ids[:, 20:] = 7  # whatever stands there
    assert far(run(model, ids, attention_mask=mask)[:, :20], expected) <= SAME


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_rows_of_different_lengths_and_one_of_padding_alone_do_not_touch_each_other(models, name, kind):
    _, model = models(name, kind)
    ids, mask = tokens(3), torch.ones(3, 20, dtype=torch.long)
    mask[1, 12:] = mask[2] = 0
    made = run(model, ids, attention_mask=mask)
    assert made.isfinite().all()
    assert far(made[:1], run(model, ids[:1])) <= SAME
    assert far(made[1:2, :12], run(model, ids[1:2, :12])) <= SAME


@pytest.mark.parametrize(("name", "kind"), CAUSAL)
def test_padding_on_the_left_changes_nothing(models, name, kind):
    _, model = models(name, kind)
    ids, mask = torch.cat([tokens(length=5, seed=1), tokens()], 1), torch.ones(2, 25, dtype=torch.long)
    mask[:, :5] = 0
    where = positions(model, mask)
    expected = run(model, tokens())
    assert far(run(model, ids, attention_mask=mask, **where)[:, 5:], expected) <= SAME
    pieces = in_pieces(model, ids, (3, 4, *[1] * 3, 9, *[1] * 6), mask, **where)[0]  # padding alone in the first
    assert far(pieces[:, 5:], expected) <= SAME


@pytest.mark.parametrize(("name", "kind"), FEW_CAUSAL)
def test_padding_between_tokens_changes_nothing(models, name, kind):
    """As when a batch of texts of different lengths, padded on the right, is gone on with."""
    _, model = models(name, kind)
    if not all(map(has_mixer, layers(model))):  # windows that stay softmax count padding
        _, model = pair(kind, (name, small(name, kind)), layer_types=["full_attention"] * 2)
    ids, mask = torch.cat([tokens()[:, :8], tokens(length=4, seed=1), tokens()[:, 8:]], 1), torch.ones(2, 24, dtype=torch.long)
    mask[:, 8:12] = 0
    where = positions(model, mask)
    expected = run(model, tokens())
    for made in (
        run(model, ids, attention_mask=mask, **where),
        *(in_pieces(model, ids, sizes, mask, **where)[0] for sizes in ((12, 1, 5, 6), (9, 15))),
    ):
        assert far(made[:, [*range(8), *range(12, 24)]], expected) <= SAME


@pytest.mark.parametrize(("name", "kind"), CAUSAL)
def test_decoding_in_pieces_equals_one_pass(models, name, kind):
    _, model = models(name, kind)
    expected = run(model, tokens())
    made, cache = in_pieces(model, tokens(), PIECES)
    assert far(made, expected) <= SAME
    assert cache.get_seq_length() == 20
    assert far(in_pieces(model, tokens()[:, :8], [1] * 8)[0], expected[:, :8]) <= SAME
    assert far(in_pieces(model, tokens(), [20])[0], expected) <= SAME


@pytest.mark.parametrize(("name", "kind"), CAUSAL)
def test_no_token_sees_a_later_one(models, name, kind):
    _, model = models(name, kind)
    ids = tokens()
    other = torch.cat([ids[:, :11], tokens(length=9, seed=1)], 1)
    assert far(run(model, other)[:, :11], run(model, ids)[:, :11]) <= SAME


@pytest.mark.parametrize(("name", "kind"), FEW)
def test_bfloat16_is_run_and_stays_bfloat16(models, name, kind):
    _, model = models(name, kind)
    half = copy.deepcopy(model).bfloat16()
    made = run(half, tokens())
    assert made.dtype == torch.bfloat16
    assert made.isfinite().all()
    if FAMILIES[kind].decoder:
        pieces, cache = in_pieces(half, tokens(), PIECES)
        assert pieces.dtype == torch.bfloat16
        assert pieces.isfinite().all()
        for layer in cache.layers:  # a type that changed on the way would change what the plan says of its size
            for slot, (_, dtype) in layer.slots.items() if hasattr(layer, "slots") else ():
                assert layer.tensors[slot].dtype == (torch.bfloat16 if dtype == "model" else getattr(torch, dtype)), slot


@pytest.mark.parametrize(("name", "kind"), FEW_CAUSAL)
def test_the_state_has_the_size_that_was_planned_however_long_the_text(models, name, kind):
    model, other = models(name, kind)
    config = load(name)(**small(name, kind)).config(stock_config(model))
    for length in (1, 20, 60):
        _, cache = in_pieces(other, tokens(1, length), [length])
        states = [layer for layer in cache.layers if hasattr(layer, "tensors")]
        assert sum(state.nbytes for state in states) == state_bytes(config, 4, length) > 0
        assert 0 <= state_bytes(config, 4, length) - state_bytes(config, 4) <= length * growth_bytes(config, 4)
        assert len(states) == sum(name is not None for name in names(config))
        for state in states:  # a part of something larger would keep all of it
            for slot, tensor in state.tensors.items():
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, slot


@pytest.mark.parametrize(("name", "kind"), FEW_CAUSAL)
def test_under_autocast_states_keep_their_types(models, name, kind):
    _, model = models(name, kind)
    with torch.autocast("cpu", torch.bfloat16):
        made, cache = in_pieces(model, tokens(), PIECES)
    assert made.isfinite().all()
    for layer in cache.layers:
        for slot, (_, dtype) in layer.slots.items() if hasattr(layer, "slots") else ():
            assert dtype == "model" or layer.tensors[slot].dtype == getattr(torch, dtype), slot


@pytest.mark.parametrize(("name", "kind"), FEW)
def test_under_autocast_a_mixer_computes_what_it_does_in_a_model_of_that_type(models, name, kind):
    _, model = models(name, kind)
    calls = []
    model = shaken(model)
    for module in model.modules():
        if isinstance(module, Mixer):
            module.register_forward_pre_hook(lambda mixer, args: calls.append((mixer, *args)))
    run(model, tokens())
    for mixer, call in list(calls):
        with torch.autocast("cpu", torch.bfloat16):
            made = mixer(call)
        assert torch.equal(made, copy.deepcopy(mixer).bfloat16()(call.to(torch.bfloat16)))
    assert calls


@pytest.mark.parametrize(("name", "kind"), FEW)
def test_a_model_is_saved_and_loaded_again_to_the_bit(models, name, kind, tmp_path):
    _, model = models(name, kind)
    model = shaken(model)
    model.save_pretrained(tmp_path)
    again, info = model_class(FAMILIES[kind].lm).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    said, before = again.config.to_dict(), model.config.to_dict()
    assert {key for key in said.keys() | before.keys() if said.get(key) != before.get(key)} <= {"_name_or_path", "dtype", "architectures", "auto_map"}
    assert torch.equal(run(again.eval(), tokens()), run(model, tokens()))


def shaken(model):
    """A copy whose mixers have other parameters than they begin with, so that what is not loaded shows."""
    made, draw = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".effconvert." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return made


@pytest.mark.parametrize(("name", "kind"), FEW)
def test_gradients_reach_every_new_parameter_under_checkpointing(models, name, kind):
    _, model = models(name, kind)
    model = copy.deepcopy(model).train()
    keep_no_activations(model)
    model(tokens(), labels=tokens()).loss.backward()
    frozen = load(name)(**small(name, kind)).frozen
    for parameter, value in model.named_parameters():
        if ".effconvert." in parameter and parameter.rpartition(".")[2] in frozen:
            assert not value.requires_grad, parameter
        else:
            assert value.requires_grad, parameter
        if ".effconvert." in parameter and value.requires_grad:
            assert value.grad is not None, parameter
            assert value.grad.isfinite().all(), parameter
            assert value.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("name", ROWS)
def test_checkpointed_gradients_are_those_without(models, name):
    kind = ROWS[name].kinds[0]  # a llama has no dropout; an encoder has
    found = []
    for checkpointed in (False, True):
        model = tiny(kind, **wide(kind), **({} if kind in DECODERS else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
        model = converted(model, (name, small(name, kind))).train()
        if checkpointed:
            keep_no_activations(model)
        model(tokens(), labels=tokens()).loss.backward()
        found.append(torch.cat([value.grad.flatten() for _, value in sorted(model.named_parameters()) if value.grad is not None]))
    assert far(found[1], found[0]) <= SAME


@pytest.mark.parametrize("name", ROWS)
def test_what_begins_is_the_same_each_time(name):
    kind = ROWS[name].kinds[0]
    config, step = stock_config(tiny(kind, **wide(kind))), load(name)(**small(name, kind))
    shapes = {part: tuple(shape) for part, shape in step.parameters(config).items()}
    for index in (0, 1):
        first, again = step.initial_values(config, index), step.initial_values(config, index)
        assert {part: tuple(value.shape) for part, value in first.items()} == shapes
        assert all(torch.equal(first[part], again[part]) for part in shapes)


@pytest.mark.parametrize(("name", "kind"), REFUSED, ids=map("-".join, REFUSED))
def test_a_family_that_cannot_have_it_is_refused_with_the_reason(name, kind):
    config, step = stock_config(tiny(kind)), load(name)(**(ROWS[name].small or ROWS[name].encoder))
    for refuse in (step.check, type(step).allowed_options):
        with pytest.raises(ModelError, match=f"^{kind} .*{ROWS[name].refused[kind]}"):
            refuse(config)


@pytest.mark.parametrize("name", ROWS)
def test_a_family_that_can_have_it_is_told_the_options_that_are_needed(name):
    for kind in ROWS[name].kinds:
        told = load(name).allowed_options(stock_config(tiny(kind)))
        needed = [f"--{field}" for field, about in load(name).model_fields.items() if about.is_required()]
        assert all(option in told for option in needed)
        assert needed or told == "as it is"


@pytest.mark.parametrize("name", ROWS)
def test_float16_holds_scores_that_only_their_scaling_brings_into_its_range(name):
    """Products of queries and keys beyond 65504, as large key biases make them, and scores within it: where an original is finite, so is a mixer."""
    kind = ROWS[name].kinds[0]
    config, technique = stock_config(tiny(kind, **wide(kind))), load(name)(**small(name, kind))
    draw = torch.Generator().manual_seed(0)
    rows = [size * torch.randn(1, 4, 20, config.head_dim, generator=draw).half() for size in (115, 115, 1)]
    products = (rows[0].float() @ rows[1].float().mT).abs().max()
    assert 65504 < products < 65504 * config.head_dim**0.5
    with torch.no_grad():
        for split in ([20], [1] * 20) if config.family.decoder else ([20],):
            expected, made = (mixed(technique, config, [tensor.to(dtype) for tensor in rows], split) for dtype in (torch.float32, torch.float16))
            assert far(made, expected) < 2**-8, split


def mixed(technique, config, rows, split):
    """What a mixer gives of queries, keys and values in parts, in their type."""
    mixer = Mixer(technique, config, 0).to(rows[0].dtype)
    mixer.initialize()
    state, made = State(mixer.slots) if len(split) > 1 else None, []
    for query, key, value in zip(*(tensor.split(split, 2) for tensor in rows), strict=True):
        if state:
            state.update(key, value)
        live, hidden = torch.ones(1, key.shape[2], dtype=torch.bool), key.new_zeros(1, key.shape[2], config.hidden)
        made.append(mixer(Call(query, key, value, config.head_dim**-0.5, live, config.family.decoder, state, hidden, None)))
    return torch.cat(made, 2).float()
