"""Tasks one after another, `--task A --then B C`: rows of A are stage 0, those of B stage 1, and so on.

The rule that trains stages in their order is lab/continual.py. Each row is scored by its own task.
"""

import json

from tasks import gym, own


def problems_of(task: str) -> tuple[list[tuple], list[tuple], str]:
    """Rows to train on and held-out ones (problem, answer, gold, row) of one task, and a line about them. ValueError
    or FileNotFoundError, in one line."""
    return (gym if gym.is_task(task) else own).problems(task)


def problems(tasks: tuple[str, ...], most: int, most_held_out: int) -> tuple[list[tuple], list[tuple], list[str]]:
    """The same of several, with a line about each. `most` of each task are trained on (0: all). What one task holds out
    no other trains on."""
    found = [problems_of(task) for task in tasks]
    if len(found) > 1:
        never = {json.dumps(pair[0]) for _, held, _ in found for pair in held}
        found = [staged(*one, stage, never) for stage, one in enumerate(found)]
    training = []
    held_out = []
    notes = []
    for pairs, held, note in found:
        training += pairs[: most or None]
        held_out += held[:most_held_out]
        notes.append(note)
    return training, held_out, notes


def staged(pairs: list[tuple], held: list[tuple], note: str, stage: int, never: set[str]) -> tuple:
    """One task of several: its rows have this stage, in place of one that they may have had, and none of the problems
    `never` to be trained on."""

    def with_stage(rows: list[tuple]) -> list[tuple]:
        return [(problem, answer, gold, row | {"stage": stage}) for problem, answer, gold, row in rows]

    pairs = [pair for pair in pairs if json.dumps(pair[0]) not in never]
    return with_stage(pairs), with_stage(held), f"stage {stage}: {note.removeprefix('task: ')}"


class Scorer(own.Scorer):
    """Each response by the score of its prompt's task. scores: one for each stage, each an own.Scorer."""

    def __init__(self, scores: list[own.Scorer]):
        self.scores = scores

    def check(self, prompts: list) -> None:
        """ValueError unless the prompts of each stage have what its score needs."""
        for stage, score in enumerate(self.scores):
            score.check([prompt for prompt in prompts if prompt.row["stage"] == stage])

    def of_prompts(self, responses: list[str], prompts: list, lengths: list[int], truncated: list[bool]) -> list[float]:
        """One reward for each response to the prompt at its place."""
        rewards = [0.0] * len(responses)
        for stage, score in enumerate(self.scores):
            places = [i for i, prompt in enumerate(prompts) if prompt.row["stage"] == stage]
            if not places:
                continue
            columns = [[column[i] for i in places] for column in (responses, prompts, lengths, truncated)]
            for i, reward in zip(places, score.of_prompts(*columns), strict=True):
                rewards[i] = reward
        return rewards
