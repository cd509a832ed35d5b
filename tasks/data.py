r"""Training prompts: known maths sets, any other of Hugging Face, and local files (tiny.py has the embedded task).

A prompt is text (or chat messages), its token ids as the model will see them, made once, here, and a gold answer.

    python train.py                                            # the embedded task
    python train.py --model ID --data polaris                  # or dolci, dapo, gsm8k, math: see SOURCES
    python train.py --model ID --data polaris --difficulty 0.125 0.75    # by its column of pass rates
    python train.py --model ID --data polaris=FILE.parquet     # a copy of it, for machines without network
    python train.py --model ID --data OWNER/NAME --problem-column question --answer-column gold
    python train.py --model ID --data train.jsonl              # a line each: {"problem": ..., "answer": ...}

Problems that are the same after `normal` are one: the first is kept, and none of the evaluation sets; all are
counted. Known sets are read at the revisions in SOURCES, as several public projects pin them (we have not compared
them with the hub); without one, the newest, or --data-options. Whatever the hub does, `fingerprint` tells what was
used.
"""

import csv
import hashlib
import io
import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from support import limits
from support.config import meant
from support.rows import bar
from tasks.answers import LONGEST, matching_braces, spell_out

KINDS = (".jsonl", ".json", ".parquet", ".csv")
PROBLEM_COLUMNS = ("problem", "prompt", "question")
ANSWER_COLUMNS = ("answer", "solution")
LONGEST_TEXT = 1_000_000  # characters of a problem or a worked answer; no model reads so many
MOST_ROWS = 10_000_000  # of a file
LARGEST = 8 << 30  # bytes of a file, unpacked
AT_ONCE = 1000  # prompts that a tokenizer is given
INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
ASKS_FOR_BOX = re.compile(r"answer[^.]{0,60}\\boxed", re.I)  # an instruction like ours is there already
PLAIN_TEXT = "note: the tokenizer has no chat template: prompts are plain text, without an instruction"

# What data sets put around their problems, each behind words of it, which are looked for first: most problems have
# none. An instruction is added by `encode`, once.
WRAPPERS = {
    "user:": r"(?i)^\s*user:\s*",
    "the last line of your": (
        r"(?is)^\s*Solve the following math problem step by step\. The last line of your .{0,200}? to the problem\."
    ),
    "on its own line": r"(?i)Remember to put your answer on its own line after \"Answer:\"\.?$",
    "step by step": (
        r"(?i)(Let's think|(Please )?reason) step by step,? and (output the|put your) final answer within "
        r"\\boxed\{\}\.?$"
    ),
}

BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*(?P<brace>\{)|\s+(?P<bare>[^\s{}$.]+))")
JUNK = r"[^\w+\-*/=<>^|%!.()\[\]]"  # signs that make no other problem of one
ASCII_JUNK = {number: None for number in range(128) if re.match(JUNK, chr(number))}
# 3/8, 0.375 or 3.75e-1. An exponent is bounded, because a Fraction holds all its digits.
PASS_RATE = re.compile(r"[-+]?(?:\d+/0*[1-9]\d*|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)")

Pair = tuple  # problem (text or chat messages) and answer; where rows are kept, the gold as it stands, and the row, too


@dataclass(frozen=True)
class Prompt:
    """One problem: its place in the data set, what is asked, the gold answer, and the tokens the model
    sees."""

    index: int
    text: str | list[dict]  # plain text, or chat messages
    answer: str  # the final answer alone
    ids: tuple[int, ...] = ()
    gold: object = None  # for a reward of the user's: the answer as it stands in the data
    row: dict | None = None  # for the same: where it came from


@dataclass(frozen=True)
class Source:
    """Where a data set of Hugging Face is, and how it is read."""

    hub: str
    config: str | None = None
    revision: str | None = None  # a commit hash; None: the newest
    problem: tuple[str, ...] = PROBLEM_COLUMNS  # the first of these columns that is there
    answer: tuple[str, ...] = ANSWER_COLUMNS
    maths: bool = True  # False: rows of other subjects are among them, and the column `dataset` says which


SOURCES = {
    # 53 k with pass rates of another 7B model, as "3/8"; an instruction after some problems; repeats.
    "polaris": Source("POLARIS-Project/Polaris-Dataset-53K", revision="296f8e34132e63f4a1d70e0dcc8bddebb43f03e4"),
    # 13 k, as messages or as "user: ..."; ground_truth and dataset are strings or lists.
    "dolci": Source(
        "allenai/Dolci-RL-Zero-Math-7B", problem=("messages", "prompt"), answer=("ground_truth",), maths=False
    ),
    # 14 k in English, of which `solution` is the bare answer.
    "dapo": Source(
        "open-r1/DAPO-Math-17k-Processed",
        config="en",
        revision="31dd309567e3da778038cc87d868b6097a3ccf68",
        problem=("prompt",),
        answer=("solution", "reward_model"),
    ),
    # 7 k; the answer is worked and ends in "#### 1,234".
    "gsm8k": Source("openai/gsm8k", config="main", revision="740312add88f781978c0658806c59bc2815b9866"),
    # 7.5 k; the answer is the last box of the solution.
    "math": Source("DigitalLearningGmbH/MATH-lighteval", revision="0530c78699ea5e8eb5530600900e1f328b48acad"),
    # Relatives: DAPO's problems a hundred times each in an "Answer: $Answer" wrapper; and 102 k of many
    # subjects.
    "dapo-raw": Source("BytedTsinghua-SIA/DAPO-Math-17k", problem=("prompt",), answer=("reward_model",)),
    "dolci-think": Source(
        "allenai/Dolci-Think-RL-7B", problem=("messages", "prompt"), answer=("ground_truth",), maths=False
    ),
}


# ---- rows of a file or of the hub


def read_rows(path: str) -> list[dict]:
    """Rows of a local .jsonl, .json, .parquet or .csv file. ValueError or OSError says what is wrong, and
    where."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no data file at {path}; give an existing file of {', '.join(KINDS)}")
    if file.suffix not in KINDS:
        raise ValueError(f"{path}: this kind of file is not read; use .jsonl, .json, .parquet or .csv")
    check_size(path, size=file.stat().st_size)
    if file.suffix == ".parquet":
        rows = read_parquet(path)
    else:
        # Plain json and csv rather than Arrow: an answer column that mixes 5 and "5/2" is common, and the
        # number of a wrong line is exact.
        try:
            text = file.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
        rows = read_csv(path, text) if file.suffix == ".csv" else read_json(path, text)
    if not rows:
        raise ValueError(f"{path} has no rows, it is empty; give it as many as there are prompts in a step")
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            kind = "null" if row is None else type(row).__name__
            raise ValueError(f"{path} row {n} is {kind}, not an object with a problem and an answer")
    return rows


def read_parquet(path: str) -> list[dict]:
    import pyarrow  # slow to import, and not needed for the embedded task
    import pyarrow.parquet

    rows = []
    size = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        check_columns(path, file.schema_arrow.names)
        check_size(path, rows=file.metadata.num_rows)
        # In parts: a file of a few kilobytes may unpack to more than the memory holds.
        batches = file.iter_batches(batch_size=AT_ONCE)
        for batch in bar(batches, f"reading {path}", math.ceil(file.metadata.num_rows / AT_ONCE)):
            size += batch.nbytes
            check_size(path, size=size)
            rows += batch.to_pylist()
        return rows
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {one_line(error)}") from error


def read_csv(path: str, text: str) -> list[dict]:
    """All values are text: 007 stays 007."""
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        check_columns(path, reader.fieldnames or [])
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as csv: {error}") from error
    for n, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"{path} row {n} has not as many fields as there are columns; quote its commas")
    return rows


def read_json(path: str, text: str) -> list:
    """One JSON value a line, or one list in a .json file."""
    if path.endswith(".json") and text.lstrip().startswith("["):
        return parse_json(text, path)
    rows = []
    lines = text.split("\n")  # not splitlines, which cuts at other characters too
    for n, line in enumerate(bar(lines, f"reading {path}"), 1):
        if line.strip():
            rows.append(parse_json(line, f"{path} line {n}"))
    return rows


def parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); write one JSON object a line") from error
    except RecursionError as error:
        raise ValueError(f"{where} is JSON in more levels than can be read; write plain texts") from error
    except ValueError as error:  # an integer of more than 4300 digits
        raise ValueError(f"{where} cannot be read ({error}); write it as text") from error


def check_size(path: str, rows: int = 0, size: int = 0) -> None:
    """ValueError for a file of more rows, or more bytes, than are read."""
    if rows > MOST_ROWS:
        raise ValueError(f"{path} has {rows:,} rows, of which at most {MOST_ROWS:,} are read; give fewer")
    if size > LARGEST:
        raise ValueError(f"{path} is of more than {LARGEST >> 30} GiB, which is not read; give a part of it")


def check_columns(path: str, names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        names = " and ".join(map(repr, repeated))
        raise ValueError(f"{path} has several columns {names}; give each its own name")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def fetch(hub: str, config: str | None, split: str, revision: str | None, copy: str) -> Iterable[dict]:
    """Rows of a data set of Hugging Face. ValueError says in one line how to go on; `copy` is how to name a
    file."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a dozen lines about retries
    try:
        return datasets.load_dataset(hub, config, split=split, revision=revision)
    except Exception as error:  # of the hub, the network, the cache, the file: a dozen kinds, some of many lines
        what = one_line(error)
        if "gated" in what:
            how = "ask for access on its page and log in with `hf auth login`"
        elif isinstance(error, ConnectionError):
            how = "go online"
        else:
            how = "choose with --data-options"
        message = f"{hub} cannot be loaded ({what}): {how}, or fetch it elsewhere and give {copy}"
        raise ValueError(message) from error


def select(rows: Iterable[dict], where: str, maths: bool, difficulty, counts: Counter) -> Iterator[dict]:
    """Maths, if not all rows are; of it pass rates within `difficulty`, ends included. Counts the others."""
    low, high = difficulty
    ranged = (low, high) != (0, 1)
    needed = []
    if not maths:
        needed.append("dataset")
    if ranged:
        needed.append("difficulty")

    kept = 0
    for n, row in enumerate(rows, 1):
        counts["rows"] += 1
        if not set(needed) <= set(row):
            has = ", ".join(row)
            raise ValueError(f"{where} row {n} lacks {' or '.join(needed)} to select by; it has {has}")
        if not maths:
            row = maths_of(row)
            if row is None:
                counts["not maths"] += 1
                continue
        if ranged and not low <= pass_rate(row["difficulty"], f"{where} row {n}") <= high:
            counts["outside --difficulty"] += 1
            continue
        kept += 1
        yield row
    if counts["rows"] and not kept:
        raise ValueError(f"{where}: no row is left: {dict(counts)}")


def maths_of(row: dict) -> dict | None:
    """The row with its gold for maths, where each verifier has one; None if it is of another subject."""
    kinds = row["dataset"]
    golds = row.get("ground_truth")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    golds = golds if isinstance(golds, list) else [golds]
    if "math" not in kinds:
        return None
    if len(kinds) == len(golds):
        return row | {"ground_truth": golds[kinds.index("math")]}
    return row


def pass_rate(value, where: str) -> Fraction:
    """Of "3/8" or 0.375, exactly; below all ranges where it is not known."""
    if value is None:
        return Fraction(-1)
    text = str(value).strip() if isinstance(value, str | int | float | Decimal) else ""
    if len(text) <= 60 and PASS_RATE.fullmatch(text):
        return Fraction(text)
    shown = repr(value)[:60] if isinstance(value, str | int | float | Decimal) else type(value).__name__
    raise ValueError(f"{where}: difficulty {shown} is no pass rate like 3/8 or 0.4")


# ---- pairs of problem and answer


def pick_column(row: dict, wanted: str | None, usual: tuple[str, ...], flag: str, path: str) -> str:
    """The column `wanted`, or the first of the `usual` ones that the row has."""
    names = (wanted,) if wanted else usual
    for name in names:
        if name in row:
            return name
    wish = " or ".join(map(repr, names))
    has = ", ".join(row)
    raise ValueError(f"{path} has no column {wish}; it has {has}: name one of them with {flag}")


def from_rows(
    rows: Iterable[dict],
    path: str,
    problem_column: str | None = None,
    answer_column: str | None = None,
    source: Source | None = None,
    left_out: Counter | None = None,
    keep: str = "",
) -> list[Pair]:
    """(problem, answer) pairs. ValueError names the row whose problem or answer is missing, empty or too long.

    With a Counter `left_out`, for data that is not the user's own, such a row is left out and counted, and wrappers
    are taken off. `source` says which columns there are. keep: "row" adds the gold as it stands there, and the row, to
    each pair; "any gold" does so too, and takes every gold, or none, for an answer.
    """
    problems = source.problem if source else PROBLEM_COLUMNS
    answers = source.answer if source else ANSWER_COLUMNS
    pairs: list[Pair] = []
    problem = answer = ""
    for n, row in enumerate(rows, 1):
        # The columns are those of the first row.
        if not problem:
            problem = pick_column(row, problem_column, problems, "--problem-column", path)
            if answer_column or keep != "any gold" or set(answers) & set(row):
                answer = pick_column(row, answer_column, answers, "--answer-column", path)

        # What is wrong with this row? Long texts are not even searched for an answer.
        text = gold = ""
        size = length(row.get(problem))
        if keep != "any gold":
            size = max(size, length(row.get(answer)))
        if size <= LONGEST_TEXT:
            text = question(row.get(problem))
            gold = final_answer(row.get(answer)) if keep != "any gold" else str(row.get(answer, ""))
        if left_out is not None:
            text = unwrap(text)
        if text and (gold or keep == "any gold"):
            pairs.append((text, gold, row.get(answer), dict(row)) if keep else (text, gold))
            continue
        if left_out is not None:
            left_out["without problem or answer" if size <= LONGEST_TEXT else "too long"] += 1
            continue
        if size > LONGEST_TEXT:
            wrong = f"a text of {size:,} characters, of which at most {LONGEST_TEXT:,} are read"
        elif not text:
            wrong = f"an empty {problem!r} (it takes text, or messages with a role and a text as content)"
        else:
            wrong = f"no final answer in {answer!r}"
        how = "give every row a problem and an answer, or take it out"
        raise ValueError(f"{path} row {n} has {wrong}; {how}")
    if not problem:
        raise ValueError(f"{path} has no rows; give it as many as there are prompts in a step")
    return pairs


def length(value) -> int:
    """Characters of all texts in a value, however deep."""
    total = 0
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            left += part.values()
    return total


def as_text(value) -> str:
    return "" if value is None or isinstance(value, list | dict) else str(value)


def question(value) -> str | list[dict]:
    """Text, or chat messages as they are; "" for anything else."""
    if not isinstance(value, list):
        text = as_text(value)
        return text if text.strip() else ""
    for message in value:
        if not isinstance(message, dict):
            return ""
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return ""
    return value


def final_answer(value) -> str:
    r"""The last \boxed{}, or what follows the last ####, or all of it; "" where there is none. Of a list
    the first."""
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, list):
        value = value[0] if value else None
    text = as_text(value).strip()

    # The last box that is closed. `\boxed 5` needs no braces.
    boxes = list(BOX.finditer(text))
    closing = matching_braces(text) if boxes else {}
    for box in reversed(boxes):
        if box["bare"]:
            return box["bare"]
        opening = box.start("brace")
        if opening in closing:
            return text[opening + 1 : closing[opening]].strip()

    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    # No answer of more than LONGEST characters is ever right; without a box a longer text is no answer.
    return "" if boxes or len(text) > LONGEST else text


def unwrap(problem: str | list[dict]) -> str | list[dict]:
    """The bare problem. A single user message becomes text, so that `encode` adds its instruction."""
    if isinstance(problem, list):
        single = len(problem) == 1 and problem[0].get("role") == "user"
        return unwrap(problem[0]["content"]) if single else problem
    problem = problem.strip()
    small = problem.lower()
    for words, pattern in WRAPPERS.items():
        if words in small:
            problem = re.sub(pattern, "", problem).strip()
    return problem


def source_of(name: str) -> Source | None:
    """The known set that --data `name` is, or is a copy of."""
    known = name.partition("=")[0]
    for short, source in SOURCES.items():
        if known in (short, source.hub):
            return source
    return None


def check_name(name: str) -> None:
    """ValueError, in one line, for a --data that is no known set, no OWNER/NAME and no file. Without one there is
    nothing to say."""
    if name and not (source_of(name) or is_file(name) or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        choices = f"{', '.join(SOURCES)}, OWNER/NAME of Hugging Face, or a file"
        raise ValueError(f"no data {name!r}: say {choices}{meant(name, SOURCES)}")


def load_pairs(
    name, problem_column=None, answer_column=None, difficulty=(0, 1), config=None, split=None, revision=None, keep=""
):
    """Pairs of --data `name`, and a Counter of what was met on the way. ValueError or OSError in one line. keep: as in
    `from_rows`; a known set has golds that its own verifier needs."""
    check_name(name)
    known, _, copy = name.partition("=")
    source = source_of(name)
    counts: Counter = Counter()
    own = source is None and is_file(name)  # what is wrong in it can be mended

    # From a file: of the user's own, or a copy of a known set.
    if own or (source and copy):
        where = copy or name
        if config or split or revision:
            raise ValueError(f"--data-options are for the hub, and {where} is a file")
        rows = read_rows(where)
    # From the hub: a known set, or any other.
    elif source:
        where = source.hub
        config = config or source.config
        revision = revision or source.revision
        rows = fetch(where, config, split or "train", revision, f"--data {known}=FILE.parquet")
    else:
        where = name
        rows = fetch(where, config, split or "train", revision, "--data FILE.parquet")

    maths = source is None or source.maths
    rows = select(rows, where, maths, difficulty, counts)
    if source and keep:
        keep = "row"
    pairs = from_rows(rows, where, problem_column, answer_column, source, None if own else counts, keep)
    return pairs, counts


def hub_options(text: str) -> dict:
    """`--data-options` as arguments of `load_pairs`. ValueError if it is no JSON object, or knows other
    names."""
    names = {"name": "config", "split": "split", "revision": "revision"}
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--data-options {text!r} is not JSON ({error})") from error
    if not isinstance(options, dict) or set(options) - set(names):
        raise ValueError(f"--data-options {text!r}: give a JSON object of {', '.join(names)}")
    return {names[name]: value for name, value in options.items()}


def is_file(name: str) -> bool:
    """Whether --data `name` is a file of the user's own, and no copy of a known set."""
    known = name.partition("=")[0]
    return known not in SOURCES and (Path(name).exists() or Path(name).suffix in KINDS)


# ---- which problems are the same


def normal(problem: str | list[dict]) -> str:
    """What is left when case, white space, wrappers, typesetting and punctuation do not count. Operators,
    brackets and decimal points do: 3+4 and 3-4 are two problems, and so are 2²+1 and 22+1."""
    if isinstance(problem, list):
        told = [message for message in problem if message.get("role") != "system"]
        problem = " ".join(str(message.get("content")) for message in told)

    # Typesetting goes; what it sets apart stays apart.
    text = spell_out(unwrap(problem)).lower().replace("\u2212", "-").replace("\u2013", "-")
    if "\\" in text:
        text = re.sub(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|\\[,;:!()\[\] ]", "", text)
        text = re.sub(r"\\[dt]?frac *(?:(\d) *(\d))?", joined_fraction, text)
    if "," in text:
        text = re.sub(r",(?<=\d,)(?=\d{3}(?!\d))|\{,\}(?<=\d\{,\})(?=\d{3}(?!\d))", "", text)  # 1,000

    # All other signs are junk, and so are full stops, hyphens between words, and exclamation marks after them. Each
    # pattern begins with what it looks for: one that looked back from every letter would take twice as long.
    text = re.sub(rf"(\d)(?:\.(?!\d)|{JUNK})+(?=\d)", r"\1_", text)  # gcd(12, 3) is not gcd(1, 23)
    text = re.sub(r"\.(?!\d)|-(?<=[a-z]{2}-)(?=[a-z]{2})|!(?<=[a-z]{2}!)", "", text)
    text = text.translate(ASCII_JUNK) if text.isascii() else re.sub(f"{JUNK}+", "", text)
    return text or str(problem)


def joined_fraction(match: re.Match) -> str:
    r"""`\frac12` has two arguments, and is not `\frac{12}...`."""
    return f"frac{match[1]}_{match[2]}" if match[1] else "frac"


def clean(cfg, find_evaluation: Callable, keep: str = "") -> tuple[list[Pair], str]:
    """Different problems of `cfg.data`, none of the evaluation's, and a line of what went. find_evaluation: returns
    problems by benchmark, and the names of those that cannot be had; called once the data is there."""
    columns = (cfg.problem_column, cfg.answer_column)
    pairs, counts = load_pairs(cfg.data, *columns, cfg.difficulty, **hub_options(cfg.data_options), keep=keep)
    evaluation, missing = find_evaluation()
    places = {}
    for benchmark, problems in evaluation.items():
        for problem in problems:
            places[normal(problem)] = benchmark

    # The first of several problems that are the same is kept.
    kept: dict[str, Pair] = {}
    for pair in bar(pairs, "comparing problems"):
        problem, answer = pair[:2]
        key = normal(problem)
        if key in places:
            counts[f"in {places[key]}"] += 1
        elif key in kept:
            counts["repeated"] += 1
            counts["of these with another answer"] += kept[key][1] != answer
        else:
            kept[key] = pair
    left = list(kept.values())

    what = ", ".join(f"{number:,} {kind}" for kind, number in counts.items() if number)
    if not left:
        raise ValueError(f"--data {cfg.data}: no problem is left: {what}")
    what += f"; left {len(left):,} problems, sha256 {fingerprint(left)[:16]}"
    if missing:
        what += f"; not compared with {', '.join(missing)}, which cannot be had"
    return left, f"data: {cfg.data}: {what}"


def evaluation_problems(names: Iterable[str], load: Callable[[str], list]) -> tuple[dict[str, list], list[str]]:
    """Benchmark -> problems, from `load`; and the benchmarks that cannot be had."""
    problems = {}
    network = True
    for name in names:
        if not network:
            break  # each of the others would take half a minute of retries
        try:
            problems[name] = load(name)
        except (ValueError, OSError) as error:
            network = not isinstance(error.__cause__, ConnectionError)
    return problems, [name for name in names if name not in problems]


def fingerprint(pairs: Iterable[Pair]) -> str:
    """sha256 over problems and answers, and over rows where they are kept."""
    # The digest of one JSON list, which is never held in memory as a whole.
    digest = hashlib.sha256(b"[")
    between = ""
    for pair in pairs:
        digest.update((between + json.dumps(tuple(pair), default=str)).encode())
        between = ", "
    digest.update(b"]")
    return digest.hexdigest()


def split(pairs: list[Pair], held_out: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Training pairs, in their order, and `held_out` others for evaluation."""
    held = set(random.Random(seed).sample(range(len(pairs)), held_out))
    training = [pair for i, pair in enumerate(pairs) if i not in held]
    return training, [pairs[i] for i in sorted(held)]


# ---- what the model sees


def encode(
    pairs: list[Pair], tokenizer, max_tokens: int, thinking: bool | None = None, instruction: str = "auto"
) -> tuple[list[Prompt], int]:
    """Prompts with token ids, and how many were left out for being longer than `max_tokens` (never cut).

    With a chat template text is put to it with INSTRUCTION, unless it asks for a box itself; messages are put to it
    as they are. Without one, text goes as it is. `thinking` is the template's enable_thinking; None: its own
    default. `instruction`: another one, which every text gets, or none.
    """
    template = str(tokenizer.chat_template or "")
    options = {"add_generation_prompt": True, "tokenize": False}
    if thinking is not None:
        if "enable_thinking" not in template:
            what = "tokenizer has no chat template"
            if template:
                what = "chat template does not know enable_thinking"
            raise ValueError(f"--thinking cannot be set: the model's {what}; leave --thinking out")
        options["enable_thinking"] = thinking

    prompts: list[Prompt] = []
    for start in bar(range(0, len(pairs), AT_ONCE), f"reading prompts, {AT_ONCE} at once"):
        some = pairs[start : start + AT_ONCE]
        texts = [pair[0] for pair in some]
        if template:
            chats = [as_messages(text, instruction) for text in texts]
            found = ids_of(render(chats, tokenizer, options), tokenizer, add_special_tokens=False)
        else:
            texts = [plain_text(text, instruction) for text in texts]
            found = ids_of(texts, tokenizer)
        for text, ids, (_, answer, *more) in zip(texts, found, some, strict=True):
            # One beginning-of-sequence token may be in the text, and one more come from the tokenizer.
            if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
                ids = ids[1:]
            if not ids:
                raise ValueError(f"the model knows no sign of {str(text)[:60]!r}; give another --model")
            if len(ids) <= max_tokens:
                prompts.append(Prompt(len(prompts), text, answer, tuple(ids), *(more or [answer])))
    return prompts, len(pairs) - len(prompts)


def check_ids(prompts: list[Prompt], vocabulary: int) -> None:
    """ValueError for a token that the model, which knows `vocabulary` of them, has no weights for."""
    for prompt in prompts:
        if max(prompt.ids) >= vocabulary:
            raise ValueError(
                f"the tokenizer makes token {max(prompt.ids)} of {str(prompt.text)[:60]!r}, and the model has "
                f"{vocabulary}; give a model with its own tokenizer"
            )


def instructed(text: str, instruction: str) -> str:
    """A problem with --instruction: auto (INSTRUCTION, unless it asks for a box itself), none, or a text."""
    if instruction == "none" or (instruction == "auto" and ASKS_FOR_BOX.search(text)):
        return text
    return text + (INSTRUCTION if instruction == "auto" else f"\n\n{instruction}")


def as_messages(text: str | list[dict], instruction: str = "auto") -> list[dict]:
    if isinstance(text, list):
        return text
    return [{"role": "user", "content": instructed(text, instruction)}]


def plain_text(text: str | list[dict], instruction: str) -> str:
    """What is read where there is no chat template."""
    if isinstance(text, list):
        return "\n".join(message["content"] for message in text)
    return text if instruction == "auto" else instructed(text, instruction)


def render(chats: list[list[dict]], tokenizer, options: dict) -> list[str]:
    """What the model's chat template makes of each chat. ValueError, in one line, where it fails."""
    rendered = []
    try:
        with limits.within(limits.SECONDS):
            for chat in chats:
                rendered.append(tokenizer.apply_chat_template(chat, **options))
                if len(rendered[-1]) > LONGEST_TEXT + length(chat):
                    raise ValueError(f"it adds {len(rendered[-1]):,} characters")
    except (Exception, limits.TookTooLong) as error:  # it is the model's code
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"the model's chat template fails on a problem ({what}); mend it, or --model") from error
    return rendered


def ids_of(texts: list[str], tokenizer, **options) -> list[list[int]]:
    """Token ids of each text. ValueError, in one line, names one that cannot be read."""
    try:
        return tokenizer(texts, **options)["input_ids"]
    except Exception as error:  # tokenizers knows no kinds
        if len(texts) > 1:
            return [ids_of([text], tokenizer, **options)[0] for text in texts]
        what = f"the tokenizer cannot read {texts[0][:60]!r} ({one_line(error)})"
        raise ValueError(f"{what}; the embedded model knows sums only: give --model") from error
