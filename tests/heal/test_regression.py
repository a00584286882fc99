"""The linear algebra of refit, held against dense least squares and autograd in float64."""

import pytest
import torch

from effconvert.surgery import _regression, _ridge
from effconvert.surgery._regression import AttentionWindow, Keys, Queries, Rotation, Values, by_head, mixtures, solve
from effconvert.surgery._ridge import HELD_OUT, Moments, ridge

WIDTH, HEADS, GROUPS, DIM = 6, 4, 2, 4  # M, H, G, D
LENGTH = 12  # T
LAYOUTS = [("halves", 4), ("interleaved", 4), ("halves", 2), ("interleaved", 2), ("", 0)]


@pytest.fixture
def _exact():
    """Compute in float64 all that a test makes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(torch.get_default_dtype())


def turn(rotary, layout):
    angles = draw(LENGTH, max(rotary // 2, 0), seed=9)
    return Rotation(torch.polar(torch.ones_like(angles), angles), rotary, layout, DIM)


def attention(heads, seed):
    """Weights of causal attention."""
    scores = draw(heads, LENGTH, LENGTH, seed=seed).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


def window(seed):
    read = draw(LENGTH, WIDTH, seed=seed)
    query, key, wanted = (draw(*shape, seed=seed + at) for at, shape in enumerate([(HEADS, LENGTH, DIM), (HEADS, LENGTH, DIM), (LENGTH, WIDTH)], 1000))
    return AttentionWindow(read, attention(HEADS, seed), query, key, wanted)


def keys_of(windows):
    return [draw(GROUPS, LENGTH, DIM, seed=5000 + at) for at in range(len(windows))]


def queries(count, rotary=4, layout="halves"):
    """A problem whose scores some queries, and a little noise, give."""
    windows, spin = [window(10 * at) for at in range(count)], turn(rotary, layout)
    keys, truth = keys_of(windows), draw(HEADS * DIM, WIDTH, seed=77)
    for at, (each, key) in enumerate(zip(windows, keys, strict=True)):  # the original has these scores: it has the same keys
        each.key = key.repeat_interleave(HEADS // GROUPS, 0)
        each.query = spin(by_head(each.inputs @ truth.T, HEADS)) + 0.3 * draw(HEADS, LENGTH, DIM, seed=900 + at)
    return Queries(windows, keys, spin, HEADS)


def keys(count):
    """Likewise with the queries fixed."""
    problem = queries(count)
    fixed = [draw(HEADS, LENGTH, DIM, seed=6000 + at) for at in range(count)]
    for each, query in zip(problem.windows, fixed, strict=True):
        each.query, each.key = query, each.query
    return Keys(problem.windows, fixed, problem.rotation, HEADS)


def values(count):
    windows, outputs, truth = [window(10 * at) for at in range(count)], draw(WIDTH, HEADS * DIM, seed=78), draw(GROUPS * DIM, WIDTH, seed=79)
    for at, each in enumerate(windows):
        each.target = mixtures(each, truth, HEADS, GROUPS) @ outputs.T + 0.3 * draw(LENGTH, WIDTH, seed=900 + at)
    return Values(windows, outputs, HEADS, GROUPS)


def anew(problem):
    """The same problem, after its windows have changed."""
    if isinstance(problem, Values):
        return Values(problem.windows, problem.outputs, HEADS, GROUPS)
    fixed = problem.queries if isinstance(problem, Keys) else problem.keys
    return type(problem)(problem.windows, list(fixed.values()), problem.rotation, HEADS)


def rows_of(problem):
    return (GROUPS if isinstance(problem, Values) else HEADS) * DIM


def squared_error(problem, weights, windows):
    """Half the squared error as it is written in a textbook: nothing of the code that is tested but `Rotation`."""
    total = weights.new_zeros(())
    for each in windows:
        probability = each.weights.to(weights.dtype)
        if not isinstance(problem, Values):
            rows = problem.rotation((each.inputs @ weights.T).view(LENGTH, HEADS, DIM).transpose(0, 1))
            query, key = (
                (problem.queries[id(each)], rows) if isinstance(problem, Keys) else (rows, problem.keys[id(each)].repeat_interleave(HEADS // GROUPS, 0))
            )
            mine = query @ key.transpose(1, 2)
            off = mine - each.query @ each.key.transpose(1, 2)
            mean = (probability * off).sum(-1, keepdim=True)
            total = total + (probability * (off - mean) ** 2).sum() / 2  # the variance of what is off: KL to second order
        else:
            value = (each.inputs @ weights.T).view(LENGTH, GROUPS, DIM).transpose(0, 1).repeat_interleave(HEADS // GROUPS, 0)
            out = (probability @ value).transpose(0, 1).reshape(LENGTH, HEADS * DIM) @ problem.outputs.T
            total = total + (out - each.target).square().sum() / 2
    return total


def gradient(problem, weights, windows):
    weights = weights.clone().requires_grad_()
    return torch.autograd.grad(squared_error(problem, weights, windows), weights)[0]


def dense(problem, windows):
    """Solve by normal equations, built column by column from gradients."""
    count = rows_of(problem) * WIDTH
    zero = torch.zeros(rows_of(problem), WIDTH)
    offset = gradient(problem, zero, windows).flatten()
    columns = [gradient(problem, unit.view_as(zero), windows).flatten() - offset for unit in torch.eye(count)]
    normal = torch.stack(columns, 1)
    return torch.linalg.lstsq(normal, -offset, driver="gelsd").solution.view_as(zero)


PROBLEMS = {f"queries {layout}{rotary}": (lambda count, rotary=rotary, layout=layout: queries(count, rotary, layout)) for layout, rotary in LAYOUTS} | {
    "keys": keys,
    "values": values,
}


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize("name", PROBLEMS)
def test_slopes_are_those_of_autograd(name):
    problem = PROBLEMS[name](3)
    weights, first = draw(rows_of(problem), WIDTH, seed=5), problem.windows[0]
    slope, error = problem.gradient(weights, first, with_target=True)
    assert error == pytest.approx(squared_error(problem, weights, [first]).item(), rel=1e-10)
    torch.testing.assert_close(slope, gradient(problem, weights, [first]), rtol=1e-9, atol=1e-9)
    bent, none = problem.gradient(weights, first, with_target=False)
    assert none == 0
    zero = torch.zeros_like(weights)
    torch.testing.assert_close(bent, gradient(problem, weights, [first]) - gradient(problem, zero, [first]), rtol=1e-9, atol=1e-9)


@pytest.mark.few(3)
@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize("name", PROBLEMS)
def test_with_enough_steps_the_least_squares_solution_is_reached(name, monkeypatch):
    monkeypatch.setattr(_regression, "STEPS", 100)
    monkeypatch.setattr(_regression, "SETTLED", -1.0)  # never
    problem = PROBLEMS[name](24)
    start = draw(rows_of(problem), WIDTH, seed=6)
    found, exact = solve(problem, start), dense(problem, problem.fit_windows)
    fitted = [squared_error(problem, weights, problem.fit_windows).item() for weights in (start, found, exact)]
    held = [squared_error(problem, weights, problem.held_out).item() for weights in (start, found, exact)]
    assert fitted[2] < 0.2 * fitted[0]
    assert held[1] <= held[2] * (1 + 1e-6)  # it may stop on its way, where held-out windows are predicted better
    assert fitted[1] <= fitted[2] * 1.2


@pytest.mark.few(3)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_few_steps_that_are_taken_get_near(name):
    problem = PROBLEMS[name](24)
    start = draw(rows_of(problem), WIDTH, seed=6)
    held = [squared_error(problem, weights, problem.held_out).item() for weights in (start, solve(problem, start), dense(problem, problem.fit_windows))]
    assert held[2] < 0.2 * held[0]
    assert held[1] < held[2] + 0.1 * (held[0] - held[2])


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_best_already_stays(name):
    problem = PROBLEMS[name](16)
    best = dense(problem, problem.held_out)
    assert solve(problem, best) is best


@pytest.mark.parametrize("name", PROBLEMS)
def test_held_out_windows_are_chosen_on_and_never_fitted(name):
    """With other held-out windows, the weights that are passed on the way are the same."""
    passed = []
    for change in (0.0, 3.0):
        problem = PROBLEMS[name](2 * HELD_OUT)
        assert [id(each) for each in problem.held_out] == [id(problem.windows[HELD_OUT - 1]), id(problem.windows[-1])]
        for each in problem.held_out:
            each.target, each.query, each.inputs = each.target + change, each.query + change, each.inputs * (1 + change)
        problem = anew(problem)
        way = []
        real = problem.gradient

        def slope(weights, window, with_target, problem=problem, way=way, real=real):
            if any(window is each for each in problem.held_out):
                way.append(weights.clone())
                return torch.zeros_like(weights), 1 / len(way)  # each step is better than the one before it
            return real(weights, window, with_target)

        problem.gradient = slope
        solve(problem, draw(rows_of(problem), WIDTH, seed=6))
        passed.append(torch.stack(way[::2]))
    assert len(passed[0]) > 3
    assert torch.equal(*passed)


def test_the_best_on_held_out_windows_is_taken_and_not_the_last():
    problem = values(16)
    for each in problem.held_out:
        each.target = each.target + 5 * draw(LENGTH, WIDTH, seed=4)
    start = draw(rows_of(problem), WIDTH, seed=6)
    found = solve(problem, start)
    before, after = (squared_error(problem, weights, problem.held_out).item() for weights in (start, found))
    assert after <= before


def test_heads_that_no_output_reads_stop_nobody():
    """As pruned heads are stored: their columns of o are zero."""
    problem = values(16)
    problem.outputs[:, : HEADS // GROUPS * DIM] = 0  # all that share the first KV head
    for each in problem.windows:
        each.target = mixtures(each, draw(GROUPS * DIM, WIDTH, seed=79), HEADS, GROUPS) @ problem.outputs.T
    start = draw(rows_of(problem), WIDTH, seed=6)
    found = solve(problem, start)
    assert squared_error(problem, found, problem.held_out) < 0.5 * squared_error(problem, start, problem.held_out)


@pytest.mark.parametrize("name", PROBLEMS)
def test_inputs_that_are_always_zero_stop_nobody(name):
    problem = PROBLEMS[name](16)
    for each in problem.windows:
        each.inputs[:] = 0
    problem = anew(problem)
    start = draw(rows_of(problem), WIDTH, seed=6)
    assert torch.equal(solve(problem, start), start)  # no weights are better than others


# Rotation


@pytest.mark.parametrize(("layout", "rotary"), LAYOUTS)
def test_a_turn_is_found_from_queries_before_and_after_it(layout, rotary):
    truth, before = turn(rotary, layout), draw(3, HEADS, LENGTH, DIM)
    found = Rotation.estimate(before, truth(before), rotary, layout)
    assert found is not None
    rows = draw(HEADS, LENGTH, DIM, seed=3)
    torch.testing.assert_close(found(rows), truth(rows))
    torch.testing.assert_close(found(found(rows), back=True), rows)


@pytest.mark.parametrize(("layout", "rotary"), LAYOUTS)
def test_a_turn_that_makes_longer_is_found_too(layout, rotary):
    """As YaRN's attention factor does, and OPT, which scales its queries."""
    truth, before = turn(rotary, layout), draw(3, HEADS, LENGTH, DIM)
    after = truth(before).clone()
    width = rotary or DIM
    after[..., :width] = 1.3 * after[..., :width]
    found = Rotation.estimate(before, after, rotary, layout)
    assert found is not None
    torch.testing.assert_close(found(before), after)
    one, other = draw(LENGTH, DIM, seed=4), draw(LENGTH, DIM, seed=5)
    torch.testing.assert_close((found(one) * other).sum(), (one * found(other, back=True)).sum())  # the adjoint, which slopes need


@pytest.mark.parametrize(("layout", "rotary"), LAYOUTS)
def test_behind_a_norm_no_turn_is_found(layout, rotary):
    before = draw(3, HEADS, LENGTH, DIM)
    normed = before / before.square().mean(-1, keepdim=True).sqrt()
    assert Rotation.estimate(before, turn(rotary, layout)(normed), rotary, layout) is None


@pytest.mark.parametrize(("layout", "other"), [("halves", "interleaved"), ("interleaved", "halves")])
def test_the_wrong_layout_is_no_turn(layout, other):
    before = draw(3, HEADS, LENGTH, DIM)
    assert Rotation.estimate(before, turn(4, layout)(before), 4, other) is None


def test_pairs_are_those_that_turn_together():
    squares = torch.arange(4.0)[None]
    none = torch.zeros(1, 0)
    assert Rotation(none, 4, "halves", 4).pair_means(squares).tolist() == [[1, 2, 1, 2]]
    assert Rotation(none, 4, "interleaved", 4).pair_means(squares).tolist() == [[0.5, 0.5, 2.5, 2.5]]
    assert Rotation(none, 2, "halves", 4).pair_means(squares).tolist() == [[0.5, 0.5, 2, 3]]
    assert Rotation(none, 0, "", 4).pair_means(squares).tolist() == [[0, 1, 2, 3]]


# Ridge


def moments(count, truth, noise, seed, inputs=None):
    gathered = Moments()
    for at in range(4):  # in several goes
        read = draw(count // 4, truth.shape[1], seed=seed + at).double() if inputs is None else inputs
        gathered.add(read[None], (read @ truth.T.to(read) + noise * draw(len(read), len(truth), seed=seed + at + 50))[None])
    return gathered


def test_moments_know_what_a_change_gains():
    change, gathered = draw(5, WIDTH, seed=1), Moments()
    inputs, missing = draw(2, 30, WIDTH, seed=2), draw(2, 30, 5, seed=3)
    gathered.add(inputs[:1], missing[:1])
    gathered.add(inputs[1:], missing[1:])
    gain = missing.square().sum() - (missing - inputs @ change.T).square().sum()
    assert gathered.gain(change.double()) == pytest.approx(gain.item(), rel=1e-4)


def test_a_ridge_finds_what_is_missing():
    truth = draw(5, WIDTH)
    change = ridge(moments(4000, truth, 0.0, 100), moments(400, truth, 0.0, 200))
    torch.testing.assert_close(change.float(), truth, rtol=0, atol=1e-3)


def test_a_ridge_that_helps_nobody_is_none():
    truth = draw(5, WIDTH)
    assert ridge(moments(400, truth, 0.0, 100), moments(400, -truth, 0.0, 200)) is None  # what was learnt is wrong there


def test_nothing_missing_is_nothing_to_change():
    nothing = torch.zeros(5, WIDTH)
    assert ridge(moments(400, nothing, 0.0, 100), moments(400, nothing, 0.0, 200)) is None


def test_of_few_and_noisy_tokens_a_ridge_learns_less():
    """The strength is the one that does best on held-out tokens: of six, neither the least nor one that says nothing."""
    width = 40
    truth = draw(5, width) / width**0.5
    fit, held = moments(48, truth, 1.0, 100), moments(4000, truth, 0.0, 200)
    scale = fit.gram.diagonal().mean()
    tried = [torch.linalg.solve(fit.gram + strength * scale * torch.eye(width), fit.cross.T).T for strength in _ridge.STRENGTHS]
    gains = [held.gain(change) for change in tried]
    best = max(range(len(gains)), key=gains.__getitem__)
    assert gains[best] > 0 > gains[-1]
    torch.testing.assert_close(ridge(fit, held), tried[best])


def test_fewer_tokens_than_inputs_are_enough_for_a_ridge():
    width, truth = 40, draw(5, 40)
    fit = moments(12, truth, 0.0, 100)  # three tokens, four times
    assert torch.linalg.matrix_rank(fit.gram) == 12
    change = ridge(fit, moments(400, truth, 0.0, 200))
    assert change is not None
    assert torch.isfinite(change).all()
    assert change.shape == (5, width)


def test_inputs_that_are_zero_have_no_ridge():
    silent = moments(40, draw(5, WIDTH), 1.0, 100, inputs=torch.zeros(10, WIDTH))
    assert ridge(silent, silent) is None


def test_the_strength_is_chosen_on_held_out_tokens_alone():
    truth = draw(5, WIDTH)
    fit = moments(400, truth, 0.5, 100)
    before = fit.gram.clone(), fit.cross.clone()
    one, other = ridge(fit, moments(400, truth, 0.0, 200)), ridge(fit, moments(400, 0.01 * truth, 0.0, 200))
    assert torch.equal(fit.gram, before[0])
    assert torch.equal(fit.cross, before[1])
    assert one.norm() > 0.8 * truth.norm()
    assert other is None or other.norm() < one.norm()
