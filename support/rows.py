"""Reading back the JSON lines that a run or an evaluation has written, whatever has ended it."""

import json
import sys
from pathlib import Path


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
