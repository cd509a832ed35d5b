"""The answers of an evaluation on disk, so that the same command goes on where it was stopped.

A folder holds settings.json, what all of its answers depend on, and one NAME@K.jsonl for each benchmark. A line of
it is one answer: `problem` (its number), `id` (of that problem), `sample` (0 to K - 1), `response` and more.
"""

import hashlib
import json
from pathlib import Path

from support.config import OUT


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
        before = json.loads(file.read_text())
        changed = []
        for key, value in settings.items():
            if before.get(key) != value:
                changed.append(f"{key} {before.get(key)}, not {value}")
        if changed:
            raise ValueError(f"{folder} has completions with {'; '.join(changed)}; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def answers_so_far(path: Path, ids: list[str], samples: int) -> dict[int, list[dict]]:
    """The answers in `path` to problems that have all of theirs, by problem and in the order of the samples.

    `ids` are those of the problems, in their order. ValueError if the file is about other problems.
    """
    if not path.exists():
        return {}

    # the rows of each problem, by sample
    found: dict[int, dict[int, dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line, left by a killed process: its problem is not complete
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
    aside = path.with_name(path.name + ".partial")  # renamed when it is whole: a kill leaves the old file
    with open(aside, "w", encoding="utf-8") as file:
        for i in sorted(answers):
            file.writelines(json.dumps(row) + "\n" for row in answers[i])
    aside.replace(path)
