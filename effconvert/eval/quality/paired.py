"""Statistics of scores: a model's standard error, and its difference to the original on the same documents.

Both models answer the same questions, so differences are taken question by question. The error of their mean is far smaller than the two models'
errors suggest (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640, section 4). Perplexities and ratios are not means over documents: they
are linearised (the delta method). Rank correlations are resampled: a paired bootstrap, with the same draws for both models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from effconvert.eval.results import Value

DRAWS = 1000  # of a bootstrap: its standard error is then within 5 % (95 % confidence)
ABOVE_CHANCE = 1.645  # standard errors: one-sided 5 %
LARGEST = 300.0  # nats a token or word at most, so that a perplexity stays finite
Array = NDArray[np.float64]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Samples:
    """One metric of one task on one model, document by document."""

    task: str
    metric: str
    better: Better | None
    chance: float | None
    version: str
    aggregation: str  # the function from items to the value: one of `AGGREGATIONS`, or one of lm-eval's
    value: float
    error: float | None
    documents: tuple[str, ...]  # the id of each
    items: tuple[Any, ...]  # the contribution of each: a number, or the few numbers that `aggregation` needs


def _stratified(items: Array) -> float:
    strata = items[:, 0]
    return float(np.mean([items[strata == stratum, 1].mean() for stratum in np.unique(strata)]))


def _spearman(items: Array) -> float:
    from scipy.stats import rankdata

    ranks = rankdata(items, axis=0)
    return float(np.corrcoef(ranks.T)[0, 1]) if (ranks.std(0) > 0).all() else 0.0


AGGREGATIONS: dict[str, Callable[[Array], float]] = {
    "mean": lambda items: float(items.mean()),
    "perplexity": lambda items: math.exp(min(-items.mean(), LARGEST)),  # of log-likelihoods a token
    "weighted_perplexity": lambda items: math.exp(min(-items[:, 0].sum() / items[:, 1].sum(), LARGEST)),  # (log-likelihood, words or bytes)
    "ratio": lambda items: float(items[:, 0].sum() / items[:, 1].sum()),  # (sum, count)
    "bits_per_byte": lambda items: float(-items[:, 0].sum() / items[:, 1].sum() / math.log(2)),  # (log-likelihood, bytes)
    "stratified": _stratified,  # (index of the part, number): the mean of the parts' means
    "pooled": lambda items: float(items[:, 1].mean()),  # (index of the part, number): parts weighted by size
    "spearman": _spearman,  # (similarity, score)
}

LINEAR = ("mean", "perplexity", "weighted_perplexity", "ratio", "bits_per_byte")  # with a known contribution of each document, at least to first order


def make(task: str, metric: str, aggregation: str, items: Sequence[Any], documents: Sequence[str], better: Better | None, **more: Any) -> Samples:
    """Build the samples of one of our own measurements, with their value and its standard error."""
    values = np.asarray(items, float)
    value = AGGREGATIONS[aggregation](values)
    error = _error(values, aggregation)
    fields = {"chance": None, "version": "1", **more}
    return Samples(task, metric, better, aggregation=aggregation, value=value, error=error, documents=tuple(documents), items=tuple(items), **fields)


def pooled(task: str, metric: str, version: str, parts: Sequence[Samples], value: float, error: float | None, by_size: bool) -> Samples:
    """Build the score of a group of tasks: over all documents, or as the mean of the tasks' means."""
    documents = tuple(document for part in parts for document in part.documents)
    weights = [len(part.items) if by_size else 1 for part in parts]
    chances = [part.chance for part in parts if part.chance is not None]
    chance = float(np.average(chances, weights=weights)) if len(chances) == len(parts) else None
    items = [(index, item) for index, part in enumerate(parts) for item in part.items]
    samples = make(task, metric, "pooled" if by_size else "stratified", items, documents, parts[0].better, chance=chance, version=version)
    return replace(samples, value=value, error=error)


def compare(original: Samples, other: Samples) -> Value:
    """Return the score of `other` beside that of `original`.

    Both must be of the same documents; callers check that.
    """
    assert original.documents == other.documents, f"{other.task}: other documents"
    difference = other.value - original.value
    if not (original.aggregation and other.aggregation):  # a document's contribution is no number
        return Value(other.value, other.error, difference)
    a, b = np.asarray(original.items, float), np.asarray(other.items, float)
    kept_share = recovery(original, other)
    if (a == b).all():
        return Value(other.value, other.error, difference, 0.0 if len(a) > 1 else None, 1.0 if len(a) > 1 else None, kept_share)
    if original.aggregation in ("stratified", "pooled"):
        by_size = original.aggregation == "pooled"
        error = _stratified_error(a[:, 0], b[:, 1] - a[:, 1], by_size)
        p = _p_of_mean(a[:, 1], b[:, 1]) if by_size else _p_of_stratified(a[:, 0], b[:, 1] - a[:, 1])
        return Value(other.value, other.error, difference, error, p, kept_share)
    if contributions := _linear(a, b, original.aggregation):
        test_values = _logarithms(a, original.aggregation), _logarithms(b, original.aggregation)
        return Value(other.value, other.error, difference, _mean_error(contributions[1] - contributions[0]), _p_of_mean(*test_values), kept_share)
    draws = _bootstrap(b, other.aggregation) - _bootstrap(a, original.aggregation)
    return Value(other.value, other.error, difference, _spread(draws), _p_of_draws(draws), kept_share)


def _linear(a: Array, b: Array, aggregation: str) -> tuple[Array, Array] | None:
    """Return numbers, one a document, whose means are the two scores: exact for a mean, to first order for perplexities and ratios."""
    return (_contributions(a, aggregation), _contributions(b, aggregation)) if aggregation in LINEAR else None


def _contributions(items: Array, aggregation: str) -> Array:
    """Return each document's contribution to a score, to first order (the delta method)."""
    if aggregation == "mean":
        return items
    value = AGGREGATIONS[aggregation](items)
    if aggregation == "perplexity":
        return np.asarray(value - value * (items - items.mean()))
    ratio, weights = items[:, 0].sum() / items[:, 1].sum(), items[:, 1] / items[:, 1].mean()
    slope = {"ratio": 1.0, "bits_per_byte": -1 / math.log(2), "weighted_perplexity": -value}[aggregation]
    contributions: Array = value + slope * (items[:, 0] / items[:, 1].mean() - ratio * weights)
    return contributions


def _logarithms(items: Array, aggregation: str) -> Array:
    """Return the values to test: for perplexities their logarithms, which are closer to normal."""
    if aggregation == "perplexity":
        return items
    return _contributions(items, "ratio" if aggregation == "weighted_perplexity" else aggregation)


def recovery(original: Samples, other: Samples) -> float | None:
    """Return the share of the original's advantage over guessing that is left, (s - chance) / (t - chance); None where the original has none."""
    if original.chance is None or original.better != "higher":
        return None
    above = original.value - original.chance
    if above <= ABOVE_CHANCE * (original.error or 0.0) or above <= 0:
        return None
    return (other.value - original.chance) / above


def _mean_error(values: Array) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _p_of_mean(a: Array, b: Array) -> float | None:
    """Return the two-sided p of the mean difference: McNemar's exact test for right and wrong, Student's t otherwise."""
    from scipy import stats

    differences = b - a
    if len(differences) < 2:
        return None
    if not differences.any():
        return 1.0
    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        return float(stats.binomtest(int((differences > 0).sum()), int((differences != 0).sum())).pvalue)
    if np.ptp(differences) <= 1e-9 * abs(differences.mean()):
        return float(2.0 ** (1 - len(differences)))  # all differences are equal, so t would divide by zero: the sign test
    return float(stats.ttest_rel(b, a).pvalue)


def _error(values: Array, aggregation: str) -> float | None:
    if aggregation in ("stratified", "pooled"):
        return _stratified_error(values[:, 0], values[:, 1], aggregation == "pooled")
    contributions = _linear(values, values, aggregation)
    return _spread(_bootstrap(values, aggregation)) if contributions is None else _mean_error(contributions[0])


def _stratified_error(strata: Array, values: Array, by_size: bool) -> float | None:
    parts = [values[strata == stratum] for stratum in np.unique(strata)]
    weights = [len(part) / len(values) if by_size else 1 / len(parts) for part in parts]
    errors = [_mean_error(part) for part in parts]
    weighted = [weight * error for weight, error in zip(weights, errors, strict=True) if error is not None]
    return math.hypot(*weighted) if len(weighted) == len(parts) else None


def _p_of_stratified(strata: Array, differences: Array) -> float | None:
    """Return the two-sided p of the mean of the parts' mean differences: Student's t, degrees of freedom by Welch and Satterthwaite."""
    from scipy import stats

    parts = [differences[strata == stratum] for stratum in np.unique(strata)]
    if min(map(len, parts)) < 2:
        return None
    squares = np.array([part.var(ddof=1) / len(part) for part in parts])
    if not squares.any():
        return _p_of_mean(np.zeros(len(differences)), differences)
    freedom = squares.sum() ** 2 / sum(square**2 / (len(part) - 1) for square, part in zip(squares, parts, strict=True))
    mean = np.mean([part.mean() for part in parts])
    return float(2 * stats.t.sf(abs(mean) * len(parts) / math.sqrt(squares.sum()), freedom))


def _bootstrap(items: Array, aggregation: str) -> Array:
    """Return the statistic on `DRAWS` resamples of the documents, the same for every model."""
    if len(items) < 2:
        return np.full(1, np.nan)
    combine = AGGREGATIONS[aggregation] if aggregation in AGGREGATIONS else _of_lm_eval(aggregation)
    random = np.random.default_rng(0)
    return np.array([combine(items[random.integers(len(items), size=len(items))]) for _ in range(DRAWS)])


def _of_lm_eval(name: str) -> Callable[[Array], float]:
    from lm_eval.api.registry import get_aggregation

    combine = get_aggregation(name)
    return lambda items: float(combine(items.tolist()))


def _spread(draws: Array) -> float | None:
    return float(draws.std(ddof=1)) if len(draws) > 1 else None


def _p_of_draws(draws: Array) -> float | None:
    if len(draws) < 2:
        return None
    side = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (side + 1) / (len(draws) + 1)))
