"""From the command line to a configuration: flags, bounds of numbers, and a user's own classes."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import eval as evaluation
import train
from replay import PromptReplay, RolloutReplay, Uniform
from support import config, plot
from tasks import tiny


@dataclass
class Knobs:
    """A program's settings, few of them."""

    steps: int = 3  # how many of them
    lr: float = 0.5  # how large
    name: str = "x"  # what it is called
    pair: tuple[float, float] = (0.0, 1.0)  # both ends
    mask_truncated: bool = False  # whether to leave out what was cut


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("", {}),
        ("--steps 7", {"steps": 7}),
        ("--steps=7 --name y", {"steps": 7, "name": "y"}),
        ("--lr -1e-3", {"lr": -1e-3}),
        ("--lr inf", {"lr": math.inf}),
        ("--pair 0.2 0.4", {"pair": (0.2, 0.4)}),
        ("--mask-truncated", {"mask_truncated": True}),
        ("--no-mask-truncated", {"mask_truncated": False}),
        ("--mask_truncated --steps 1 --steps 2", {"mask_truncated": True, "steps": 2}),
        ("--name --steps=5x", None),
        ("--step 7", None),
        ("--steps", None),
        ("--steps 7 8", None),
        ("stray", None),
    ],
)
def test_parse_reads_flags_and_tells_which_were_given(capsys, words, changed):
    argv = words.split()
    if changed is None:
        with pytest.raises(SystemExit) as stop:
            config.parse(Knobs, argv, "A program.", Knobs())
        assert stop.value.code == 2 and capsys.readouterr().err
        return
    found, given = config.parse(Knobs, argv, "A program.", Knobs())
    assert found == dataclasses.replace(Knobs(), **changed)
    assert set(given) == ({"mask_truncated"} if words == "--no-mask-truncated" else set(changed))


def test_parse_takes_what_is_not_given_from_the_default_it_is_handed():
    default = Knobs(steps=11, pair=(0.1, 0.2))
    found, given = config.parse(Knobs, ["--lr", "2"], "A program.", default)
    assert found == Knobs(steps=11, lr=2.0, pair=(0.1, 0.2)) and given == ["lr"]
    assert default == Knobs(steps=11, pair=(0.1, 0.2))


def test_parse_works_without_a_default():
    assert config.parse(Knobs, ["--steps", "2"], "A program.") == (Knobs(steps=2), ["steps"])


def test_help_has_the_description_and_the_comments_behind_the_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(Knobs, ["--help"], "What this program does.", Knobs(steps=77))
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "What this program does." in text and "77" in text
    for comment in ("how many of them", "how large", "what it is called", "both ends", "whether to leave out"):
        assert comment in text


@dataclass
class Boxed:
    """Settings under headings."""

    # ---- first of all
    steps: int = 3  # how many of them
    pair: tuple[float, float] = (0.0, 1.0)  # both ends
    # ---- the rest
    on: bool = False  # whether to
    name: str = "x"  # what it is called, # and why


def test_headings_among_the_fields_are_boxes_of_the_help(capsys):
    with pytest.raises(SystemExit):
        config.parse(Boxed, ["--help"], "A program.", Boxed(steps=77))
    text = capsys.readouterr().out.partition("-h, --help")[2]
    wanted = ("first of all options", "--steps", "77", "--pair", "the rest options", "--on")
    parts = [text.index(part) for part in wanted]
    assert parts == sorted(parts) and "what it is called, # and why" in text
    found, given = config.parse(Boxed, ["--on", "--pair", "1", "2"], "A program.", Boxed(steps=5))
    assert found == Boxed(5, (1.0, 2.0), True) and given == ["pair", "on"]
    assert config.parse(Boxed, [], "A program.")[0] == Boxed()


@pytest.mark.parametrize("kind", [train.Config, evaluation.Config])
def test_every_flag_is_in_a_box_with_its_comment(kind):
    names = [name for helps in config.headings(kind).values() for name in helps]
    assert names == [field.name for field in dataclasses.fields(kind)]
    assert config.headings(Knobs) == {}


def test_a_field_without_a_comment_would_be_no_flag_and_is_refused():
    @dataclass
    class Bare:
        # ---- one
        first: int = 1  # with help
        second: int = 2

    with pytest.raises(TypeError, match="Bare: second needs a comment"):
        config.parse(Bare, [], "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("train.py --help", 0),
        ("train.py --lrr 1", 2),
        ("train.py --lr -1", 2),
        ("train.py --replay grop", 2),
        ("train.py @nowhere", 2),
        ("eval.py --help", 0),
        ("eval.py --sed 1", 2),
    ],
)
def test_flags_are_read_before_what_takes_seconds_to_import(words, code):
    script = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers', 'scipy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, *words.split()]
    done = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{code} set()", done


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (train.main, "--lrr 1", "there is no flag --lrr; did you mean --lr?"),
        (train.main, "--max_token 1", "there is no flag --max-token; did you mean --max-tokens?"),
        (train.main, "--qqq=1", "there is no flag --qqq"),
        (
            train.main,
            "--replay promt+group",
            "--replay promt is not known; choose from prompt, .*; did you mean prompt?",
        ),
        (train.main, "--data polariss --reward math", "no data 'polariss': say polaris, .*; did you mean polaris?"),
        (train.main, "--reward mth", "no reward 'mth': say math, .*; did you mean math?"),
        (train.main, "@demo_popo", "there is no recipe demo_popo; .*; did you mean @lab/recipes/demo_popo.txt?"),
        (train.main, "@lab/recipes/demo_pop.txt", "there is no .*; did you mean @lab/recipes/demo_popo.txt?"),
        (evaluation.main, "--bencmarks x", "there is no flag --bencmarks; did you mean --benchmarks?"),
        (evaluation.main, "--benchmarks math50", "no benchmark 'math50'; choose .*; did you mean math500?"),
        (evaluation.main, "--benchmarks embeded", "no benchmark 'embeded'; choose .*; did you mean embedded?"),
    ],
)
def test_a_typo_is_one_line_with_what_was_meant(capsys, main, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.fullmatch(f"error: {message}\n".replace("?", "[?]"), error)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--replay group", "group"),
        ("--replay=group", "group"),
        ("--replay=a=b", "a=b"),
        ("--steps 3", "none"),
        ("", "none"),
        ("--replay", "none"),
        ("--replay-ratio 3", "none"),
        ("--replay group --steps 3 --replay rollout", "rollout"),
        ("--replay=group --replay=", ""),
    ],
)
def test_value_of_reads_one_flag_as_the_parser_would(words, value):
    assert config.value_of(words.split(), "replay", "none") == value


def test_value_of_knows_both_spellings_of_a_flag():
    assert config.value_of(["--max_tokens", "3"], "max_tokens") == "3"
    assert config.value_of(["--max-tokens=3"], "max_tokens") == "3"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--replay", "--replay prompt"),
        ("--replay --steps 3", "--replay prompt --steps 3"),
        ("--steps 3 --replay", "--steps 3 --replay prompt"),
        ("--replay -h", "--replay prompt -h"),
        ("--replay group", "--replay group"),
        ("--replay=group", "--replay=group"),
        ("--replay-ratio 3", "--replay-ratio 3"),
        ("", ""),
    ],
)
def test_with_value_completes_a_flag_that_stands_alone(words, expected):
    argv = words.split()
    assert config.with_value(argv, "replay", "prompt") == expected.split()
    assert argv == words.split()


def test_preset_goes_by_the_model_and_by_the_methods_named():
    def preset(*argv: str) -> train.Config:
        return config.preset(train.Config, [*argv], tiny.SETTINGS, train.METHODS)

    assert preset() == train.Config(**tiny.SETTINGS)
    assert preset("--model", "x") == preset("--model=x") == train.Config(data="polaris")
    group = train.METHODS["group"].settings
    assert group and preset("--replay", "group") == train.Config(**tiny.SETTINGS | group)
    both = preset("--model", "x", "--replay", "rollout+group")
    assert both == preset("--model", "x", "--replay", "group+rollout")
    assert both == train.Config(data="polaris", **train.METHODS["rollout"].settings)  # which is group's and one more
    assert preset("--replay", "nonsense") == preset()
    assert "steps" in tiny.SETTINGS and train.Config().steps != tiny.SETTINGS["steps"]


def test_it_is_known_what_has_set_each_setting():
    def origins(words: str) -> dict:
        cfg, given = config.settings(words.split(), train.Config, train.METHODS, tiny.SETTINGS, "")
        return config.origins(cfg, given, tiny.SETTINGS, train.METHODS)

    assert origins("") == dict.fromkeys(tiny.SETTINGS, "embedded model")
    found = origins("--replay group --lr 1 --clip-high 0.3 --no-mask-truncated")
    assert found["steps"] == "embedded model" and found["advantage"] == "--replay group"
    assert {name for name, origin in found.items() if origin == "given"} == {
        *("replay", "lr", "clip_high", "mask_truncated"),
    }
    assert origins("--model x --task y.py") == {"model": "given", "task": "given", "data": "--task", "reward": "--task"}
    both = origins("--model x --replay prompt+group")
    assert both["data"] == "--model" and both["mask_truncated"] == both["dual_clip"] == "--replay prompt+group"


# ---------------------------------------------------------------- bounds


def numbers(kind=train.Config) -> list[str]:
    """Settings that are numbers, or tuples of numbers."""
    found = []
    for field in dataclasses.fields(kind):
        if {"int", "float"} & set(re.findall(r"\w+", str(field.type))):
            found.append(field.name)
    return found


def test_every_number_of_both_programs_has_a_least_and_a_largest_value():
    assert len(numbers()) > 40 and {"band", "lr", "dual_clip"} < set(numbers())
    assert set(numbers()) | set(numbers(evaluation.Config)) == set(config.BOUNDS)
    assert {*config.ABOVE, *config.INFINITE} <= set(config.BOUNDS)
    for low, high in config.BOUNDS.values():
        assert -math.inf < low < high < math.inf


@pytest.mark.parametrize("preset", [train.Config(), train.Config(**tiny.SETTINGS)], ids=["papers", "embedded"])
@pytest.mark.parametrize("method", [None, *train.METHODS])
def test_defaults_of_every_method_are_within_bounds(preset, method):
    settings = train.METHODS[method].settings if method else {}
    config.check_training(dataclasses.replace(preset, **settings))


@pytest.mark.parametrize("name", numbers())
def test_a_number_beyond_its_bounds_is_refused_by_name(name):
    flag = "--" + name.replace("_", "-")
    low, high = config.BOUNDS[name]
    usual = getattr(train.Config(), name)

    def like(value):
        """As a pair, where the setting is one."""
        return (low, value) if isinstance(usual, tuple) else value

    def refusal(value) -> str:
        with pytest.raises(ValueError) as error:
            config.check(dataclasses.replace(train.Config(), **{name: like(value)}))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refusal(low - 1) == f"{flag} must be at least {low}, got {low - 1}"
    assert refusal(high + 1) == f"{flag} must be at most {high}, got {high + 1}"
    config.check(dataclasses.replace(train.Config(), **{name: like(high)}))
    if name in config.ABOVE:
        assert refusal(0.0) == f"{flag} must be above 0, got 0.0"
    else:
        config.check(dataclasses.replace(train.Config(), **{name: like(low)}))
    if not isinstance(usual, int):
        assert refusal(math.nan) == f"{flag} must be a finite number, got nan"
        assert refusal(-math.inf) == f"{flag} must be a finite number, got -inf"


def test_infinity_is_meant_in_two_places_and_nowhere_else():
    meant = []
    for name in numbers():
        usual = getattr(train.Config(), name)
        infinite = (math.inf, math.inf) if isinstance(usual, tuple) else math.inf
        try:
            config.check(dataclasses.replace(train.Config(), **{name: infinite}))
            meant.append(name)
        except ValueError:
            pass
    assert sorted(meant) == ["initial_priority", "is_cap"]


TOGETHER = {
    "--dual-clip must be above 1 .or 0: none., got 0.5": {"dual_clip": 0.5},
    "--dual-clip must be at least 0, got -1": {"dual_clip": -1.0},
    "--betas must be at least 0 and below 1, got 0.9 and 1.0": {"betas": (0.9, 1.0)},
    "--betas must be at least 0, got -0.1": {"betas": (-0.1, 0.9)},
    "--temperature must be above 0": {"temperature": 0.0},
    "--difficulty needs two pass rates": {"difficulty": (0.5, 0.2)},
    "--sharing is a knob of the embedded task": {"model": "x", "sharing": "none"},
    "--gpus is for --dry-run": {"gpus": "8x80"},
    "--steps must be at least 1": {"steps": 0},
}


@pytest.mark.parametrize("message", TOGETHER)
def test_settings_that_cannot_be_meant_together_are_refused(message):
    with pytest.raises(ValueError, match=message):
        config.check_training(dataclasses.replace(train.Config(), **TOGETHER[message]))


# ---------------------------------------------------------------- classes by name

PACE = """
from replay import Uniform


class Pace(Uniform):
    '''Every prompt `max_reuse` times in a row.'''

    STATE = (*Uniform.STATE, 'before')
    before = []

    def __init__(self, num_prompts, seed=0, max_reuse=2, own=5):
        super().__init__(num_prompts, seed)
        self.max_reuse = max_reuse
        self.own = own

    def draw(self, n, step):
        if step % self.max_reuse == 1:
            self.before = self.take_fresh(self.begin(n, step))
            return self.before
        self.begin(n, step)
        return self.take(self.before, replayed=True)
"""

AGAIN = """
from replay import ReplayStore


class Again(ReplayStore):
    '''The useful groups of the step before once more.'''

    def complete(self, useful, places, step):
        batch = useful + list(self.stored)
        self.stored.clear()
        self.stored.extend(useful)
        return batch

    def figures(self, step):
        return {"again": len(self.stored)}


class InPlaces(Again):
    DECIDES = "places"
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_load_class_of_a_module_and_of_a_file(tmp_path):
    assert config.load_class("replay:PromptReplay") is PromptReplay
    kind = config.load_class(f"{written(tmp_path / 'pace.py', PACE)}:Pace")
    assert issubclass(kind, Uniform) and kind(10).max_reuse == 2


def test_a_users_file_takes_no_modules_place(tmp_path):
    path = written(tmp_path / "replay.py", "from replay import Uniform\nclass Mine(Uniform): ...\n")
    assert issubclass(config.load_class(f"{path}:Mine"), Uniform)
    import replay

    assert replay.PromptReplay is PromptReplay and not hasattr(replay, "Mine")


def test_a_users_file_may_have_dataclasses(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass D:\n    x: int = 1\n"
    )
    assert config.load_class(f"{written(tmp_path / 'd.py', text)}:D")().x == 1


BROKEN = {
    "def f(:": r"cannot be imported \(SyntaxError: ",
    "x = 1\nraise KeyError('gone')": r"cannot be imported \(KeyError: 'gone' at line 2\)",
    "import no_such_module": r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_module' at line 1\)",
    "raise ValueError('one\\ntwo')": r"cannot be imported \(ValueError: one at line 1\)",
    "import json\n\njson.loads('{')": r"cannot be imported \(JSONDecodeError: .* at line 3\)",
    "def Pace(): ...": "has no class 'Pace'",
    "class Peace: ...": "has no class 'Pace'",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_class_that_cannot_be_had_is_one_line(tmp_path, text):
    path = written(tmp_path / "mine.py", text)
    with pytest.raises(ValueError, match=BROKEN[text]) as error:
        config.load_class(f"{path}:Pace")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no file {tmp_path / 'mine.py'}"):
        config.load_class("mine.py:Pace")
    with pytest.raises(ValueError, match="has no class ''"):
        config.load_class(f"{written(tmp_path / 'mine.py', PACE)}:")


def test_build_gives_a_class_the_settings_of_the_names_of_its_arguments():
    cfg = train.Config(seed=4, band=(0.1, 0.2), replay_ratio=0.7, mask_truncated=True)
    sampler = config.build(PromptReplay, cfg, 50)
    assert len(sampler.rate) == 50 and sampler.band == (0.1, 0.2) and sampler.cooldown == cfg.cooldown
    store = config.build(RolloutReplay, cfg)
    assert store.replay_ratio == 0.7 and store.mask_truncated and store.stored.maxlen == cfg.rollout_capacity


def test_build_names_what_is_no_setting():
    class Needy:
        def __init__(self, seed, of_its_own):
            pass

    class Nothing: ...

    with pytest.raises(ValueError, match="Needy cannot be made .*'of_its_own'.* needs a default"):
        config.build(Needy, train.Config())
    with pytest.raises(ValueError, match="Nothing cannot be made"):
        config.build(Nothing, train.Config(), 50)


# ---------------------------------------------------------------- rules of a user


def test_a_users_class_decides_prompts_extra_or_what_it_says(tmp_path):
    pace = written(tmp_path / "pace.py", PACE)
    again = written(tmp_path / "again.py", AGAIN)
    sampler, stores = train.make_rules(train.Config(replay=f"{pace}:Pace", max_reuse=3, seed=1), num_prompts=40)
    assert type(sampler).__name__ == "Pace" and stores == {}
    assert (sampler.max_reuse, sampler.own, len(sampler.order)) == (3, 5, 40)
    first = sampler.draw(8, 1)
    assert first == sampler.draw(8, 2) == sampler.draw(8, 3) != sampler.draw(8, 4) and sampler.replays == set()
    sampler, stores = train.make_rules(train.Config(replay=f"prompt+{again}:Again+group"), num_prompts=40)
    assert isinstance(sampler, PromptReplay)
    assert {place: type(store).__name__ for place, store in stores.items()} == {
        "places": "GroupReplay",
        "extra": "Again",
    }
    _, stores = train.make_rules(train.Config(replay=f"{again}:InPlaces"), num_prompts=40)
    assert list(stores) == ["places"]
    with pytest.raises(ValueError, match="GroupReplay and InPlaces decide the same thing"):
        train.make_rules(train.Config(replay=f"group+{again}:InPlaces"), num_prompts=40)


LACKING = {
    "class Mine: ...": "Mine has no complete, watch, attach, learn, figures, .*replay.ReplayStore",
    "class Mine:\n    def draw(self, n, step): ...": "Mine has no observe, .*replay.Uniform",
    "import replay\nclass Mine(replay.Uniform):\n    DECIDES = 'answers'": "Mine.DECIDES must be one of prompts, ",
    "import replay\nclass Mine(replay.ReplayStore):\n    figures = 1": "Mine has no complete:",
}


@pytest.mark.parametrize("text", LACKING)
def test_a_rule_that_lacks_what_training_needs_is_refused(tmp_path, text):
    path = written(tmp_path / "mine.py", text)
    with pytest.raises(ValueError, match=LACKING[text]):
        train.make_rules(train.Config(replay=f"{path}:Mine"), num_prompts=40)


def test_a_users_rule_trains_resumes_and_names_the_folder_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "OUT", tmp_path / "out")
    monkeypatch.setattr(tiny, "home", lambda sharing: config.ROOT / "out" / "tiny-model")
    rules = f"{written(tmp_path / 'pace.py', PACE)}:Pace+{written(tmp_path / 'again.py', AGAIN)}:Again"
    flags = ["--prompts-per-step", "4", "--answers-per-prompt", "4", "--eval-every", "0", "--save-every", "3"]
    flags += ["--replay", rules, "--max-reuse", "2"]
    assert train.main([*flags, "--steps", "3"]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == "tiny-pace-Pace+again-Again-s0"
    assert train.main([*flags, "--steps", "5", "--resume"]) == 0
    rows = plot.read(folder / "metrics.jsonl")
    assert train.main([*flags, "--steps", "5", "--out", str(tmp_path / "whole")]) == 0
    for row, whole in zip(rows, plot.read(tmp_path / "whole" / "metrics.jsonl"), strict=True):
        for name in ("reward", "loss", "grad_norm", "distinct_prompts", "again"):
            assert row[name] == whole[name], name
    assert [row["distinct_prompts"] for row in rows] == [4, 4, 8, 8, 12]
    assert any(row["again"] for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", ""),
        ("--prompts-per-step 8 --seed 3", ""),
        ("--mask-truncated --max-tokens 3", ""),
        ("--cooldown 5", "warning: --cooldown has no effect, no rule of --replay none takes it"),
        (
            "--replay prompt --cooldown 5",
            "--replay prompt also sets --mask-truncated\n"
            "plain GRPO with the same objective is this command with --replay none --mask-truncated",
        ),
        (
            "--replay dapo --max-rounds 3 --clip-high 0.3 --minibatches 2",
            "--replay dapo also sets --advantage std\n"
            "plain GRPO with the same objective is this command with --replay none --advantage std",
        ),
        ("--replay adaptive --cooldown 3", "--replay adaptive also sets --share 0.5"),
        (
            "--clip-high 0.3 --dual-clip 5",
            "note: --clip-high, --dual-clip act from the second optimiser step of a batch on (--minibatches, --epochs)",
        ),
        ("--clip-high 0.3 --proximal birth", ""),
        ("--replay greso --max-rounds 3", "warning: --max-rounds has no effect, no rule of --replay greso takes it"),
    ],
)
def test_what_a_method_sets_and_what_has_no_effect_is_said(capsys, words, said):
    argv = words.split()
    cfg, given = config.parse(train.Config, argv, "", config.preset(train.Config, argv, {}, train.METHODS))
    config.remark(cfg, given, train.METHODS)
    assert capsys.readouterr().out.strip() == said


# ---------------------------------------------------------------- mistakes


def test_a_mistake_is_one_line_and_other_errors_pass(capsys):
    with pytest.raises(SystemExit) as stop, config.exits(2, ValueError, OSError):
        raise ValueError("this is wrong")
    assert stop.value.code == 2 and capsys.readouterr().err == "error: this is wrong\n"
    with pytest.raises(KeyError), config.exits(2, ValueError):
        raise KeyError("a bug")
    with config.exits(2, ValueError):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "all_ranks"), [("0", False), ("1", False), ("0", True), ("1", True)])
def test_what_is_wrong_everywhere_is_said_first_by_the_first_rank(monkeypatch, capsys, tmp_path, rank, all_ranks):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    waited = []
    monkeypatch.setattr(config.time, "sleep", waited.append)
    monkeypatch.setattr(config.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop, config.exits(1, ValueError, all_ranks=all_ranks):
        raise ValueError("this is wrong")
    assert stop.value.code == 1 and capsys.readouterr().err == "error: this is wrong\n"
    assert waited == ([config.ALONE] if rank == "1" and not all_ranks else [])  # long enough for torchrun to end it
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: this is wrong"


@pytest.mark.parametrize("signals", [(), (signal.SIGTERM,)])
def test_control_c_is_one_line(capsys, signals):
    with pytest.raises(SystemExit) as stop, config.exits(2, ValueError):
        raise KeyboardInterrupt(*signals)
    assert stop.value.code == (143 if signals else 130) and capsys.readouterr().err == "stopped at once\n"


@pytest.mark.parametrize(("raised", "said"), [("KeyboardInterrupt", "stopped\n"), ("KeyError(5)", "Traceback")])
def test_control_c_among_the_imports_is_one_word(raised, said):
    code = f"import support.config; raise {raised}"
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True)
    assert done.returncode in (1, -signal.SIGINT) and done.stderr.startswith(said)
    assert done.stderr == said or "KeyError" in raised
