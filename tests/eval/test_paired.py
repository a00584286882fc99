"""The statistics of paired differences, against formulas written out here and against scipy, numpy and lm-eval."""

import math
from dataclasses import replace
from math import comb

import numpy as np
import pytest
from lm_eval.api.metrics import aggregate_subtask_metrics, unweighted_mean_stderr
from scipy import stats

from effconvert.eval.quality.paired import compare, make, pooled, recovery
from effconvert.eval.quality.table import rows


def names(count, task="t"):
    return [f"{task}{index}" for index in range(count)]


def samples(items, aggregation="mean", better="higher", task="t", **more):
    return make(task, "m", aggregation, list(items), names(len(items), task), better, **more)


def numbers(seed, count):
    return np.random.default_rng(seed).normal(size=count)


def right(seed, count, accuracy):
    return (np.random.default_rng(seed).random(count) < accuracy).astype(float)


def test_the_difference_of_means_and_its_error_are_those_of_the_documents_differences():
    a, b = numbers(0, 50), numbers(1, 50)
    value = compare(samples(a), samples(b))
    assert value.value == pytest.approx(b.mean())
    assert value.error == pytest.approx(stats.sem(b))
    assert value.difference == pytest.approx((b - a).mean())
    assert value.difference_error == pytest.approx(stats.sem(b - a))
    assert value.p == pytest.approx(stats.ttest_1samp(b - a, 0).pvalue)


def test_right_and_wrong_are_compared_by_mcnemars_exact_test():
    only_first, only_second, both, neither = 9, 2, 30, 13
    a = [1.0] * only_first + [0.0] * only_second + [1.0] * both + [0.0] * neither
    b = [0.0] * only_first + [1.0] * only_second + [1.0] * both + [0.0] * neither
    changed = only_first + only_second
    by_hand = 2 * sum(comb(changed, k) for k in range(only_second + 1)) / 2**changed
    value = compare(samples(a), samples(b))
    assert value.p == pytest.approx(by_hand, rel=1e-12)
    assert value.difference == pytest.approx((only_second - only_first) / len(a))
    assert compare(samples(b), samples(a)).p == pytest.approx(by_hand, rel=1e-12)  # two-sided


@pytest.mark.parametrize(
    ("items", "aggregation"),
    [
        (numbers(0, 20), "mean"),
        (right(0, 20, 0.5), "mean"),
        (-np.abs(numbers(0, 20)), "perplexity"),
        ([(-5.0 - index, 30.0) for index in range(9)], "bits_per_byte"),
        ([(-5.0 - index, 30.0) for index in range(9)], "weighted_perplexity"),
        ([(index % 2, float(index)) for index in range(9)], "stratified"),
        (list(zip(numbers(0, 20), numbers(1, 20), strict=True)), "spearman"),
    ],
)
def test_equal_models_differ_by_nothing(items, aggregation):
    value = compare(samples(items, aggregation), samples(items, aggregation))
    assert (value.difference, value.difference_error, value.p) == (0, 0, 1)
    assert not value.significant


@pytest.mark.parametrize(("aggregation", "one", "other"), [("mean", 1.0, 0.5), ("perplexity", -1.0, -2.0), ("bits_per_byte", (-5.0, 20.0), (-9.0, 20.0))])
def test_one_document_has_neither_error_nor_p(aggregation, one, other):
    value = compare(samples([one], aggregation), samples([other], aggregation))
    assert value.difference != 0
    assert (value.error, value.difference_error, value.p, value.significant) == (None, None, None, None)


def test_a_shift_by_the_same_number_has_no_error_and_the_p_of_a_sign_test():
    a = np.array([0.0, 3.0, 5.0, 1.0, 2.0, 4.0])
    value = compare(samples(a), samples(a + 2))
    assert (value.difference, value.difference_error) == (2, 0)
    assert value.p == pytest.approx(stats.binomtest(6, 6).pvalue)


@pytest.mark.parametrize(("original", "other", "chance", "kept"), [(0.8, 0.55, 0.3, 0.5), (0.8, 0.3, 0.3, 0.0), (0.8, 0.2, 0.3, -0.2), (0.8, 0.9, 0.0, 1.125)])
def test_recovery_is_what_is_left_of_the_advantage_over_chance(original, other, chance, kept):
    count = 200
    a = np.arange(count) < round(original * count)
    b = np.arange(count) < round(other * count)
    value = compare(samples(a * 1.0, chance=chance), samples(b * 1.0, chance=chance))
    assert value.recovery == pytest.approx(kept)


def test_what_was_never_above_chance_cannot_be_recovered():
    count, chance = 400, 0.25
    error = math.sqrt(chance * (1 - chance) / count)
    lucky = np.arange(count) < round((chance + 1.5 * error) * count)  # above chance, by no more than chance does in one of fifteen
    able = np.arange(count) < round((chance + 2 * error) * count)
    assert recovery(samples(lucky * 1.0, chance=chance), samples(able * 1.0, chance=chance)) is None
    assert recovery(samples(able * 1.0, chance=chance), samples(lucky * 1.0, chance=chance)) == pytest.approx(0.75, abs=0.1)  # 1.5 of 2 errors
    assert recovery(samples(able * 0.0, chance=0.0), samples(able * 1.0, chance=0.0)) is None
    assert recovery(samples(able * 1.0), samples(able * 1.0)) is None  # chance unknown
    assert recovery(samples(able * 1.0, chance=chance, better="lower"), samples(able * 1.0, chance=chance)) is None


def test_the_table_says_which_original_is_not_above_chance():
    a = right(0, 50, 0.25)
    made, notes = rows([[samples(a, chance=0.25)], [samples(1 - a, chance=0.25)]], ["first", "second"])
    assert made[0].values[1].recovery is None
    assert "first is not above guessing" in notes[0]


# A bootstrap of 1000 draws knows a standard error to 1 / sqrt(2 * 999) = 2.2 %, and the linearised (delta-method) error is itself off by terms of order
# 1 / documents, 0.5 % of 200; 10 % is four of these standard deviations together.
NEAR = 0.10


def perplexities(count=200):
    draw = np.random.default_rng(0)
    hard = draw.normal(3, 0.5, count)  # how hard a document is, in nats a token, is the same for both models
    return -hard, -(hard + draw.normal(0.1, 0.05, count))


def test_the_error_of_a_perplexity_is_that_of_the_delta_method_and_of_its_difference_too():
    a, b = perplexities()
    value = compare(samples(a, "perplexity", "lower"), samples(b, "perplexity", "lower"))
    first, second = math.exp(-a.mean()), math.exp(-b.mean())
    assert value.difference == pytest.approx(second - first)
    assert value.error == pytest.approx(second * stats.sem(b), rel=NEAR)
    assert value.difference_error == pytest.approx(stats.sem(second * -b - first * -a), rel=NEAR)


def test_the_error_of_bits_per_byte_is_that_of_a_ratio():
    draw = np.random.default_rng(0)
    sizes = draw.integers(500, 1500, 200).astype(float)
    logs = -draw.normal(1.0, 0.1, 200) * sizes
    found = samples(list(zip(logs, sizes, strict=True)), "bits_per_byte", "lower")
    rate = -logs.sum() / sizes.sum()
    assert found.value == pytest.approx(rate / math.log(2))
    assert found.error == pytest.approx(stats.sem(-logs - rate * sizes) / sizes.mean() / math.log(2), rel=NEAR)


def test_a_difference_is_paired_so_that_shuffling_the_second_models_documents_drowns_it():
    a, b = perplexities()
    mixed = np.random.default_rng(1).permutation(b)
    for aggregation in ("mean", "perplexity"):
        kept, lost = (compare(samples(a, aggregation), samples(other, aggregation)) for other in (b, mixed))
        assert kept.difference == pytest.approx(lost.difference)
        # The documents' spread, 0.5 on both sides, against 0.05 between the models: about 14 times.
        assert lost.difference_error > 5 * kept.difference_error
        assert kept.significant


def test_other_documents_are_never_compared():
    a, b = samples(right(0, 9, 0.5)), replace(samples(right(1, 9, 0.5)), documents=tuple(names(9, "other")))
    with pytest.raises(AssertionError):
        compare(a, b)
    made, _ = rows([[a], [b]], ["first", "second"])
    assert (made[0].values[1].value, made[0].values[1].difference, made[0].values[1].p) == (b.value, None, None)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_scores_what_it_scores_in_lm_eval(by_size):
    parts = [samples(right(0, 30, 0.8), task="a", chance=0.25), samples(right(1, 100, 0.3), task="b", chance=0.5)]
    value = aggregate_subtask_metrics([part.value for part in parts], [30, 100], by_size)
    group = pooled("group", "m", "1", parts, value, None, by_size)
    assert group.value == value
    assert group.value == pytest.approx(np.concatenate([part.items for part in parts]).mean() if by_size else (parts[0].value + parts[1].value) / 2)
    assert group.chance == pytest.approx((30 * 0.25 + 100 * 0.5) / 130 if by_size else 0.375)
    assert group.documents == parts[0].documents + parts[1].documents


def test_the_error_of_an_unweighted_group_is_that_of_lm_eval():
    parts = [samples(right(0, 30, 0.8), task="a"), samples(right(1, 100, 0.3), task="b")]
    group = pooled("group", "m", "1", parts, 0.5, 0.25, by_size=False)
    assert group.error == 0.25  # as lm-eval says
    made = make("group", "m", "stratified", [(at, item) for at, part in enumerate(parts) for item in part.items], group.documents, "higher")
    assert made.error == pytest.approx(unweighted_mean_stderr([part.error for part in parts]))


@pytest.mark.parametrize("by_size", [True, False])
def test_groups_are_compared_document_by_document(by_size):
    first = [samples(right(0, 30, 0.8), task="a"), samples(right(1, 100, 0.3), task="b")]
    second = [samples(right(2, 30, 0.6), task="a"), samples(right(3, 100, 0.3), task="b")]
    value = compare(*(pooled("group", "m", "1", parts, 0.0, None, by_size) for parts in (first, second)))
    differences = [np.subtract(after.items, before.items) for before, after in zip(first, second, strict=True)]
    error = math.hypot(*((30, 100)[at] / 130 * stats.sem(part) if by_size else stats.sem(part) / 2 for at, part in enumerate(differences)))
    assert value.difference_error == pytest.approx(error)


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_that_of_scipy(ties):
    a, b = numbers(0, 40), numbers(1, 40) + 0.5 * numbers(0, 40)
    if ties:
        a, b = a.round(), b.round()
    found = samples(list(zip(a, b, strict=True)), "spearman")
    assert found.value == pytest.approx(stats.spearmanr(a, b).statistic)


def test_spearman_of_a_constant_is_nothing():
    assert samples([(1.0, float(index)) for index in range(5)], "spearman").value == 0


@pytest.mark.parametrize(("kind", "count"), [("right and wrong", 400), ("numbers", 12)])
def test_equal_models_are_told_apart_no_more_often_than_chance(kind, count):
    """The share of p < 0.05 among equal models is 5 % at most: of 1000 trials no more than a binomial gives in all but one of 1000 cases."""
    trials, found = 1000, 0
    for seed in range(trials):
        draw = np.random.default_rng(seed)
        hard = draw.random(count)  # some documents are harder, for both
        if kind == "numbers":
            a, b = hard + draw.normal(0, 0.1, count), hard + draw.normal(0, 0.1, count)
        else:
            a, b = (draw.random(count) < hard) * 1.0, (draw.random(count) < hard) * 1.0
        found += bool(compare(samples(a), samples(b)).significant)
    assert found <= stats.binom.ppf(0.999, trials, 0.05)
    assert found > 0, "a test that never finds anything is no test"


@pytest.mark.parametrize("count", [4, 8, 200])
def test_equal_models_have_equal_perplexity_in_19_of_20_texts(count):
    trials, found = 100, 0
    for seed in range(trials):
        draw = np.random.default_rng(seed)
        hard = draw.normal(3, 0.3, count)
        a, b = (-(hard + draw.normal(0, 0.05, count)) for _ in range(2))
        found += bool(compare(samples(a, "perplexity", "lower"), samples(b, "perplexity", "lower")).significant)
    assert found <= stats.binom.ppf(0.999, trials, 0.05)


def test_ten_points_over_four_hundred_documents_are_found():
    """Both are right on 60 %, and the first alone on a further 15 %, the second on 5 %: McNemar's test finds that in 99.5 % of cases (exact power)."""
    draw, found, trials = np.random.default_rng(0), 0, 100
    for _ in range(trials):
        outcome = draw.choice(4, size=400, p=[0.6, 0.15, 0.05, 0.2])
        value = compare(samples((outcome <= 1) * 1.0), samples(((outcome == 0) | (outcome == 2)) * 1.0))
        found += bool(value.significant and value.difference < 0)
    assert found >= 95  # of 99.5 expected: fewer in one of 77 000 cases


def test_a_ruined_word_perplexity_is_no_chance_though_few_documents_were_read():
    found = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        words = random.integers(200, 400, 5)
        logs = -3.0 * words + random.normal(0, 300, 5)
        items = [[(float(log), float(count)) for log, count in zip(each, words, strict=True)] for each in (logs, logs - 6.0 * words + random.normal(0, 300, 5))]
        value = compare(*(samples(each, "weighted_perplexity", better="lower") for each in items))
        found += value.p < 0.05
    assert found == 100


@pytest.mark.parametrize(("aggregation", "sizes"), [("pooled", (3, 3)), ("stratified", (3, 3)), ("stratified", (3, 10))])
def test_groups_of_equal_models_differ_in_5_of_100_cases(aggregation, sizes):
    trials, found = 400, 0
    for seed in range(trials):
        random = np.random.default_rng(seed)
        a, b = ([(part, float(random.normal())) for part, size in enumerate(sizes) for _ in range(size)] for _ in range(2))
        found += compare(samples(a, aggregation), samples(b, aggregation)).p < 0.05
    assert found <= stats.binom.ppf(0.999, trials, 0.06)  # Welch's t is a little liberal with so few
