"""Recipes: @FILE on the command line, and every file of lab/recipes with every command in its header, dry-run.

There is no network here. So a model of the hub is a folder with a config of its shape and the embedded tokenizer,
and data of the hub are a file of sums with the columns that the recipe names. Everything else is the recipe's own, and
what it says of GPUs has to be what the memory plan says.
"""

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

import train
from lab import long_answers
from lab.recipes import guru_math
from support import config, plan
from support.config import ROOT
from tasks import data, tiny
from tests.helpers import code_of
from tests.models import shape
from tests.test_plan import MODELS

FOLDER = ROOT / "lab" / "recipes"
RECIPES = sorted(FOLDER.glob("*.txt"))
COMMAND = re.compile(r"^#   (?:python|torchrun --nproc-per-node \d+) train\.py (?P<flags>.*?)(?:  .*)?$")


def qwen2(hidden, layers, heads, kv_heads, mlp, tied, vocabulary=151_936, context=131_072):
    more = {"tie_word_embeddings": tied, "max_position_embeddings": context}
    return shape(Qwen2Config, hidden, layers, heads, kv_heads, mlp, vocabulary, **more)


LLAMA = {"head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 131_072, "bos_token_id": 1}
LLAMA_3B = shape(LlamaConfig, 3072, 28, 24, 8, 8192, 128_256, **LLAMA)
# The shapes of the models on the hub, and how many parameters these have.
HUB = {
    "Qwen/Qwen3-0.6B": (MODELS["Qwen3-0.6B"], 596_049_920),
    "Qwen/Qwen3-1.7B": (MODELS["Qwen3-1.7B"], 1_720_574_976),
    "Qwen/Qwen3-1.7B-Base": (MODELS["Qwen3-1.7B"], 1_720_574_976),
    "Qwen/Qwen3-4B-Base": (MODELS["Qwen3-4B"], 4_022_468_096),
    "Qwen/Qwen3-8B": (MODELS["Qwen3-8B"], 8_190_735_360),
    "Qwen/Qwen3-8B-Base": (MODELS["Qwen3-8B"], 8_190_735_360),
    "Qwen/Qwen2.5-3B": (qwen2(2048, 36, 16, 2, 11_008, True), 3_085_938_688),
    "Qwen/Qwen2.5-7B": (qwen2(3584, 28, 28, 4, 18_944, False, 152_064), 7_615_616_512),
    "Qwen/Qwen2.5-Math-1.5B": (qwen2(1536, 28, 12, 2, 8960, True, context=4096), 1_543_714_304),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (qwen2(1536, 28, 12, 2, 8960, False), 1_777_088_000),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (qwen2(3584, 28, 28, 4, 18_944, False, 152_064), 7_615_616_512),
    "meta-llama/Llama-3.2-3B-Instruct": (LLAMA_3B, 3_212_749_824),
}


def expanded(*argv: str):
    """The configuration that train.py makes of this command line."""
    return config.settings([*argv], train.Config, train.METHODS, tiny.SETTINGS, "")


def commands(path: Path) -> list[list[str]]:
    """The flags of each command of train.py in a recipe's header."""
    found = []
    for line in path.read_text().splitlines():
        match = COMMAND.match(line)
        if match:
            found.append(shlex.split(match["flags"]))
    return found


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A function: the folder that stands for a model of the hub."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        place = folder / name.replace("/", "_")
        if name == "out/long-model":  # the project's own
            tiny.make_config(**long_answers.SHAPE).save_pretrained(place)
            tiny.make_tokenizer(long_answers.ALPHABET).save_pretrained(place)
        elif not place.exists():
            HUB[name][0].save_pretrained(place)
            tokenizer = tiny.make_tokenizer()
            tokenizer.chat_template = "{% for m in messages %}{{ m.content[:10] }}{% endfor %}{# enable_thinking #}"
            tokenizer.save_pretrained(place)
        return place

    return make


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A file of sums that has the columns of any data set."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    with path.open("w") as file:
        for question, answer in tiny.arithmetic(400):
            row = {"problem": question, "answer": answer, "difficulty": "4/8", "reward_model": {"ground_truth": answer}}
            file.write(json.dumps(row) + "\n")
    return path


# ---------------------------------------------------------------- the project's own


def test_there_are_recipes_and_each_has_a_title_and_a_command_that_runs_it():
    assert len(RECIPES) >= 15
    for path in RECIPES:
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ") and commands(path)[0] == [f"@lab/recipes/{path.name}"]


@pytest.mark.parametrize("name", HUB)
def test_stand_ins_have_the_shape_of_the_model_on_the_hub(name):
    shape, parameters = HUB[name]
    assert plan.shape(shape)["parameters"] == parameters


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_command_of_a_recipe_is_one_that_train_py_takes(path, stand_in, sums, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for number, flags in enumerate(commands(path)):
        cfg, _ = expanded(*flags)
        if cfg.task.startswith("gym:") and not importlib.util.find_spec("reasoning_gym"):
            pytest.skip("needs reasoning-gym")
        more = ["--dry-run", "--out", str(tmp_path / f"run{number}")]
        if cfg.model:
            more += ["--model", str(stand_in(cfg.model))]
        if cfg.data:
            more += ["--data", str(sums), "--data-options", ""]
        assert train.main([*flags, *more]) == 0
        assert "one step:" in capsys.readouterr().out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_says_of_gpus_is_what_the_plan_says(path, stand_in, sums, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    gpus = re.findall(r"fits --gpus (\d+x\d+)", text.replace("\n#  ", ""))
    cfg, _ = expanded(*commands(path)[0])
    assert len(gpus) == (cfg.model in HUB)
    if gpus:
        flags = ["--model", str(stand_in(cfg.model)), "--data", str(sums), "--dry-run", "--gpus", gpus[0]]
        assert train.main([f"@{path}", *flags, "--out", str(tmp_path / "run")]) == 0
        *_, verdict, cost = capsys.readouterr().out.splitlines()
        hours = re.search(r"(\d+) GPU hours for", cost)[1]
        count = int(gpus[0].partition("x")[0])
        assert verdict.startswith("fits")
        assert f"; {hours} GPU hours" in text.replace("\n#  ", "")
        assert ("on the host" in verdict) == ("of host memory" in text)
        launcher = f"torchrun --nproc-per-node {count}" if count > 1 else "python"
        assert f"#   {launcher} train.py @" in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_a_paper_says_what_is_known_what_is_not_and_what_it_needs(path):
    text = path.read_text()
    if "(26" in text.splitlines()[0]:  # a paper's number
        for part in ("Known", "Not known", "Reported", "Hardware"):
            assert f"\n# {part}: " in text


def test_the_data_of_prioritized_replay_are_drawn_by_its_rules(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def row(i: int, **more) -> dict:
        gold = {"ground_truth": str(i)}
        asked = [{"role": "user", "content": f"Problem {i}?"}]
        rates = {guru_math.SOLVER: 0.9, guru_math.LEARNER: 0.6 * i / 400}
        return {"prompt": asked, "reward_model": gold, "ability": "math", **rates} | more

    rows = [row(i) for i in range(400)]
    rows += [row(0), row(500, ability="code"), row(501, **{guru_math.SOLVER: 0.5})]
    rows += [row(502, **{guru_math.LEARNER: 0.7}), row(503, **{guru_math.SOLVER: 0.6, guru_math.LEARNER: 0.6})]
    (tmp_path / "maths.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert guru_math.main(["maths.jsonl", "--count", "40"]) == 0
    said = capsys.readouterr().out
    assert "405 rows, 400 kept, 40 drawn" in said and "above 0.2, at most 0.4: " in said
    drawn, _ = data.load_pairs("guru-math-1000.jsonl", answer_column="reward_model")
    numbers = sorted(int(gold) for _, gold in drawn)
    assert [sum(40 * i <= number < 40 * (i + 1) for number in numbers) for i in range(10)] == [4] * 10

    for words, message in (
        ([], "give the files"),
        (["maths.jsonl"], "400 of 405 rows are left, fewer than the 1000"),
        (["guru-math-1000.jsonl"], "row 1 lacks ability, qwen3_30b_pass_rate"),
    ):
        assert code_of(guru_math.main, words) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------- @FILE


def write(folder: Path, text: str) -> str:
    path = folder / "mine.txt"
    path.write_text(text)
    return f"@{path}"


def test_a_recipe_is_read_as_flags_that_those_given_by_hand_override(tmp_path):
    text = "# it's a recipe\n\n--lr 2e-4   # half\n--replay\n--band 0.2 0.8\n--mask_truncated\n--vllm '{\"a\": 1}'\n"
    recipe = write(tmp_path, text)
    cfg, given = expanded("--lr", "1e-4", recipe, "--seed", "3")
    plain = ["--replay", "prompt", "--band", "0.2", "0.8", "--mask-truncated", "--vllm", '{"a": 1}', "--seed", "3"]
    assert cfg == expanded(*plain, "--lr", "1e-4")[0]
    assert {"lr", "replay", "band", "mask_truncated", "vllm", "seed"} == set(given)
    assert expanded(recipe, "--no-mask-truncated", "--replay", "none")[0].mask_truncated is False


def test_of_several_recipes_the_last_counts(tmp_path):
    first = write(tmp_path, "--lr 1\n--steps 2\n")
    other = tmp_path / "other.txt"
    other.write_text("--lr 3\n")
    cfg, _ = expanded(first, f"@{other}")
    assert (cfg.lr, cfg.steps) == (3, 2)


def test_without_a_recipe_nothing_changes():
    assert config.with_recipes(["--lr", "1", "x@y"], train.Config) == ["--lr", "1", "x@y"]


def test_every_flag_may_stand_in_a_recipe(tmp_path):
    names = [field.name for field in dataclasses.fields(train.Config)]
    recipe = write(tmp_path, "\n".join(f"--{name.replace('_', '-')} 1" for name in names))
    assert len(config.with_recipes([recipe], train.Config)) == 2 * len(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--lr 1\n--step 7\n", "mine.txt line 2: there is no flag --step; did you mean --steps?"),
        ("--qqqqq 7\n", "mine.txt line 1: there is no flag --qqqqq\n"),
        ("# a\n\nlr = 3\n", "mine.txt line 3: a line holds one flag and its values, got 'lr = 3'"),
        ("--lr 1 --steps 3\n", "mine.txt line 1: a line holds one flag"),
        ("3 --steps\n", "mine.txt line 1: a line holds one flag"),
        ("@other.txt\n", "mine.txt line 1: a line holds one flag"),
        ("--vllm '{\n", "mine.txt line 1: No closing quotation"),
        ("\xff", "UTF-8"),
        (None, "there is no recipe"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_that_names_file_and_line(tmp_path, capsys, text, message):
    recipe = f"@{tmp_path / 'mine.txt'}"
    if text is not None:
        (tmp_path / "mine.txt").write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit) as stop:
        train.main([recipe, "--steps", "3"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_compare_takes_a_recipe_among_the_flags_of_every_run():
    from lab.compare import settings_of

    cfg, given = settings_of([f"@{FOLDER / 'demo_popo.txt'}", "--steps", "7"])
    assert (cfg.replay, cfg.lr, cfg.steps) == ("popo", 2e-4, 7) and {"replay", "lr", "steps"} == set(given)
