"""Mirrors of a run in Weights & Biases and TensorBoard, with stand-ins for both packages."""

import builtins
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from buffer import Group
from support import log

ROW = {
    "step": 7,
    "reward": 0.5,
    "rollouts": 64,
    "resumed": True,
    "pass_rates_fresh": [3, 0, 1],
    "empty": [0],
    "x": None,
}
SAMPLES = [
    {"step": 7, "prompt": "1+1=", "response": "a\nb", "answer": "2", "reward": 1.0, "truncated": False},
    {
        "step": 7,
        "prompt": [{"role": "user", "content": "2"}],
        "response": "",
        "answer": "2",
        "reward": 0,
        "truncated": True,
    },
]


def whole_group(prompt: int, rewards: list[float], cut: int = 0) -> Group:
    rewards, size = torch.tensor(rewards), len(rewards)
    tokens, logprobs = [torch.zeros(2, dtype=torch.int32)] * size, [torch.tensor([-0.5, -1.5 - prompt])] * size
    return Group(prompt, tokens, logprobs, [i < cut for i in range(size)], 1, rewards, rewards - rewards.mean())


def test_figures_of_a_steps_rollouts_by_hand():
    groups = [
        whole_group(0, [1.0, 1.0, 1.0, 1.0]),
        whole_group(1, [0.0, 0.0, 0.0, 0.0], cut=3),
        whole_group(2, [1.0, 0.0, 0.0, 0.0]),
    ]
    groups += [whole_group(3, [1.0, 1.0, 1.0, 0.6]), whole_group(4, [0.0, 0.0, 0.0, 0.4])]
    figures = log.rollout_figures(groups, replays={1, 2})
    expected = {
        "reward": (4 + 0 + 1 + 3.6 + 0.4) / 20, "reward_replayed": 1 / 8, "zero_variance": 2 / 5,
        "zero_variance_fresh": 1 / 3, "zero_variance_replayed": 1 / 2, "all_right": 1 / 5, "all_wrong": 1 / 5,
        "replayed": 2 / 5, "truncated": 3 / 20, "mean_abs_advantage": (0.375 + 0.15 + 0.15) / 5,
        "entropy": (0.5 + 1.5 + 2) / 2,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert figures["pass_rates_fresh"] == [1, 0, 0, 0, 2] and figures["pass_rates_replayed"] == [1, 1, 0, 0, 0]
    assert "zero_variance_replayed" not in log.rollout_figures(groups, replays=set())


def test_a_step_says_when_nothing_of_medium_pass_rate_is_left():
    names = ("reward", "zero_variance", "replayed", "mean_abs_advantage", "entropy", "truncated", "grad_norm")
    row = {"step": 3, "seconds_total": 1.0} | dict.fromkeys(names, 0.25)
    assert "all right or all wrong" in log.line(row | {"heap": 0})
    assert "all right" not in log.line(row | {"heap": 1}) and "all right" not in log.line(row)


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes what is asked of it."""
    module = ModuleType("wandb")
    module.calls, module.Error = [], type("Error", (Exception,), {})
    run = SimpleNamespace(
        log=lambda row, step: module.calls.append(("log", row, step)), finish=lambda: module.calls.append(("finish",))
    )
    module.init = lambda **options: module.calls.append(("init", options)) or run
    module.Histogram = lambda np_histogram: ("histogram", np_histogram)
    module.Table = lambda columns, data: ("table", columns, data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def tensorboard(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.calls = []

    class SummaryWriter:
        def __init__(self, *args, **options):
            module.calls.append(("open", args, options))

        def __getattr__(self, name):
            return lambda *args, **options: module.calls.append((name, args, options))

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return module


def test_without_flags_nothing_is_imported_and_nothing_happens(tmp_path, wandb, tensorboard):
    mirror = log.Mirror()
    mirror.start(tmp_path, {}, 0)
    mirror.log(ROW)
    mirror.samples(SAMPLES)
    mirror.close()
    assert not wandb.calls and not tensorboard.calls and not list(tmp_path.iterdir())


def test_not_started_as_on_other_ranks_nothing_is_written(wandb, tensorboard):
    mirror = log.Mirror("project", True)
    mirror.log(ROW)
    mirror.samples(SAMPLES)
    mirror.close()
    assert not wandb.calls and not tensorboard.calls


def test_wandb_gets_numbers_histograms_and_samples(tmp_path, wandb):
    mirror = log.Mirror("project")
    mirror.start(tmp_path, {"lr": 1e-6}, 0)
    mirror.samples(SAMPLES)
    mirror.samples([])
    mirror.log(ROW)
    mirror.close()
    (_, options), (_, table, at), (_, row, step), end = wandb.calls
    assert options["project"] == "project" and options["config"] == {"lr": 1e-6} and options["name"] == tmp_path.name
    assert at == step == 7 and end == ("finish",)
    assert row == {
        "reward": 0.5, "rollouts": 64, "resumed": True,
        "pass_rates_fresh": ("histogram", ([3, 0, 1], [-0.5, 0.5, 1.5, 2.5])),
    }  # fmt: skip
    kind, columns, cells = table["samples"]
    assert columns == list(SAMPLES[0]) and cells[0] == list(SAMPLES[0].values())
    assert json.loads(cells[1][1]) == SAMPLES[1]["prompt"]


def test_a_resumed_run_goes_on_in_the_same_place_and_a_new_one_does_not(tmp_path, wandb, tensorboard):
    for step in (0, 20, 0):
        log.Mirror("project", True).start(tmp_path, {}, step)
    first, resumed, new = (options for _, options in wandb.calls)
    assert first["id"] == resumed["id"] != new["id"] and resumed["resume"] == "allow"
    assert [options["purge_step"] for _, _, options in tensorboard.calls] == [1, 21, 1]


def test_tensorboard_gets_numbers_histograms_and_samples(tmp_path, tensorboard):
    mirror = log.Mirror(tensorboard=True)
    mirror.start(tmp_path, {}, 0)
    mirror.log(ROW)
    mirror.samples(SAMPLES)
    mirror.close()
    calls = {}
    for name, args, options in tensorboard.calls:
        calls.setdefault(name, []).append((args, options))
    assert calls["open"][0][0] == (str(tmp_path / "tensorboard"),)
    assert [args for args, _ in calls["add_scalar"]] == [("reward", 0.5, 7), ("rollouts", 64, 7), ("resumed", True, 7)]
    ((name,), bars) = calls["add_histogram_raw"][0]
    assert name == "pass_rates_fresh" and len(calls["add_histogram_raw"]) == 1
    assert bars["bucket_counts"] == [3, 0, 1] and bars["bucket_limits"] == [0.5, 1.5, 2.5]
    assert (bars["num"], bars["sum"], bars["sum_squares"], bars["max"], bars["global_step"]) == (4, 2, 4, 2, 7)
    texts = [args for args, _ in calls["add_text"]]
    assert [name for name, _, _ in texts] == ["samples/0", "samples/1"] and texts[0][2] == 7
    assert "    response: a\n    b\n" in texts[0][1] and "1+1=" in texts[0][1]
    assert "close" in calls and "flush" in calls


@pytest.mark.parametrize(("flags", "package"), [(("p", False), "wandb"), (("", True), "tensorboard")])
def test_a_missing_package_is_one_clear_line(monkeypatch, flags, package):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    real = builtins.__import__

    def missing(name, *args, **options):
        if name in ("wandb", "torch.utils.tensorboard"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=f"^--{package} needs a package: pip install {package}") as error:
        log.Mirror(*flags)
    assert "\n" not in str(error.value)


def test_both_asked_for_and_only_one_there(monkeypatch, wandb):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="^--tensorboard needs a package"):
        log.Mirror("project", True)


def test_wandb_that_cannot_start_says_what_to_do(tmp_path, wandb):
    def fail(**_):
        raise wandb.Error("api_key not configured\n(no-tty)")

    wandb.init = fail
    with pytest.raises(
        ValueError, match=r"api_key not configured \(no-tty\)\): wandb login, or set WANDB_MODE=offline"
    ):
        log.Mirror("project").start(tmp_path, {}, 0)


def group(prompt: int, *rewards: float) -> Group:
    return Group(prompt, [], [], [], 1, torch.tensor(rewards, dtype=torch.float32))


def test_gauge_is_the_mean_change_from_visit_to_visit_apart_for_replay_and_epochs():
    gauge = log.Gauge(4)
    gauge.observe([group(0, 0, 1), group(1, 0, 0)], set())
    assert gauge.figures() == {}
    gauge.observe([group(0, 1, 1), group(1, 0, 1)], {0, 1})
    gauge.observe([group(0, 0, 1), group(2, 1, 1)], set())
    gauge.observe([group(2, 0, 0), group(0, 0, 1)], set())
    figures = gauge.figures()
    assert (figures["gain_replay"], figures["gain_replay_n"], figures["gain_replay_se"]) == (0.5, 2, 0)
    assert figures["gain_epochs"] == pytest.approx(-0.5) and figures["gain_epochs_n"] == 3
    assert figures["gain_epochs_se"] == pytest.approx(np.std([-0.5, -1, 0], ddof=1) / 3**0.5)
    again = log.Gauge(4)
    again.load_state_dict(gauge.state_dict())
    assert again.figures() == figures
    assert len({log.advice(gain, 0.01) for gain in (0.01, 0.05, 0.2, 0.3)}) == 4
    assert log.advice(0.054, 0.047) == log.advice(0.2, 0.03) == log.advice(0.01, 0.01)


def test_closing_lines_say_how_far_from_on_policy_stored_answers_were():
    row = {"step": 1, "rollouts": 8, "tokens": 80} | dict.fromkeys(
        (f"seconds_{name}" for name in ("rollout", "reward", "update", "sync", "total")), 1.0
    )
    assert "stored" not in log.summary([row])
    for sizes, words in (((1.0, 0.98), "0.990 of 1: nearly"), ((0.92,), "may save or cost"), ((0.8,), "stale")):
        assert words in log.summary([row, *(row | {"ess_replayed": size, "group_ages": [0, 1]} for size in sizes)])
