"""Tasks of reasoning-gym: names, rows, scores, and the small model that is made for one of them."""

import base64
import dataclasses
import importlib.util
import json
import pickle
import random
import sys
from collections import Counter
from statistics import fmean

import pytest

import eval
import reward
import train
from support import config, plot
from tasks import data, gym, tiny

needs_gym = pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason=f"pip install {gym.PACKAGE}")
MINI = "gym:mini_countdown,size=60"
SMALL = ["--prompts-per-step", "6", "--answers-per-prompt", "4", "--eval-every", "4"]


def refused(capsys, *words: str, program=train) -> str:
    """The one line that a mistake ends in."""
    with pytest.raises(SystemExit) as stop:
        program.main([*words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: "), lines
    assert sum("error: " in line for line in lines) == 1 and "Traceback" not in "".join(lines)
    return lines[-1]


def prompts_of(task: str) -> list[data.Prompt]:
    training, _, _ = gym.problems(task)
    return [data.Prompt(i, *row[:2], (1,), *row[2:]) for i, row in enumerate(training)]


def scores(partial: bool, responses: list[str], prompts: list) -> list[float]:
    count = len(responses)
    return reward.PARTIAL[partial].of_prompts(responses, prompts, [1] * count, [False] * count)


@pytest.fixture(scope="module")
def hardly_taught(tmp_path_factory):
    """A small model after few lessons."""
    return tiny.make(tmp_path_factory.mktemp("model") / "model", steps=20, sharing="mini_countdown")


# ---------------------------------------------------------------- names


def test_without_the_package_one_line_says_how_to_install_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr(tiny, "home", lambda kind="digits": tmp_path / "none")
    for program, words in ((train, ["--task", "gym:mini_countdown"]), (eval, ["--benchmarks", "gym:countdown"])):
        error = refused(capsys, *words, program=program)
        assert "--task gym:NAME needs reasoning-gym: pip install reasoning-gym==" in error


@needs_gym
def test_an_unknown_task_is_one_line_with_the_nearest_names(capsys):
    for program, flag in ((train, "--task"), (eval, "--task"), (eval, "--benchmarks")):
        for model in ([], ["--model", "somewhere"]):
            error = refused(capsys, *model, flag, "gym:contdown", program=program)
            assert "no task 'contdown'; the nearest are countdown" in error
    with pytest.raises(ValueError, match="no task 'zzzzzzqqq'; `python -m tasks.gym` lists them"):
        gym.parts_of("gym:countdown+zzzzzzqqq")
    assert len(gym.names()) > 100


@needs_gym
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gym:chain_sum,max_term=3", "chain_sum has no setting 'max_term'; it has min_terms, max_terms, min_digits"),
        ("gym:chain_sum,size=many", "size and seed are whole numbers, got 'many' and 0"),
        ("gym:chain_sum,seed=-1", "size and seed are whole numbers, got 2000 and -1"),
        ("gym:chain_sum,min_terms=9", "cannot be made (AssertionError: max_terms must be >= min_terms)"),
        ("gym:chain_sum,max_terms=two", "cannot be made (TypeError: "),
        ("gym:countdown,min_target=990,size=20", "cannot be made (ValueError: Failed to generate"),
    ],
)
def test_a_setting_that_is_none_is_one_line(task, message):
    with pytest.raises(ValueError) as error:
        gym.problems(task)
    assert message in str(error.value) and "\n" not in str(error.value)


@needs_gym
def test_settings_are_json_and_parts_are_joined_by_a_plus():
    first, second = gym.parts_of('gym:countdown,operators=["+","-"],max_value=20,shuffle=false+chain_sum,size=7,seed=3')
    assert first.settings == {"operators": ["+", "-"], "max_value": 20, "shuffle": False}
    assert (first.name, first.size, first.seed) == ("countdown", gym.SIZE, 0)
    assert (second.name, second.size, second.seed, second.settings) == ("chain_sum", 7, 3, {})
    (mini,) = gym.parts_of("gym:mini_countdown,max_value=30")
    assert mini.name == "countdown" and mini.settings["max_value"] == 30 and mini.settings["max_numbers"] == 3


@needs_gym
def test_a_task_without_a_small_model_asks_for_a_model(capsys):
    error = refused(capsys, "--task", "gym:chain_sum")
    assert "--task gym:chain_sum needs a --model; a small one is made for gym:mini_countdown alone" in error
    assert "needs a --model" in refused(capsys, "--task", "gym:chain_sum,size=20", program=eval)
    assert "give path/to/task.py" in refused(capsys, "--task", "countdown")
    assert "--reward gym scores tasks of reasoning-gym; give --task gym:NAME" in refused(capsys, "--reward", "gym")


# ---------------------------------------------------------------- rows


@needs_gym
def test_held_out_rows_come_from_another_seed_and_are_never_trained_on():
    training, held_out, note = gym.problems("gym:chain_sum,size=3000,max_terms=2,max_digits=2")
    asked = [row[0] for row in training]
    never = [row[0] for row in held_out]
    assert 3000 > len(asked) == len(set(asked)) > 500 and 400 > len(never) == len(set(never)) > 100
    assert not set(asked) & set(never)  # though many such sums are drawn twice
    assert f"3,000 rows, {3000 - len(asked):,} repeated or held out; {len(never)} held out" in note
    assert held_out == gym.held_out("gym:chain_sum,size=3000,max_terms=2,max_digits=2")
    other = {row[0] for row in gym.problems("gym:chain_sum,size=3000,max_terms=2,max_digits=2,seed=1")[0]}
    assert other != set(asked)


@needs_gym
def test_the_seed_of_held_out_rows_is_not_a_neighbours():
    """Row i of seed s is row 0 of seed s + i: with seeds that are near, most rows would be the same."""
    (part,) = gym.parts_of("gym:chain_sum,size=50")
    assert gym.entries(part, 1, 50)[0]["question"] == gym.entries(part, 0, 50)[1]["question"]
    assert gym.FAR > 10**8 and not {row[0] for row in gym.rows_of([part], gym.FAR, 1)} & {
        row[0] for row in gym.rows_of([part], 0, 1)
    }


@needs_gym
def test_a_mixture_has_its_parts_by_their_sizes_in_one_shuffled_list():
    training, held_out, _ = gym.problems("gym:chain_sum,size=300+gcd,size=100")
    tasks = [row[3]["task"] for row in training]
    assert Counter(tasks)["gcd"] == pytest.approx(100, abs=10) and 10 < tasks[:80].count("gcd") < 35
    assert {row[3]["stage"] for row in held_out} == {0, 1} and len(held_out) == pytest.approx(80, abs=6)
    for text, answer, entry, _ in training:
        assert text.startswith(entry["question"].strip()) and text.endswith(gym.INSTRUCTION)
        assert answer == str(entry["answer"])


# ---------------------------------------------------------------- scores


@needs_gym
def test_right_is_one_and_all_else_nothing_unless_credit_is_partial():
    prompt = prompts_of(MINI)[0]
    right = f"so <answer>{prompt.answer}</answer>"
    responses = [right, "<answer>1</answer>", f"{prompt.answer}", "<answer>1+</answer>", f"<think>{right}"]
    responses += [f"<think><answer>1</answer></think>{right}", f"{right}<answer>1</answer>", "<answer> </answer>"]
    reward.counts()
    assert scores(False, responses, [prompt] * 8) == [1, 0, 0, 0, 0, 1, 0, 0]
    found = reward.counts()
    assert (found["reward_graded"], found["reward_no_box"]) == (5, 3)
    assert scores(True, responses, [prompt] * 8) == [1, 0.05, 0, 0.01, 0, 1, 0.05, 0]


@needs_gym
def test_an_answer_that_does_not_end_costs_nobody_else_a_score():
    prompt = prompts_of(MINI)[0]
    right = f"<answer>{prompt.answer}</answer>"
    endless = "<answer>" + "9**" * 6 + "9</answer>"
    reward.counts()
    assert scores(False, [right, endless, right, "<answer>" + "1" * 30_000 + "</answer>"], [prompt] * 4) == [1, 0, 1, 0]
    found = reward.counts()
    assert found["reward_timeouts"] + found["reward_kills"] == 1 and found["reward_too_long"] == 1


@needs_gym
def test_an_entry_reaches_its_scorer_as_it_was_made():
    """JSON would make lists of the tuples of ARC's grids, and every answer wrong."""
    for task in ("rearc", "chain_sum", "time_intervals", "knights_knaves", "word_ladder"):
        prompt = prompts_of(f"gym:{task},size=5")[0]
        assert scores(False, [f"<answer>{prompt.answer}</answer>"], [prompt]) == [1.0], task


@needs_gym
def test_the_scorer_has_the_settings_of_its_task(monkeypatch):
    prompt = prompts_of(MINI)[0]
    sent = []
    monkeypatch.setattr(reward.GYM, "judge", lambda pairs: sent.extend(pairs) or dict.fromkeys(pairs, "0.99"))
    assert scores(False, ["<answer>x</answer>"], [prompt]) == [1.0]
    assert pickle.loads(base64.b64decode(sent[0][0])) == (prompt.row["settings"], prompt.gold)


@needs_gym
def test_a_reward_of_the_users_own_has_the_entry_for_a_gold(tmp_path, hardly_taught, monkeypatch):
    monkeypatch.setattr(tiny, "home", lambda kind="digits": hardly_taught)
    path = tmp_path / "mine.py"
    path.write_text("""def score(responses, golds, task):
    assert all(one == "mini_countdown" for one in task)
    return [len(response) / gold["metadata"]["target"] for response, gold in zip(responses, golds)]
""")
    flags = [*SMALL, "--task", MINI, "--reward", f"{path}:score", "--steps", "2", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["reward"], settings["judge"], settings["data"]) == (f"{path}:score", "gym", "")


# ---------------------------------------------------------------- the small model


@needs_gym
def test_the_pupil_errs_at_its_stated_rates_and_is_told_so_by_the_reward():
    pupil = tiny.make_pupil("mini_countdown")
    rng = random.Random(0)
    prompts = prompts_of(MINI)
    asked = []
    responses = []
    for prompt in prompts:
        assert pupil.solution(prompt.text)[1] == prompt.gold["metadata"]["target"]
        asked += [prompt] * 20
        responses += [pupil.answer(prompt.text, rng) for _ in range(20)]
    found = scores(False, responses, asked)
    seen = {0.1: [], 0.5: [], 1.0: []}
    for i, prompt in enumerate(prompts):
        seen[round(pupil.pass_rate(prompt.text), 1)].append(fmean(found[20 * i : 20 * i + 20]))
    assert set(seen[1.0]) == {1.0}
    for rate in (0.1, 0.5):  # a wrong sign may be another solution
        assert rate - 0.1 < fmean(seen[rate]) < rate + 0.2
    assert 0.4 < fmean(map(pupil.pass_rate, pupil.questions(500, 0))) < 0.7


@needs_gym
def test_its_tokenizer_reads_and_writes_what_reasoning_gym_asks():
    config_, tokenizer = tiny.shape("mini_countdown")
    settings = tiny.SETTINGS
    prompts, skipped = data.encode(gym.problems(MINI)[0], tokenizer, settings["max_prompt_tokens"])
    assert not skipped and len(tokenizer) == config_.vocab_size
    pupil = tiny.make_pupil("mini_countdown")
    for prompt in prompts:
        assert tokenizer.decode(prompt.ids) == prompt.text
        answer = pupil.answer(prompt.text, random.Random(0))
        ids = tokenizer(answer)["input_ids"]
        assert tokenizer.decode(ids) == answer and len(ids) < settings["max_tokens"]


@needs_gym
def test_train_and_eval_take_the_name_alone(tmp_path, hardly_taught, monkeypatch):
    monkeypatch.setattr(tiny, "home", lambda kind="digits": hardly_taught)
    out = tmp_path / "run"
    for steps in ("2", "4 --resume"):
        assert train.main([*SMALL, "--task", MINI, "--replay", "--out", str(out), "--steps", *steps.split()]) == 0
    rows = plot.read(out / "metrics.jsonl")
    assert len(rows) == 4 and all(row["reward_graded"] + row["reward_no_box"] == 24 for row in rows)
    assert rows[-1]["eval_accuracy"] < 1

    # A trained one is known when it is seen.
    assert tiny.sharing_of(str(out / "model")) == "mini_countdown"
    cfg = eval.settled(eval.Config(model=str(out / "model")), [])
    assert (cfg.benchmarks, cfg.temperature, cfg.max_tokens) == (("gym:mini_countdown",), 1.0, 15)
    flags = ["--model", str(out / "model"), "--samples", "2", "--out", str(tmp_path / "eval")]
    assert eval.main([*flags, "--task", MINI]) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())["benchmarks"]["mini_countdown-size-60"]
    assert found["reward"] == "gym" and len(found["ids"]) == len(gym.held_out(MINI)) == 12


@needs_gym
def test_the_parts_of_a_mixture_are_stages(tmp_path, hardly_taught, monkeypatch):
    monkeypatch.setattr(tiny, "home", lambda kind="digits": hardly_taught)
    task = "gym:mini_countdown,size=40+mini_countdown,size=40,seed=1000"
    flags = ["--task", task, "--replay", "continual", "--steps", "2", "--out", str(tmp_path / "run")]
    assert train.main([*SMALL, *flags]) == 0
    assert [row["stage"] for row in plot.read(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


@needs_gym
def test_partial_credit_is_what_is_trained_on_and_not_what_is_judged():
    prompt = prompts_of(MINI)[0]
    for flags, nearly in ((["--partial-credit"], 0.05), ([], 0.0)):
        argv = ["--task", MINI, "--then", MINI, "--replay", "continual", *flags]
        cfg, _ = config.settings(argv, train.Config, train.METHODS, tiny.SETTINGS, "")
        assert cfg.reward == reward.judge_of(cfg) == "tasks"
        asked = dataclasses.replace(prompt, row=prompt.row | {"stage": 1})
        trained, judge = (one.of_prompts(["<answer>1</answer>"], [asked], [1], [False]) for one in reward.choose(cfg))
        assert (trained, judge) == ([nearly], [0.0])


@pytest.mark.parametrize(
    "flags",
    [
        ["--partial-credit"],
        ["--partial-credit", "--task", "gym:mini_countdown", "--reward", "always"],
        ["--partial-credit", "--task", "lab/recipes/sums.py"],
        ["--partial-credit", "--model", "m", "--data", "gsm8k"],
    ],
)
def test_partial_credit_needs_scores_of_reasoning_gym(capsys, flags):
    assert "--partial-credit is of the scores of reasoning-gym" in refused(capsys, *flags)


def test_eval_takes_an_answer_between_tags_for_the_vote():
    assert eval.spelling("x <answer>1 + 2</answer>", "gym") == "1+2" and eval.spelling("1 + 2", "gym") == ""


@needs_gym
@pytest.mark.slow
def test_a_small_model_is_made_and_learns_countdown(tmp_path, monkeypatch):
    place = tiny.make(tmp_path / "small", steps=700, sharing="mini_countdown")
    monkeypatch.setattr(tiny, "home", lambda kind="digits": place)
    flags = [
        "--task",
        "gym:mini_countdown,size=400",
        "--steps",
        "60",
        "--eval-every",
        "60",
        "--out",
        str(tmp_path / "r"),
    ]
    assert train.main(flags) == 0
    rows = plot.read(tmp_path / "r" / "metrics.jsonl")
    first = fmean(row["reward"] for row in rows[:15])
    last = fmean(row["reward"] for row in rows[-15:])
    assert 0.05 < first < 0.5 and last > first + 0.06
    assert rows[-1]["eval_accuracy"] > rows[0]["eval_accuracy_start"]


def test_the_package_is_the_one_that_is_tested_with():
    assert gym.PACKAGE in (config.ROOT / ".ci" / "run").read_text()
