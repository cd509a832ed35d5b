"""Estimates from benchmarks and how sure they are; two results side by side.

The problems are the clusters (Miller, 2411.00640): answers to one problem are not independent, so each problem gives
one value, the share of its answers that are right, and the standard error is that of a mean over problems. (30 problems
with 32 answers each, taken for 960 independent ones, would give an interval that covers the truth one time in three.)
Intervals of accuracies are Wilson's, at the number of independent answers that the standard error amounts to, with a t
quantile: near 0 and 1 the plain t interval covers too little. (Simulated, 30 problems, U-shaped pass rates, 1 or 32
answers: 0.94 to 0.97; where nearly no problem is ever solved, mean 0.05: 0.87 to 0.94, and plain t 0.78 to 0.87.) Two
models are compared problem by problem.
"""

import json
import math
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

POWER = 1.96 + 0.84  # standard errors that a difference must have to be seen (p < 0.05) with a chance of 80 %

# ---------------------------------------------------------------- one model


def t_within(t: float, df: int) -> float:
    """P(|T| <= t), t >= 0, of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7)."""
    theta, odd = math.atan(t / math.sqrt(df)), df % 2
    term, total = 1.0, 0.0
    for j in range(df // 2):
        total += term
        term *= math.cos(theta) ** 2 * (2 * j + 1 + odd) / (2 * j + 2 + odd)
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    return math.sin(theta) * total


@cache
def t_quantile(df: int) -> float:
    """The t with P(|T| <= t) = 0.95."""
    low, high = 0.0, 20.0  # 12.7 for one degree of freedom, and less for more
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < 0.95 else (low, middle)
    return high


def proportion(mean: float, se: float, df: int, n: int) -> dict:
    """A mean in [0, 1] of `n` problems with its interval. If nothing varied, each problem counts as one answer."""
    t, variance = t_quantile(df), max(mean * (1 - mean), 0.0)
    size = variance / se**2 if se and variance else n
    middle = (mean + t * t / (2 * size)) / (1 + t * t / size)
    half = t / (1 + t * t / size) * math.sqrt(variance / size + (t / (2 * size)) ** 2)
    return {"mean": mean, "se": se, "low": max(middle - half, 0.0), "high": min(middle + half, 1.0), "n": n}


def over_problems(values: list[float]) -> dict:
    """Mean, standard error and interval of one value in [0, 1] for each problem."""
    n = len(values)
    se = stdev(values) / math.sqrt(n) if n > 1 else 0.5  # one problem says nothing of others, and no error is larger
    return proportion(fmean(values), se, max(n - 1, 1), n)


def pooled(parts: list[dict]) -> tuple[float, int]:
    """Standard error of the mean of independent estimates, and its degrees of freedom (Welch and Satterthwaite)."""
    total = sum(part["se"] ** 2 for part in parts)
    spread = sum(part["se"] ** 4 / max(part["n"] - 1, 1) for part in parts)
    return math.sqrt(total) / len(parts), max(int(total**2 / spread), 1) if spread else min(p["n"] for p in parts)


def macro(benchmarks: list[dict]) -> dict:
    """Means over benchmarks, each of which counts once."""
    averages = [benchmark["avg"] for benchmark in benchmarks]
    average = proportion(fmean(a["mean"] for a in averages), *pooled(averages), sum(a["n"] for a in averages))
    return {"avg": average} | {key: fmean(b[key] for b in benchmarks) for key in ("tokens", "truncated")}


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that among `k` of `n` answers, of which `right` are right, there is a right one (2107.03374, eq. 1)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} answers; it needs {k} or more")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def vote(right: list[bool], spellings: list[str]) -> float:
    """Chance that a commonest answer is right, ties drawn by lot. All right answers are one, however they are spelt; no
    answer ("") is no vote."""
    votes = Counter(True if ok else answer for ok, answer in zip(right, spellings, strict=True) if ok or answer)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return (True in winners) / max(len(winners), 1)


# ---------------------------------------------------------------- two models


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p value, where `b` problems are solved by the one model only and `c` by the other only."""
    return min(1.0, 2 * sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c))


def difference(mean: float, se: float, df: int, n: int) -> dict:
    """A mean paired difference over `n` problems, with t interval and p value. `needed`: how many problems of this kind
    show one as large, `seen`: the smallest that `n` problems show, both with p < 0.05 in 80 % of comparisons."""
    half = t_quantile(df) * se
    p = 1 - t_within(abs(mean) / se, df) if se else float(mean == 0)
    needed = max(math.ceil(n * (POWER * se / mean) ** 2), 2) if mean else None
    interval = {"low": mean - half, "high": mean + half}
    return {"mean": mean, "se": se, "n": n, "p": p, "needed": needed, "seen": POWER * se} | interval


def paired(a: list[list[int]], b: list[list[int]]) -> dict:
    """`b` minus `a`: scores of the answers to the same problems, one list for each problem. With one answer each the p
    value is McNemar's, which is exact, and more cautious than the interval."""
    d = [fmean(y) - fmean(x) for x, y in zip(a, b, strict=True)]
    result = difference(fmean(d), stdev(d) / math.sqrt(len(d)) if len(d) > 1 else 0.5, max(len(d) - 1, 1), len(d))
    if all(len(scores) == 1 for scores in a + b):
        result["p"] = mcnemar(d.count(-1), d.count(1))
    return result


def same_problems(name: str, mine: list[str], other: list[str]) -> None:
    """ValueError if results of benchmark `name` cannot be compared."""
    first, second = Counter(mine), Counter(other)
    if first != second:
        raise ValueError(
            f"{name}: {(first - second).total()} of {len(mine)} problems are not among the {len(other)} of the "
            f"other results, and {(second - first).total()} of those not here; compare results on the same problems"
        )


def ids(results: dict) -> dict[str, list[str]]:
    return {name: benchmark["ids"] for name, benchmark in results["benchmarks"].items()}


def common(a: dict[str, list[str]], b: dict[str, list[str]]) -> list[str]:
    """Benchmarks that are in both, given the ids of their problems. ValueError if there are none or they differ."""
    names = [name for name in a if name in b]
    if not names:
        raise ValueError(f"no benchmark is in both results: {', '.join(a)}; {', '.join(b)}")
    for name in names:
        same_problems(name, a[name], b[name])
    return names


def add_aes(results: dict, base: dict) -> None:
    """Accuracy-efficiency score (2501.12570): 1 x tokens saved + 3 x gain or - 5 x loss in accuracy, all relative."""
    names = common(ids(results), ids(base))
    pairs = [(results["benchmarks"][name], base["benchmarks"][name]) for name in names]
    if len(names) == len(results["benchmarks"]):
        pairs.append((results["macro"], macro([was for _, was in pairs])))
    for now, was in pairs:
        if was["avg"]["mean"] and was["tokens"]:
            gain = now["avg"]["mean"] / was["avg"]["mean"] - 1
            now["aes"] = 1 - now["tokens"] / was["tokens"] + (3 if gain >= 0 else 5) * gain


# ---------------------------------------------------------------- for people


def read(path: str) -> dict:
    """A results.json."""
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        if all({"avg", "ids", "scores", "tokens"} <= benchmark.keys() for benchmark in results["benchmarks"].values()):
            return results
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no results at {path}; give a results.json of eval.py") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} holds no results; give a results.json of eval.py")


def table(results: dict) -> str:
    """Accuracies in per cent with their 95 % intervals."""
    rows = dict(results["benchmarks"])
    ks = sorted({int(k) for row in rows.values() for k in row["pass"]})
    rows |= {"macro mean": results["macro"]} if len(rows) > 1 else {}
    wide = max(map(len, rows))
    header = f"{'':{wide}}{'problems':>10}{'k':>4}{'avg@k':>8}  {'95 % interval':16}"
    lines = [header + "".join(f"{f'pass@{k}':>8}" for k in ks) + f"{'maj@k':>8}{'tokens':>9}{'cut off':>9}{'AES':>7}"]
    for name, row in rows.items():
        avg = row["avg"]
        interval = f"[{avg['low']:.1%}, {avg['high']:.1%}]"
        line = f"{name:{wide}}{avg['n']:>10}{row.get('samples', ''):>4}{avg['mean']:8.1%}  {interval:16}"
        means = [row.get("pass", {}).get(str(k)) for k in ks] + [row.get("majority")]
        line += "".join(f"{value['mean']:8.1%}" if value else f"{'':8}" for value in means)
        aes = f"{row['aes']:.2f}" if "aes" in row else "-"
        lines.append(f"{line}{row['tokens']:9.0f}{row['truncated']:9.1%}{aes:>7}")
    return "\n".join(lines)


def by_problem(benchmark: dict) -> list[list[int]]:
    """Scores in an order that depends on the problems alone."""
    return [benchmark["scores"][i] for i in sorted(range(len(benchmark["ids"])), key=benchmark["ids"].__getitem__)]


def compare(a: dict, b: dict, paths: list[str]) -> str:
    """What `b` gains over `a`, problem by problem, in points of per cent."""
    names, found = common(ids(a), ids(b)), {}
    for name in names:
        found[name] = paired(*(by_problem(results["benchmarks"][name]) for results in (a, b)))
    if len(names) > 1:
        parts = list(found.values())
        mean = fmean(part["mean"] for part in parts)
        found["macro mean"] = difference(mean, *pooled(parts), sum(part["n"] for part in parts))
    lines = [f"A {paths[0]}", f"B {paths[1]}"]
    lines += [f"note: {key} {x} in A, {b['settings'].get(key)} in B" for key, x in a["settings"].items()
              if key not in ("model", "weights") and x != b["settings"].get(key)]  # fmt: skip
    both = {name: (a["benchmarks"][name], b["benchmarks"][name]) for name in names}
    lines += [f"note: {name} was scored by {x.get('reward')} in A, {y.get('reward')} in B"
              for name, (x, y) in both.items() if x.get("reward") != y.get("reward")]  # fmt: skip
    lines += [f"note: {name} is in one of them only" for name in a["benchmarks"].keys() ^ b["benchmarks"].keys()]
    wide = max(map(len, found))
    lines += [f"{'':{wide}}{'problems':>10}{'B - A':>8}  {'95 % interval':16}{'p':>8}{'needed':>10}{'seen':>8}"]
    for name, d in found.items():
        interval = f"[{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        lines.append(
            f"{name:{wide}}{d['n']:10}{100 * d['mean']:+8.1f}  {interval:16}{d['p']:8.3g}{d['needed'] or '-':>10}"
            f"{100 * d['seen']:8.1f}"
        )
    return "\n".join(lines) + (
        "\nneeded: problems of this kind with which such a difference is seen (p < 0.05) in 80 % of comparisons"
        "\nseen: the smallest difference that these problems show as often; p: of each row for itself"
    )


# ---------------------------------------------------------------- matched seeds


def by_seed(values: list[float]) -> dict:
    """Mean of paired differences with its 95 % interval and two-sided p value (Student's t); of one, the mean alone."""
    n, mean = len(values), fmean(values)
    if n < 2:
        return {"n": n, "mean": mean, "low": None, "high": None, "p": 1.0}
    if not (se := stdev(values) / math.sqrt(n)):
        return {"n": n, "mean": mean, "low": mean, "high": mean, "p": 1.0 if mean == 0 else 0.0}
    half = t_quantile(n - 1) * se
    p = 1 - t_within(abs(mean) / se, n - 1)
    return {"n": n, "mean": mean, "low": mean - half, "high": mean + half, "p": p}


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: corrected p values in the order given."""
    corrected, most = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = most
    return corrected


# ---------------------------------------------------------------- results files


def rounded(value):
    """Four digits are enough for a file; NaN, which JSON does not know, is None."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return (None if math.isnan(value) else float(f"{value:.4g}")) if isinstance(value, float) else value


def commit() -> str:
    """Of this code; empty outside of a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:  # no git
        return ""
    return done.stdout.strip()
