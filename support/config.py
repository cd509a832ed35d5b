"""From the command line to a configuration: flags from a dataclass, bounds of numbers, and classes by name."""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).parent.parent  # of the project
OUT = ROOT / "out"  # where runs, and the embedded model, are kept
GYM = "gym:"  # begins the name of a task of reasoning-gym
EACH = "tasks"  # the reward of --then: each row is scored by its own task

# Least and largest value of each number of train.py and eval.py. What is beyond the largest is a slip of the hand: it
# would start, and never end.
BOUNDS = {
    "answers_per_prompt": (2, 4096),
    "band": (0, 1),
    "batch": (1, 1_000_000),
    "betas": (0, 1),
    "clip_high": (0, 1000),
    "clip_low": (0, 1),
    "cooldown": (0, 10**9),
    "difficulty": (0, 1),
    "dual_clip": (0, 1000),
    "epochs": (1, 1000),
    "eval_every": (0, 10**9),
    "eval_prompts": (0, 1_000_000),
    "eval_samples": (1, 4096),
    "explore": (0, 1),
    "gpu_memory": (0, 1),
    "group_capacity": (0, 10_000_000),
    "grad_clip": (0, 10**9),
    "initial_priority": (-(10**9), 10**9),
    "is_cap": (0, 10**9),
    "kl": (0, 1000),
    "lr": (0, 1000),
    "max_age": (1, 10**9),
    "max_prompt_tokens": (1, 10_000_000),
    "max_prompts": (0, 10**9),
    "max_reuse": (0, 10**9),
    "max_rollouts": (0, 10**12),
    "max_rounds": (1, 10_000),
    "max_tokens": (1, 10_000_000),
    "minibatches": (1, 10_000),
    "pass_at": (1, 4096),
    "priority_exponent": (0, 100),
    "prompts_per_step": (1, 100_000),
    "replay_ratio": (0, 100),
    "replay_warmup": (0, 10**9),
    "retest_every": (0, 10**9),
    "retest_solved": (0, 1),
    "rollout_batch": (1, 1_000_000),
    "rollout_capacity": (1, 100_000_000),
    "save_every": (1, 10**9),
    "seed": (0, 2**31 - 1),
    "share": (0, 1),
    "smoothing": (0, 1),
    "steps": (1, 10**9),
    "temperature": (0, 100),
    "threads": (0, 1024),
    "tokens_per_microbatch": (1, 10**9),
    "weight_decay": (0, 10),
}
OF_THE_RATIO = ("clip_low", "clip_high", "dual_clip", "loss")  # the ratio is 1 in the first optimiser step of a batch
ABOVE = ("lr", "grad_clip", "smoothing")  # these have to be above 0; so has the temperature, in training
INFINITE = ("initial_priority", "is_cap")  # these may be inf: before all others; no cap
TEXTS = ("instruction",)  # these may have several lines
ALONE = 10  # seconds after which a rank that torchrun has not ended is the only one with its mistake

# What train.py asks of a rule, by what the rule decides. replay.Uniform and replay.ReplayStore have most of it.
NEEDS = {
    "prompts": ("draw", "observe", "attach", "figures", "state_dict", "load_state_dict"),
    "places": ("complete", "watch", "attach", "learn", "figures", "state_dict", "load_state_dict"),
    "extra": ("complete", "watch", "attach", "learn", "figures", "state_dict", "load_state_dict"),
}


def interrupted(kind: type, error: BaseException, trace) -> None:
    """What a program says that an exception ends: of Ctrl-C one word, wherever it falls, among the imports too."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = interrupted


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(kind: type, argv: list[str], description: str, default=None) -> tuple[object, list[str]]:
    """A `kind` (a dataclass whose trailing comments are its flags' help) from `argv`, and the names given by hand.

    default: an instance whose values hold where no flag is given. A mistake ends the program with exit code 2.
    """
    with exits(2, ValueError):
        check_flags(argv, kind)
    names = [field.name for field in dataclasses.fields(kind)]
    given = [name for name in names if is_given(argv, name)]
    titles = headings(kind)
    if not titles:
        return tyro.cli(kind, args=argv, description=description, default=default), given

    commented = set().union(*titles.values())
    if commented != set(names):
        bare = ", ".join(name for name in names if name not in commented)
        raise TypeError(f"{kind.__name__}: {bare} needs a comment behind it in its line, which is the flag's help")

    # A dataclass of dataclasses, one a heading: --help puts each into a box of its own.
    boxes = []
    for number, (title, helps) in enumerate(titles.items()):
        named = tyro.conf.arg(name=title)
        boxes.append((f"box{number}", Annotated[box(kind, helps, default or kind()), named]))
    whole = dataclasses.make_dataclass("Boxes", boxes)
    found = tyro.cli(whole, args=argv, description=description, config=[tyro.conf.OmitArgPrefixes])
    values = {}
    for part in vars(found).values():
        values |= vars(part)
    return kind(**values), given


def headings(kind: type) -> dict[str, dict[str, str]]:
    """The fields of `kind` and their comments under each heading among them, a comment such as `# ---- the run`."""
    found = {}
    for line in inspect.getsource(kind).splitlines():
        title = re.fullmatch(r" +# -+ (.+)", line)
        field = re.fullmatch(r" +(\w+): .+?  # (.+)", line)
        if title:
            found[title[1]] = {}
        elif field and found:
            found[list(found)[-1]][field[1]] = field[2]
    return found


def box(kind: type, helps: dict[str, str], default) -> type:
    """A dataclass of those fields of `kind` that have `helps`, with the values of `default`."""
    fields = []
    for field in dataclasses.fields(kind):
        if field.name in helps:
            about = tyro.conf.arg(help=helps[field.name])
            fields.append((field.name, Annotated[field.type, about], getattr(default, field.name)))
    return dataclasses.make_dataclass("Box", fields)


def is_given(argv: list[str], name: str) -> bool:
    words = (flag(name), flag(f"no_{name}"))
    return any(word.partition("=")[0].replace("_", "-") in words for word in argv)


def value_of(argv: list[str], name: str, default: str = "") -> str:
    """What `argv` says of one flag, before it is parsed: other defaults depend on it. The last one wins, as there."""
    found = default
    for i, word in enumerate(argv):
        key, equals, value = word.partition("=")
        if key.replace("_", "-") != flag(name):
            continue
        if equals:
            found = value
        elif i + 1 < len(argv):
            found = argv[i + 1]
    return found


def preset(kind: type, argv: list[str], embedded: dict, methods: dict):
    """The defaults of train.py that hold for this command line."""
    named = [value_of(argv, name) for name in ("model", "task", "then")]
    named.append(value_of(argv, "replay", "none"))
    settings = {}
    for layer in layers(*named, embedded, methods).values():
        settings |= layer
    return kind(**settings)


def layers(model: str, task: str, then, replay: str, embedded: dict, methods: dict) -> dict[str, dict]:
    """What replaces the defaults of train.py, by what sets it; the later wins: `embedded` where no model is named, a
    task's own score, and what the methods named by --replay set."""
    found = {"--model": {"data": "polaris"}} if model else {"embedded model": embedded}
    if task:
        found["--task"] = {"data": "", "reward": scorer_of(task, then)}
    return found | {f"--replay {replay}": set_by(replay, methods)}


def scorer_of(task: str, then=()) -> str:
    """The name of a task's own score, as --reward takes it. then: the tasks behind it."""
    if then:
        return EACH
    return "gym" if task.startswith(GYM) else f"{task}:score"


def origins(cfg, given: list[str], embedded: dict, methods: dict) -> dict[str, str]:
    """What has set each setting of `cfg` that is no default of train.py; those of `given` are given by hand."""
    found = {}
    for origin, settings in layers(cfg.model, cfg.task, cfg.then, cfg.replay, embedded, methods).items():
        found |= dict.fromkeys(settings, origin)
    return found | dict.fromkeys(given, "given")


def settings(argv: list[str], kind: type, methods: dict, embedded: dict, about: str) -> tuple[object, list[str]]:
    """What a command line of train.py sets, a `kind`, and the names of what it gives by hand. A mistake ends the
    program with exit code 2."""
    with exits(2, ValueError, OSError):
        argv = with_value(with_recipes(argv, kind), "replay", "prompt")  # --replay alone
        lines = [about, "--replay takes these, a file.py:Class of your own, or some of them joined by +", ""]
        lines += [f"    {name:14}{method.about}" for name, method in methods.items()]
        config, given = parse(kind, argv, "\n".join(lines), preset(kind, argv, embedded, methods))
        check_training(config)
        check_methods(config.replay, methods)
    return config, given


def with_recipes(argv: list[str], kind: type) -> list[str]:
    """`argv` with the flags of every @FILE in it, a recipe, before those given by hand, which so override them.
    ValueError or FileNotFoundError, in one line, for a recipe that cannot be read."""
    flags = []
    given = []
    for word in argv:
        if word.startswith("@"):
            flags += read_recipe(word[1:], kind)
        else:
            given.append(word)
    return flags + given


def read_recipe(path: str, kind: type) -> list[str]:
    """The words of a recipe: a flag of `kind` a line, with its values; # begins a comment. ValueError names the line
    that is something else."""
    if not os.path.isfile(path):
        ours = [file.stem for file in (ROOT / "lab" / "recipes").glob("*.txt")]
        near = meant(Path(path).stem, ours, "@lab/recipes/{}.txt")
        raise FileNotFoundError(f"there is no recipe {path}; ours are lab/recipes/*.txt{near}")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    words = []
    for number, line in enumerate(lines, 1):
        try:
            found = shlex.split(line, comments=True)
            check_flags(found, kind)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
        flags = [word for word in found if word.startswith("--")]
        if found and (len(flags) != 1 or not found[0].startswith("--")):
            raise ValueError(f"{path} line {number}: a line holds one flag and its values, got {line.strip()!r}")
        words += found
    return words


def check_flags(argv: list[str], kind: type) -> None:
    """ValueError, in one line, for a flag that `kind` does not have."""
    known = ["--help", "--help-verbose"]
    for field in dataclasses.fields(kind):
        known += [flag(field.name), flag(f"no_{field.name}")]
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and name not in known:
            raise ValueError(f"there is no flag {name}{meant(name, known)}")


def meant(name: str, known, shown: str = "{}") -> str:
    """The end of a message about a `name` that is none of `known`: the nearest of them, if one is near, as `shown`."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {shown.format(near[0])}?" if near else ""


def with_value(argv: list[str], name: str, value: str) -> list[str]:
    """`argv` with `value` behind a flag that stands there without one."""
    argv = list(argv)
    for i, word in enumerate(argv):
        if word == flag(name) and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
            argv.insert(i + 1, value)
            break
    return argv


def check(config) -> None:
    """ValueError, in one line, for a number out of its BOUNDS, and for a text of several lines: it would be repeated in
    messages, which are one line."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, int | float) and not isinstance(part, bool):
                check_number(field.name, part)
            elif isinstance(part, str) and field.name not in TEXTS and len(part.splitlines()) > 1:
                raise ValueError(f"{flag(field.name)} {part!r} has more than one line; rename what it names")


def check_number(name: str, number: float) -> None:
    low, high = BOUNDS.get(name, (-math.inf, math.inf))  # a knob that someone has added has none
    if number == math.inf and name in INFINITE:
        return
    if not math.isfinite(number):
        raise ValueError(f"{flag(name)} must be a finite number, got {number}")
    if number < low:
        raise ValueError(f"{flag(name)} must be at least {low}, got {number}")
    if number > high:
        raise ValueError(f"{flag(name)} must be at most {high}, got {number}")
    if name in ABOVE and number <= 0:
        raise ValueError(f"{flag(name)} must be above 0, got {number}")


def check_training(config) -> None:
    """ValueError, in one line, for settings of train.py that are out of bounds, or cannot be meant
    together."""
    check(config)
    if config.temperature <= 0:
        raise ValueError(f"--temperature must be above 0, got {config.temperature}")
    if config.dual_clip and config.dual_clip <= 1:
        raise ValueError(f"--dual-clip must be above 1 (or 0: none), got {config.dual_clip}")
    low, high = sorted(config.betas)
    if not 0 <= low <= high < 1:
        raise ValueError(f"--betas must be at least 0 and below 1, got {config.betas[0]} and {config.betas[1]}")
    if not 0 <= config.difficulty[0] <= config.difficulty[1] <= 1:
        raise ValueError(f"--difficulty needs two pass rates in [0, 1], the lower first, got {config.difficulty}")
    check_tasks(config)
    if config.model and config.sharing != "digits":
        raise ValueError("--sharing is a knob of the embedded task; leave out --model or --sharing")
    if config.gpus and not config.dry_run:
        raise ValueError("--gpus is for --dry-run: a run takes the GPUs that it finds")


def check_tasks(config) -> None:
    """ValueError, in one line, for --task and --then that are no tasks, or with which other flags cannot be meant."""
    if config.task and config.data:
        raise ValueError("--task has rows of its own; leave out --data or --task")
    if config.then and not config.task:
        raise ValueError("--then says what comes after --task; give --task too")
    for name, task in (("task", config.task), *(("then", task) for task in config.then)):
        if task and not task.endswith(".py") and not task.startswith(GYM):
            what = f"path/to/task.py, a file with rows() and score(responses, golds), or {GYM}NAME"
            raise ValueError(f"{flag(name)} {task}: give {what}")

    # A rule of the user's own may know stages; of ours one does.
    if config.then and "continual" not in config.replay.split("+") and ".py:" not in config.replay:
        raise ValueError(
            f"--replay {config.replay} does not train tasks one after another, as --then asks; give --replay "
            "continual, with --share 0 to bring nothing back"
        )
    in_gym = [task.startswith(GYM) for task in (config.task, *config.then)]
    if config.reward == "gym" and not all(in_gym):
        raise ValueError(f"--reward gym scores tasks of reasoning-gym; give --task {GYM}NAME")
    if config.partial_credit and (not any(in_gym) or config.reward not in ("gym", EACH)):
        raise ValueError(f"--partial-credit is of the scores of reasoning-gym; give --task {GYM}NAME and no --reward")


def load_class(name: str) -> type:
    """The class in `module:Class`, or in a user's `path/to/file.py:Class`. ValueError or FileNotFoundError, in one
    line, where there is none."""
    place, _, kind = name.rpartition(":")
    if place.endswith(".py"):
        module = load_file(place)
    else:
        module = importlib.import_module(place)
    found = getattr(module, kind, None)
    if not isinstance(found, type):
        raise ValueError(f"{name}: {place} has no class {kind!r}")
    return found


def is_own(kind: type) -> bool:
    """Whether it is a class of a user's file."""
    return kind.__module__.startswith("file ")  # as load_file names the modules that it makes


def load_file(path: str):
    """The module that a user's file is."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.path.abspath(path)}")
    name = f"file {os.path.abspath(path)}"  # no module of the project, or of anything else, may be called so
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code
        first = str(error).strip().split("\n")[0]
        line = line_in(path, error)
        where = f" at line {line}" if line else ""
        raise ValueError(f"{path} cannot be imported ({type(error).__name__}: {first}{where})") from error
    return module


def line_in(path: str, error: Exception) -> int | None:
    """The line of a user's file at which `error` came about, though it was raised in another file."""
    if isinstance(error, SyntaxError):
        return error.lineno
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if os.path.abspath(frame.filename) == os.path.abspath(path):
            lines.append(frame.lineno)
    return lines[-1] if lines else None


def check_methods(replay: str, methods: dict) -> list[str]:
    """The names in --replay. ValueError, in one line, for one that is no method's and no file.py:Class."""
    names = [] if replay == "none" else replay.split("+")
    for name in names:
        if name not in methods and ".py:" not in name:
            raise ValueError(
                f"--replay {name} is not known; choose from {', '.join(methods)}, give file.py:Class, or join some "
                f"with +{meant(name, methods)}"
            )
    return names


def choose_rules(replay: str, methods: dict) -> dict[str, type]:
    """The classes that --replay names, by what each of them decides. ValueError for two that decide the same, and for
    one that EXCLUDES what another decides."""
    chosen: dict[str, type] = {}
    for name in check_methods(replay, methods):
        rules = methods[name].rules.split("+") if name in methods else [name]
        for rule in map(load_class, rules):
            place = decides(rule)
            if place in chosen:
                both = f"{chosen[place].__name__} and {rule.__name__}"
                raise ValueError(f"--replay {replay}: {both} decide the same thing; choose one of them")
            chosen[place] = rule
    for rule in chosen.values():
        for place in chosen.keys() & set(getattr(rule, "EXCLUDES", ())):
            both = f"{rule.__name__} cannot join {chosen[place].__name__}"
            raise ValueError(f"--replay {replay}: {both}; leave out one of them")
    return chosen


def remark(cfg, given: list[str], methods: dict) -> None:
    """Prints what the methods named by --replay set besides their rules, and which flags of rules, `given` by hand, no
    chosen rule takes. ValueError as `choose_rules`."""
    if os.environ.get("RANK", "0") != "0":
        return
    rules_only = headings(type(cfg))["replay"]
    also = [name for name in set_by(cfg.replay, methods) if name not in given]
    if also:
        print(f"--replay {cfg.replay} also sets {', '.join(as_flag(name, getattr(cfg, name)) for name in also)}")
    same = [as_flag(name, getattr(cfg, name)) for name in also if name not in rules_only]
    if same:
        print(f"plain GRPO with the same objective is this command with --replay none {' '.join(same)}")

    # Those under the heading `replay` are of rules alone; what the loop reads always has an effect.
    taken = {"replay"}
    for rule in choose_rules(cfg.replay, methods).values():
        taken |= set(inspect.signature(rule).parameters) | set(getattr(rule, "FLAGS", ()))
    for name in rules_only:
        if name in given and name not in taken:
            print(f"warning: {flag(name)} has no effect, no rule of --replay {cfg.replay} takes it")
    idle = [flag(name) for name in OF_THE_RATIO if name in given]
    if idle and cfg.minibatches * cfg.epochs == 1 and cfg.proximal == "old":
        print(f"note: {', '.join(idle)} act from the second optimiser step of a batch on (--minibatches, --epochs)")


def set_by(replay: str, methods: dict) -> dict:
    """What the methods in --replay set besides their rules, in the order of `methods`, whatever theirs is."""
    chosen = replay.split("+")
    settings = {}
    for name, method in methods.items():
        if name in chosen:
            settings |= method.settings
    return settings


def as_flag(name: str, value) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def decides(rule: type) -> str:
    """What a rule decides: prompts, places or extra. A user's class that does not say so in DECIDES decides prompts if
    it has `draw`, else extra. ValueError if it lacks what such a rule needs."""
    usual = "prompts" if hasattr(rule, "draw") else "extra"
    place = getattr(rule, "DECIDES", usual)
    if place not in NEEDS:
        raise ValueError(f"{rule.__name__}.DECIDES must be one of {', '.join(NEEDS)}, not {place!r}")
    missing = [name for name in NEEDS[place] if not hasattr(rule, name)]
    if missing:
        raise ValueError(
            f"{rule.__name__} has no {', '.join(missing)}: derive it from replay.Uniform if it chooses prompts, or "
            "from replay.ReplayStore if it completes batches"
        )
    return place


def check_rules(config, methods: dict) -> None:
    """ValueError for what --replay cannot mean, before minutes of loading. The rules of `methods` are made once, on as
    many prompts as a step has. A class of a user's file is not: it may need to know how many prompts there are."""
    for place, kind in choose_rules(config.replay, methods).items():
        counts = [config.prompts_per_step] if place == "prompts" else []
        settings = arguments(kind, config, *counts)
        if not is_own(kind):
            kind(*counts, **settings)


def build(kind: type, config, *args):
    """A `kind`, whose keyword arguments are the settings in `config` that bear the same names. ValueError if it needs
    others."""
    from support.own_rule import guarded  # imports torch, which takes seconds, and flags are read before

    return guarded(kind)(*args, **arguments(kind, config, *args))


def arguments(kind: type, config, *args) -> dict:
    """The settings in `config` that are keyword arguments of `kind`. ValueError if it needs others."""
    signature = inspect.signature(kind)
    names = {field.name for field in dataclasses.fields(config)} & set(signature.parameters)
    settings = {name: getattr(config, name) for name in names}
    try:
        signature.bind(*args, **settings)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot be made ({error}): what is no flag needs a default") from error
    return settings


@contextlib.contextmanager
def exits(code: int, *kinds: type[Exception], all_ranks: bool = False):
    """A mistake ends in one line and exit code `code`, and so does Ctrl-C. What is wrong on every rank is
    said by the first one; with `all_ranks` each says it at once, as it may be wrong on one of them alone."""
    try:
        yield
    except kinds as error:
        message = "; ".join([f"error: {error}", *getattr(error, "__notes__", [])])
        waits = not all_ranks and os.environ.get("RANK", "0") != "0"  # the ranks may not have met yet
        if waits:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))  # torchrun's, once the first rank has left
        for_torchrun(message)
        if waits:
            time.sleep(ALONE)
        print(message, file=sys.stderr)
        raise SystemExit(code) from error
    except KeyboardInterrupt as error:
        print("; ".join(["stopped at once", *getattr(error, "__notes__", [])]), file=sys.stderr)
        raise SystemExit(128 + (error.args or [signal.SIGINT])[0]) from error


def for_torchrun(message: str) -> None:
    """Leaves the message where torchrun looks for it: its own report, forty lines long, then ends with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        found = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": found}))
