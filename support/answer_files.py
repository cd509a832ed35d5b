"""The answers of an evaluation on disk, so that the same command goes on where it was stopped.

A folder holds settings.json, what all of its answers depend on, and one NAME@K.jsonl for each benchmark. A line of
it is one answer: `problem` (its number), `id` (of that problem), `sample` (0 to K - 1), `response` and more.
"""

import hashlib
import json
from pathlib import Path

from support.config import OUT
from support.log import write_aside
from support.rows import read_rows

NEEDED = {"problem": int, "sample": int, "id": str, "response": str, "tokens": int, "truncated": bool}  # in a line


def weights_digest(model) -> str:
    """A digest of some weights of each tensor: after more training the same path holds another model."""
    digest = hashlib.sha256()
    for name, weights in model.state_dict().items():
        some = weights.flatten()[:: max(weights.numel() // 256, 1)]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def choose_results_folder(out: str, settings: dict) -> Path:
    """Folder `out`, or one under out/ for these settings; `settings` are written into it.

    ValueError if it has answers made with other settings.
    """
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]
    folder = Path(out or OUT / f"eval-{Path(settings['model']).name}-{digest}")

    # answers are kept only with others of the same model, seed, temperature ...
    file = folder / "settings.json"
    if file.exists():
        try:
            before = dict(json.loads(file.read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} holds no settings of eval.py; remove it, or give another --out") from error
        changed = []
        for key, value in settings.items():
            if before.get(key) != value:
                changed.append(f"{key} {before.get(key)}, not {value}")
        if changed:
            raise ValueError(f"{folder} has completions with {'; '.join(changed)}; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(file, json.dumps(settings, indent=2) + "\n")
    return folder


def answers_so_far(path: Path, ids: list[str], samples: int) -> dict[int, list[dict]]:
    """The answers in `path` to problems that have all of theirs, by problem and in the order of the samples.

    `ids` are those of the problems, in their order. ValueError if the file is about other problems, or holds
    something else.
    """
    if not path.exists():
        return {}

    # the rows of each problem, by sample
    found: dict[int, dict[int, dict]] = {}
    for _, row in read_rows(path, NEEDED):
        found.setdefault(row["problem"], {})[row["sample"]] = row

    # does the number of a problem still mean the same problem?
    known = dict(enumerate(ids))
    strange = set()
    for i, rows in found.items():
        if any(row["id"] != known.get(i) for row in rows.values()):
            strange.add(i)
    if strange:
        name = path.name.partition("@")[0]
        raise ValueError(f"{path} answers {len(strange)} problems that {name} now lacks; give another --out")

    return {i: [rows[k] for k in range(samples)] for i, rows in found.items() if len(rows) == samples}


def write_answers(path: Path, answers: dict[int, list[dict]]) -> None:
    """Writes all answers, problem by problem."""
    rows = [row for i in sorted(answers) for row in answers[i]]
    write_aside(path, "".join(json.dumps(row) + "\n" for row in rows))
