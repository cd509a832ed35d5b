"""Estimates from benchmarks and how sure they are; two results side by side.

The problems are the clusters (Miller, 2411.00640). Answers to one problem are not independent. So each problem gives
one value, the share of its answers that are right, and the standard error is that of a mean over them. (If 30
problems with 32 answers each were taken for 960 independent answers, the interval would cover the truth one time in
three.)

Intervals of accuracies are Wilson's, with a t quantile, at the number of independent answers that the standard error
amounts to. Near 0 and 1 the plain t interval covers too little. (In simulations with 30 problems, U-shaped pass
rates and 1 or 32 answers ours covers 0.94 to 0.97. Where nearly no problem is ever solved, at a mean of 0.05, it
covers 0.87 to 0.94, and plain t 0.78 to 0.87.) Two models are compared problem by problem.
"""

import json
import math
from collections import Counter
from functools import cache
from statistics import fmean, stdev

from scipy.stats import binomtest
from scipy.stats import t as student_t

# Student's t and the binomial come from scipy. Three things are written by hand. Of statsmodels, the Wilson
# interval takes a normal quantile, and no t at an effective number of answers. Its degrees of freedom by Welch
# and Satterthwaite are of two means only. It does have Holm's correction, but seven lines weigh less than a
# dependency.

POWER = 1.96 + 0.84  # standard errors that a difference must have to be seen (p < 0.05) with a chance of 80 %
WORST_SE = 0.5  # of a single problem: it says nothing of others, and no error of a mean in [0, 1] is larger

# ---------------------------------------------------------------- one model


@cache
def t_quantile(df: int) -> float:
    """The t with P(|T| <= t) = 0.95, of Student's t with `df` degrees of freedom."""
    return float(student_t.ppf(0.975, df))


def two_sided_p(t: float, df: int) -> float:
    """P(|T| >= |t|) of Student's t with `df` degrees of freedom."""
    return float(2 * student_t.sf(abs(t), df))


def wilson(mean: float, se: float, df: int, n: int) -> dict:
    """A mean in [0, 1] of `n` problems with its 95 % interval, `low` to `high`."""
    t = t_quantile(df)
    variance = max(mean * (1 - mean), 0.0)

    # So many independent answers would have this standard error. If nothing varied, a problem counts as one.
    size = n
    if se > 0 and variance > 0:
        size = variance / se**2

    shrink = 1 + t * t / size
    middle = (mean + t * t / (2 * size)) / shrink
    half = t * math.sqrt(variance / size + (t / (2 * size)) ** 2) / shrink
    return {"mean": mean, "se": se, "low": max(middle - half, 0.0), "high": min(middle + half, 1.0), "n": n}


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of `values`, one for each problem."""
    if len(values) < 2:
        return WORST_SE
    return stdev(values) / math.sqrt(len(values))


def over_problems(values: list[float]) -> dict:
    """Mean, standard error and interval of one value in [0, 1] for each problem."""
    n = len(values)
    return wilson(fmean(values), standard_error(values), max(n - 1, 1), n)


def pooled_error(parts: list[dict]) -> tuple[float, int]:
    """Standard error of the mean of independent estimates, and its degrees of freedom.

    The degrees of freedom are Welch and Satterthwaite's.
    """
    total = sum(part["se"] ** 2 for part in parts)
    spread = sum(part["se"] ** 4 / max(part["n"] - 1, 1) for part in parts)
    se = math.sqrt(total) / len(parts)
    if spread == 0:
        return se, min(part["n"] for part in parts)
    return se, max(int(total**2 / spread), 1)


def macro_mean(benchmarks: list[dict]) -> dict:
    """Accuracy, tokens and truncated share over benchmarks, each of which counts once."""
    averages = [benchmark["avg"] for benchmark in benchmarks]
    se, df = pooled_error(averages)
    mean = fmean(average["mean"] for average in averages)
    problems = sum(average["n"] for average in averages)
    return {
        "avg": wilson(mean, se, df, problems),
        "tokens": fmean(benchmark["tokens"] for benchmark in benchmarks),
        "truncated": fmean(benchmark["truncated"] for benchmark in benchmarks),
    }


def pass_at_k(k: int, n: int, right: int) -> float:
    """Chance that among `k` of `n` answers, of which `right` are right, there is a right one.

    This is equation 1 of 2107.03374, and unbiased. ValueError if k is not from 1 to n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} answers; it needs {k} or more")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_vote(right: list[bool], spellings: list[str]) -> float:
    """Chance that a commonest answer is right, where ties are drawn by lot.

    All right answers are one answer, however they are spelt. No answer ("") is no vote.
    """
    votes_for_right = sum(right)
    votes_for_wrong: Counter = Counter()
    for is_right, spelling in zip(right, spellings, strict=True):
        if not is_right and spelling:
            votes_for_wrong[spelling] += 1

    most = max(votes_for_wrong.values(), default=0)
    if votes_for_right == 0 or votes_for_right < most:
        return 0.0
    rivals = sum(votes == votes_for_right for votes in votes_for_wrong.values())
    return 1 / (1 + rivals)


def accuracies(right: list[list[bool]], spellings: list[list[str]], pass_at: tuple[int, ...]) -> dict:
    """What results.json says of the accuracy on a benchmark.

    `right` and `spellings` have one list for each problem, with as many answers each; "" is no answer. `pass_at` has
    each k of pass@k.
    """
    # how much avg@k would vary with the seed: less than its error, which is about other problems too
    seed_sd = None
    if len(right[0]) > 1:
        accuracy_of_sample = [fmean(sample) for sample in zip(*right, strict=True)]
        seed_sd = standard_error(accuracy_of_sample)

    # one value for each problem: whether one of k is right, whether the vote is
    passes = {}
    for k in pass_at:
        passes[str(k)] = over_problems([pass_at_k(k, len(group), sum(group)) for group in right])
    votes = [majority_vote(*group) for group in zip(right, spellings, strict=True)]
    return {
        "avg": over_problems([fmean(group) for group in right]),
        "seed_sd": seed_sd,
        "pass": passes,
        "majority": over_problems(votes),
    }


# ---------------------------------------------------------------- two models


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p value, where `b` problems are solved by one model only and `c` by the other only."""
    if b + c == 0:
        return 1.0
    return float(binomtest(b, b + c, 0.5).pvalue)


def difference(mean: float, se: float, df: int, n: int) -> dict:
    """A mean paired difference over `n` problems, with its t interval (`low` to `high`) and p value.

    `needed` is how many problems of this kind show a difference as large; None where there is no difference. `seen`
    is the smallest difference that `n` problems show. "Show" means: p < 0.05 in 80 % of comparisons.
    """
    half = t_quantile(df) * se
    if se > 0:
        p = two_sided_p(mean / se, df)
    else:
        p = float(mean == 0)
    needed = None
    if mean != 0:
        needed = max(math.ceil(n * (POWER * se / mean) ** 2), 2)
    return {
        "mean": mean,
        "se": se,
        "n": n,
        "p": p,
        "needed": needed,
        "seen": POWER * se,
        "low": mean - half,
        "high": mean + half,
    }


def paired_difference(a: list[list[int]], b: list[list[int]]) -> dict:
    """`b` minus `a`: scores of the answers to the same problems, one list for each problem.

    With one answer to each problem the p value is McNemar's: exact, and more cautious than the interval.
    """
    gains = [fmean(after) - fmean(before) for before, after in zip(a, b, strict=True)]
    n = len(gains)
    result = difference(fmean(gains), standard_error(gains), max(n - 1, 1), n)
    if all(len(scores) == 1 for scores in a + b):
        result["p"] = mcnemar(gains.count(-1), gains.count(1))
    return result


def problem_ids(results: dict) -> dict[str, list[str]]:
    """The ids of the problems of each benchmark in `results`."""
    return {name: benchmark["ids"] for name, benchmark in results["benchmarks"].items()}


def shared_benchmarks(a: dict[str, list[str]], b: dict[str, list[str]]) -> list[str]:
    """The benchmarks that are in both, given the ids of their problems.

    ValueError if no benchmark is in both, or if one of them has other problems in `a` than in `b`.
    """
    names = [name for name in a if name in b]
    if not names:
        raise ValueError(f"no benchmark is in both results: {', '.join(a)}; {', '.join(b)}")
    for name in names:
        mine = Counter(a[name])
        other = Counter(b[name])
        if mine != other:
            missing = (mine - other).total()
            strange = (other - mine).total()
            raise ValueError(
                f"{name}: {missing} of {len(a[name])} problems are not among the {len(b[name])} of the other "
                f"results, and {strange} of those not here; compare results on the same problems"
            )
    return names


def add_aes(results: dict, base: dict) -> None:
    """Puts the accuracy-efficiency score against `base` into `results` (2501.12570).

    It is the share of tokens saved, plus 3 x the relative gain in accuracy, or minus 5 x the relative loss.
    """
    names = shared_benchmarks(problem_ids(results), problem_ids(base))
    pairs = [(results["benchmarks"][name], base["benchmarks"][name]) for name in names]

    # the macro mean has a score where `base` knows all of its benchmarks
    if len(names) == len(results["benchmarks"]):
        pairs.append((results["macro"], macro_mean([before for _, before in pairs])))

    for now, before in pairs:
        if before["avg"]["mean"] == 0 or before["tokens"] == 0:
            continue  # nothing can be said relative to nothing
        gain = now["avg"]["mean"] / before["avg"]["mean"] - 1
        weight = 3 if gain >= 0 else 5
        now["aes"] = 1 - now["tokens"] / before["tokens"] + weight * gain


# ---------------------------------------------------------------- for people


def read_results(path: str) -> dict:
    """The results.json at `path`. FileNotFoundError if there is none, ValueError if it is something else."""
    # eval.py writes more than this; what is needed here tells its files from others
    needed = {"avg", "ids", "scores", "tokens"}
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        whole = all(needed <= benchmark.keys() for benchmark in results["benchmarks"].values())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no results at {path}; give a results.json of eval.py") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} holds no results; give a results.json of eval.py")
    return results


def percent(estimate: dict | None) -> str:
    """The mean of `estimate` in per cent; nothing where there is no estimate."""
    if estimate is None:
        return ""
    return f"{estimate['mean']:.1%}"


def aligned(cells: list[str], widths: list[int]) -> str:
    """A line of a table: each cell on the right of its column, or on the left where the width is negative."""
    line = ""
    for cell, width in zip(cells, widths, strict=True):
        if width > 0:
            line += cell.rjust(width)
        else:
            line += cell.ljust(-width)
    return line


def results_table(results: dict) -> str:
    """Accuracies in per cent with their 95 % intervals, a line for each benchmark."""
    rows = dict(results["benchmarks"])
    ks = sorted({int(k) for row in rows.values() for k in row["pass"]})
    if len(rows) > 1:
        rows["macro mean"] = results["macro"]

    # the header
    name_width = max(len(name) for name in rows)
    widths = [-name_width, 10, 4, 8, -18, *[8] * len(ks), 8, 9, 9, 7]
    passes = [f"pass@{k}" for k in ks]
    header = ["", "problems", "k", "avg@k", "  95 % interval", *passes, "maj@k", "tokens", "cut off", "AES"]
    lines = [aligned(header, widths)]

    # a line each; the macro mean has no number of samples, no pass@k and no vote
    for name, row in rows.items():
        average = row["avg"]
        cells = [name, str(average["n"]), str(row.get("samples", "")), percent(average)]
        cells.append(f"  [{average['low']:.1%}, {average['high']:.1%}]")
        for k in ks:
            cells.append(percent(row.get("pass", {}).get(str(k))))
        cells.append(percent(row.get("majority")))
        cells.append(f"{row['tokens']:.0f}")
        cells.append(f"{row['truncated']:.1%}")
        cells.append(f"{row['aes']:.2f}" if "aes" in row else "-")
        lines.append(aligned(cells, widths))
    return "\n".join(lines)


def scores_by_problem(benchmark: dict) -> list[list[int]]:
    """The scores in an order that depends on the problems alone."""
    ids = benchmark["ids"]
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    return [benchmark["scores"][i] for i in order]


def notes_on(a: dict, b: dict, names: list[str]) -> list[str]:
    """What else than the model differs between two results: a line each."""
    notes = []

    # the settings of the two runs
    for key, value in a["settings"].items():
        other = b["settings"].get(key)
        if key not in ("model", "weights") and value != other:
            notes.append(f"note: {key} {value} in A, {other} in B")

    # what was evaluated
    for name in names:
        reward = a["benchmarks"][name].get("reward")
        other = b["benchmarks"][name].get("reward")
        if reward != other:
            notes.append(f"note: {name} was scored by {reward} in A, {other} in B")
    for name in sorted(a["benchmarks"].keys() ^ b["benchmarks"].keys()):
        notes.append(f"note: {name} is in one of them only")
    return notes


LEGEND = """\
needed: problems of this kind with which such a difference is seen (p < 0.05) in 80 % of comparisons
seen: the smallest difference that these problems show as often; p: of each row for itself"""


def compare_results(a: dict, b: dict, paths: tuple[str, str]) -> str:
    """What `b` gains over `a`, problem by problem, in points of per cent.

    ValueError if they have no benchmark in common, or other problems in one.
    """
    # each benchmark that both have
    names = shared_benchmarks(problem_ids(a), problem_ids(b))
    found = {}
    for name in names:
        before = scores_by_problem(a["benchmarks"][name])
        after = scores_by_problem(b["benchmarks"][name])
        found[name] = paired_difference(before, after)

    # the macro mean of the differences
    if len(names) > 1:
        parts = list(found.values())
        se, df = pooled_error(parts)
        mean = fmean(part["mean"] for part in parts)
        found["macro mean"] = difference(mean, se, df, sum(part["n"] for part in parts))

    # as a table, in points of per cent
    lines = [f"A {paths[0]}", f"B {paths[1]}", *notes_on(a, b, names)]
    name_width = max(len(name) for name in found)
    widths = [-name_width, 10, 8, -18, 8, 10, 8]
    lines.append(aligned(["", "problems", "B - A", "  95 % interval", "p", "needed", "seen"], widths))
    for name, gain in found.items():
        cells = [name, str(gain["n"]), f"{100 * gain['mean']:+.1f}"]
        cells.append(f"  [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]")
        cells.append(f"{gain['p']:.3g}")
        cells.append(str(gain["needed"] or "-"))
        cells.append(f"{100 * gain['seen']:.1f}")
        lines.append(aligned(cells, widths))
    return "\n".join([*lines, LEGEND])


# ---------------------------------------------------------------- matched seeds


def by_seed(values: list[float]) -> dict:
    """Mean of paired differences, one for each seed, with 95 % interval and two-sided p value (Student's t).

    The mean of a single difference has no interval.
    """
    # neither one seed nor seeds that all agree give Student's t anything to work with
    n = len(values)
    mean = fmean(values)
    if n < 2:
        return {"n": n, "mean": mean, "low": None, "high": None, "p": 1.0}
    se = standard_error(values)
    if se == 0:
        return {"n": n, "mean": mean, "low": mean, "high": mean, "p": float(mean == 0)}

    half = t_quantile(n - 1) * se
    return {"n": n, "mean": mean, "low": mean - half, "high": mean + half, "p": two_sided_p(mean / se, n - 1)}


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: corrected p values in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0  # so far: a corrected p value is at least that of the one before
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def correct(tests: list[dict]) -> None:
    """Puts Holm's corrected p value, `p_holm`, into each of the tests that `by_seed` has made."""
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p


# ---------------------------------------------------------------- results files


def rounded(value):
    """`value` with four digits, which are enough for a file. NaN, which JSON does not know, becomes None."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return float(f"{value:.4g}")
