"""Makes guru-math-1000.jsonl, the data of prioritized_qwen2.5_7b.txt, out of the maths part of LLM360/guru-RL-92k.

    hf download LLM360/guru-RL-92k --repo-type dataset --include "train/math*" --local-dir out/guru
    python -m lab.recipes.guru_math out/guru/train/math*.parquet

The rules are those of the author's code. It keeps 47,844 rows and draws 1,000 of them, of which 696 have a
qwen2.5_7b_pass_rate of at most 0.2, 170 of at most 0.4, 133 of at most 0.6, and 1 of at most 0.8. The same counts of
our draw are printed, to be held against these. Which rows of a bin its seed 42 draws depends on its libraries: ours are
others. The name of the file on the hub has not been looked up.
"""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from support.config import exits, parse
from tasks import data

SOLVER = "qwen3_30b_pass_rate"
LEARNER = "qwen2.5_7b_pass_rate"
COLUMNS = ("prompt", "reward_model", "ability", SOLVER, LEARNER)
BINS = 10


@dataclass
class Flags:
    files: Positional[tuple[str, ...]] = ()  # the maths part, as Parquet or JSON lines
    count: int = 1000  # problems to draw
    seed: int = 42  # of the draw
    out: str = "guru-math-1000.jsonl"  # file to write


def candidates(rows: list[dict]) -> list[dict]:
    """Rows of maths, no problem twice, that the large model solves more often than not, and the small one not yet."""
    found = {}
    for row in rows:
        solver = row[SOLVER]
        learner = row[LEARNER]
        if row["ability"] == "math" and solver > 0.5 and learner < 0.7 and solver != learner:
            found.setdefault(json.dumps(row["prompt"]), row)
    return list(found.values())


def drawn(rows: list[dict], count: int, seed: int) -> list[dict]:
    """`count` of `rows`: equal shares of ten equal bins by the small model's pass rate."""
    rng = random.Random(seed)
    rows = sorted(rows, key=lambda row: row[LEARNER])
    found = []
    for i in range(BINS):
        some = rows[i * len(rows) // BINS : (i + 1) * len(rows) // BINS]
        share = (i + 1) * count // BINS - i * count // BINS
        found += rng.sample(some, share)
    rng.shuffle(found)
    return found


@exits(2, ValueError, OSError)
def main(argv: list[str]) -> int:
    flags, _ = parse(Flags, argv, __doc__)
    if not flags.files:
        raise ValueError("give the files of the maths part")
    rows = []
    for file in flags.files:
        rows += data.read_rows(file)
    for n, row in enumerate(rows, 1):
        lacking = [name for name in COLUMNS if row.get(name) is None]
        if lacking:
            raise ValueError(f"row {n} lacks {', '.join(lacking)}; give the files of the maths part alone")
    kept = candidates(rows)
    if len(kept) < flags.count:
        raise ValueError(f"{len(kept)} of {len(rows)} rows are left, fewer than the {flags.count} to draw")

    chosen = drawn(kept, flags.count, flags.seed)
    lines = [json.dumps({name: row[name] for name in ("prompt", "reward_model")}) for row in chosen]
    Path(flags.out).write_text("\n".join(lines) + "\n")
    fifths = Counter(max(math.ceil(5 * row[LEARNER] - 1e-9), 1) for row in chosen)
    print(f"{len(rows):,} rows, {len(kept):,} kept, {len(chosen):,} drawn into {flags.out}")
    for i in sorted(fifths):
        print(f"pass rate above {0.2 * (i - 1):.1f}, at most {0.2 * i:.1f}: {fifths[i]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
