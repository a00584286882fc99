"""Attention by way of landmarks is the paper's, whatever is padding; where every token is a landmark, it is softmax as far as the pseudo-inverse is exact."""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effconvert.errors import ModelError, OptionError
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing.nystrom import Nystrom, pseudo_inverse, segments
from tests.surgery.rows import GROUPS, HEADS, WIDTH, random
from tests.surgery.rows import config as shape
from tests.surgery.rows import rows as any_rows

LONGEST, MARKS = 32, 8
EXACT = 1e-6  # of float32 values of size 1
SAME = 1e-5  # likewise, behind a pseudo-inverse, which magnifies what is rounded


config = partial(shape, max_position_embeddings=LONGEST)
GROUPED = config(num_key_value_heads=GROUPS)


def rows(tokens=LONGEST, texts=2):
    return any_rows(tokens, texts)


def mixed(technique, query, key, value, live=None, conv=None):
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool) if live is None else live
    weights = technique.initial_values(GROUPED, 0) if conv is None else {"conv": conv}
    return technique.mix(weights, Call(query, key, value, WIDTH**-0.5, live, False, None, query, None))


def softmax(query, key, value):
    return scaled_dot_product_attention(query, key, value, enable_gqa=True)


def reference(query, key, value, marks=MARKS):
    """The paper's equation 13 in float64, with an exact pseudo-inverse, for texts of a multiple of `marks` tokens."""
    query, key, value = (tensor.double() for tensor in (query, key.repeat_interleave(HEADS // GROUPS, 1), value.repeat_interleave(HEADS // GROUPS, 1)))
    few = [tensor.unflatten(2, (marks, -1)).mean(3) for tensor in (query, key)]
    first, middle, last = ((a @ b.mT / WIDTH**0.5).softmax(-1) for a, b in ((query, few[1]), (few[0], few[1]), (few[0], key)))
    return first @ torch.linalg.pinv(middle) @ last @ value


def test_mixing_is_the_papers():
    assert torch.allclose(mixed(Nystrom(landmarks=MARKS, iterations=0), *rows()), reference(*rows()), atol=EXACT)


@pytest.mark.parametrize("tokens", [1, 5, 20, LONGEST])
def test_with_every_token_a_landmark_and_an_exact_inverse_it_is_softmax(tokens):
    technique = Nystrom(landmarks=LONGEST, iterations=0)
    assert technique.is_exact(config())
    assert torch.allclose(mixed(technique, *rows(tokens)).float(), softmax(*rows(tokens)), atol=EXACT)


def test_the_papers_six_steps_are_not_exact_and_many_are():
    assert not Nystrom(landmarks=LONGEST).is_exact(config())
    assert not Nystrom(landmarks=LONGEST - 1, iterations=0).is_exact(config())
    given = [tensor.double() for tensor in rows()]  # in float32 the inverse magnifies what is rounded to 1e-3
    wrong = {steps: (mixed(Nystrom(landmarks=LONGEST, iterations=steps), *given) - softmax(*given)).norm() / softmax(*given).norm() for steps in (6, 24)}
    assert wrong[6] > 1e-3
    assert wrong[24] < EXACT


def test_the_iteration_is_of_third_order():
    """I - A Z is cubed, nearly: with p(x) = x (13 - x (15 - x (7 - x))) / 4, 1 - p(1 - e) = (3 e^3 + e^4) / 4."""
    matrix = random(3, 6, 6, dtype=torch.float64).softmax(-1) + torch.eye(6)
    matrix = matrix / matrix.sum(-1, keepdim=True)
    unit = torch.eye(6)
    before, after = (unit - matrix @ pseudo_inverse(matrix, steps) for steps in (2, 3))
    assert torch.allclose(after, (3 * before @ before @ before + before @ before @ before @ before) / 4, atol=1e-12)
    assert torch.allclose(pseudo_inverse(matrix, 30), torch.linalg.inv(matrix), atol=1e-10)


def test_the_pseudo_inverse_of_a_matrix_without_an_inverse():
    """Two landmarks alike: the iteration goes to the same as singular values do."""
    matrix = random(4, 4, dtype=torch.float64).softmax(-1)
    matrix = torch.cat([matrix, matrix[:1]])[:, [0, 1, 2, 3, 0]]
    matrix = matrix / matrix.sum(-1, keepdim=True)
    assert torch.allclose(pseudo_inverse(matrix, 40), pseudo_inverse(matrix, 0), atol=1e-8)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 20, 31, 32])
def test_landmarks_are_means_of_consecutive_tokens_each_counted_once(tokens):
    means = segments(torch.ones(1, tokens, dtype=torch.bool), MARKS)[0]
    assert means.shape == (MARKS, tokens)
    sizes = (means > 0).sum(-1)
    assert torch.equal((means > 0).sum(0), torch.ones(tokens).long())
    assert torch.allclose(means.sum(-1), (sizes > 0).float())
    assert (sizes > 0).sum() == min(tokens, MARKS)
    some = sizes[sizes > 0]
    assert some.max() - some.min() <= 1
    assert torch.equal((means > 0).int().argmax(-1)[sizes > 0], some.cumsum(0) - some)


@pytest.mark.parametrize("iterations", [0, 6])
@pytest.mark.parametrize("kept", [1, 5, 13])
def test_padding_changes_nothing_on_either_side_and_whatever_it_holds(kept, iterations):
    """Also where a text has fewer tokens than there are landmarks."""
    technique, conv = Nystrom(landmarks=MARKS, iterations=iterations, conv=5), random(HEADS, 5)
    query, key, value = rows(kept)
    expected = mixed(technique, query, key, value, conv=conv)
    for left, right in ((0, 9), (9, 0), (4, 5)):
        live = torch.nn.functional.pad(torch.ones(2, kept, dtype=torch.bool), (left, right))
        for held in (0.0, 1e4):
            padded = [torch.nn.functional.pad(tensor, (0, 0, left, right), value=held) for tensor in (query, key, value)]
            out = mixed(technique, *padded, live, conv)
            assert torch.allclose(out[:, :, live[0]], expected, atol=SAME)
            assert out.isfinite().all()


@pytest.mark.parametrize("iterations", [0, 6])
def test_a_batch_gives_what_its_texts_give_alone(iterations):
    """Of different lengths, one of them nothing but padding, and one with much larger queries: the iteration begins from each one's own norms."""
    technique, conv = Nystrom(landmarks=MARKS, iterations=iterations, conv=5), random(HEADS, 5)
    live = torch.arange(LONGEST) < torch.tensor([LONGEST, 11, 1, 0, LONGEST])[:, None]
    query, key, value = rows(texts=5)
    query[4] *= 30
    together = mixed(technique, query, key, value, live, conv)
    assert together.isfinite().all()
    for text in (0, 1, 2, 4):
        alone = mixed(technique, *[tensor[text : text + 1, :, live[text]] for tensor in (query, key, value)], conv=conv)
        assert torch.allclose(together[text, :, live[text]], alone[0], atol=SAME * max(1, alone.abs().max()))


def test_the_convolution_is_of_each_heads_values():
    technique = Nystrom(landmarks=MARKS, conv=5)
    conv, (query, key, value) = random(HEADS, 5), rows()
    added = mixed(technique, query, key, value, conv=conv) - mixed(technique, query, key, value)
    for head in range(HEADS):
        near = torch.nn.functional.pad(value[:, head // (HEADS // GROUPS)], (0, 0, 2, 2))
        expected = sum(conv[head, place] * near[:, place : place + LONGEST] for place in range(5))
        assert torch.allclose(added[:, head], expected, atol=SAME)


def test_what_begins_is_no_convolution_each_time():
    assert Nystrom(landmarks=MARKS).parameters(config()) == {"conv": (HEADS, 65)}
    assert not Nystrom(landmarks=MARKS).initial_values(config(), 1)["conv"].any()
    assert Nystrom(landmarks=MARKS, conv=0).parameters(config()) == Nystrom(landmarks=MARKS, conv=0).initial_values(config(), 0) == {}
    assert torch.equal(mixed(Nystrom(landmarks=MARKS), *rows()), mixed(Nystrom(landmarks=MARKS, conv=0), *rows()))


@pytest.mark.parametrize("iterations", [0, 6])
def test_bfloat16_is_finite_and_what_float32_makes_of_the_same_numbers(iterations):
    technique, given = Nystrom(landmarks=MARKS, iterations=iterations), [tensor.bfloat16() for tensor in rows()]
    out = mixed(technique, *given, conv=random(HEADS, 65).bfloat16())
    assert out.isfinite().all()
    assert torch.allclose(out, mixed(technique, *[tensor.float() for tensor in given], conv=random(HEADS, 65).bfloat16().float()), atol=EXACT)


@pytest.mark.parametrize("iterations", [0, 6])
def test_gradients_are_finite_with_fewer_tokens_than_landmarks(iterations):
    technique, conv = Nystrom(landmarks=MARKS, iterations=iterations, conv=5), torch.zeros(HEADS, 5, requires_grad=True)
    given = [tensor.requires_grad_() for tensor in rows(20, 3)]
    live = torch.arange(20) < torch.tensor([20, 3, 0])[:, None]
    mixed(technique, *given, live, conv).square().sum().backward()
    for tensor in (*given, conv):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


def test_options_that_cannot_be():
    with pytest.raises(OptionError, match="--landmarks is 0, and it should be greater than or equal to 1"):
        Nystrom(landmarks=0)
    with pytest.raises(OptionError, match="--landmarks is needed"):
        Nystrom()
    with pytest.raises(OptionError, match=r"--conv 4 is even, .* give 5, or 0 for none"):
        Nystrom(landmarks=4, conv=4)
    with pytest.raises(OptionError, match="--iterations is -1"):
        Nystrom(landmarks=4, iterations=-1)


def test_decoders_are_refused_with_what_fits_them():
    with pytest.raises(ModelError, match=r"^llama is a decoder, and nystrom takes landmarks from all .* streaming, linear, performer and retnet are for"):
        Nystrom(landmarks=4).check(config("llama"))


def test_layers_with_a_window_are_left_alone():
    own = config("modernbert", local_attention=8)
    assert Nystrom(landmarks=4).chosen(own) == {0, 3}
    assert "after RoPE" in Nystrom(landmarks=4).notes(own)
    assert Nystrom(landmarks=4).notes(config()) == ""
