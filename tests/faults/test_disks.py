"""Disks that are full, read-only or gone: one line, nothing of the last checkpoint lost, and exactly on with room."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import eval as evaluation
import train
from tests.faults.harness import Child, evaluated, left_behind, run, start, steps_of, wait_until

pytestmark = pytest.mark.slow

FLAGS = ["--replay", "prompt+group", "--steps", "9"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 40 MB that can be filled; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here (this needs root)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    """To the last byte: a row that is begun in a free page would still find room there."""
    try:
        with open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except OSError:
        pass
    # rows are far shorter than a page, of which the last one may be half empty
    for path in disk.glob("run/*.jsonl"):
        with open(path, "ab", buffering=0) as file:
            file.write(b" " * (-path.stat().st_size % 4096))


def make_room(disk: Path) -> None:
    (disk / "filler").unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, *FLAGS).code == 0
    return left_behind(folder)


MOMENTS = {
    "before the first row": lambda folder: (folder / "config.json").exists(),
    "at a row": lambda folder: steps_of(folder) >= 4,
    "in a checkpoint": lambda folder: any((folder / "checkpoints").glob("step-00000006.partial/*")),
    "at the export": lambda folder: (folder / "checkpoints" / "step-00000009").exists(),
    "at the curves": lambda folder: (folder / "model" / "tokenizer_config.json").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk(moment, whole, disk, count):
    folder = disk / "run"
    child = start(folder, *FLAGS, curves=moment == "at the curves")
    if wait_until(lambda: MOMENTS[moment](folder), child):
        fill(disk)
    end = child.end()
    # Figures come last: where one of them finds no room, all else is saved, and only it is to be drawn again.
    # A quick run may be done before the disk is full: then there is nothing to say.
    figure = "draw it again" in end.text or end.code == 0
    said = end.code == 0 or end.one_line and (figure or "--resume" in end.text)
    count("full disk: one line that says how to go on", said, f"{moment}: {end.text}")
    before = sorted(path.name for path in folder.glob("checkpoints/step-????????"))
    named = figure or not before or before[-1] in end.text
    count("full disk: the last checkpoint is named", named, f"{moment}: {end.text}")
    full = run(folder, *FLAGS, "--resume")
    count("full disk: a resume without room is one line", full.one_line or full.code == 0, f"{moment}: {full.text}")
    make_room(disk)
    again = run(folder, *FLAGS, "--resume")
    held = again.code == 0 and left_behind(folder) == whole
    count("full disk: with room all is as if it never was", held, f"{moment}: {again.text}")


def test_a_disk_that_becomes_read_only(whole, disk, count):
    folder = disk / "run"
    child = start(folder, *FLAGS)
    wait_until(lambda: (folder / "checkpoints" / "step-00000003").exists(), child)
    # The kernel refuses while a file is open for writing; the lock file is, so that the mount is covered instead.
    for path in [folder, folder / "checkpoints"]:
        subprocess.run(["mount", "--bind", "-o", "ro", str(path), str(path)], check=True)
    end = child.end()
    for path in [folder / "checkpoints", folder]:
        subprocess.run(["umount", "-l", str(path)], check=True)
    count("a disk that becomes read-only: one line", end.one_line, end.text)
    again = run(folder, *FLAGS, "--resume")
    count("a disk that becomes read-only: then on", again.code == 0 and left_behind(folder) == whole, again.text)


def test_a_folder_that_is_removed_or_renamed(whole, tmp_path, count):
    folder = tmp_path / "run"
    child = start(folder, *FLAGS)
    wait_until(lambda: (folder / "checkpoints" / "step-00000003").exists(), child)
    folder.rename(tmp_path / "elsewhere")
    end = child.end()
    count("a folder that goes away: one line", end.one_line, end.text)
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "elsewhere").rename(folder)
    again = run(folder, *FLAGS, "--resume")
    count("a folder that goes away: then on", again.code == 0 and left_behind(folder) == whole, again.text)


def test_places_where_no_run_can_be(tmp_path, count):
    (tmp_path / "file").write_text("")
    for place in (
        "/proc/run",
        "/dev/null/run",
        str(tmp_path / "file" / "run"),
        "/sys/run",
        str(tmp_path / ("x" * 300)),
    ):
        folder = tmp_path / "console"
        end = start(folder, *FLAGS, "--out", place).end()  # the last --out counts
        count("no folder can be made: one line", end.one_line, f"{place}: {end.text}")
        (tmp_path / "console.console").unlink()


def test_an_evaluation_on_a_full_disk(disk, tmp_path, count):
    flags = ["--samples", "2", "--batch", "32"]
    assert run(tmp_path / "whole", *flags, main=evaluation.main).code == 0
    folder = disk / "run"
    child = start(folder, *flags, main=evaluation.main)
    wait_until(lambda: (folder / "embedded@2.jsonl").exists(), child)
    fill(disk)
    end = child.end()
    count("full disk, eval.py: one line", end.one_line, end.text)
    make_room(disk)
    again = run(folder, *flags, main=evaluation.main)
    count(
        "full disk, eval.py: then on",
        again.code == 0 and evaluated(folder) == evaluated(tmp_path / "whole"),
        again.text,
    )


def test_a_console_without_a_reader(tmp_path, count):
    """As `train.py | head -1`: the run is saved and left, as when a terminal is closed."""
    read, write = os.pipe()

    def piped() -> int:
        os.dup2(write, 1)
        os.close(read)
        return train.main([*FLAGS, "--steps", "1000", "--prompts-per-step", "4", "--out", str(tmp_path / "run")])

    child = Child(piped, tmp_path / "console")
    os.close(write)
    wait_until(lambda: steps_of(tmp_path / "run") >= 2, child)
    os.close(read)
    end = child.end()
    saved = (tmp_path / "run" / "checkpoints" / f"step-{steps_of(tmp_path / 'run'):08d}").exists()
    count("a console without a reader: saved and left", end.code == 129 and saved, f"{end.code} {end.text}")
