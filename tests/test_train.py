"""The whole program: a run of each method, exact resume, signals, what a run folder holds, and every bad input."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import grpo
import rollout
import train
from lab import rules
from replay import Group, PromptReplay, Uniform
from support import checkpoint, config, lives, plot
from tasks import tiny

TINY = str(tiny.home())
SMALL = ["--prompts-per-step", "6", "--answers-per-prompt", "4", "--eval-prompts", "20", "--eval-every", "4"]
# constants small enough that every part of every method acts within a dozen steps
QUICK = ["--cooldown", "2", "--replay-warmup", "2", "--retest-every", "3", "--max-rounds", "3", "--save-every", "5"]
METHODS = ["none", *train.METHODS, "prompt+group+rollout", "prioritized+dapo+rollout"]
METHODS.remove("popo")  # another name of group
METHODS.remove("continual")  # needs prompts in stages: tests/test_continual.py
NOT_COMPARED = ("seconds_", "peak_memory_mb")


@pytest.fixture(scope="session", autouse=True)
def embedded_model():
    tiny.make(TINY)


def run(out, *flags: str) -> list[dict]:
    assert train.main([*SMALL, *QUICK, "--out", str(out), *flags]) == 0
    return plot.read(out / "metrics.jsonl")


def refused(*words: str) -> int:
    """The exit code of a program that ends with one of its own messages."""
    with pytest.raises(SystemExit) as stop:
        train.main([*words])
    return stop.value.code


def parsed(*words: str) -> train.Config:
    """The configuration that `train.main` would make of these flags."""
    return config.settings([*words], train.Config, train.METHODS, tiny.SETTINGS, "")[0]


def figures(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)} for row in rows]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


# ---------------------------------------------------------------- what a run leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, run(out, "--replay", "--steps", "12", "--seed", "3")


def test_metrics_hold_every_figure_and_no_nan(finished):
    _, rows = finished
    names = [
        "step",
        "reward",
        "zero_variance",
        "zero_variance_fresh",
        "mean_abs_advantage",
        "replayed",
        "lr",
        "rollouts",
    ]
    names += ["distinct_prompts", "tokens", "truncated", "entropy", "clip_fraction", "grad_norm", "peak_memory_mb"]
    names += [f"seconds_{part}" for part in ("rollout", "reward", "update", "sync", "total")]
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert all(math.isfinite(row[name]) for name in names), row
        assert sum(row["pass_rates_fresh"]) + sum(row["pass_rates_replayed"]) == 6
        assert "NaN" not in json.dumps(row)
    assert [row["rollouts"] for row in rows] == [24 * step for step in range(1, 13)]
    assert all(a["tokens"] < b["tokens"] for a, b in zip(rows, rows[1:], strict=False))
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [4, 8, 12]
    assert any(row["replayed"] > 0 for row in rows) and all(row["replayed"] < 0.7 for row in rows)


def test_run_folder_holds_config_samples_figure_and_a_loadable_model(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = finished
    stored = json.loads((out / "config.json").read_text())
    assert stored["seed"] == 3 and stored["replay"] == "prompt" and stored["lr"] == tiny.SETTINGS["lr"]
    assert "seed" in stored["given"] and "lr" not in stored["given"]
    sample = plot.read(out / "samples.jsonl")[0]
    assert {"step", "prompt", "response", "answer", "reward", "truncated"} == set(sample)
    for name in ("curves.png", "lives.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert AutoTokenizer.from_pretrained(out / "model").decode([2, 3]) == "01"
    before, after = AutoModelForCausalLM.from_pretrained(TINY).state_dict(), model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_every_visit_of_a_run_is_written_down(finished):
    out, rows = finished
    visits = lives.read(out)
    for row in rows:
        mine = visits[visits["step"] == row["step"]]
        assert len(mine) == len(set(mine["prompt"])) == 6 and set(mine["answers"]) == {4}
        assert mine["replayed"].mean() == pytest.approx(row["replayed"])
        for kind, key in enumerate(("pass_rates_fresh", "pass_rates_replayed")):
            assert np.bincount(mine["right"][mine["replayed"] == kind], minlength=5).tolist() == row[key]
    assert len(np.unique(visits["prompt"])) == rows[-1]["distinct_prompts"]
    assert set(plot.Curves(out).of_the_rule()) == {"buffer", "prompt_uses"}  # and no other key of a row


def test_same_seed_same_run_and_other_seed_another(finished, tmp_path):
    _, rows = finished
    assert figures(run(tmp_path / "again", "--replay", "--steps", "5", "--seed", "3")[:4]) == figures(rows[:4])
    assert figures(run(tmp_path / "other", "--replay", "--steps", "4", "--seed", "4")) != figures(rows[:4])


def test_without_replay_prompts_come_in_the_same_order(tmp_path, monkeypatch):
    drawn: dict[str, list] = {}

    def record(name, method):
        def draw(self, n, step):
            indices = method(self, n, step)
            drawn.setdefault(name, []).append([x for x in indices if x not in self.replays])
            return indices

        return draw

    for kind in (Uniform, PromptReplay):
        monkeypatch.setattr(kind, "draw", record(kind.__name__, kind.draw))
    run(tmp_path / "plain", "--steps", "8")
    run(tmp_path / "off", "--replay", "--share", "0", "--steps", "8")
    assert drawn["PromptReplay"] == drawn["Uniform"]
    del drawn["PromptReplay"]
    run(tmp_path / "on", "--replay", "--steps", "8")
    fresh = [x for batch in drawn["PromptReplay"] for x in batch]
    assert len(fresh) < 48 and fresh == [x for batch in drawn["Uniform"] for x in batch][: len(fresh)]


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_resumes_bit_for_bit(tmp_path, method):
    flags = ["--replay", method, "--minibatches", "2" if method == "group" else "1"]
    whole = run(tmp_path / "whole", *flags, "--steps", "12")
    run(tmp_path / "parts", *flags, "--steps", "7")
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 8, "reward": 0.0}) + '\n{"step": 9, "rew')  # written after the checkpoint, torn
    with open(tmp_path / "parts" / "visits.bin", "ab") as file:
        file.write(np.array([(8, 1, 2, 4, 0)], lives.VISIT).tobytes() + b"torn")
    parts = run(tmp_path / "parts", *flags, "--steps", "12", "--resume")
    # the run that stopped at 7 evaluated then, because it ended there
    parts[6].pop("eval_accuracy")
    assert figures(parts) == figures(whole)
    assert (tmp_path / "parts" / "visits.bin").read_bytes() == (tmp_path / "whole" / "visits.bin").read_bytes()
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    last = whole[-1]
    assert {"dapo": "carried", "group": "stored_groups", "rollout": "stored_rollouts", "greso": "p_easy"}.get(
        method, "reward"
    ) in last
    for kind in {"group", "rollout"} & set(method.split("+")):
        ages = [row[f"{kind}_ages"] for row in whole]
        assert any(sum(counts) for counts in ages) and all(counts[0] == 0 for counts in ages)  # none in its birth step
        assert any("ess_replayed" in row for row in whole)


def test_a_torn_checkpoint_is_never_picked_up_and_old_ones_go(finished):
    out, _ = finished
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    torn = out / "checkpoints" / "step-00000099.partial"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half")
    assert checkpoint.newest(out).name == "step-00000012"
    # One that is damaged is named, and passed over: tests/test_checkpoint.py.
    torn.rename(out / "checkpoints" / "step-00000100")
    assert checkpoint.fault(out / "checkpoints" / "step-00000100")
    shutil.rmtree(out / "checkpoints" / "step-00000100")


def test_a_finished_run_has_nothing_left_to_do(finished, capsys):
    out, rows = finished
    flags = ["--replay", "--steps", "12", "--seed", "3", "--resume"]
    assert figures(run(out, *flags)) == figures(rows)


def start(out, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", *SMALL, *QUICK, "--out", str(out), *flags]
    return subprocess.Popen(
        command, cwd=config.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_steps(out, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = out / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get that far in two minutes")


@pytest.mark.slow
def test_sigkill_and_resume_equal_the_uninterrupted_run(tmp_path):
    whole = run(tmp_path / "whole", "--replay", "--steps", "200")
    process = start(tmp_path / "killed", "--replay", "--steps", "200")
    wait_for_steps(tmp_path / "killed", 57)
    process.kill()
    process.communicate()
    assert 57 <= len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) < 200
    assert figures(run(tmp_path / "killed", "--replay", "--steps", "200", "--resume")) == figures(whole)
    assert (tmp_path / "killed" / "visits.bin").read_bytes() == (tmp_path / "whole" / "visits.bin").read_bytes()
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path, number):
    process = start(tmp_path / "run", "--replay", "--steps", "100000", "--save-every", "100000")
    wait_for_steps(tmp_path / "run", 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "--resume" in output and "Traceback" not in output
    steps = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert checkpoint.newest(tmp_path / "run").name == f"step-{steps:08d}"


# ---------------------------------------------------------------- bad input: one clear line, exit code 2

UNREADABLE = {  # what no value can be read from: tyro's own box, which names the flag and what is wrong
    "--band 0.5": "--band'. Expected 2 values",
    "--steps many": "--steps: invalid literal",
    "--seed 1.5": "--seed: invalid literal",
    "--lr": "Missing value for argument '--lr'",
    "--advantage median": "'median' for argument '--advantage'.*'centred', 'std', 'rloo'",
}
BAD_FLAGS = {
    "--no-such-flag 3": "there is no flag --no-such-flag",
    "--kv-cache-gb 3": "there is no flag --kv-cache-gb",  # gone; --vllm has it
    "--answers-per-prompt 1": "--answers-per-prompt must be at least 2",
    "--share 1.5": "--share must be at most 1",
    "--band 0.8 0.2": "band",
    "--cooldown -1": "--cooldown must be at least 0",
    "--steps 0": "--steps must be at least 1",
    "--lr 0": "--lr must be above 0",
    "--grad-clip 0": "--grad-clip must be above 0",
    "--temperature 0": "--temperature must be above 0",
    "--replay nonsense": "nonsense.*prompt",
    "--replay prompt+prioritized": "PromptReplay and Prioritized",
    "--replay dapo+group": "DynamicSampling and GroupReplay|GroupReplay and DynamicSampling",
    "--replay adaptive+group": "OnPolicyGroupReplay and GroupReplay",
    "--replay group+popo": "GroupReplay and GroupReplay",
    "--temperature nan": "--temperature must be a finite number",
    "--lr inf": "--lr must be a finite number",
    "--kl -1": "--kl must be at least 0",
    "--is-cap -1": "--is-cap must be at least 0",
    "--dual-clip 0.5": "--dual-clip must be above 1",
    "--dual-clip -2": "--dual-clip must be at least 0",
    "--dual-clip nan": "--dual-clip must be a finite number",
    "--is-cap nan": "--is-cap must be a finite number",
    "--initial-priority nan": "--initial-priority must be a finite number",
    "--betas 0.9 1": "--betas must be at least 0 and below 1",
    "--betas nan 0.9": "--betas must be a finite number",
    "--seed -1": "--seed must be at least 0",
    "--gpu-memory 1.5": "--gpu-memory must be at most 1",
    "--gpu-memory -1": "--gpu-memory must be at least 0",
    "--threads 100000": "--threads must be at most 1024",
    "--replay adaptive+rollout": "OnPolicyGroupReplay cannot join RolloutReplay",
    "--dry-run --reward nosuch": "nosuch",
    "--dry-run --share 7": "share",
    "--dry-run --replay adaptive+rollout": "OnPolicyGroupReplay cannot join RolloutReplay",
    "--replay prompt+": "not known",
    "--reward nonsense": "nonsense",
    "--data /nowhere/file.jsonl": "/nowhere/file.jsonl",
    "--max-prompts 3": "3 training prompts",
    "--max-prompt-tokens 4": "0 training prompts",
    "--model /nowhere/model --data x/y": "/nowhere/model",
    "--model out": "no model can be loaded",
    "--difficulty 0.5 0.2 --data x.jsonl": "difficulty",
    "--gpus 8x80": "--dry-run",
    "--wandb x": "pip install wandb",
    "--optimizer adamw8bit": "pip install torchao",
    "--resume": "nothing to resume",
    "--explore 2 --replay prioritized": "explore",
    "--replay-ratio -1 --replay rollout": "ratio",
    "--replay /nowhere/mine.py:Pace": "there is no file /nowhere/mine.py",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_input_ends_in_one_line_and_exit_code_2(tmp_path, capsys, flags):
    words = [*SMALL, "--out", str(tmp_path / "run"), *flags.split()]
    if "--replay" not in words:
        words += ["--replay"]
    code = refused(*words)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and re.search(BAD_FLAGS[flags], error[-1]), error
    assert error[-1].startswith("error: ") and not (tmp_path / "run").exists()
    assert sum("error: " in line for line in error) == 1 and "Traceback" not in "".join(error)


@pytest.mark.parametrize("flags", UNREADABLE)
def test_a_flag_that_cannot_be_read_is_named_and_ends_in_exit_code_2(tmp_path, capsys, flags):
    assert refused("--out", str(tmp_path / "run"), *flags.split()) == 2
    output = capsys.readouterr()
    box = " ".join(line.strip(" │") for line in output.err.splitlines())
    assert re.search(UNREADABLE[flags], box), box
    assert not output.out and "Traceback" not in box and not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model_and_a_file_without_answers(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"no": "model"}')
    (tmp_path / "data.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n{"problem": "1+2="}\n')
    flags = ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run")]
    assert refused(*[*flags, "--model", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert refused(*[*flags, "--model", TINY]) == 2
    assert "row 2" in capsys.readouterr().err


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(finished, capsys, tmp_path):
    out, rows = finished
    base = [*SMALL, *QUICK, "--out", str(out), "--seed", "3"]
    assert refused(*[*base, "--replay", "--steps", "12"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert refused(*[*base, "--replay", "--steps", "14", "--resume", "--share", "0.5", "--lr", "0.1"]) == 2
    message = capsys.readouterr().err
    assert "--share was 0.75 and is 0.5" in message and "--lr was 0.0005 and is 0.1" in message
    assert figures(plot.read(out / "metrics.jsonl")) == figures(rows)


def test_a_run_that_has_spent_its_rollouts_has_nothing_left_to_do(tmp_path, capsys):
    flags = ["--max-rollouts", "90", "--steps", "100"]
    first = run(tmp_path / "run", *flags)
    assert "nothing left" not in capsys.readouterr().out
    assert run(tmp_path / "run", *flags, "--resume") == first
    assert "nothing left to do after step" in capsys.readouterr().out


def test_two_runs_that_start_at_once_get_a_folder_each(tmp_path):
    cfg = train.Config(seed=3)
    one, two = (checkpoint.choose_folder(cfg, tmp_path) for _ in range(2))
    assert one == two  # neither is there yet
    assert checkpoint.claim(one, cfg) == one and checkpoint.claim(two, cfg) == tmp_path / "tiny-grpo-s3-2"
    cfg.out = str(tmp_path / "given")
    assert checkpoint.claim(Path(cfg.out), cfg) == checkpoint.claim(Path(cfg.out), cfg)


def test_what_a_method_sets_does_not_depend_on_the_order_of_names():
    for names in ("prioritized", "group"), ("group", "rollout"), ("prompt", "dapo"), ("adaptive", "rollout"):
        one, two = (parsed("--replay", "+".join(order)) for order in (names, names[::-1]))
        if names != ("adaptive", "rollout"):
            config.check_training(one)
            train.make_rules(one, num_prompts=100)
        one.replay = two.replay = ""
        assert one == two


def test_a_file_in_the_place_of_the_folder_and_a_broken_checkpoint(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert refused(*[*SMALL, "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
    run(tmp_path / "run", "--steps", "2")
    state = checkpoint.newest(tmp_path / "run") / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert refused(*[*SMALL, *QUICK, "--out", str(tmp_path / "run"), "--steps", "3", "--resume"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_problems_that_the_embedded_model_cannot_read(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"problem": "What is 1+1?", "answer": "2"}\n' * 20)
    assert refused(*[*SMALL, "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run")]) == 2
    assert "knows sums only: give --model" in capsys.readouterr().err


BROKEN = {
    "raise KeyError('gone')": "mine.py, line 2 (KeyError: 'gone')",
    "return [1.0]": "return a list of",
    "return [float('nan')] * len(responses)": "finite numbers, not nan",
    "return [None] * len(responses)": "finite numbers, not None",
}


@pytest.mark.parametrize("body", BROKEN)
def test_a_reward_function_that_does_not_do_what_it_has_to(tmp_path, capsys, body):
    (tmp_path / "mine.py").write_text(f"def reward(responses, golds):\n    {body}\n")
    assert refused(*[*SMALL, "--reward", f"{tmp_path / 'mine.py'}:reward", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert BROKEN[body] in error[-1] and "Traceback" not in "".join(error)


@pytest.mark.parametrize(("control", "reward"), [("always", 1), ("format", 0)])
def test_controls_are_judged_by_the_task(tmp_path, control, reward):
    rows = run(tmp_path / "run", "--reward", control, "--steps", "4")
    assert all(row["reward"] == reward for row in rows) and 0 < rows[-1]["eval_accuracy"] < 0.9
    assert all(row["optimizer_steps"] == 0 for row in rows)  # every group is dead


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_used(tmp_path, capsys, monkeypatch):
    run(tmp_path / "run", "--steps", "5")
    monkeypatch.setattr(train.grpo, "advantages", lambda rewards, kind: rewards * float("nan"))
    flags = [*SMALL, *QUICK, "--out", str(tmp_path / "run"), "--steps", "20", "--resume"]
    assert refused(*flags) == 1 and "the gradient of step" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path / "run").name == "step-00000005"


def test_an_engine_that_is_astray_ends_in_one_line_at_a_resume_too(tmp_path, capsys, monkeypatch):
    run(tmp_path / "run", "--steps", "2")

    def astray(engine, model=None):
        raise rollout.EngineAstray("the engine does not follow")

    monkeypatch.setattr(rollout.TransformersEngine, "sync", astray)
    assert refused(*SMALL, *QUICK, "--out", str(tmp_path / "run"), "--steps", "3", "--resume") == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: the engine does not follow"


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    options = " ".join(line.strip(" │|") for line in text[text.index("-h, --help") :].splitlines())
    for name in train.Config.__dataclass_fields__:
        # Behind the flag, and what kind of value it takes, stands its help.
        entry = re.search(rf"--{name.replace('_', '-')}[ ,](.*?)\(default: ", options)
        assert entry and re.sub(r"^(\{[^}]*\}|[A-Z]+|--no-[a-z-]+|[ |,])+", "", entry[1]), name
    for name, method in train.METHODS.items():
        assert re.search(rf"^ +{name} +{re.escape(method.about)}$", text, re.M), name


def test_replay_alone_is_prompt_and_each_method_brings_its_papers_constants():
    assert parsed("--replay").replay == "prompt"
    answers = parsed("--replay", "rollout")
    assert (answers.proximal, answers.clip_high, answers.dual_clip, answers.advantage) == ("birth", 0.28, 10.0, "std")
    assert parsed("--replay", "rollout", "--clip-high", "0.3").clip_high == 0.3
    model = parsed("--model", "x", "--replay")
    assert (model.prompts_per_step, model.answers_per_prompt, model.lr, model.temperature) == (32, 16, 1e-6, 1.0)
    assert (model.band, model.share, model.cooldown, model.max_reuse) == ((0.25, 0.75), 0.75, 10, 15)
    assert model.mask_truncated and model.advantage == "centred" and model.data == "polaris"
    assert not parsed("--replay", "--no-mask-truncated").mask_truncated
    assert parsed("--replay", "dapo").advantage == "std"
    # the last of several: the settings are of the method that runs
    twice = parsed("--replay", "rollout", "--replay=dapo")
    assert (twice.replay, twice.proximal, twice.dual_clip) == ("dapo", "old", 0.0)
    adaptive = parsed("--replay", "adaptive")
    assert (adaptive.share, adaptive.cooldown) == (0.5, 10)
    sampler, stores = train.make_rules(adaptive, num_prompts=100)
    assert isinstance(sampler, rules.Adaptive) and list(stores) == ["places"]
    assert isinstance(stores["places"], rules.OnPolicyGroupReplay)
    assert (stores["places"].min_ess, stores["places"].max_fill) == (0.99, 1.0)


# what each method decides
PLACES = {"prompt": "prompts", "prioritized": "prompts", "greso": "prompts", "beta": "prompts"}
PLACES |= {"group": "places", "dapo": "places", "rollout": "extra"}
# of the papers (of the public code, for the baselines): settings, and attributes of the sampler and of the store
CONSTANTS = {
    "prompt": (
        {"clip_low": 0.2, "clip_high": 0.272, "advantage": "centred", "normaliser": "token", "mask_truncated": True},
        {"band": (0.25, 0.75), "share": 0.75, "cooldown": 10, "max_reuse": 15}, {},
    ),
    "prioritized": (
        {"clip_low": 0.2, "clip_high": 0.2, "advantage": "centred", "mask_truncated": False, "initial_priority": 0.2},
        {"smoothing": 0.8, "explore": 0.125, "retest_every": 10, "retest_solved": 0.25, "TIE_BIAS": 1e-4}, {},
    ),
    "group": (
        {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "advantage": "std", "proximal": "old", "is_cap": 2.0},
        {}, {},
    ),
    "rollout": (
        {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "advantage": "std", "proximal": "birth"},
        {}, {"replay_ratio": 0.5, "priority_exponent": 0.5, "max_age": 10, "replay_warmup": 20},
    ),
    "dapo": ({"clip_low": 0.2, "clip_high": 0.28, "advantage": "std", "max_rounds": 10, "dual_clip": 0.0}, {}, {}),
    "greso": ({"clip_high": 0.272}, {"targets": (0.25 / 3, 0.5 / 3), "floor": 0.01, "pace": 0.01}, {}),
    "beta": ({"clip_high": 0.272}, {"decay": 0.5, "prior": 1.0}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_method_has_the_constants_of_its_paper(name):
    settings, of_sampler, of_store = CONSTANTS[name]
    cfg = parsed("--model", "x", "--replay", name)
    config.check_training(cfg)
    sampler, stores = train.make_rules(cfg, num_prompts=100)
    store = next(iter(stores.values()), None)
    for there, expected in ((cfg, settings), (sampler, of_sampler), (store, of_store)):
        for key, value in expected.items():
            assert getattr(there, key) == value, key
    assert list(stores) == [place for place in ("places", "extra") if PLACES[name] == place]
    if name == "group":
        assert store.stored.maxlen == 2 * 32  # two steps' worth
    if name == "rollout":
        assert store.stored.maxlen == 30_000
    if name == "prioritized":
        assert set(sampler.priority) == {0.2}


def test_every_knob_of_a_store_reaches_it():
    flags = "--replay-ratio 0.3 --priority-exponent 0.7 --max-age 4 --replay-warmup 6 --rollout-capacity 99"
    cfg = parsed("--replay", "rollout", "--mask-truncated", "--seed", "5", *flags.split())
    store = train.make_rules(cfg, num_prompts=100)[1]["extra"]
    assert (store.replay_ratio, store.priority_exponent, store.max_age, store.replay_warmup) == (0.3, 0.7, 4, 6)
    assert store.mask_truncated and store.stored.maxlen == 99
    assert store.rng.random() == np.random.default_rng([5, 3]).random()
    store = train.make_rules(parsed("--replay", "group", "--group-capacity", "7"), num_prompts=100)[1]["places"]
    assert store.stored.maxlen == 7
    store = train.make_rules(parsed("--replay", "group-oldest", "--prompts-per-step", "9"), num_prompts=100)[1][
        "places"
    ]
    assert isinstance(store, rules.OldestGroupReplay) and store.stored.maxlen == 18


def test_every_knob_of_a_sampler_reaches_it():
    flags = "--band 0.1 0.6 --share 0.3 --cooldown 4 --max-reuse 6 --seed 5"
    sampler, stores = train.make_rules(parsed("--replay", *flags.split()), num_prompts=100)
    assert (sampler.band, sampler.share, sampler.cooldown, sampler.max_reuse) == ((0.1, 0.6), 0.3, 4, 6)
    assert stores == {} and sampler.order.tolist() == np.random.default_rng(5).permutation(100).tolist()
    flags = "--smoothing 0.7 --initial-priority 0.1 --explore 0.2 --retest-every 3 --retest-solved 0.4"
    sampler, _ = train.make_rules(parsed("--replay", "prioritized", *flags.split()), num_prompts=100)
    assert (sampler.smoothing, sampler.explore, sampler.retest_every, sampler.retest_solved) == (0.7, 0.2, 3, 0.4)
    assert set(sampler.priority) == {0.1}


def test_stores_complete_a_batch_in_one_order_whatever_the_order_of_names():
    for names in ("rollout+group+prompt", "group+prompt+rollout"):
        sampler, stores = train.make_rules(parsed("--replay", names), num_prompts=100)
        assert list(stores) == ["places", "extra"] and isinstance(sampler, PromptReplay)


def prepared(out, *flags: str) -> train.Run:
    made = train.Run(parsed(*SMALL, *QUICK, "--eval-every", "0", "--out", str(out), *flags))
    made.folder.mkdir(parents=True)
    return made


def test_refills_end_when_the_batch_is_full_and_each_knows_the_results_of_those_before(tmp_path, monkeypatch):
    made = prepared(tmp_path / "run", "--replay", "prioritized+dapo", "--steps", "8", "--max-rounds", "5")
    events, sampler, store = [], made.sampler, made.stores["places"]
    draw, observe, complete = sampler.draw, sampler.observe, store.complete

    def note_results(prompts, num_correct, num_answers, step):
        events.append(("observe", step, sum(0 < right < num_answers for right in num_correct)))
        observe(prompts, num_correct, num_answers, step)

    def note_batch(useful, places, step):
        events.append(("carried", step, len(store.stored)))
        return complete(useful, places, step)

    monkeypatch.setattr(sampler, "draw", lambda n, step: events.append(("draw", step, 0)) or draw(n, step))
    monkeypatch.setattr(sampler, "observe", note_results)
    monkeypatch.setattr(store, "complete", note_batch)
    train.train(made)
    rounds = []
    for step in range(1, 9):
        names = [name for name, s, _ in events if s == step]
        assert names == ["draw", "observe"] * (len(names) // 2) + ["carried"]
        useful = [number for name, s, number in events if s == step and name == "observe"]
        carried = next(number for name, s, number in events if s == step and name == "carried")
        rounds.append(len(useful))
        assert carried + sum(useful[:-1]) < 6 or len(useful) == 1  # not one round more than needed
        assert carried + sum(useful) >= 6 or len(useful) == 5
    assert len(set(rounds)) > 1


@pytest.mark.parametrize(("lr", "more"), [("1e-5", True), ("2e-3", False)])
def test_adaptive_learns_from_every_update_how_many_places_to_fill(tmp_path, lr, more):
    made = prepared(tmp_path / "run", "--replay", "adaptive", "--steps", "12", "--lr", lr)
    assert made.stores["places"].fill == pytest.approx(0.1)
    train.train(made)
    assert (made.stores["places"].fill > 0.15) == more and (made.stores["places"].fill < 0.09) != more


def test_truncated_answers_are_left_out_of_fresh_and_replayed_groups_alike_and_equal_ones_counted():
    def group(birth: int) -> Group:
        tokens = [torch.tensor(t, dtype=torch.int32) for t in ([4, 1], [4, 1], [5, 6, 7], [8, 1])]
        logprobs = [torch.zeros(len(t)) for t in tokens]
        advantages = torch.tensor([0.5, 0.5, -0.5, -0.5])
        return Group(0, tokens, logprobs, [False, False, True, False], birth, advantages + 0.5, advantages)

    prompts = [SimpleNamespace(ids=(2, 3))]
    for mask, lengths in ((False, [2, 3, 2]), (True, [2, 2])):
        sequences = grpo.to_answers([group(7), group(5), group(5).pick(2)], prompts, 7, mask_truncated=mask)
        assert [len(s.tokens) for s in sequences] == 2 * lengths
        assert [s.count for s in sequences][:2] == [2, 1] and {s.age for s in sequences} == {0, 2}
        # the single stored answer joins its like of the same birth, or is left out with it
        assert sum(s.count for s in sequences) == (9 if not mask else 6)
        assert all(s.prompt == (2, 3) for s in sequences)
