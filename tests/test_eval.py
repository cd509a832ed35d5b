"""Benchmarks in their real formats, resume, comparison, bad input; the program with the embedded model."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from statistics import fmean

import pytest
import torch

import eval
import reward
import rollout
from replay import Group
from reward import boxed
from support import stats
from support.config import ROOT
from support.model import load_model
from tasks import benchmarks, data, tiny
from tasks.benchmarks import BENCHMARKS, Problem, near

TINY = tiny.home()


def exact(responses, golds):
    """A stand-in for the maths reward: the box is the gold, letter by letter."""
    return [float(reward.boxed(response) == gold) for response, gold in zip(responses, golds, strict=True)]


# ---------------------------------------------------------------- benchmarks in their real formats

ROWS = {
    "aime24": [
        {
            "id": 60, "problem": "Every morning Aya goes for a walk. Find $s$.", "solution": "It is $\\boxed{204}$.",
            "answer": "204", "url": "https://artofproblemsolving.com/wiki", "year": "2024",
        },
        {"id": 61, "problem": "Find $x + y$.", "solution": "\\boxed{025}", "answer": "025", "url": "", "year": "2024"},
    ],
    "aime25": [
        {"problem": "Find the sum of all bases.", "answer": "70", "id": "0"},
        {"problem": "Find the angle.", "answer": "336^\\circ", "id": "19"},
    ],
    "amc23": [
        {"id": 0, "answer": 27.0, "url": "https://", "question": "How many miles?"},
        {"id": 1, "answer": -4.0, "url": "https://", "question": "What is the sum?"},
    ],
    "math500": [
        {
            "problem": "Convert $(0,3)$.", "solution": "We have $r = 3$: $\\boxed{x}$.", "subject": "Precalculus",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2, "unique_id": "test/precalculus/807.json",
        },
        {
            "problem": "Which?", "solution": "", "answer": "\\text{Evelyn}", "subject": "Algebra", "level": 1,
            "unique_id": "test/algebra/1.json",
        },
    ],
    "minerva": [
        {"question": "What is the period?", "answer": "4.5e33"},
        {"question": "What is the force?", "answer": ["\\arcsin{1.3}\n", "1.1 \\mathrm{~N}\n"]},
    ],
    "olympiad": [
        {
            "id": 1606, "subfield": "Algebra", "context": None, "question": "Find $a$.", "solution": ["..."],
            "final_answer": ["$\\frac{1}{2}$"], "is_multiple_answer": False, "unit": None,
            "answer_type": "Numerical", "error": None,
        },
        {
            "id": 1610, "subfield": "Number Theory", "context": "Let $n > 0$.", "question": "Find all $n$.",
            "solution": ["..."], "final_answer": ["$69$,$84$"], "is_multiple_answer": True, "unit": None,
            "answer_type": "Numerical", "error": None,
        },
        {
            "id": 2211, "subfield": "Geometry", "context": None, "question": "How far?", "solution": ["..."],
            "final_answer": ["12.57", "$3$"], "is_multiple_answer": True, "unit": "m", "answer_type": "Numerical",
            "error": "1e-1,1e-2",
        },
    ],
}  # fmt: skip
GOLDS = {
    "aime24": [("204",), ("25",)],
    "aime25": [("70",), ("336",)],
    "amc23": [("27",), ("-4",)],
    "math500": [("\\left( 3, \\frac{\\pi}{2} \\right)",), ("\\text{Evelyn}",)],
    "minerva": [("4.5e33",), ("\\arcsin{1.3}", "1.1 \\mathrm{~N}")],
    "olympiad": [("\\frac{1}{2}",), ("69,84",), ("12.57, 3",)],
}


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "hub"])
def test_each_format_is_read(name, suffix, tmp_path, monkeypatch, capsys):
    import datasets

    rows, asked = ROWS[name], []
    if suffix == "parquet" and name == "minerva":
        rows = [row | {"answer": row["answer"] if isinstance(row["answer"], list) else [row["answer"]]} for row in rows]
    file = tmp_path / f"copy.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    if suffix == "hub":

        def load_dataset(*args, **kwargs):
            asked.append((args, kwargs))
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    called, problems, source = benchmarks.load(name if suffix == "hub" else f"{name}={file}", {})
    assert called == name
    assert [problem.golds for problem in problems] == GOLDS[name]
    assert all(problem.text for problem in problems)
    assert f"{name} has {BENCHMARKS[name].size} problems, but here are {len(rows)}" in capsys.readouterr().err
    if suffix == "hub":
        benchmark = BENCHMARKS[name]
        expected = ((benchmark.hub, benchmark.config), {"split": benchmark.split, "revision": source["revision"]})
        assert asked == [expected]
        assert re.fullmatch("[0-9a-f]{40}", source["revision"])


def test_another_revision_may_be_asked_for(monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda hub, config, split, revision, copy: [ROWS["aime25"][0]])
    assert benchmarks.load("aime25", {"aime25": "abc"})[2]["revision"] == "abc"


def test_olympiad_context_and_tolerance():
    problems = benchmarks.olympiad(ROWS["olympiad"], "here")
    assert problems[1].text == "Let $n > 0$.\nFind all $n$."
    assert [problem.tolerance for problem in problems] == [0, 0, 0.01]


def test_id_is_that_of_text_golds_and_tolerance():
    ids = {Problem(*fields).id for fields in (("a", ("1",)), ("b", ("1",)), ("a", ("2",)), ("a", ("1",), 0.1))}
    assert len(ids) == 4
    assert Problem("a", ("1",)).id == Problem("a", ("1",)).id


@pytest.mark.parametrize(
    ("response", "gold", "tolerance", "expected"),
    [
        (r"\boxed{12.6}", "12.57", 0.05, True),
        (r"\boxed{12.63}", "12.57", 0.05, False),
        (r"\boxed{12.62}", "12.57", 0.05, True),  # the end of the range is in it, exactly
        (r"\boxed{3, 12.6}", "12.57,3", 0.05, True),
        (r"\boxed{3}", "12.57,3", 0.05, False),
        (r"\boxed{\frac{1}{3}}", "0.333", 0.001, True),
        (r"\boxed{\dfrac{-1}{3}}", "0.333", 0.001, False),
        (r"12.57", "12.57", 0.05, False),  # no box
        (r"\boxed{9^{9^{9}}}", "12.57", 0.05, False),
        (r"\boxed{1/0}", "12.57", 0.05, False),
        (r"\boxed{1e999999999}", "12.57", 0.05, False),
    ],
)
def test_tolerance(response, gold, tolerance, expected):
    assert near(boxed(response) or "", gold, tolerance) is expected
    assert eval.score([response], [Problem("?", (gold,), tolerance)], exact) == [float(expected)]


def test_one_of_several_golds_must_match_and_all_are_graded_in_one_call():
    calls = []

    def grade(responses, golds):
        calls.append(list(golds))
        return exact(responses, golds)

    problems = [Problem("?", ("1", "2")), Problem("?", ("3",)), Problem("?", ("1", "2"))]
    assert eval.score([r"\boxed{2}", r"\boxed{2}", r"\boxed{3}"], problems, grade) == [1, 0, 0]
    assert calls == [["1", "2", "3", "1", "2"]]


def test_golds_are_judged_right_by_the_maths_reward():
    problems = [p for name, rows in ROWS.items() for p in BENCHMARKS[name].parse(rows, name)]
    responses = [f"So it is \\boxed{{{problem.golds[-1]}}}." for problem in problems]
    assert eval.score(responses, problems, reward.load("math")) == [1.0] * len(problems)
    turned = eval.score([r"\boxed{84, 69}", r"\boxed{69}"], [problems[-2]] * 2, reward.load("math"))
    assert turned == [1, 0]  # any order, but all


# ---------------------------------------------------------------- the program, with a scripted engine


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template = bos_token_id = None

    def __call__(self, texts):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens.tolist()))


class Script:
    """An engine that answers from a function of prompt and sample, and remembers what it was asked."""

    name = "script"

    def __init__(self, respond):
        self.respond, self.asked, self.calls, self.interrupt_at = respond, [], [], None

    def generate(self, prompts, n, seed, step, temperature=None):
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append((n, seed, step, temperature))
        self.asked += [prompt.index for prompt in prompts]
        groups = []
        for prompt in prompts:
            tokens = [torch.tensor([ord(c) for c in self.respond(prompt, i)], dtype=torch.int32) for i in range(n)]
            cut = [len(answer) > 20 for answer in tokens]
            groups.append(Group(prompt.index, tokens, [torch.zeros(len(t)) for t in tokens], cut, step))
        return groups


def respond(prompt, sample: int) -> str:
    """Right in `index % 3` of 3 samples, else a number, or nothing."""
    if sample % 3 < prompt.index % 3:
        return f"\\boxed{{{prompt.answer}}}"
    return f"I think that it is \\boxed{{{prompt.index + sample}}}" if sample % 2 else "no"


@pytest.fixture
def script(monkeypatch):
    engine = Script(respond)
    model = torch.nn.Linear(300, 2)
    model.get_input_embeddings = lambda: torch.nn.Embedding(300, 1)
    monkeypatch.setattr(eval, "load_model", lambda path, **_: (model, Characters(), [0]))
    monkeypatch.setattr(eval, "make_engine", lambda kind, model, path, stop_ids, cfg: engine)
    monkeypatch.setitem(reward.REWARDS, "math", exact)
    engine.model = model
    return engine


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}+900=", "answer": i + 900}) + "\n" for i in range(20)))
    return path


def run(file, out, *flags: str) -> int:
    settings = ["--samples", "6", "--batch", "24", "--out", str(out)]
    return code_of(["--model", "any", "--benchmarks", str(file), *settings, *map(str, flags)])


def code_of(argv: list[str]) -> int:
    """The exit code, also of a program that ends with one of its own messages."""
    try:
        return eval.main(argv)
    except SystemExit as stop:
        return stop.code


def results(out) -> dict:
    return json.loads((out / "results.json").read_text())


def test_results_hold_every_score_and_completion(script, file, tmp_path, capsys):
    assert run(file, tmp_path / "out", "--pass-at", 1, 3) == 0
    one = results(tmp_path / "out")["benchmarks"]["mine"]
    assert one["scores"][4] == [1, 0, 0, 1, 0, 0]  # index 4: one of each three
    assert one["avg"] == stats.over_problems([i % 3 / 3 for i in range(20)])
    assert one["pass"]["1"]["mean"] == pytest.approx(one["avg"]["mean"])
    expected = fmean(stats.pass_at_k(3, 6, 2 * (i % 3)) for i in range(20))
    assert one["pass"]["3"]["mean"] == pytest.approx(expected)
    # 0: the wrong 1, 3, 5 all different. 1: two right, three wrong, alike in none. 2: four right
    assert one["majority"]["mean"] == pytest.approx(fmean([0, 1, 1] * 6 + [0, 1]))
    rows = [json.loads(line) for line in (tmp_path / "out" / "mine@6.jsonl").read_text().splitlines()]
    assert [(row["problem"], row["sample"]) for row in rows] == list(itertools.product(range(20), range(6)))
    prompt = data.Prompt(7, "", "907")
    assert [row["response"] for row in rows[42:48]] == [respond(prompt, i) for i in range(6)]
    assert [row["score"] for row in rows[42:48]] == one["scores"][7]
    assert one["tokens"] == fmean(row["tokens"] for row in rows)
    assert one["truncated"] == fmean(len(row["response"]) > 20 for row in rows) > 0
    assert re.search(r"^mine +20 +6 +31\.7%  \[", capsys.readouterr().out, re.M)


def test_each_benchmark_has_its_own_count_and_the_macro_mean_counts_them_once(script, file, tmp_path, capsys):
    copy = tmp_path / "aime.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in ROWS["aime25"]))
    out = tmp_path / "out"
    flags = ["--benchmarks", str(file), f"aime25={copy}", "--samples", "aime25=8", "2", "--out", str(out)]
    assert eval.main(["--model", "any", *flags]) == 0
    found = results(out)
    assert {name: b["samples"] for name, b in found["benchmarks"].items()} == {"mine": 2, "aime25": 8}
    means = [b["avg"]["mean"] for b in found["benchmarks"].values()]
    assert found["macro"]["avg"]["mean"] == pytest.approx(fmean(means))
    assert list(found["benchmarks"]["aime25"]["pass"]) == ["1", "4", "8"]
    assert found["benchmarks"]["aime25"]["source"] == {"file": str(copy)}
    assert re.search(r"^macro mean +22 ", capsys.readouterr().out, re.M)


def test_interrupted_run_goes_on_without_generating_again(script, file, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(file, tmp_path / "whole") == 0
    script.asked, script.calls, script.interrupt_at = [], [], 3
    assert run(file, out) == 130
    assert f"goes on with --out {out}" in capsys.readouterr().err
    assert script.asked == list(range(12))  # 4 problems with 6 answers at a time
    completions = out / "mine@6.jsonl"
    torn = completions.read_text().splitlines(keepends=True)
    completions.write_text("".join(torn[:-2]) + torn[-2][:-9])  # as a kill leaves it: one line short, one cut
    script.asked, script.interrupt_at = [], None
    assert run(file, out) == 0
    assert script.asked == list(range(11, 20))  # the torn problem, and those after
    assert results(out) == results(tmp_path / "whole")
    assert completions.read_text() == (tmp_path / "whole" / "mine@6.jsonl").read_text()


def test_finished_run_is_graded_again_but_not_generated_again(script, file, tmp_path, monkeypatch):
    assert run(file, tmp_path / "out") == 0
    script.asked = []
    monkeypatch.setitem(reward.REWARDS, "math", lambda responses, golds: [1.0] * len(responses))
    assert run(file, tmp_path / "out") == 0
    assert script.asked == []
    assert results(tmp_path / "out")["benchmarks"]["mine"]["avg"]["mean"] == 1


def test_another_number_of_answers_is_another_file(script, file, tmp_path):
    assert run(file, tmp_path / "out") == 0
    assert run(file, tmp_path / "out", "--samples", 2) == 0
    assert len((tmp_path / "out" / "mine@6.jsonl").read_text().splitlines()) == 120
    assert len((tmp_path / "out" / "mine@2.jsonl").read_text().splitlines()) == 40


def test_reward_of_the_user_decides_and_only_a_whole_one_is_right(script, file, tmp_path):
    user = tmp_path / "mine.py"
    user.write_text("def half(responses, golds):\n    return [0.5 * ('box' in r) + 0.5 * (str(g) in r) for r, g in "
                    "zip(responses, golds)]\n")  # fmt: skip
    assert run(file, tmp_path / "out", "--reward", f"{user}:half") == 0
    assert results(tmp_path / "out")["benchmarks"]["mine"]["avg"]["mean"] == pytest.approx(19 / 60)


def test_compare_and_baseline_of_two_runs(script, file, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(file, a) == 0
    script.respond = lambda prompt, sample: f"\\boxed{{{prompt.answer}}}"
    assert run(file, b, "--seed", 1, "--baseline", a / "results.json") == 0
    tokens = results(b)["benchmarks"]["mine"]["tokens"] / results(a)["benchmarks"]["mine"]["tokens"]
    gain = 1 / results(a)["benchmarks"]["mine"]["avg"]["mean"] - 1
    assert results(b)["benchmarks"]["mine"]["aes"] == pytest.approx(1 - tokens + 3 * gain)
    capsys.readouterr()
    assert eval.main(["--compare", str(a / "results.json"), str(b / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^mine +20 +\+68\.3  \[", printed, re.M)
    assert "note: seed 0 in A, 1 in B" in printed


# ---------------------------------------------------------------- bad input


BAD = {
    "unknown benchmark": (["--benchmarks", "aime26"], r"no benchmark 'aime26'; choose from aime24, .*embedded"),
    "no file": (["--benchmarks", "none.jsonl"], "no data file at none.jsonl"),
    "no golds": (["--benchmarks", "{tmp}/no-golds.jsonl"], "no-golds.jsonl has no column 'answer'"),
    "empty gold": (["--benchmarks", "{tmp}/empty.jsonl"], "empty.jsonl row 2 has no final answer in 'answer'"),
    "empty list": (["--benchmarks", "{tmp}/list.jsonl"], "list.jsonl row 2 has no final answer in 'answer'"),
    "not an integer": (
        ["--benchmarks", "aime24={tmp}/half.jsonl"],
        r"half.jsonl row 2: the answer '1/2' is no integer",
    ),
    "k too large": (["--samples", "4", "--pass-at", "1", "8"], "--pass-at 8: pass@k needs k answers .* mine has 4"),
    "k zero": (["--pass-at", "0"], "--pass-at must be at least 1"),
    "samples": (["--samples", "-3"], "--samples -3: give a whole number from 1"),
    "samples of what": (["--samples", "aime24=3"], "--samples: no 'aime24' here; there is mine"),
    "greedy twice": (["--temperature", "0", "--samples", "2"], "--samples 2: .* 1 at temperature 0"),
    "temperature": (["--temperature", "-1"], "--temperature must be at least 0"),
    "no temperature": (["--temperature", "nan"], "--temperature must be a finite number"),
    "max-tokens": (["--max-tokens", "0"], "--max-tokens must be at least 1"),
    "revision": (["--revision", "aime26=abc"], "--revision: no 'aime26' here; there is aime24, aime25"),
    "thinking": (["--thinking"], "--thinking cannot be set"),
    "no thinking": (["--no-thinking"], "--thinking cannot be set"),
    "reward": (["--reward", "nonsense"], "no reward 'nonsense'"),
    "twice": (["--benchmarks", "{tmp}/mine.jsonl", "{tmp}/b/mine.jsonl"], "two benchmarks are called 'mine'"),
    "no baseline": (["--baseline", "none.json"], "no results at none.json; give a results.json"),
    "no results": (["--baseline", "{tmp}/mine.jsonl"], "mine.jsonl holds no results"),
    "other baseline": (["--baseline", "{tmp}/other/results.json"], "mine: 1 of 20 problems .* and 0 of those not here"),
    "other seed": (["--seed", "7"], "completions with seed 0, not 7; give another --out"),
    "other problems": (["--benchmarks", "{tmp}/b/mine.jsonl"], "answers 1 problems that mine now lacks"),
    "compare": (["--compare", "{tmp}/out/results.json", "{tmp}/other/results.json"], "mine: 1 of 20 problems"),
    "compare nothing": (["--compare", "none.json", "{tmp}/out/results.json"], "no results at none.json"),
}


@pytest.fixture
def folder(script, file, tmp_path):
    """A finished evaluation, and another that lacks a problem."""
    lines = file.read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.jsonl").write_text("".join(lines[:19]))
    problem = '{"problem": "1+1=", "answer": "2"}\n'
    (tmp_path / "no-golds.jsonl").write_text('{"problem": "1+1="}\n')
    (tmp_path / "empty.jsonl").write_text(problem + '{"problem": "1+1=", "answer": " "}\n')
    (tmp_path / "list.jsonl").write_text(problem + '{"problem": "1+1=", "answer": []}\n')
    (tmp_path / "half.jsonl").write_text(problem + '{"problem": "1+1=", "answer": "1/2"}\n')
    assert run(file, tmp_path / "out") == 0
    assert run(tmp_path / "b" / "mine.jsonl", tmp_path / "other") == 0
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_and_code_2(name, folder, script, file, capsys):
    flags, message = BAD[name]
    capsys.readouterr()
    calls = len(script.calls)
    assert run(file, folder / "out", *(flag.format(tmp=folder) for flag in flags)) == 2
    errors = capsys.readouterr().err.splitlines()
    notes = [line for line in errors if line.startswith("note: ")]
    assert len(errors) == len(notes) + 1
    assert re.match("error: ", errors[-1])
    assert re.search(message, errors[-1])
    assert len(script.calls) == calls  # nothing was generated first


def test_retrained_model_is_noticed(script, file, tmp_path, capsys):
    assert run(file, tmp_path / "out") == 0
    with torch.no_grad():
        script.model.weight += 1e-6
    assert run(file, tmp_path / "out") == 2
    assert "completions with weights" in capsys.readouterr().err


def test_reward_of_the_user_that_fails_is_named(script, file, tmp_path, capsys):
    user = tmp_path / "mine.py"
    user.write_text("def short(responses, golds):\n    return [1.0]\n")
    assert run(file, tmp_path / "out", "--reward", f"{user}:short") == 2
    assert re.search(r"^error: \S+mine.py:short: return a list of \d+ rewards", capsys.readouterr().err, re.M)


def test_knobs_reach_the_engine(script, file, tmp_path, monkeypatch):
    seen = []

    def make_engine(kind, model, path, stop_ids, cfg):
        seen.append((kind, cfg))
        return script

    monkeypatch.setattr(eval, "make_engine", make_engine)
    flags = ["--engine", "transformers", "--max-tokens", 9, "--temperature", 0.5, "--gpu-memory", 0.7]
    assert run(file, tmp_path / "out", *flags, "--vllm", '{"enforce_eager": true}', "--seed", 3) == 0
    ((kind, cfg),) = seen
    assert (kind, cfg.engine) == ("transformers", "transformers")
    assert (cfg.max_tokens, cfg.temperature, cfg.seed, cfg.rollout_batch) == (9, 0.5, 3, 24)
    assert (cfg.max_prompt_tokens, cfg.dtype) == (len("19+900="), "bfloat16")
    assert (cfg.gpu_memory, cfg.vllm) == (0.7, '{"enforce_eager": true}')


def test_hub_that_cannot_be_reached(monkeypatch, capsys):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert code_of(["--model", "any", "--benchmarks", "math500"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "HuggingFaceH4/MATH-500 cannot be loaded (Couldn't reach it and more)" in errors[0]
    assert "--benchmarks math500=FILE.jsonl" in errors[0]


def test_model_that_cannot_be_loaded(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert code_of(["--model", str(tmp_path), "--benchmarks", "embedded"]) == 2
    assert capsys.readouterr().err.startswith("error: no model can be loaded from")


# ---------------------------------------------------------------- the program, with the embedded model


def test_embedded_model_on_its_held_out_problems(tmp_path, capsys):
    """Without arguments but --out; the accuracy is what training logs, for the first sample is the same."""
    tiny.make(TINY)
    assert eval.main(["--out", str(tmp_path), "--samples", "2"]) == 0
    one = results(tmp_path)["benchmarks"]["embedded"]
    assert len(one["ids"]) == 400
    assert [int(k) for k in one["pass"]] == [1]
    model, tokenizer, stop_ids = load_model(str(TINY))
    prompts, _ = data.encode(tiny.arithmetic(2400)[:400], tokenizer, 64)
    engine = rollout.TransformersEngine(model, stop_ids, 15, 1.0, 512)
    groups = engine.generate(prompts, 1, seed=0, step=-1)
    responses = [tokenizer.decode(group.tokens[0], skip_special_tokens=True) for group in groups]
    in_training = fmean(reward.load("equation")(responses, [prompt.answer for prompt in prompts]))
    assert fmean(row[0] for row in one["scores"]) == pytest.approx(in_training)
    assert 0.2 < in_training < 0.4
    assert re.search(r"^embedded +400 +2 ", capsys.readouterr().out, re.M)
    pupil = tiny.Pupil()
    truth = fmean(pupil.pass_rate(question) for question, _ in tiny.arithmetic(2400)[:400])
    assert one["avg"]["low"] - 0.03 < truth < one["avg"]["high"] + 0.03


def test_greedy_takes_one_answer(tmp_path):
    tiny.make(TINY)
    assert eval.main(["--out", str(tmp_path), "--temperature", "0"]) == 0
    assert results(tmp_path)["benchmarks"]["embedded"]["samples"] == 1


@pytest.mark.slow
def test_killed_process_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), "--samples", "8", "--batch", "32"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, "--out", str(tmp_path / "whole")], env=environ).returncode == 0
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], env=environ)
    completions = tmp_path / "out" / "embedded@8.jsonl"
    while not completions.exists() or completions.read_text().count("\n") < 500:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = completions.read_text().count("\n")
    assert 500 <= kept < 3200
    before = set(completions.read_text().splitlines()[: kept // 8 * 8])
    assert subprocess.run([*command, "--out", str(tmp_path / "out")], env=environ).returncode == 0
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    after = [json.loads(line) for line in completions.read_text().splitlines()]
    assert {json.dumps({k: v for k, v in row.items() if k != "score"}) for row in after} >= before


@pytest.mark.slow
def test_saved_model_has_the_accuracy_that_training_logged(tmp_path):
    import train

    out = tmp_path / "run"
    assert train.main(["--steps", "2", "--eval-every", "2", "--seed", "5", "--out", str(out)]) == 0
    logged = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["eval_accuracy"]
    flags = ["--model", str(out / "model"), "--benchmarks", "embedded", "--samples", "1", "--seed", "5"]
    assert eval.main([*flags, "--out", str(tmp_path / "eval")]) == 0
    assert results(tmp_path / "eval")["benchmarks"]["embedded"]["avg"]["mean"] == pytest.approx(logged)
