r"""Six maths benchmarks, and files like them: what is asked and what is right.

    aime24, aime25   30 problems each, 32 answers to each. Golds are integers ("025", `336^\circ`).
    amc23            the 40 of 2023 that math-ai/amc23 has, 32 answers. Integers (142.0). Another AMC23 has 83.
    math500          500, 4 answers
    minerva          272, 4 answers. Its golds are rounded, but it states no tolerance. They are taken as exact,
                     so that scores are a floor.
    olympiad         674 of OlympiadBench (text, English), 4 answers. Several answers must all match, in any
                     order. Where the column `error` states a tolerance, plain numbers may be off by so much.

Where the gold is a list (some copies of Minerva), one member must match. Benchmarks are pinned to revisions of the
hub that several public projects pin. (They are those projects' word; we have not compared them with the hub.)
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from support.config import BOUNDS, GYM, meant, scorer_of
from tasks import data, gym, own, tiny

MOST_SAMPLES = BOUNDS["answers_per_prompt"][1]  # answers to a problem, as in training


@dataclass(frozen=True)
class Problem:
    """What is asked, and what counts as right."""

    text: str | list[dict]  # plain text, or chat messages
    golds: tuple[str, ...]  # one of them must match
    tolerance: float = 0.0  # plain numbers may be off by this
    gold: object = field(default=None, compare=False)  # for a reward of the user's: as it stands in the data
    row: dict | None = field(default=None, compare=False)  # for the same: where it came from

    @property
    def id(self) -> str:
        """The same for equal problems, and for no others."""
        content = json.dumps([self.text, self.golds, self.tolerance])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- rows in each format become problems


def plain(rows: list[dict], where: str, problem_column=None, answer_column=None, any_gold=False) -> list[Problem]:
    """Problems of MATH-500, Minerva and local files.

    `where` names the rows in messages. The columns are found by themselves if they have usual names. any_gold: for a
    reward of the user's, which takes golds of any kind, or none. ValueError says which row or column is wrong.
    """
    pairs = data.from_rows(rows, where, problem_column, answer_column, keep="any gold" if any_gold else "row")
    if any_gold:
        return [Problem(text, (answer,), 0.0, gold, row) for text, answer, gold, row in pairs]
    column = data.pick_column(rows[0], answer_column, data.ANSWER_COLUMNS, "--answer-column", where)
    problems = []
    for row, (text, _, gold, _) in zip(rows, pairs, strict=True):
        # the gold is one answer, or a list of which one member must match
        values = row[column]
        if not isinstance(values, list):
            values = [values]
        golds = [data.final_answer(value) for value in values]
        problems.append(Problem(text, tuple(filter(None, golds)), 0.0, gold, row))
    return problems


def integers(rows: list[dict], where: str, problem_column=None, answer_column=None) -> list[Problem]:
    """Problems of AIME and AMC. ValueError names a row whose gold is no integer."""
    as_texts = plain(rows, where, problem_column, answer_column)
    problems = []
    for n, problem in enumerate(as_texts, 1):
        gold = re.sub(r"\^\{?\\circ\}?|[$\s]", "", problem.golds[0])  # 336^\circ is 336
        if not re.fullmatch(r"-?\d+(\.0*)?", gold):
            what = f"the answer {gold!r} is no integer, as all of this benchmark are"
            raise ValueError(f"{where} row {n}: {what}")
        whole = int(gold.partition(".")[0])
        problems.append(replace(problem, golds=(str(whole),)))
    return problems


def olympiad(rows: list[dict], where: str, problem_column=None, answer_column=None) -> list[Problem]:
    """Problems of OlympiadBench, of which several answers are one gold, as all of them must match."""
    separate = plain(rows, where, problem_column, answer_column or "final_answer")
    problems = []
    for row, problem in zip(rows, separate, strict=True):
        # some problems come with a text that several of them share
        text = problem.text
        if row.get("context"):
            text = f"{row['context']}\n{text}"

        # `$69$,$84$` may be one string of the list
        gold = ", ".join(problem.golds).replace("$", "")

        # of several tolerances the smallest counts
        errors = str(row.get("error") or "").split(",")
        tolerances = [float(error) for error in errors if error.strip()]
        problems.append(replace(problem, text=text, golds=(gold,), tolerance=min(tolerances, default=0.0)))
    return problems


# ---------------------------------------------------------------- where they come from


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is, and how it is run."""

    parse: Callable  # makes problems of its rows
    size: int  # problems
    samples: int  # answers to each of them
    hub: str
    config: str | None
    split: str
    revision: str


AIME24 = "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
AIME25 = "563bb8404243c5f09de6ec262f2db674fe5bce9b"
AMC23 = "80815d37005feb82cd7f8fbc6901d5d3eff43057"
MATH500 = "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
MINERVA = "ee46ddc498933b1977577953250ca5c66be64f96"
OLYMPIAD = "91184b52131e7fc9455fef848035173aea8cc01a"
BENCHMARKS = {
    "aime24": Benchmark(integers, 30, 32, "HuggingFaceH4/aime_2024", None, "train", AIME24),
    "aime25": Benchmark(integers, 30, 32, "math-ai/aime25", None, "test", AIME25),
    "amc23": Benchmark(integers, 40, 32, "math-ai/amc23", None, "test", AMC23),
    "math500": Benchmark(plain, 500, 4, "HuggingFaceH4/MATH-500", None, "test", MATH500),
    "minerva": Benchmark(plain, 272, 4, "math-ai/minervamath", None, "test", MINERVA),
    "olympiad": Benchmark(olympiad, 674, 4, "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", OLYMPIAD),
}


EMBEDDED = {"embedded": "digits", "embedded-columns": "columns", "embedded-none": "none"}  # and their --sharing


def load(name: str, revisions: dict[str, str], columns=(None, None), any_gold=False) -> tuple[str, list[Problem], dict]:
    """Short name, problems and source of `aime24`, of its copy `aime24=FILE`, of `FILE`, of the held-out problems of
    `task.py` or `gym:NAME`, or of `embedded`, `embedded-columns` and `embedded-none`.

    `revisions` (name -> hash) replaces pinned ones. `columns` are those of problem and answer in files, if they have
    no usual name. any_gold: as for `plain`, in a file of the user's. ValueError or OSError says in one line what cannot
    be read.
    """
    known, _, copy = name.partition("=")
    if name in EMBEDDED:
        _, pairs = tiny.problems(EMBEDDED[name], tiny.HELD_OUT)
        return name, [Problem(text, (gold,), 0.0, gold) for text, gold in pairs], {}
    if own.is_task(name) or gym.is_task(name):
        held_out = gym.held_out(name) if gym.is_task(name) else own.problems(name)[1]
        if not held_out:
            raise ValueError(f"{name} has too few rows to hold any out; let rows() return ten or more")
        problems = [Problem(text, (answer,), 0.0, gold, row) for text, answer, gold, row in held_out]
        return gym.short(name) if gym.is_task(name) else Path(name).stem, problems, {"task": name}

    # a file of the user's own
    if known not in BENCHMARKS:
        if not Path(name).suffix:
            choices = [*BENCHMARKS, *EMBEDDED]
            raise ValueError(
                f"no benchmark {name!r}; choose from {', '.join(choices)}, gym:NAME, or name a data file"
                f"{meant(name, choices)}"
            )
        return Path(name).stem, plain(data.read_rows(name), name, *columns, any_gold), {"file": name}

    # a benchmark that we know, from a copy of it or from the hub
    benchmark = BENCHMARKS[known]
    if copy:
        source = {"file": copy}
        problems = benchmark.parse(data.read_rows(copy), copy, *columns)
    else:
        source = {
            "hub": benchmark.hub,
            "config": benchmark.config,
            "split": benchmark.split,
            "revision": revisions.get(known, benchmark.revision),
        }
        rows = list(data.fetch(**source, copy=f"--benchmarks {known}=FILE.jsonl"))
        problems = benchmark.parse(rows, benchmark.hub)
    if len(problems) != benchmark.size:
        print(f"note: {known} has {benchmark.size} problems, but here are {len(problems)}", file=sys.stderr)
    return known, problems, source


def usual_benchmarks(sharing: str) -> tuple[str, ...]:
    """What a model is evaluated on where nothing is asked for; `sharing` says which embedded model it is, if any."""
    if not sharing:
        return tuple(BENCHMARKS)
    if sharing in tiny.GYM_STEPS:
        return (GYM + sharing,)
    return ("embedded" if sharing == "digits" else f"embedded-{sharing}",)


def usual_reward(name: str, source: dict) -> str:
    """The name of the reward that scores a benchmark where none is asked for; `source` is as `load` returns it."""
    if "task" in source:
        return scorer_of(source["task"])
    return "equation" if name in EMBEDDED else "math"


def by_name(values: tuple[str, ...], flag: str, names: list[str]) -> dict[str, str]:
    """{"aime24": "8", "": "4"} of ("aime24=8", "4"). ValueError if `names` lacks one of them."""
    settings = {}
    for value in values:
        name, _, setting = value.rpartition("=")
        if name and name not in names:
            raise ValueError(f"{flag}: no {name!r} here; there is {', '.join(names)}")
        settings[name] = setting
    return settings


def load_all(names: tuple[str, ...], revisions: tuple[str, ...], columns=(None, None), any_gold=False) -> list[tuple]:
    """What `load` returns for each of `names`; `revisions` are NAME=HASH.

    ValueError or OSError says in one line what cannot be read, or which short name is there twice.
    """
    pinned = by_name(revisions, "--revision", list(BENCHMARKS))
    loaded = [load(name, pinned, columns, any_gold) for name in names]
    short, times = Counter(short for short, _, _ in loaded).most_common(1)[0]
    if times > 1:
        raise ValueError(f"two benchmarks are called {short!r}; rename a file")
    return loaded


def samples_of(names: list[str], values: tuple[str, ...], greedy: bool) -> dict[str, int]:
    """How many answers each problem of each benchmark gets, by `values` (K or NAME=K) or as is usual.

    ValueError if that is no number from 1 to MOST_SAMPLES, or not 1 where the answers are `greedy`, and so
    all the same.
    """
    asked = by_name(values, "--samples", names)
    counts = {}
    for name in names:
        usual = BENCHMARKS[name].samples if name in BENCHMARKS else 4
        if greedy:
            usual = 1
        count = asked.get(name, asked.get("", str(usual)))
        most = 1 if greedy else MOST_SAMPLES
        if not re.fullmatch("[1-9][0-9]{0,8}", count) or int(count) > most:
            how = f"give a whole number from 1 to {MOST_SAMPLES}, and 1 at temperature 0: all are the same"
            raise ValueError(f"--samples {count}: {how}")
        counts[name] = int(count)
    return counts


def near(answer: str, gold: str, tolerance: float) -> bool:
    """Are the plain numbers of an answer (12, -0.5, 3/4), from small to large, within `tolerance` of the gold's?"""
    # Anything else than plain numbers, say 9^{9^{9}}, is not computed.
    lists = []
    for text in (answer, gold):
        numbers = []
        for part in text.split(","):
            number = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", part.strip(" $"))
            if not re.fullmatch(r"-?\d{1,30}(\.\d{1,30}|/[1-9]\d{0,30})?", number):
                return False
            numbers.append(Fraction(number))
        lists.append(sorted(numbers))
    found, wanted = lists
    if len(found) != len(wanted):
        return False
    return all(abs(x - y) <= Fraction(str(tolerance)) for x, y in zip(found, wanted, strict=True))
