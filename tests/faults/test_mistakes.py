"""Hostile flags, data, models and rewards: each ends in one line, or runs; none hangs, and none ends in a traceback."""

import dataclasses
import json
import re
import shutil

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from support import config, limits
from tasks import tiny
from tests.faults.harness import run

pytestmark = pytest.mark.slow

HOSTILE = ["0", "-1", "1", "1000000", "1" + "0" * 18, "1" + "0" * 30, "1e308", "-1e308", "nan", "inf", "-inf", "1e-308"]
TINY = str(tiny.home())
STEP = ["--model", TINY, "--max-tokens", "15", "--max-prompt-tokens", "32", "--dtype", "float32", "--threads", "1"]


def flags_of(kind: type, rng, count: int) -> list[tuple[str, list[str]]]:
    """A hostile value for each number among the settings of a program, or pairs of them for pairs."""
    found = []
    for field in dataclasses.fields(kind):
        if not {"int", "float"} & set(re.findall(r"\w+", str(field.type))):
            continue
        size = 2 if str(field.type).startswith("tuple") else 1
        for value in rng.sample(HOSTILE, count):
            found.append((field.name, [config.flag(field.name), *[value] * size]))
    return found


def sound(end) -> bool:
    """It ran, or was refused: by the parser in its box, or by us in one line."""
    boxed = end.code == 2 and "For full helptext" in end.text and "Traceback" not in end.text
    return end.code == 0 or end.one_line or boxed


def test_flags_of_training(rng, times, count, tmp_path):
    for i, (name, flag) in enumerate(flags_of(train.Config, rng, min(times, len(HOSTILE)))):
        # A run of one step, whatever the flag: a larger number of steps would be meant.
        first = ["--max-rollouts", "9"] if name == "steps" else ["--steps", "1", "--eval-every", "0"]
        end = run(tmp_path / f"run{i}", "--replay", "prompt+group+rollout", *first, *flag)
        count("hostile flag of train.py", sound(end), f"{flag}: {end.code} {end.text[-600:]}")


def test_flags_of_evaluation(rng, times, count, tmp_path):
    for i, (_, flag) in enumerate(flags_of(evaluation.Config, rng, min(times, len(HOSTILE)))):
        end = run(tmp_path / f"run{i}", "--samples", "1", *flag, main=evaluation.main)
        count("hostile flag of eval.py", sound(end), f"{flag}: {end.code} {end.text[-600:]}")


@pytest.mark.parametrize("flag", ["data", "model", "reward", "replay"])
def test_names_of_two_lines(flag, count, tmp_path):
    end = run(tmp_path / "run", config.flag(flag), "a\nb.py:c")
    count("a name of two lines", end.one_line, end.text)


# ---------------------------------------------------------------- data

ROW = json.dumps({"problem": "0001+0001=", "answer": "2"}) + "\n"
DATA = {
    "null.jsonl": ROW + "null\n",
    "number.jsonl": ROW + "7\n",
    "deep.jsonl": ROW + "[" * 100_000 + "]" * 100_000,
    "deeper.jsonl": '{"problem":' * 100_000,
    "mark.jsonl": "\ufeff",
    "mark.json": "\ufeff",
    "text.json": '"abc"',
    "object.json": "{}",
    "zeros.jsonl": ROW + "\0\0\0\n",
    "infinite.jsonl": ROW + '{"problem": "0001+0001=", "answer": Infinity}\n',
    "digits.jsonl": ROW + '{"problem": "0001+0001=", "answer": ' + "9" * 5000 + "}\n",
    "half.jsonl": ROW + '{"problem": "\\ud800", "answer": "1"}\n',
    "boxes.jsonl": ROW + json.dumps({"problem": "0001+0001=", "answer": "\\boxed{" * 12_500}) + "\n",
    "long.jsonl": json.dumps({"problem": "a" * 50_000_000, "answer": "1"}) + "\n",
    "empty.csv": "",
    "quote.csv": 'problem,answer\n"a,b\n',
    "twice.csv": "problem,problem,answer\n1,2,3\n",
    "garbage.parquet": "PAR1xxxxPAR1",
    "page.json": "<html>",
}


@pytest.mark.parametrize("name", [*DATA, "bomb.parquet", "rowless.parquet", "twice.parquet"])
def test_data(name, count, tmp_path):
    if name in DATA:
        (tmp_path / name).write_text(DATA[name], encoding="utf-8")
    else:
        write_parquet(tmp_path / name)
    end = run(tmp_path / "run", *STEP, "--data", str(tmp_path / name), "--steps", "1")
    count("hostile data", end.one_line, f"{name}: {end.text[-600:]}")


def write_parquet(path) -> None:
    columns = [pyarrow.array(["0001+0001="] * 1_000_000), pyarrow.array(["2"] * 1_000_000)]
    table = pyarrow.table(columns, names=["problem", "problem" if path.stem == "twice" else "answer"])
    with parquet.ParquetWriter(path, table.schema) as writer:
        for _ in range({"bomb": 30, "twice": 1, "rowless": 0}[path.stem]):
            writer.write_table(table)
    assert path.stat().st_size < 1_000_000


# ---------------------------------------------------------------- models


def changed(weights: dict, how: str) -> dict:
    name = sorted(name for name in weights if name.endswith("q_proj.weight"))[0]
    if how == "missing":
        del weights[name]
    elif how == "renamed":
        weights[name + "s"] = weights.pop(name)
    elif how == "more":
        weights["other.weight"] = torch.ones(3)
    else:
        weights[name][0, 0] = float(how)
    return weights


@pytest.mark.parametrize("main", [train.main, evaluation.main], ids=["train", "eval"])
@pytest.mark.parametrize("how", ["missing", "renamed", "more", "nan", "inf"])
def test_models(how, main, count, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    save_file(changed(load_file(folder / "model.safetensors"), how), folder / "model.safetensors", {"format": "pt"})
    more = ["--data", "gsm8k", "--steps", "1"] if main is train.main else ["--benchmarks", "embedded"]
    end = run(tmp_path / "run", "--model", str(folder), *more, main=main)
    named = "weights" in end.text and str(folder) in end.text
    count("a model with other weights than its config says", end.one_line and named, f"{how}: {end.text}")


CONFIGS = {
    "an end of text that is no number": ("generation_config.json", {"eos_token_id": "text"}),
    "a constant that is nan": ("config.json", {"rms_norm_eps": float("nan")}),
    "a chat template that fails": ("tokenizer_config.json", {"chat_template": "{{ 1 / 0 }}"}),
    "a chat template without an end": ("tokenizer_config.json", {"chat_template": "{% for x in messages %}"}),
    "a chat template that says nothing": ("tokenizer_config.json", {"chat_template": "{# #}"}),
    "a chat template of a hundred megabytes": ("tokenizer_config.json", {"chat_template": "{{ 'x' * 10**8 }}"}),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_what_stands_beside_the_weights(what, count, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    name, change = CONFIGS[what]
    before = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(before | change))
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"problem": f"1+{i}=", "answer": i}) + "\n" for i in range(50))
    )
    end = run(tmp_path / "run", *STEP, "--model", str(folder), "--data", str(tmp_path / "data.jsonl"), "--steps", "1")
    count("a model whose files do not fit: one line", end.one_line, f"{what}: {end.text[-900:]}")


# ---------------------------------------------------------------- rewards

# What raises, or returns something else than rewards, is in tests/test_own.py and tests/test_reward.py.
REWARDS = {
    "hangs": "while True: pass",
    "sleeps and catches": "import time\n    while True:\n        try: time.sleep(99)\n        except Exception: pass",
    "leaves": "import sys; sys.exit(0)",
    "raises in two lines": "raise ValueError('one\\ntwo')",
}


@pytest.mark.parametrize("body", REWARDS)
def test_rewards(body, count, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 2)
    (tmp_path / "mine.py").write_text(f"def mine(responses, golds):\n    {REWARDS[body]}\n")
    end = run(tmp_path / "run", "--steps", "2", "--eval-every", "0", "--reward", f"{tmp_path / 'mine.py'}:mine")
    count("a reward that is broken: one line", end.one_line and "mine.py" in end.text, f"{body}: {end.text}")
    named = re.search(r"mine\.py, line [2-9]", end.text)
    count("a reward that is broken: its own line is named", named, f"{body}: {end.text}")


def test_a_reward_that_prints(count, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(responses, golds):\n    print('here')\n    return [1.0] * len(golds)\n")
    end = run(tmp_path / "run", "--steps", "2", "--reward", f"{tmp_path / 'mine.py'}:mine")
    count("a reward that prints is no mistake", end.code == 0 and "here" in end.text, end.text)
