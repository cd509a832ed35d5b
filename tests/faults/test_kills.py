"""SIGKILL at any moment: after `--resume` no figure, no answer and no weight is another than without it."""

import signal
import time

import pytest

import eval as evaluation
import train
from tests.faults.harness import evaluated, left_behind, run, start, steps_of, wait_until

pytestmark = pytest.mark.slow

STEPS = ["--steps", "9"]
# popo is group by another name; continual needs data in stages.
METHODS = [name for name in train.METHODS if name not in ("popo", "continual")] + ["none", "prompt+group+rollout"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run without a kill leaves behind, by method; made when it is first asked for."""
    made = {}

    def get(method: str) -> tuple:
        if method not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            end = run(folder, "--replay", method, *STEPS)
            assert end.code == 0, end.text
            made[method] = left_behind(folder)
        return made[method]

    return get


def go_on(folder, method: str, kills: list) -> tuple:
    """What is left behind by a run that is killed once for each of `kills`, each time when its condition holds, and
    resumed each time; and how many of them fell into the run."""
    fell = 0
    flags = ["--replay", method, *STEPS]
    for condition in kills:
        child = start(folder, *flags)
        fell += wait_until(lambda: condition(folder), child)  # noqa: B023
        child.kill()
        flags = ["--replay", method, *STEPS, "--resume"]
    end = run(folder, *flags)
    assert end.code == 0, end.text
    return left_behind(folder), fell


def after(seconds: float):
    """A condition that holds so long after it was first asked, and not before the folder is there."""
    started = []

    def passed(folder) -> bool:
        if not started and (folder / "config.json").exists():
            started.append(time.monotonic())
        return bool(started) and time.monotonic() - started[0] >= seconds

    return passed


@pytest.mark.parametrize("method", METHODS)
def test_at_random_moments(method, whole, rng, times, count, tmp_path):
    expected = whole(method)
    for i in range(times):
        # A step after which it falls, and a moment within the next.
        step = rng.randrange(9)
        moment = rng.random() * 0.2
        pause = after(moment)

        def reached(folder, step=step, pause=pause) -> bool:
            return steps_of(folder) >= step and pause(folder)

        found, fell = go_on(tmp_path / f"run{i}", method, [reached])
        if fell:
            where = f"{method}, step {step} + {moment:.3f} s"
            count("SIGKILL of train.py at a random moment", found == expected, where)


def test_a_stop(whole, rng, times, count, tmp_path):
    """SIGTERM lets the step finish and saves."""
    for i in range(times):
        method = rng.choice(METHODS)
        step = rng.randrange(1, 8)
        folder = tmp_path / f"run{i}"
        child = start(folder, "--replay", method, *STEPS)
        fell = wait_until(lambda step=step, folder=folder: steps_of(folder) >= step, child)
        child.signal(signal.SIGTERM)
        end = child.end()
        if fell:
            saved = (folder / "checkpoints" / f"step-{steps_of(folder):08d}").exists()
            again = run(folder, "--replay", method, *STEPS, "--resume")
            held = end.code in (0, 143) and saved and again.code == 0 and left_behind(folder) == whole(method)
            count("SIGTERM at a random step: saved, and exactly on", held, f"{method}, {step}: {end.text}{again.text}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_the_opening_evaluation(number, count, tmp_path):
    """There is nothing to save yet, and a long evaluation is not waited for."""
    folder = tmp_path / "run"
    child = start(folder, *STEPS, "--eval-prompts", "400", "--eval-samples", "4000")
    wait_until(lambda: (folder / "config.json").exists(), child)
    time.sleep(0.5)
    child.signal(number)
    end = child.end(seconds=20)
    gone = end.code == (-number if number == signal.SIGTERM else 130) and "Traceback" not in end.text
    count("a stop in the opening evaluation: at once", gone, f"{end.code} {end.text}")
    again = run(folder, *STEPS, "--resume")
    begun = again.code == 0 and "starts anew" in again.text and steps_of(folder) == 9
    count("a stop in the opening evaluation: it begins anew", begun, again.text)


def partial(folder):
    """The checkpoint that is being written."""
    return next(iter((folder / "checkpoints").glob("*.partial")), None)


MOMENTS = {
    "a checkpoint is begun": lambda folder: partial(folder),
    "its shard is there": lambda folder: partial(folder) and (partial(folder) / "__0_0.distcp").exists(),
    "its metadata are there": lambda folder: partial(folder) and (partial(folder) / ".metadata").exists(),
    "its state is there": lambda folder: partial(folder) and (partial(folder) / "state.pt").exists(),
    "it has its name": lambda folder: len(list((folder / "checkpoints").glob("step-????????"))) > 1,
    "three are there": lambda folder: len(list((folder / "checkpoints").glob("step-????????"))) > 2,
    "the model is written": lambda folder: (folder / "model.partial").exists(),
    "the model is moved": lambda folder: (folder / "model").exists(),
    "some answers are written": lambda folder: (folder / "samples.jsonl").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_inside_a_save_and_the_export(moment, whole, times, count, tmp_path):
    for i in range(times):
        found, fell = go_on(tmp_path / f"run{i}", "prompt+group+rollout", [MOMENTS[moment]])
        if fell:
            count("SIGKILL inside a save or the export", found == whole("prompt+group+rollout"), moment)


def test_again_and_again(whole, rng, times, count, tmp_path):
    """One run that is killed ten times, also while it resumes."""
    for i in range(times):
        moments = [after(rng.random()) for _ in range(10)]
        found, fell = go_on(tmp_path / f"run{i}", "adaptive", moments)
        count("a run killed up to ten times over", found == whole("adaptive"), f"{fell} kills")


# ---------------------------------------------------------------- eval.py

EVAL = ["--samples", "2", "--batch", "32"]


@pytest.fixture(scope="module")
def whole_evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "evaluation"
    assert run(folder, *EVAL, main=evaluation.main).code == 0
    return evaluated(folder)


def answers(folder) -> int:
    try:
        return (folder / "embedded@2.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return -1


def test_an_evaluation(whole_evaluation, rng, times, count, tmp_path):
    conditions = [lambda folder: (folder / "settings.json").exists(), lambda folder: (folder / "results.json").exists()]
    conditions.append(lambda folder: (folder / "embedded@2.jsonl.partial").exists())
    for _ in range(3 * times):
        number = rng.randrange(800)
        conditions.append(lambda folder, number=number: answers(folder) >= number)
    for i, condition in enumerate(conditions):
        folder = tmp_path / f"run{i}"
        child = start(folder, *EVAL, main=evaluation.main)
        fell = wait_until(lambda: condition(folder), child)  # noqa: B023
        child.kill()
        end = run(folder, *EVAL, main=evaluation.main)
        held = end.code == 0 and evaluated(folder) == whole_evaluation
        if fell:
            count("SIGKILL of eval.py", held, f"condition {i}: {end.text}")
