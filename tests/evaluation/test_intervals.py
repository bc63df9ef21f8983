"""Bootstrap intervals: coverage by simulation, and comparison with scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from medmoe_hf.evaluation import intervals
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.evaluation.metrics import classification_metrics


def mean(values):
    return {"mean": values.mean()}


def coverage(draw, truth, metric=mean, simulations=300, **settings):
    """Share of simulated samples whose interval contains the true value."""
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(simulations):
        columns, groups = draw(generator)
        (interval,) = bootstrap(metric, *columns, groups=groups, resamples=250, seed=seed, **settings).values()
        hits += interval.low <= truth <= interval.high
    return hits / simulations


def test_intervals_of_a_mean_have_their_nominal_coverage():
    def draw(generator):
        return [generator.exponential(2.0, 80)], None

    assert 0.90 <= coverage(draw, 2.0) <= 0.98
    assert 0.73 <= coverage(draw, 2.0, simulations=150, level=0.8) <= 0.87


def test_intervals_of_an_auroc_have_their_nominal_coverage():
    def draw(generator):
        labels = np.repeat([0, 1], 40)
        positive = stats.norm.cdf(generator.normal(size=80) + labels)
        return [np.stack([1 - positive, positive], axis=1), labels], None

    def auroc(scores, labels):
        return {"auroc": classification_metrics(scores, labels)["macro_auroc"]}

    # Two normal distributions, one deviation apart.
    assert 0.90 <= coverage(draw, stats.norm.cdf(1 / math.sqrt(2)), auroc, simulations=100) <= 0.98


def test_clustered_rows_need_intervals_by_group():
    def clustered(by_group):
        def draw(generator):
            subject = np.repeat(np.arange(40), 6)
            values = generator.normal(size=40)[subject] + 0.3 * generator.normal(size=240)
            return [values], subject if by_group else None

        return draw

    assert 0.90 <= coverage(clustered(True), 0.0, simulations=200) <= 0.98
    assert coverage(clustered(False), 0.0, simulations=200) < 0.75


def test_ends_are_those_of_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=100)
    interval = bootstrap(lambda x: {"median": np.median(x)}, values, resamples=4000)["median"]
    scipys = stats.bootstrap([values], np.median, n_resamples=4000, method="percentile", rng=2).confidence_interval
    assert interval.value == np.median(values)
    assert interval.low == pytest.approx(scipys.low, abs=0.03)
    assert interval.high == pytest.approx(scipys.high, abs=0.03)


def test_rows_of_all_columns_are_drawn_together():
    columns = np.arange(50), torch.arange(50) * 2, [[3 * row, 0] for row in range(50)]
    draws = []

    def metric(one, two, three):
        assert (two == 2 * one).all()
        assert (three[:, 0] == 3 * one).all()
        draws.append(one)
        return {"first": one.mean(), "second": two.mean()}

    result = bootstrap(metric, *columns, resamples=20)
    assert len(draws) == 21
    assert all(len(drawn) == 50 for drawn in draws)
    assert len({tuple(drawn) for drawn in draws}) == 21
    # From the same resamples, so exactly twice as much.
    assert [2 * end for end in (result["first"].low, result["first"].high)] == [
        result["second"].low,
        result["second"].high,
    ]
    assert result["first"].n == 50


def test_rows_of_a_group_are_drawn_together():
    groups = np.array(["b", "a", "c", "a", "c", "c"])
    drawn = []
    result = bootstrap(lambda rows: drawn.append(rows) or {"rows": len(rows)}, np.arange(6), groups=groups)
    for rows in drawn:
        counts = np.bincount(rows, minlength=6)
        assert counts[1] == counts[3]
        assert counts[2] == counts[4] == counts[5]
        assert counts[0] + counts[1] + counts[2] == 3
    assert result["rows"] == Interval(6, 3, 9, 3, rows=6)


def test_intervals_depend_on_the_seed_only():
    values = np.random.default_rng(0).normal(size=100)
    first, same, other = (bootstrap(mean, values, resamples=100, seed=seed)["mean"] for seed in (3, 3, 4))
    assert first == same
    assert first != other


def test_undefined_resamples_are_left_out_and_counted():
    # Without the one row that is 1, the metric is not defined: (1 - 1/20)^20 = 36 % of resamples.
    values = np.eye(20)[0]
    interval = bootstrap(lambda x: {"share": x.mean() if x.any() else math.nan}, values, resamples=2000)["share"]
    assert interval.value == pytest.approx(0.05)
    assert interval.undefined / 2000 == pytest.approx(0.95**20, abs=0.04)
    assert interval.low == pytest.approx(0.05)
    nothing = bootstrap(lambda x: {"share": math.nan}, values, resamples=10)["share"]
    assert nothing.undefined == 10
    assert all(map(math.isnan, (nothing.value, nothing.low, nothing.high)))


def test_an_infinite_metric_has_an_infinite_end():
    interval = bootstrap(lambda x: {"most": x.max()}, np.array([1.0, 2.0, 3.0, np.inf]))["most"]
    assert (interval.value, interval.high) == (np.inf, np.inf)
    assert interval.low in (1.0, 2.0, 3.0)


def test_one_subject_has_no_interval():
    interval = bootstrap(mean, [1.0, 2.0, 6.0], groups=["patient"] * 3)["mean"]
    assert (interval.value, interval.n) == (3.0, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_format_of_an_interval():
    assert str(Interval(0.9021, 0.8749, 0.9312, 200)) == "0.902 [0.87, 0.93]"


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ([], {}, "at least one"),
        ([[]], {}, r"\[0\]"),
        ([[1, 2], [1]], {}, r"\[2, 1\]"),
        ([[1, 2]], {"groups": ["a"]}, r"\[2, 1\]"),
        ([[1, 2]], {"resamples": 0}, "got 0 and 0.95"),
        ([[1, 2]], {"level": 95}, "got 1000 and 95"),
    ],
)
def test_settings_out_of_range(columns, settings, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(mean, *columns, **settings)


def test_groups_are_looked_up_once_and_each_resample_is_one_call(monkeypatch):
    """A search for each group's rows in every resample would take minutes for many subjects."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 2000)
    scores = generator.dirichlet(np.ones(5), 2000)
    groups = labels * 100 + generator.integers(0, 100, 2000)
    lookups, calls = [], []

    def counted(function, calls):
        def call(*arguments):
            calls.append([len(argument) for argument in arguments])
            return function(*arguments)

        return call

    monkeypatch.setattr(intervals, "_members", counted(intervals._members, lookups))
    metric = counted(classification_metrics, calls)
    result = bootstrap(metric, scores, labels, groups=groups, resamples=20)
    assert lookups == [[2000]]
    assert len(calls) == 21
    assert calls[0] == [2000, 2000]
    assert all(interval.low < interval.value < interval.high for interval in result.values())
    assert {interval.n for interval in result.values()} == {len(set(groups.tolist()))}
