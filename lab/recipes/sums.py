"""Sums of the embedded task, as a task of their own: the first stage of demo_continual.txt."""

from reward import grade_equation as score  # noqa: F401 (train.py takes it from here)
from tasks.tiny import arithmetic


def rows() -> list[dict]:
    return [{"problem": problem, "answer": answer} for problem, answer in arithmetic(2400) if "+" in problem]
