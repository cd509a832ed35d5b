"""docs/experiments.md: every command of its table is run, shortened, and every interval is one of the results."""

import json
import re
import shlex

import pytest

from lab import compare, simulate
from support.config import ROOT

PAGE = (ROOT / "docs" / "experiments.md").read_text()
COLUMNS = ["", "question", "command", "CPU minutes", "what to inspect", "what we saw"]


def table() -> list[list[str]]:
    """The cells of each row of the table of questions, without its head."""
    questions = PAGE.partition("## Eighteen questions")[2]
    lines = [line for line in questions.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert rows[0] == COLUMNS and all(len(row) == len(COLUMNS) for row in rows)
    return rows[1:]


ROWS = table()
COMMANDS = [row[2].strip("`") for row in ROWS]
FIRST = re.search(r"```\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()  # the three to begin with


def shortened(words: list[str], folder) -> list[str]:
    """One seed and two steps of the command `words`, in `folder`, at one learning rate."""
    if "--lrs" in words:
        at = words.index("--lrs")  # two rates, which need four seeds
        words = words[:at] + words[at + 3 :]
    less = {"--seeds": "1", "--budget-rollouts": "256", "--out": str(folder)}
    words = [less.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if "--" in words:
        at = words.index("--")
        return [*words[:at], "--jobs", "2", *words[at:], "--eval-prompts", "20"]
    return [*words, "--steps", "20", "--seeds", "2"]  # its standard errors need two


def intervals(text: str) -> list[str]:
    return re.findall(r"[+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\)|[+-]\d+ ± \d+", text)


def test_the_table_asks_of_each_paper_where_it_helps_and_where_not():
    assert len(ROWS) >= 12 and [row[0] for row in ROWS] == [str(number) for number in range(1, len(ROWS) + 1)]
    for paper in ("Prompt Replay", "Prioritized Replay", "Rollout-level replay", "POPO"):
        mine = [row for row in ROWS if row[1].startswith(f"**{paper}**")]
        seen = [float(intervals(row[5])[0].split()[0]) for row in mine]
        assert max(seen) > 0 > min(seen), paper
    for row in ROWS:
        assert float(row[3]) > 0 and row[4] and intervals(row[5]), row


def test_every_interval_of_the_table_is_one_of_the_results():
    known = (ROOT / "docs" / "results.md").read_text()
    for path in (ROOT / "docs" / "tables").glob("*.md"):
        known += path.read_text()
    for row in ROWS:
        for interval in intervals(row[5]):
            assert interval in known, f"row {row[0]}: {interval}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_read(command):
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    if words[2] == "lab.compare":
        assert flags_of_comparison(words).seeds == 12
    else:
        assert words[2] == "lab.simulate"


def flags_of_comparison(words: list[str]) -> compare.Flags:
    """Those of lab.compare; ValueError if one of its runs could not be made."""
    at = words.index("--")
    flags, _ = compare.config.parse(compare.Flags, words[3:at], "")
    for own in compare.arms_of(flags).values():
        compare.check_run(compare.settings_of([*words[at + 1 :], *own])[0])
    return flags


def test_the_three_to_begin_with_can_be_read_and_are_in_order():
    words = [shlex.split(command) for command in FIRST]
    assert len(words) == 3
    simulate.check(compare.config.parse(simulate.Flags, words[0][3:], "")[0])
    compare.check_run(compare.settings_of(words[1][2:])[0])
    assert len(flags_of_comparison(words[2]).lrs) == 2
    # the run is laid beside a reference run of the same settings
    folder = words[1][words[1].index("--out") + 1]
    assert f"python -m lab.compare {folder} docs/reference/prompt" in PAGE


@pytest.mark.slow
def test_every_command_of_the_table_runs(tmp_path, capsys):
    for number, command in enumerate([FIRST[0], FIRST[2], *COMMANDS]):
        if "gym:" in command:
            continue  # its model takes minutes to make; tests/test_gym.py trains one that had fewer lessons
        words = shortened(shlex.split(command), tmp_path / str(number))
        main = compare.main if words[2] == "lab.compare" else simulate.main
        assert main(words[3:]) == 0, command
        output = capsys.readouterr().out
        if words[2] == "lab.compare":
            result = json.loads((tmp_path / str(number) / "results.json").read_text())
            assert len(result["methods"]) >= 2 and all(entry["seeds"] == 1 for entry in result["methods"].values())
        else:
            assert "uniform sampling: accuracy" in output
