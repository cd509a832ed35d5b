"""Training prompts: the embedded arithmetic task, or local files with a problem and an answer column.

A prompt is text (or chat messages), its token ids as the model will see them, and a gold answer. Tokens are made
once, here; from here on nothing is ever re-tokenised.

    python train.py                                  # the embedded task
    python train.py --model PATH --data train.jsonl  # one JSON object a line: {"problem": ..., "answer": ...}
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

PROBLEM_COLUMNS = ("problem", "prompt", "question")
ANSWER_COLUMNS = ("answer", "solution")
INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."

# The embedded task: zero-padded operands of one to four digits, e.g. `0473+0292=`. Fixed columns, because a model
# this small does not learn to align digits of varying place. The mix of sizes gives the untrained model about 0.27.
WIDTH = 4
SIZES, SIZE_WEIGHTS = (1, 2, 3, 4), (0.06, 0.44, 0.25, 0.25)


@dataclass(frozen=True)
class Prompt:
    """One problem: its place in the data set, what is asked, the gold answer, and the tokens the model sees."""

    index: int
    text: str | list[dict]  # plain text, or chat messages
    answer: str
    ids: tuple[int, ...] = ()


def arithmetic(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different (question, answer) pairs of the embedded task, e.g. ('0473+0292=', '765')."""
    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    tries = 0
    while len(pairs) < count:
        tries += 1
        if tries > 50 * count + 1000:
            raise ValueError(f"the embedded task has no {count} different problems of these sizes; ask for fewer")
        size = rng.choices(SIZES, SIZE_WEIGHTS)[0]
        a, b = (rng.randrange(10 ** (size - 1) if size > 1 else 0, 10**size) for _ in range(2))
        op = rng.choice("+-")
        if op == "-" and a < b:
            a, b = b, a
        pairs[f"{a:0{WIDTH}d}{op}{b:0{WIDTH}d}="] = str(a + b if op == "+" else a - b)
    return list(pairs.items())


def read_rows(path: str) -> list[dict]:
    """Rows of a local .jsonl, .json, .parquet or .csv file. ValueError or OSError says what is wrong, and where."""
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no data file at {path}; give an existing .jsonl, .json, .parquet or .csv file")
    if file.suffix not in (".jsonl", ".json", ".parquet", ".csv"):
        raise ValueError(f"{path}: this kind of file is not read; use .jsonl, .json, .parquet or .csv")
    if file.stat().st_size == 0:
        raise ValueError(f"{path} is empty; it needs one JSON object a line with a problem and an answer")
    if file.suffix in (".parquet", ".csv"):
        import datasets  # slow to import, and not needed for the embedded task

        datasets.disable_progress_bars()
        try:
            return (
                datasets.Dataset.from_parquet(path).to_list()
                if file.suffix == ".parquet"
                else (datasets.Dataset.from_csv(path).to_list())
            )
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as {file.suffix[1:]}: {error.__cause__ or error}") from error
    # Plain json rather than Arrow: an answer column that mixes 5 and "5/2" is common, and the line number is exact.
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    if file.suffix == ".json" and text.lstrip().startswith("["):
        return _json(text, path)
    return [_json(line, f"{path} line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); write one JSON object a line") from error


def pick_column(row: dict, wanted: str | None, usual: tuple[str, ...], flag: str, path: str) -> str:
    names = (wanted,) if wanted else usual
    for name in names:
        if name in row:
            return name
    raise ValueError(
        f"{path} has no column {' or '.join(map(repr, names))}; it has {', '.join(row)}: name one of them with {flag}"
    )


def from_rows(
    rows: list[dict], path: str, problem_column: str | None = None, answer_column: str | None = None
) -> list[tuple[str | list[dict], str]]:
    """(problem, answer) pairs of `rows`; ValueError names the row whose problem or answer is missing or empty."""
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {n} is {type(row).__name__}, not an object with a problem and an answer")
    if not rows:
        raise ValueError(f"{path} has no rows; it needs at least as many as there are prompts in a step")
    problem = pick_column(rows[0], problem_column, PROBLEM_COLUMNS, "--problem-column", path)
    answer = pick_column(rows[0], answer_column, ANSWER_COLUMNS, "--answer-column", path)
    pairs = []
    for n, row in enumerate(rows, 1):
        text, gold = row.get(problem), row.get(answer)
        if gold is None or not str(gold).strip():
            raise ValueError(f"{path} row {n} has an empty {answer!r}; give every row an answer, or take the row out")
        if not text or (isinstance(text, str) and not text.strip()):
            raise ValueError(f"{path} row {n} has an empty {problem!r}; give every row a problem, or take it out")
        pairs.append((text if isinstance(text, list) else str(text), str(gold).strip()))
    return pairs


def split(pairs: list, held_out: int, seed: int = 0) -> tuple[list, list]:
    """Training pairs and `held_out` pairs for evaluation; a problem is never in both, duplicates included."""
    groups: dict[str, list] = {}
    for pair in pairs:
        groups.setdefault(json.dumps(pair[0]), []).append(pair)
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    held, rest = [], set(keys)
    for key in keys:
        if len(held) >= held_out:
            break
        held.append(groups[key][0])
        rest.discard(key)
    return [pair for pair in pairs if json.dumps(pair[0]) in rest], held


def encode(pairs: list, tokenizer, max_tokens: int) -> tuple[list[Prompt], int]:
    """Prompts with token ids, and how many were left out for being longer than `max_tokens` (never cut)."""
    prompts, skipped = [], 0
    for text, answer in pairs:
        if tokenizer.chat_template:
            messages = text if isinstance(text, list) else [{"role": "user", "content": text + INSTRUCTION}]
            # return_dict=False: transformers 5 returns a BatchEncoding otherwise, whose length is its number of keys
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            text = text if isinstance(text, str) else "\n".join(message["content"] for message in text)
            ids = tokenizer(text)["input_ids"]
        if len(ids) > max_tokens:
            skipped += 1
            continue
        prompts.append(Prompt(len(prompts), text, answer, tuple(ids)))
    return prompts, skipped
