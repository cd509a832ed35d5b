"""Reading rows: with a bar where there are many, and those that a run has written, whatever has ended it."""

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm


def bar(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """`items`, with a bar on rank 0 where there is a terminal, once they have taken two seconds."""
    disable = None if os.environ.get("RANK", "0") == "0" else True
    return tqdm(items, what, total, delay=2, leave=False, disable=disable)


def read_settings(folder: Path) -> dict:
    """The settings in the config.json of a run's folder. ValueError, in one line, if there are none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of a run: it has no config.json; give the folders of runs alone")
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(settings, dict) or not {"replay", "seed"} <= set(settings):
        raise ValueError(f"{path} holds no settings of a run; give the folders of runs of train.py")
    return settings


def stage_keys(row: dict) -> list[str]:
    """The keys of a row of metrics.jsonl that hold the accuracy in each stage (log.accuracies)."""
    return [key for key in row if re.fullmatch(r"eval_accuracy_stage_\d+", key)]


def read_rows(path: Path, needed: dict[str, type]) -> list[tuple[bytes, dict]]:
    """The lines of a JSON lines file of ours, each with the object in it, which has the keys `needed`, of
    these types.

    Half a last line, which a kill or a full disk has left, is passed over with a word. ValueError, in one line that
    names file and line, for any other that is no such object.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            for name, kind in needed.items():
                if not isinstance(row[name], kind):
                    raise TypeError(f"{name} is no {kind.__name__}")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            # Whole lines end in a newline, so that only a torn one can lack it.
            if number == len(lines) and not line.endswith(b"\n"):
                print(f"the last line of {path} is torn, as a kill leaves it: it is passed over", file=sys.stderr)
                break
            what = " ".join(str(error).split())
            raise ValueError(
                f"line {number} of {path} is none of ours ({type(error).__name__}: {what}); mend it or remove it"
            ) from error
        found.append((line, row))
    return found
