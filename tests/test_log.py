"""Figures and files of a run, and its mirrors, with stand-ins for both packages."""

import builtins
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import replay
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


def make_group(prompt: int, rewards: list[float], tokens: list, logprobs: list, truncated: list) -> replay.Group:
    return replay.Group(prompt, tokens, logprobs, truncated, 1, torch.tensor(rewards, dtype=torch.float32))


def whole_group(prompt: int, rewards: list[float], cut: int = 0) -> replay.Group:
    size = len(rewards)
    tokens = [torch.zeros(2, dtype=torch.int32)] * size
    logprobs = [torch.tensor([-0.5, -1.5 - prompt])] * size
    return make_group(prompt, rewards, tokens, logprobs, [i < cut for i in range(size)])


def test_figures_of_a_steps_rollouts_by_hand():
    groups = [
        whole_group(0, [1.0, 1.0, 1.0, 1.0]),
        whole_group(1, [0.0, 0.0, 0.0, 0.0], cut=3),
        whole_group(2, [1.0, 0.0, 0.0, 0.0]),
    ]
    groups += [whole_group(3, [1.0, 1.0, 1.0, 0.6]), whole_group(4, [0.0, 0.0, 0.0, 0.4])]
    figures = log.rollout_figures(groups, replays={1, 2})
    expected = {
        "reward": (4 + 0 + 1 + 3.6 + 0.4) / 20,
        "reward_replayed": 1 / 8,
        "zero_variance": 2 / 5,
        "zero_variance_fresh": 1 / 3,
        "zero_variance_replayed": 1 / 2,
        "all_right": 1 / 5,
        "all_wrong": 1 / 5,
        "replayed": 2 / 5,
        "truncated": 3 / 20,
        "mean_abs_advantage": (0.375 + 0.15 + 0.15) / 5,
        "entropy": (0.5 + 1.5 + 2) / 2,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert figures["pass_rates_fresh"] == [1, 0, 0, 0, 2] and figures["pass_rates_replayed"] == [1, 1, 0, 0, 0]
    assert "zero_variance_replayed" not in log.rollout_figures(groups, replays=set())


def test_a_step_says_when_nothing_of_medium_pass_rate_is_left():
    names = ("reward", "zero_variance", "replayed", "mean_abs_advantage", "entropy", "truncated", "grad_norm")
    row = {"step": 3, "seconds_total": 1.0} | dict.fromkeys(names, 0.25)
    assert "all right or all wrong" in log.line(row | {"heap": 0})
    assert "all right" not in log.line(row | {"heap": 1}) and "all right" not in log.line(row)


class Table:
    def __init__(self, columns):
        self.columns = columns
        self.rows = []

    def add_data(self, *cells):
        self.rows.append(list(cells))


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes what is asked of it."""
    module = ModuleType("wandb")
    module.calls = []
    module.Error = type("Error", (Exception,), {})
    module.Table = Table
    run = SimpleNamespace(
        log=lambda row: module.calls.append(("log", row)), finish=lambda: module.calls.append(("finish",))
    )
    module.init = lambda **options: module.calls.append(("init", options)) or run
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


def test_wandb_takes_curves_from_tensorboard_and_gets_samples_as_a_table(tmp_path, wandb, tensorboard):
    mirror = log.Mirror("project")
    mirror.start(tmp_path, {"lr": 1e-6}, 0)
    assert not [name for name, _ in wandb.calls if name == "log"] and tensorboard.calls[0][0] == "open"
    mirror.log(ROW)
    mirror.samples(SAMPLES)
    mirror.samples([])
    mirror.close()
    (_, options), (_, row), end = wandb.calls
    assert options["sync_tensorboard"] is True and options["project"] == "project"
    assert options["config"] == {"lr": 1e-6} and options["name"] == tmp_path.name
    assert row["global_step"] == 7 and end == ("finish",)
    assert row["samples"].columns == list(SAMPLES[0]) and row["samples"].rows[0] == list(SAMPLES[0].values())
    assert json.loads(row["samples"].rows[1][1]) == SAMPLES[1]["prompt"]
    assert [args[0] for name, args, _ in tensorboard.calls if name == "add_scalar"] == ["reward", "rollouts", "resumed"]


def test_wandb_is_begun_before_the_writer_that_it_watches(tmp_path, wandb, tensorboard):
    order = []
    begin = wandb.init
    wandb.init = lambda **options: order.append("wandb") or begin(**options)
    writer = tensorboard.SummaryWriter
    tensorboard.SummaryWriter = lambda *args, **options: order.append("writer") or writer(*args, **options)
    log.Mirror("project").start(tmp_path, {}, 0)
    assert order == ["wandb", "writer"]


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


def test_wandb_needs_tensorboard_too(monkeypatch, wandb):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="^--wandb needs a package: pip install tensorboard"):
        log.Mirror("project")


def test_the_real_writer_writes_what_tensorboard_reads(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    mirror = log.Mirror(tensorboard=True)
    mirror.start(tmp_path, {}, 0)
    mirror.log(ROW)
    mirror.samples(SAMPLES)
    mirror.close()
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    read.Reload()
    tags = read.Tags()
    assert set(tags["scalars"]) == {"reward", "rollouts", "resumed"}
    assert tags["histograms"] == ["pass_rates_fresh"] and read.Histograms("pass_rates_fresh")[0].step == 7
    assert set(tags["tensors"]) == {"samples/0/text_summary", "samples/1/text_summary"}


def test_wandb_that_cannot_start_says_what_to_do(tmp_path, wandb, tensorboard):
    def fail(**_):
        raise wandb.Error("api_key not configured\n(no-tty)")

    wandb.init = fail
    with pytest.raises(
        ValueError, match=r"api_key not configured \(no-tty\)\): wandb login, or set WANDB_MODE=offline"
    ):
        log.Mirror("project").start(tmp_path, {}, 0)


def group(prompt: int, *rewards: float) -> replay.Group:
    return make_group(prompt, list(rewards), [], [], [])


@pytest.mark.parametrize(
    ("rewards", "right"),
    [([1, 0, 1], 2), ([1, 1, 1], 3), ([2, 2, 2], 3), ([0, 0, 0], 0), ([0.5, 0.5, 0.5], 0), ([-1, -1, -1], 0)]
    + [([0.5, 1, -1], 1.5), ([2, 1, 1], 3)],
)
def test_a_pass_rate_is_the_samplers_and_dead_groups_are_of_one_of_two_kinds(rewards, right):
    one = whole_group(0, rewards)
    assert one.num_correct == right
    figures = log.rollout_figures([one], set())
    assert figures["all_right"] + figures["all_wrong"] == figures["zero_variance"] == one.dead
    assert figures["pass_rates_fresh"].index(1) == round(right)
    gauge = log.Gauge(1)
    gauge.observe([one], set())
    assert gauge.rate[0] == pytest.approx(right / 3)


def test_gauge_is_the_mean_change_from_visit_to_visit_apart_for_replay_and_epochs():
    gauge = log.Gauge(4)
    assert gauge.observe([group(0, 0, 1), group(1, 0, 0)], set()) == {}
    gauge.observe([group(0, 1, 1), group(1, 0, 1)], {0, 1})
    gauge.observe([group(0, 0, 1), group(2, 1, 1)], set())
    figures = gauge.observe([group(2, 0, 0), group(0, 0, 1)], set())
    assert (figures["gain_replay"], figures["gain_replay_n"], figures["gain_replay_se"]) == (0.5, 2, 0)
    assert figures["gain_epochs"] == pytest.approx(-0.5) and figures["gain_epochs_n"] == 3
    assert figures["gain_epochs_se"] == pytest.approx(np.std([-0.5, -1, 0], ddof=1) / 3**0.5)
    again = log.Gauge(4)
    again.load_state_dict(gauge.state_dict())
    assert again.observe([], set()) == figures
    assert len({log.advice(gain, 0.01) for gain in (0.01, 0.05, 0.2, 0.3)}) == 4
    assert log.advice(0.054, 0.047) == log.advice(0.2, 0.03) == log.advice(0.01, 0.01)


def test_a_run_without_a_live_group_is_told_that_nothing_was_trained_on():
    row = {"step": 1, "rollouts": 8, "tokens": 8, "seconds_total": 1.0, "reward": 0.0, "trained_groups": 0}
    row |= {f"seconds_{name}": 0.25 for name in ("rollout", "reward", "update", "sync")}
    assert "all rewards were equal; give it problems that the model solves now" in log.summary([row, row])
    assert "give it harder problems" in log.summary([row | {"reward": 1.0}])
    assert "nothing was trained" not in log.summary([row, row | {"trained_groups": 1}])


def test_closing_lines_say_how_far_from_on_policy_stored_answers_were():
    row = {"step": 1, "rollouts": 8, "tokens": 80} | dict.fromkeys(
        (f"seconds_{name}" for name in ("rollout", "reward", "update", "sync", "total")), 1.0
    )
    assert "stored" not in log.summary([row])
    for sizes, words in (((1.0, 0.98), "0.990 of 1: nearly"), ((0.92,), "may save or cost"), ((0.8,), "stale")):
        assert words in log.summary([row, *(row | {"ess_replayed": size, "group_ages": [0, 1]} for size in sizes)])


# ---------------------------------------------------------------- files


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_after_the_checkpoint_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log.append(path, [{"step": step, "text": "ä"} for step in (1, 2, 3)])
    log.forget_after(path, 2)
    assert [row["step"] for row in rows_of(path)] == [1, 2]
    log.forget_after(path, 0)
    assert path.read_bytes() == b""
    log.forget_after(tmp_path / "nothing.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "rew', '{"step": 2, "response": "\\boxed{5}', "\0\0\0", '{"step": 2, "x": "\u00e4']
)
def test_a_torn_last_line_is_cut_off_with_a_word(tmp_path, capsys, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn.encode())
    log.forget_after(path, 5)
    assert path.read_text() == '{"step": 1}\n'
    assert "torn" in capsys.readouterr().err


def test_half_a_character_at_the_end_is_a_torn_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": "' + "ä".encode()[:1])
    log.forget_after(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_a_whole_last_line_without_a_newline_is_kept(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    log.forget_after(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "bad", [b"\xff\xfe", b"[1]", b"null", b"7", b"{}", b"", b'{"step": "x"}', b'{"step": 1', b"[" * 9999]
)
def test_a_line_that_is_no_row_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    before = b'{"step": 1}\n' + bad + b'\n{"step": 2}\n'
    path.write_bytes(before)
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl") as error:
        log.forget_after(path, 5)
    assert "\n" not in str(error.value) and path.read_bytes() == before


def test_a_kill_while_rows_are_forgotten_leaves_them_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log.append(path, [{"step": 1}, {"step": 2}])
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        log.forget_after(path, 1)
    assert path.read_bytes() == before


def test_without_held_out_prompts_the_accuracy_is_called_what_it_is():
    assert log.evaluated_on(SimpleNamespace(sharing="digits")) == "held-out"
    where = log.evaluated_on(SimpleNamespace(sharing="none"))
    names = ("reward", "zero_variance", "replayed", "mean_abs_advantage", "entropy", "truncated", "grad_norm")
    row = {"step": 1, "rollouts": 8, "tokens": 80, "eval_accuracy": 0.5, "eval_accuracy_start": 0.25}
    row |= dict.fromkeys(names, 0.25)
    row |= dict.fromkeys((f"seconds_{name}" for name in ("rollout", "reward", "update", "sync", "total")), 1.0)
    assert "| held-out 0.500" in log.line(row) and "held-out accuracy: 0.250 at the start" in log.summary([row])
    assert "| on the training prompts 0.500" in log.line(row, where) and "held-out" not in log.line(row, where)
    assert "accuracy on the training prompts: 0.250 at the start, 0.500 at" in log.summary([row], where)


def test_commit_is_a_hash_or_nothing(monkeypatch):
    assert all(letter in "0123456789abcdef" for letter in log.commit())
    monkeypatch.setenv("PATH", "")
    assert log.commit() == ""
