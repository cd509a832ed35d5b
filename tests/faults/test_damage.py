"""Damaged, mistaken and malicious checkpoints: what is wrong is named in one line, nothing of it runs, and the run goes
on exactly from the checkpoint before. tests/test_checkpoint.py tries the same on a small model, case by case."""

import io
import itertools
import shutil

import pytest
import torch

from tests.faults.harness import left_behind, run
from tests.test_checkpoint import FILES, Evil, flip, sign

pytestmark = pytest.mark.slow

FLAGS = ["--replay", "prompt+group+rollout", "--save-every", "3"]
TRIED = 6  # of each kind; all of them with --many


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run of six steps with checkpoints at 3 and 6, and what one of nine steps leaves behind."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    assert run(folder, *FLAGS, "--steps", "6").code == 0
    assert run(folder.with_name("whole"), *FLAGS, "--steps", "9").code == 0
    return folder, left_behind(folder.with_name("whole"))


def cut(path, length: int) -> None:
    data = path.read_bytes()[:length]
    path.write_bytes(data[:-1] if length == -1 else data)  # a last newline is nothing that is missed


def damages() -> dict:
    found = {}
    for name, at in itertools.product(FILES, (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)):
        found[f"{name}, a bit at {at:.0%}"] = lambda path, name=name, at=at: flip(path / name, at)
    for name, length in itertools.product(FILES, (0, 100, -1)):
        found[f"{name}, cut at {length}"] = lambda path, name=name, length=length: cut(path / name, length)
    for name in FILES:
        found[f"{name}, missing"] = lambda path, name=name: (path / name).unlink()
    return found


DAMAGES = damages()


def test_damage(prepared, rng, times, count, tmp_path):
    for i, what in enumerate(rng.sample(sorted(DAMAGES), min(2 * TRIED * times, len(DAMAGES)))):
        folder = shutil.copytree(prepared[0], tmp_path / f"run{i}")
        DAMAGES[what](folder / "checkpoints" / "step-00000006")
        end = run(folder, *FLAGS, "--steps", "9", "--resume")
        said = [line for line in end.text.splitlines() if "going on from step-00000003" in line]
        held = end.code == 0 and len(said) == 1 and left_behind(folder) == prepared[1]
        count("a damaged checkpoint: on from the one before", held, f"{what}: {end.text}")


# ---------------------------------------------------------------- whole by their check sums, and of something else


def without(key: str):
    def state(before: dict) -> dict:
        return {name: value for name, value in before.items() if name != key}

    return state


STATES = {
    "a list": lambda before: [1],
    "a number": lambda before: 7,
    "without its step": without("step"),
    "without its sampler": without("sampler"),
    "without its settings": without("config"),
    "a sampler of another type": lambda before: before | {"sampler": [1]},
    "settings of another type": lambda before: before | {"config": "text"},
    "a sampler of other prompts": lambda before: before | {"sampler": {"seen": torch.zeros(3)}},
    "stores of another type": lambda before: before | {"stores": {"places": 3}},
    "random numbers of another type": lambda before: before | {"torch_rng": "x"},
}


def rewrite(path, state: dict) -> None:
    """As a kill would not leave it, but a mistaken program would: with check sums that fit."""
    file = io.BytesIO()
    torch.save(state, file)
    (path / "state.pt").write_bytes(file.getvalue())
    sign(path)


def test_states_of_another_type(prepared, rng, times, count, tmp_path):
    for i, what in enumerate(rng.sample(sorted(STATES), min(TRIED * times, len(STATES)))):
        folder = shutil.copytree(prepared[0], tmp_path / f"run{i}")
        path = folder / "checkpoints" / "step-00000006"
        rewrite(path, STATES[what](torch.load(path / "state.pt", weights_only=True)))
        end = run(folder, *FLAGS, "--steps", "9", "--resume")
        count("a checkpoint of something else: one line", end.one_line and end.code == 2, f"{what}: {end.text}")


@pytest.mark.parametrize("name", [".metadata", "state.pt", "__0_0.distcp"])
def test_malicious_ones(name, prepared, count, tmp_path):
    import pickle

    folder = shutil.copytree(prepared[0], tmp_path / "run")
    path = folder / "checkpoints" / "step-00000006"
    proof = tmp_path / "proof"
    if name == "state.pt":
        torch.save({"config": Evil(proof)}, path / name)
    else:
        (path / name).write_bytes(pickle.dumps(Evil(proof)))
    sign(path)
    end = run(folder, *FLAGS, "--steps", "9", "--resume")
    count("a malicious checkpoint: one line", end.one_line, f"{name}: {end.text}")
    count("a malicious checkpoint: nothing of it runs", not proof.exists(), name)
