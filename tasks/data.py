r"""Training prompts: known maths sets, any other of Hugging Face, and local files (tiny.py has the embedded task).

A prompt is text (or chat messages), its token ids as the model will see them, made once, here, and a gold answer.

    python train.py                                            # the embedded task
    python train.py --model ID --data polaris                  # or dolci, dapo, gsm8k, math: see SOURCES
    python train.py --model ID --data polaris --difficulty 0.125 0.75    # by its column of pass rates
    python train.py --model ID --data polaris=FILE.parquet     # a copy of it, for machines without network
    python train.py --model ID --data OWNER/NAME --problem-column question --answer-column gold
    python train.py --model ID --data train.jsonl              # one JSON object a line: {"problem": ..., "answer": ...}

Problems that are the same after `normal` are one: the first is kept, and none of the evaluation sets; all are counted.
Known sets are read at the revisions in SOURCES, as several public projects pin them (we have not compared them with the
hub); without one, the newest, or --data-revision HASH. Whatever the hub does, `fingerprint` tells what was used.
"""

import csv
import hashlib
import io
import json
import logging
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

KINDS = (".jsonl", ".json", ".parquet", ".csv")
PROBLEM_COLUMNS, ANSWER_COLUMNS = ("problem", "prompt", "question"), ("answer", "solution")
LONGEST_ANSWER = 400  # characters; no answer of more is ever right, and a text of more without a box is no answer
INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
ASKS_FOR_BOX = re.compile(r"answer[^.]{0,60}\\boxed", re.I)  # an instruction like ours is there already
PLAIN_TEXT = "note: the tokenizer has no chat template: prompts are plain text, without an instruction"

# what data sets put around their problems; an instruction is added by `encode`, once
WRAPPERS = (
    r"(?i)^\s*user:\s*",
    r"(?is)^\s*Solve the following math problem step by step\. The last line of your .{0,200}? to the problem\.",
    r"(?i)Remember to put your answer on its own line after \"Answer:\"\.?$",
    r"(?i)(Let's think|(Please )?reason) step by step,? and (output the|put your) final answer within \\boxed\{\}\.?$",
)

Pair = tuple[str | list[dict], str]  # problem (text or chat messages), answer


@dataclass(frozen=True)
class Prompt:
    """One problem: its place in the data set, what is asked, the gold answer, and the tokens the model sees."""

    index: int
    text: str | list[dict]  # plain text, or chat messages
    answer: str
    ids: tuple[int, ...] = ()


POLARIS, DAPO = "296f8e34132e63f4a1d70e0dcc8bddebb43f03e4", "31dd309567e3da778038cc87d868b6097a3ccf68"
GSM8K, MATH = "740312add88f781978c0658806c59bc2815b9866", "0530c78699ea5e8eb5530600900e1f328b48acad"
USUAL, DOLCI = (PROBLEM_COLUMNS, ANSWER_COLUMNS), (("messages", "prompt"), ("ground_truth",))
# name: id, config, revision (None: the newest), columns of problem and answer (the first that is there), all maths?
SOURCES = {
    # 53 k with pass rates of another 7B model, as "3/8"; an instruction after some problems; repeats
    "polaris": ("POLARIS-Project/Polaris-Dataset-53K", None, POLARIS, *USUAL, True),
    # 13 k, as messages or as "user: ..."; ground_truth and dataset are strings or lists
    "dolci": ("allenai/Dolci-RL-Zero-Math-7B", None, None, *DOLCI, False),
    # 14 k in English, of which `solution` is the bare answer
    "dapo": ("open-r1/DAPO-Math-17k-Processed", "en", DAPO, ("prompt",), ("solution", "reward_model"), True),
    # 7 k; the answer is worked and ends in "#### 1,234"
    "gsm8k": ("openai/gsm8k", "main", GSM8K, *USUAL, True),
    # 7.5 k; the answer is the last box of the solution
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, MATH, *USUAL, True),
    # relatives: DAPO's problems a hundred times each in an "Answer: $Answer" wrapper; and 102 k of many subjects
    "dapo-raw": ("BytedTsinghua-SIA/DAPO-Math-17k", None, None, ("prompt",), ("reward_model",), True),
    "dolci-think": ("allenai/Dolci-Think-RL-7B", None, None, *DOLCI, False),
}


def read_rows(path: str) -> list[dict]:
    """Rows of a local .jsonl, .json, .parquet or .csv file. ValueError or OSError says what is wrong, and where."""
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no data file at {path}; give an existing .jsonl, .json, .parquet or .csv file")
    if file.suffix not in KINDS:
        raise ValueError(f"{path}: this kind of file is not read; use .jsonl, .json, .parquet or .csv")
    if file.stat().st_size == 0:
        raise ValueError(f"{path} is empty; it needs one JSON object a line with a problem and an answer")
    if file.suffix == ".parquet":
        import datasets  # slow to import, and not needed for the embedded task

        datasets.disable_progress_bars()
        try:
            return datasets.Dataset.from_parquet(path).to_list()
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as parquet: {error.__cause__ or error}") from error
    # Plain json rather than Arrow: an answer column that mixes 5 and "5/2" is common, and the line number is exact.
    try:
        text = file.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        if file.suffix == ".csv":  # all as text: 007 stays 007
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
            wrong = next((n for n, row in enumerate(rows, 1) if None in row or None in row.values()), None)
            if wrong:
                raise ValueError(f"{path} row {wrong} has not as many fields as there are columns; quote its commas")
            return rows
        lines = [text] if file.suffix == ".json" and text.lstrip().startswith("[") else text.split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as csv: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        n = lines.index(error.doc) + 1
        raise ValueError(f"{path} line {n} is not JSON ({error}); write one JSON object a line") from error
    return rows[0] if lines == [text] and isinstance(rows[0], list) else rows


def fetch(hub: str, config: str | None, split: str, revision: str | None, copy: str) -> Iterable[dict]:
    """Rows of a data set of Hugging Face. ValueError says in one line how to go on; `copy` is how to name a file."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a dozen lines about retries
    try:
        return datasets.load_dataset(hub, config, split=split, revision=revision)
    except Exception as error:  # of the hub, the network, the cache, the file format: a dozen kinds, some of many lines
        what, offline = " ".join(str(error).split())[:300], isinstance(error, ConnectionError)
        how = "go online" if offline else "choose with --data-config, --data-split or --data-revision"
        how = "ask for access on its page and log in with `hf auth login`" if "gated" in what else how
        raise ValueError(f"{hub} cannot be loaded ({what}): {how}, or fetch it elsewhere and give {copy}") from error


def pick_column(row: dict, wanted: str | None, usual: tuple[str, ...], flag: str, path: str) -> str:
    names = (wanted,) if wanted else usual
    for name in names:
        if name in row:
            return name
    raise ValueError(
        f"{path} has no column {' or '.join(map(repr, names))}; it has {', '.join(row)}: name one of them with {flag}"
    )


def select(rows: Iterable[dict], where: str, maths: bool, difficulty, counts: Counter) -> Iterator[dict]:
    """Maths, if not all rows are; of it pass rates within `difficulty`, ends included. Counts the others."""
    kept, ranged = 0, tuple(difficulty) != (0, 1)
    needed = ["dataset"] * (not maths) + ["difficulty"] * ranged
    for n, row in enumerate(rows, 1):
        counts["rows"] += 1
        if set(needed) - set(row):
            raise ValueError(f"{where} row {n} lacks {' or '.join(needed)} to select by; it has {', '.join(row)}")
        if not maths:
            kinds, golds = (x if isinstance(x, list) else [x] for x in (row["dataset"], row.get("ground_truth")))
            if "math" not in kinds:
                counts["not maths"] += 1
                continue
            if len(kinds) == len(golds):  # one gold for each verifier
                row = row | {"ground_truth": golds[kinds.index("math")]}
        if ranged:
            try:
                rate = -1 if (value := row["difficulty"]) is None else Fraction(str(value))
            except (ValueError, ZeroDivisionError) as error:
                raise ValueError(f"{where} row {n}: difficulty {value!r} is no pass rate like 3/8 or 0.4") from error
            if not difficulty[0] <= rate <= difficulty[1]:
                counts["outside --difficulty"] += 1
                continue
        kept += 1
        yield row
    if counts["rows"] and not kept:
        raise ValueError(f"{where}: no row is left: {dict(counts)}")


def from_rows(rows, path: str, problem_column=None, answer_column=None, usual=USUAL, left_out=None) -> list[Pair]:
    """(problem, answer) pairs. ValueError names the row whose problem or answer is missing or empty; with a Counter
    `left_out`, for data that is not the user's own, it is left out and counted, and wrappers are taken off."""
    pairs: list[Pair] = []
    problem = answer = ""
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {n} is {type(row).__name__}, not an object with a problem and an answer")
        problem = problem or pick_column(row, problem_column, usual[0], "--problem-column", path)
        answer = answer or pick_column(row, answer_column, usual[1], "--answer-column", path)
        text, gold = question(row.get(problem)), final_answer(row.get(answer))
        text = text if left_out is None else unwrap(text)
        if gold and text:
            pairs.append((text, gold))
        elif left_out is not None:
            left_out["without problem or answer"] += 1
        else:
            empty = f"an empty {problem!r} (it takes text, or messages with a role and a text as content)"
            lacks = f"no final answer in {answer!r}" if text else empty
            raise ValueError(f"{path} row {n} has {lacks}; give every row a problem and an answer, or take it out")
    if not problem:
        raise ValueError(f"{path} has no rows; it needs at least as many as there are prompts in a step")
    return pairs


def question(value) -> str | list[dict]:
    """Text, or chat messages as they are; "" for anything else."""
    if isinstance(value, list):
        chat = all(isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str} for m in value)
        return value if chat else ""
    text = "" if value is None else str(value)
    return text if text.strip() else ""


def final_answer(value) -> str:
    r"""The last \boxed{}, or what follows the last ####, or all of it; "" where there is none. Of a list the first."""
    value = value.get("ground_truth") if isinstance(value, dict) else value
    value = (value or [None])[0] if isinstance(value, list) else value
    text = "" if value is None else str(value).strip()
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{}$.]+))", text))
    for box in reversed(boxes):
        depth, end = 1, box.end()
        while not box[1] and depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if box[1] or not depth:
            return box[1] or text[box.end() : end - 1].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    return "" if boxes or len(text) > LONGEST_ANSWER else text


def unwrap(problem: str | list[dict]) -> str | list[dict]:
    """The bare problem. A single user message becomes text, so that `encode` adds its instruction."""
    if isinstance(problem, list):
        single = len(problem) == 1 and problem[0].get("role") == "user"
        return unwrap(problem[0]["content"]) if single else problem
    for pattern in WRAPPERS:
        problem = re.sub(pattern, "", problem).strip()
    return problem


def load(name, problem_column=None, answer_column=None, difficulty=(0, 1), config=None, split=None, revision=None):
    """Pairs of --data `name`, and a Counter of what was met on the way. ValueError or OSError in one line."""
    known, _, copy = name.partition("=")
    source = SOURCES.get(known) or next((s for s in SOURCES.values() if s[0] == known), None)
    hub, usual_config, pinned, *usual, maths = source or (name, None, None, *USUAL, True)
    counts: Counter = Counter()
    own = not source and is_file(name)  # what is wrong in it can be mended
    if own or (source and copy):
        where = copy or name
        if config or split or revision:
            raise ValueError(f"--data-config, --data-split and --data-revision are for the hub, and {where} is a file")
        rows = read_rows(where)
    elif source or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        where, copy = hub, f"--data {f'{known}=' if source else ''}FILE.parquet"
        rows = fetch(hub, config or usual_config, split or "train", revision or pinned, copy)
    else:
        raise ValueError(f"no data {name!r}: say {', '.join(SOURCES)}, OWNER/NAME of Hugging Face, or a file")
    rows = select(rows, where, maths, difficulty, counts)
    pairs = from_rows(rows, where, problem_column, answer_column, usual, None if own else counts)
    return pairs, counts


def is_file(name: str) -> bool:
    """Whether --data `name` is a file of the user's own, and no copy of a known set."""
    return name.partition("=")[0] not in SOURCES and (Path(name).exists() or Path(name).suffix in KINDS)


def normal(problem: str | list[dict]) -> str:
    """What is left when case, white space, wrappers, typesetting and punctuation do not count. Operators, brackets and
    decimal points do: 3+4 and 3-4 are two problems."""
    if isinstance(problem, list):
        problem = " ".join(str(message.get("content")) for message in problem if message.get("role") != "system")
    text = unicodedata.normalize("NFKC", unwrap(problem)).lower().replace("\u2212", "-").replace("\u2013", "-")
    text = re.sub(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|\\[,;:!()\[\] ]", "", text)
    text = re.sub(r"\\[dt]?frac *(?:(\d) *(\d))?", lambda m: f"frac{m[1]}_{m[2]}" if m[1] else "frac", text)
    text = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", text)  # 1,000
    junk = r"(?<=[a-z]{2})(?:-(?=[a-z]{2})|!)|\.(?!\d)|[^\w+\-*/=<>^|%!.()\[\]]"
    text = re.sub(rf"(?<=\d)(?:{junk})+(?=\d)", "_", text)  # gcd(12, 3) is not gcd(1, 23)
    return re.sub(junk, "", text) or str(problem)


def prepare(cfg, evaluation: dict[str, list], missing: list[str]) -> tuple[list[Pair], str]:
    """Different problems of `cfg.data`, none of `evaluation` (benchmark -> problems), and a line of what went."""
    place = [None, None, None]
    pairs, counts = load(cfg.data, cfg.problem_column, cfg.answer_column, cfg.difficulty, *place)
    places = {normal(problem): benchmark for benchmark, problems in evaluation.items() for problem in problems}
    kept: dict[str, Pair] = {}
    for problem, answer in pairs:
        key = normal(problem)
        if key in places:
            counts[f"in {places[key]}"] += 1
        elif key in kept:
            counts["repeated"] += 1
            counts["of these with another answer"] += kept[key][1] != answer
        else:
            kept[key] = problem, answer
    left, what = list(kept.values()), ", ".join(f"{number:,} {kind}" for kind, number in counts.items() if number)
    if not left:
        raise ValueError(f"--data {cfg.data}: no problem is left: {what}")
    what += f"; left {len(left):,} problems, sha256 {fingerprint(left)[:16]}"
    what += f"; not compared with {', '.join(missing)}, which cannot be had" if missing else ""
    return left, f"data: {cfg.data}: {what}"


def evaluation_problems(names: Iterable[str], load: Callable[[str], list]) -> tuple[dict[str, list], list[str]]:
    """Benchmark -> problems, from `load`; and the benchmarks that cannot be had."""
    problems, network = {}, True
    for name in names:
        try:
            problems |= {name: load(name)} if network else {}  # each would take half a minute of retries
        except (ValueError, OSError) as error:
            network = not isinstance(error.__cause__, ConnectionError)
    return problems, [name for name in names if name not in problems]


def fingerprint(pairs: Iterable[Pair]) -> str:
    """sha256 over problems and answers."""
    return hashlib.sha256(json.dumps([(problem, answer) for problem, answer in pairs]).encode()).hexdigest()


def split(pairs: list[Pair], held_out: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Training pairs, in their order, and `held_out` others for evaluation."""
    held = set(random.Random(seed).sample(range(len(pairs)), held_out))
    return [pair for i, pair in enumerate(pairs) if i not in held], [pairs[i] for i in sorted(held)]


def encode(pairs: list[Pair], tokenizer, max_tokens: int, thinking: bool | None = None) -> tuple[list[Prompt], int]:
    """Prompts with token ids, and how many were left out for being longer than `max_tokens` (never cut).

    With a chat template text is put to it with INSTRUCTION, unless it asks for a box itself; messages are put to it as
    they are. Without one, text goes as it is. `thinking` is the template's enable_thinking; None: its own default.
    """
    template = str(tokenizer.chat_template or "")
    if thinking is not None and "enable_thinking" not in template:
        what = "chat template does not know enable_thinking" if template else "tokenizer has no chat template"
        raise ValueError(f"--thinking cannot be set: the model's {what}; leave --thinking out")
    options = {} if thinking is None else {"enable_thinking": thinking}
    prompts: list[Prompt] = []
    for text, answer in pairs:
        if template:
            more = "" if ASKS_FOR_BOX.search(str(text)) else INSTRUCTION
            messages = text if isinstance(text, list) else [{"role": "user", "content": text + more}]
            # return_dict=False: transformers 5 returns a BatchEncoding otherwise, whose length is its number of keys
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
        else:
            text = text if isinstance(text, str) else "\n".join(message["content"] for message in text)
            try:
                ids = tokenizer(text)["input_ids"]
            except Exception as error:  # tokenizers knows no kinds
                what = f"the tokenizer cannot read {text[:60]!r} ({error})"
                raise ValueError(f"{what}; the embedded model knows sums only: give --model") from error
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # one in the text, one of the tokenizer
            ids = ids[1:]
        if len(ids) <= max_tokens:
            prompts.append(Prompt(len(prompts), text, answer, tuple(ids)))
    return prompts, len(pairs) - len(prompts)
