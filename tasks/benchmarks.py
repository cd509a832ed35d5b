r"""Six maths benchmarks, and files like them: what is asked and what is right.

    aime24, aime25   30 problems each, 32 answers to each: golds are integers ("025", `336^\circ`)
    amc23            the 40 of 2023 that math-ai/amc23 has, 32 answers: integers (142.0). (Another AMC23 has 83.)
    math500          500, 4 answers
    minerva          272, 4 answers. Its golds are rounded, but no tolerance is stated: exact, so scores are a floor
    olympiad         674 of OlympiadBench (text, English), 4 answers. Several answers must all match, in any order;
                     where the column `error` states a tolerance, plain numbers may be off by so much

Where the gold is a list (some copies of Minerva), one member must match. All else is decided by `reward.py`. Benchmarks
are pinned to revisions of the hub that several public projects pin (taken from them, not compared with the hub by us).
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import reward
from tasks import data, tiny


@dataclass(frozen=True)
class Problem:
    """What is asked, and what counts as right."""

    text: str | list[dict]
    golds: tuple[str, ...]  # one of them must match
    tolerance: float = 0.0  # plain numbers may be off by this

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps([self.text, self.golds, self.tolerance]).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- rows in each format become problems


def plain(rows: list[dict], where: str, problem: str | None = None, answer: str | None = None) -> list[Problem]:
    """MATH-500, Minerva and local files. ValueError names the row or column that is wrong."""
    texts = [text for text, _ in data.from_rows(rows, where, problem, answer)]
    column = data.pick_column(rows[0], answer, data.ANSWER_COLUMNS, "--answer-column", where)
    lists = [row[column] if isinstance(row[column], list) else [row[column]] for row in rows]
    return [
        Problem(text, tuple(filter(None, map(data.final_answer, golds))))
        for text, golds in zip(texts, lists, strict=True)
    ]


def integers(rows: list[dict], where: str, problem: str | None = None, answer: str | None = None) -> list[Problem]:
    """AIME and AMC."""
    problems = plain(rows, where, problem, answer)
    for n, one in enumerate(problems):
        gold = re.sub(r"\^\{?\\circ\}?|[$\s]", "", one.golds[0])
        if not re.fullmatch(r"-?\d+(\.0*)?", gold):
            raise ValueError(f"{where} row {n + 1}: the answer {gold!r} is no integer, as all of this benchmark are")
        problems[n] = Problem(one.text, (str(int(gold.partition(".")[0])),))
    return problems


def olympiad(rows: list[dict], where: str, problem: str | None = None, answer: str | None = None) -> list[Problem]:
    """OlympiadBench: `$69$,$84$` may be one string of the list; of several tolerances the smallest counts."""
    problems = plain(rows, where, problem, answer or "final_answer")
    for n, (row, one) in enumerate(zip(rows, problems, strict=True)):
        text = "\n".join(filter(None, (row.get("context"), one.text)))
        errors = [float(error) for error in str(row.get("error") or "").split(",") if error.strip()]
        problems[n] = Problem(text, (", ".join(one.golds).replace("$", ""),), min(errors, default=0.0))
    return problems


# ---------------------------------------------------------------- where they come from


@dataclass(frozen=True)
class Benchmark:
    parse: Callable
    size: int  # problems
    samples: int  # answers to each of them
    hub: str
    config: str | None
    split: str
    revision: str


MATH500, MINERVA = "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "ee46ddc498933b1977577953250ca5c66be64f96"
AIME24, AIME25 = "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "563bb8404243c5f09de6ec262f2db674fe5bce9b"
AMC23, OLYMPIAD = "80815d37005feb82cd7f8fbc6901d5d3eff43057", "91184b52131e7fc9455fef848035173aea8cc01a"
BENCHMARKS = {
    "aime24": Benchmark(integers, 30, 32, "HuggingFaceH4/aime_2024", None, "train", AIME24),
    "aime25": Benchmark(integers, 30, 32, "math-ai/aime25", None, "test", AIME25),
    "amc23": Benchmark(integers, 40, 32, "math-ai/amc23", None, "test", AMC23),
    "math500": Benchmark(plain, 500, 4, "HuggingFaceH4/MATH-500", None, "test", MATH500),
    "minerva": Benchmark(plain, 272, 4, "math-ai/minervamath", None, "test", MINERVA),
    "olympiad": Benchmark(olympiad, 674, 4, "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", OLYMPIAD),
}


def load(name: str, revisions: dict[str, str], columns: tuple = (None, None)) -> tuple[str, list[Problem], dict]:
    """Short name, problems and source of `aime24`, of a copy of it `aime24=FILE`, of `FILE`, or of `embedded`."""
    known, _, copy = name.partition("=")
    if name == "embedded":
        return name, [Problem(text, (gold,)) for text, gold in tiny.problems("digits", tiny.HELD_OUT)[1]], {}
    if known not in BENCHMARKS and Path(name).suffix:
        return Path(name).stem, plain(data.read_rows(name), name, *columns), {"file": name}
    if known not in BENCHMARKS:
        names = ", ".join(BENCHMARKS)
        raise ValueError(f"no benchmark {name!r}; choose from {names}, embedded, or name a .jsonl or other data file")
    benchmark = BENCHMARKS[known]
    if copy:
        problems, source = benchmark.parse(data.read_rows(copy), copy, *columns), {"file": copy}
    else:
        source = {key: getattr(benchmark, key) for key in ("hub", "config", "split", "revision")}
        source["revision"] = revisions.get(known, benchmark.revision)
        rows = list(data.fetch(**source, copy=f"--benchmarks {known}=FILE.jsonl"))
        problems = benchmark.parse(rows, benchmark.hub)
    if len(problems) != benchmark.size:
        print(f"note: {known} has {benchmark.size} problems, but here are {len(problems)}", file=sys.stderr)
    return known, problems, source


# ---------------------------------------------------------------- what is right


def score(responses: list[str], problems: list[Problem], grade: Callable) -> list[float]:
    """Best reward of each response over the golds of its problem; 1 if it is within the tolerance."""
    pairs = [(i, gold) for i, problem in enumerate(problems) for gold in problem.golds]
    rewards = grade([responses[i] for i, _ in pairs], [gold for _, gold in pairs])
    best = [-math.inf] * len(responses)
    for (i, gold), value in zip(pairs, rewards, strict=True):
        tolerance = problems[i].tolerance
        best[i] = max(best[i], 1.0 if tolerance and near(responses[i], gold, tolerance) else float(value))
    return best


def near(response: str, gold: str, tolerance: float) -> bool:
    """Are the plain numbers (12, -0.5, 3/4) in the box, from small to large, within `tolerance` of the gold's?"""
    lists = []
    for text in (reward.boxed(response) or "", gold):
        parts = [re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", part.strip(" $")) for part in text.split(",")]
        if not all(re.fullmatch(r"-?\d{1,30}(\.\d{1,30}|/[1-9]\d{0,30})?", part) for part in parts):
            return False
        lists.append(sorted(map(Fraction, parts)))
    pairs = zip(*lists, strict=False)
    return len(lists[0]) == len(lists[1]) and all(abs(x - y) <= Fraction(str(tolerance)) for x, y in pairs)
