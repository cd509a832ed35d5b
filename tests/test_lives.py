"""Visits that a run writes down, what is told from them, and that a million of them are drawn in seconds."""

from time import process_time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import lives, log, plot


def group(prompt: int, birth: int, *rewards: float) -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, birth=birth, rewards=torch.tensor(rewards))


def make_visits(*rows: tuple) -> np.ndarray:
    return np.array(list(rows), lives.VISIT)


def write(folder, visits: np.ndarray, more: bytes = b"") -> None:
    (folder / lives.FILE).write_bytes(visits.tobytes() + more)


def random_visits(prompts: int, steps: int, per_step: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    visits = np.zeros(steps * per_step, lives.VISIT)
    visits["step"] = np.repeat(np.arange(1, steps + 1), per_step)
    visits["prompt"] = rng.integers(prompts, size=len(visits))
    visits["answers"] = 8
    visits["right"] = rng.integers(9, size=len(visits))
    visits["replayed"] = rng.random(len(visits)) < 0.3
    return visits


# ---------------------------------------------------------------- the file


def test_the_gauge_appends_every_visit_with_its_right_answers_and_why(tmp_path):
    gauge = log.Gauge(70_000)
    gauge.observe([group(3, 1, 1.0, 0.0)], set())  # on the other ranks: no file
    gauge.file = tmp_path / lives.FILE
    gauge.observe([group(3, 2, 1.0, 0.0, 0.5), group(69_999, 2, 0.0, -1.0, 0.0)], {69_999})
    gauge.observe([group(3, 3, 1.0, 1.0, 1.0)], {3})
    expected = [(2, 3, 1, 3, 0), (2, 69_999, 0, 3, 1), (3, 3, 3, 3, 1)]
    assert lives.read(tmp_path).tolist() == expected
    assert (tmp_path / lives.FILE).stat().st_size == 3 * 13


def test_visits_after_the_checkpoint_and_a_torn_one_are_cut_off(tmp_path):
    visits = random_visits(9, steps=5, per_step=4)
    write(tmp_path, visits, b"torn")
    assert (lives.read(tmp_path) == visits).all()
    lives.forget_after(tmp_path / lives.FILE, 3)
    assert (tmp_path / lives.FILE).read_bytes() == visits[:12].tobytes()
    lives.forget_after(tmp_path / lives.FILE, 7)
    assert len(lives.read(tmp_path)) == 12
    lives.forget_after(tmp_path / lives.FILE, 0)
    assert (tmp_path / lives.FILE).read_bytes() == b""
    lives.forget_after(tmp_path / "none" / lives.FILE, 0)


def test_what_is_no_record_of_visits_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError):
        lives.read(tmp_path)
    (tmp_path / lives.FILE).write_bytes(bytes(range(255, 0, -1)))
    with pytest.raises(ValueError, match="no record of visits; remove it"):
        lives.read(tmp_path)
    with pytest.raises(ValueError, match="no record of visits"):
        lives.forget_after(tmp_path / lives.FILE, 1)


# ---------------------------------------------------------------- what is told


def test_moves_and_retests_by_hand():
    visits = make_visits(
        (1, 7, 0, 4, 0),
        (1, 5, 2, 4, 0),
        (2, 7, 4, 4, 1),  # all wrong, then all right by replay: a retest
        (3, 5, 1, 4, 1),  # medium, and medium again by replay
        (4, 5, 1, 8, 0),  # then hard, by the epochs
        (5, 7, 7, 8, 0),  # all right, then easy by the epochs
    )
    assert lives.rates(visits).tolist() == [0, 0.5, 1, 0.25, 0.125, 0.875]
    assert lives.kinds(visits).tolist() == [0, 2, 4, 2, 1, 3]
    by_replay, by_epochs = np.zeros((5, 5), int), np.zeros((5, 5), int)
    by_replay[0, 4] = by_replay[2, 2] = 1
    by_epochs[2, 1] = by_epochs[4, 3] = 1
    assert (lives.moves(visits, True) == by_replay).all() and (lives.moves(visits, False) == by_epochs).all()
    assert lives.retests(visits).tolist() == [False, False, True, False, False, False]


def test_the_raster_shows_prompts_visited_more_than_once_and_all_where_those_are_few():
    once = make_visits(*((1, prompt, 1, 2, 0) for prompt in range(6)))
    again = make_visits((2, 4, 1, 2, 0), (3, 2, 1, 2, 0), (4, 2, 1, 2, 1))
    visits = np.concatenate([once, again])
    assert lives.chosen(visits, 2)[0].tolist() == [2, 4] and lives.chosen(visits, 2)[1] == 2
    assert lives.chosen(visits, 9)[0].tolist() == [2, 4, 0, 1, 3, 5] and lives.chosen(visits, 9)[1] == 6
    assert lives.chosen(visits, 3)[0].tolist() == [2, 0, 5]  # an even sample, ends included


def test_marks_are_where_and_of_the_colour_that_the_visits_say():
    visits = make_visits((1, 7, 0, 4, 0), (2, 5, 2, 4, 0), (3, 7, 4, 4, 1), (9, 8, 4, 4, 1))
    axis = plot.pyplot().subplots()[1]
    lives.raster(axis, visits, np.array([7, 5]))
    fresh, back = axis.collections
    assert fresh.get_offsets().tolist() == [[1, 0], [2, 1]] and fresh.get_array().tolist() == [0, 0.5]
    assert back.get_offsets().tolist() == [[3, 0]] and back.get_array().tolist() == [1]
    plot.pyplot().close()


def test_a_million_visits_to_50_000_prompts_are_read_cut_and_drawn_in_seconds(tmp_path):
    write(tmp_path, random_visits(50_000, steps=16_000, per_step=64))
    start = process_time()
    lives.forget_after(tmp_path / lives.FILE, 15_999)
    path = lives.draw(lives.read(tmp_path), tmp_path / "lives.png")
    assert process_time() - start < 12
    assert 10_000 < path.stat().st_size < 100_000


def test_without_visits_nothing_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="no visit"):
        lives.draw(make_visits(), tmp_path / "lives.png")
