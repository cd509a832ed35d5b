"""Every knob of a training run: one flat dataclass. Its fields and their comments are the flags and their help.

A setting comes from, in rising order: the defaults here, which are the papers' at model scale; EMBEDDED, with the
embedded model (with another one, the data set polaris); METHODS, what a method does otherwise; the command line.
"""

import argparse
import dataclasses
import inspect
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

ROOT = Path(__file__).parent.parent  # of the project
OUT = ROOT / "out"  # where runs, and the embedded model, are kept

# name -> (the switches it sets, what it is, the settings that replace our defaults)
METHODS = {
    "prompt": (
        "prompts",
        "Prompt Replay (2603.21177): prompts of medium pass rate come back, with fresh answers",
        {"mask_truncated": True},
    ),
    "prioritized": ("prompts", "Prioritized Replay (2601.02648): prompts by p(1-p), with retests", {"clip_high": 0.2}),
    "adaptive": (
        "prompts fill",
        "our own rule: prompts of pass rates that lately beat the next of the epoch (adaptive.py), and as many recent "
        "groups for dead ones as are still nearly on-policy (buffer.py)",
        {"share": 0.5, "cooldown": 10, "min_ess": 0.99},
    ),
    "greso": ("prompts", "GRESO (2506.02177), a baseline: pass over prompts that were dead lately", {}),
    "dapo": (
        "fill",
        "DAPO (2503.14476), a baseline: generate again until the batch is full",
        {"clip_high": 0.28, "advantage": "std"},
    ),
    "group": (
        "fill",
        "POPO (2606.01281): recent useful groups stand in for dead ones",
        {"clip_high": 0.28, "dual_clip": 10.0, "advantage": "std"},
    ),
    "rollout": (
        "extra",
        "rollout-level replay (2606.04560): young stored answers of large advantage are added",
        {"clip_high": 0.28, "dual_clip": 10.0, "advantage": "std", "proximal": "birth"},
    ),
}

# with the embedded model these replace the defaults below, which are the papers': a demo of minutes
EMBEDDED = {
    "prompts_per_step": 16, "answers_per_prompt": 8, "max_prompt_tokens": 32, "max_tokens": 15, "lr": 5e-4,
    "steps": 600, "eval_every": 20, "eval_prompts": 400, "save_every": 50, "reward": "equation",
    "dtype": "float32", "gradient_checkpointing": False, "threads": 1,
}  # fmt: skip


@dataclass
class Config:
    # ---- what is trained, and on what
    model: str = ""  # Hugging Face id or folder; without it the embedded model is made and trained
    data: str = ""  # polaris (the default), dolci, dapo, gsm8k, math; OWNER/NAME of Hugging Face; or a file
    data_config: str | None = None  # configuration on the hub
    data_split: str | None = None  # split on the hub; train
    data_revision: str | None = None  # commit hash on the hub; that of SOURCES in data.py, or else the newest
    problem_column: str | None = None  # column of the problem; found by itself if it has a usual name
    answer_column: str | None = None  # column of the gold answer; found by itself if it has a usual name
    difficulty: tuple[float, float] = (0.0, 1.0)  # keep pass rates within, by the data's column `difficulty`
    sharing: Literal["digits", "columns", "none"] = "digits"  # embedded task: facts that prompts share (tiny.py)
    keep_overlap: bool = False  # do not look for problems of the six evaluation sets in data of the hub
    thinking: Literal["auto", "on", "off"] = "auto"  # enable_thinking of the chat template; auto: its own default
    max_prompts: int = 0  # train on the first so many prompts only; 0: all
    reward: str = "math"  # math, equation, random, always, format, or path/to/file.py:function
    # ---- the run
    out: str = ""  # folder of the run; default: a new one under out/
    seed: int = 0  # of prompt order, sampling and replay
    steps: int = 500  # steps to train for
    max_rollouts: int = 0  # end once so many answers have been generated; 0: after --steps
    resume: bool = False  # go on from the newest checkpoint in --out, as if never stopped
    save_every: int = 20  # steps between checkpoints
    eval_every: int = 20  # steps between evaluations on held-out prompts; 0: never
    eval_prompts: int = 200  # held-out prompts (at most a tenth of the data)
    eval_samples: int = 1  # answers to each of them
    attention: str = "auto"  # of the trainer; auto: flash_attention_2 where flash-attn is installed, else sdpa
    threads: int = 0  # CPU threads; 0: PyTorch's choice
    dry_run: bool = False  # print configuration, first prompt and memory plan, and end
    gpus: str = ""  # with --dry-run: GPUs to plan for, as 8x80 for 8 of 80 GB; else those that are found
    wandb: str = ""  # project of Weights & Biases to mirror metrics and samples in
    tensorboard: bool = False  # mirror metrics and samples in tensorboard/ of the run's folder
    profile: bool = False  # write trace.json of steps 3 and 4, to open in Perfetto
    # ---- replay
    replay: str = "none"  # prompt, prioritized, adaptive, greso; dapo, group; rollout; some with +; alone: prompt
    band: tuple[float, float] = (0.25, 0.75)  # prompt: pass rates that may come back, ends included
    share: float = 0.75  # prompt, adaptive: largest share of a batch that may be replayed
    cooldown: int = 10  # prompt, adaptive: least steps between two uses of a prompt
    max_reuse: int = 15  # prompt: most times a prompt comes back
    smoothing: float = 0.8  # prioritized: weight of the newest pass rate
    initial_priority: float = 0.2  # prioritized: p(1-p) ascribed to prompts never seen
    explore: float = 0.125  # prioritized: chance that a whole batch is drawn at random
    retest_every: int = 10  # prioritized: steps between retests of solved and unsolved prompts; 0: none
    retest_solved: float = 0.25  # prioritized: share of a retest batch that goes to solved prompts
    tie_bias: float = 1e-4  # prioritized: head start of pass rates of one half and more
    dead_target: float = 0.25  # greso: zero-variance share aimed at
    max_rounds: int = 10  # dapo: most generation rounds a step
    group_capacity: int = 0  # group: groups stored; 0: two steps' worth
    group_order: Literal["recent", "oldest", "kl"] = "recent"  # group: which come first; kl: the policy's least drift
    max_fill: float = 1.0  # group, adaptive: largest share of the dead groups' places that stored ones get
    min_ess: float = 0.0  # group, adaptive: effective sample size that replay must keep; 0: no matter
    replay_ratio: float = 0.5  # rollout: stored answers added, per fresh useful one
    priority_exponent: float = 0.5  # rollout: exponent of |advantage| when drawing
    max_age: int = 10  # rollout: most steps since birth
    replay_warmup: int = 20  # rollout: first steps, without replay
    rollout_capacity: int = 30_000  # rollout: answers stored
    # ---- rollouts
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # what generates; auto: vLLM on a GPU that has it
    prompts_per_step: int = 32  # P
    answers_per_prompt: int = 16  # G
    max_prompt_tokens: int = 1024  # longer prompts are left out and counted
    max_tokens: int = 7168  # of an answer
    temperature: float = 1.0  # of sampling; log-probs are taken at the same
    rollout_batch: int = 512  # answers decoded side by side
    gpu_memory: float = 0.45  # vLLM: its share of the GPU
    kv_cache_gb: float = 0.0  # vLLM: fixed size of the KV cache; 0: what its share leaves
    keep_resident: bool = False  # vLLM: keep weights and KV cache on the GPU while the trainer works
    tensor_parallel: int = 1  # vLLM: ranks that share one engine
    enforce_eager: bool = False  # vLLM: no CUDA graphs; quicker to start, slower to run
    # ---- objective
    advantage: Literal["centred", "std", "rloo"] = "centred"  # how rewards of a group become advantages
    loss: Literal["clip", "cispo"] = "clip"  # PPO's clipped objective, or CISPO's clipped weight
    ratio: Literal["token", "sequence"] = "token"  # level of the ratio; sequence is GSPO
    normaliser: Literal["token", "sequence", "constant"] = "token"  # DAPO's token mean, GRPO's, or Dr. GRPO's
    proximal: Literal["old", "birth"] = "old"  # clip around the step's first policy, or the one that sampled
    clip_low: float = 0.2  # ratio may fall by this
    clip_high: float = 0.272  # ratio may rise by this
    dual_clip: float = 0.0  # bound on the loss of wrong answers grown likely; 0: none
    is_cap: float = 2.0  # truncation of importance weights; inf: none; 0: no weights
    kl: float = 0.0  # coefficient of a k3 KL to the initial model
    mask_truncated: bool = False  # answers cut at the limit count in their group, but are not trained on
    # ---- optimiser
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # moments in float32, or in 8 bits (pip install torchao)
    lr: float = 1e-6  # constant
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's; 0.999 would average over more steps than most runs have
    weight_decay: float = 0.0  # AdamW's
    grad_clip: float = 1.0  # largest gradient norm
    minibatches: int = 1  # optimiser steps per pass over the batch
    epochs: int = 1  # passes over the batch
    tokens_per_microbatch: int = 16_384  # bounds the memory of the update
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of computation; weights are float32 always
    gradient_checkpointing: bool = True  # make activations anew in the backward pass: a tenth of their memory


# settings that may differ between a run and its resumption
FREE = {
    "attention", "out", "steps", "max_rollouts", "resume", "save_every", "eval_every", "rollout_batch", "gpu_memory",
    "kv_cache_gb", "keep_resident", "tensor_parallel", "enforce_eager", "profile", "dry_run", "gpus", "wandb",
    "tensorboard",
}  # fmt: skip


def fail(message: str) -> None:
    print(f"error: {message}; --help lists all flags", file=sys.stderr)
    raise SystemExit(2)


def comments_of(kind: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, which is its flag's help."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.M))


def parse(kind, argv, description: str = "", default=None) -> tuple:
    """The flags of a program, by tyro from the dataclass `kind`, whose trailing comments are the help. Returns the
    configuration and the names of the fields that were given by hand."""
    if not isinstance(kind, type):
        return parse_run(kind, argv)  # train.py, which does not say its dataclass yet
    import tyro

    cfg = tyro.cli(kind, args=argv, description=description, default=default, config=(tyro.conf.FlagCreatePairsOff,))
    words = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}
    return cfg, sorted(field.name for field in dataclasses.fields(kind) if field.name in words)


def parse_run(argv: list[str], description: str) -> tuple[Config, list[str]]:
    """Flags from the fields of Config and their comments. Returns the configuration and the fields given by hand."""
    comments = comments_of(Config)
    methods = "\n".join(f"  {name:12}{text}" for name, (_, text, _) in METHODS.items())
    parser = argparse.ArgumentParser(
        description=description, epilog=f"--replay takes\n{methods}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    for field in dataclasses.fields(Config):
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        usual = EMBEDDED.get(field.name)
        values = [str(field.default)] if field.default not in ("", None) else []
        values += [] if usual is None else [f"embedded model: {usual}"]
        text = f"{comments[field.name]} ({'; '.join(values)})" if values else comments[field.name]
        text = text.replace("%", "%%")
        if field.name == "replay":
            parser.add_argument(flag, nargs="?", const="prompt", metavar="NAME", help=text)
        elif kind is bool:
            either = field.default or any(field.name in settings for _, _, settings in METHODS.values())
            action = argparse.BooleanOptionalAction if either else "store_true"  # --no-... where it is usual
            parser.add_argument(flag, action=action, help=text)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), help=text)
        elif get_origin(kind) is tuple:
            parser.add_argument(flag, nargs=2, type=float, metavar=("FIRST", "SECOND"), help=text)
        else:
            first = (get_args(kind) or (kind,))[0]  # `str | None` reads a str
            parser.add_argument(flag, type=first, metavar=first.__name__.upper(), help=text)
    parser.error = fail  # argparse would print a page of usage first
    given = vars(parser.parse_args(argv))
    settings = {"data": "polaris"} if given.get("model") else dict(EMBEDDED)
    names = given.get("replay", "none").split("+")
    for name in METHODS:  # in their order, whatever the order they are named in
        settings |= METHODS[name][2] if name in names else {}
    cfg = Config(**settings | given)
    cfg.band, cfg.difficulty, cfg.betas = tuple(cfg.band), tuple(cfg.difficulty), tuple(cfg.betas)
    return cfg, sorted(given)


def validate(cfg: Config) -> dict[str, str]:
    """Raises ValueError, in one line, for settings that cannot be meant. Returns which method sets which switch."""
    switches: dict[str, str] = {}
    for name in [] if cfg.replay == "none" else cfg.replay.split("+"):
        if name not in METHODS:
            raise ValueError(f"--replay {name} is not known; choose from {', '.join(METHODS)} or join some with +")
        for switch in METHODS[name][0].split():
            if switch in switches:
                raise ValueError(f"--replay {switches[switch]} and {name} decide the same thing; choose one of them")
            switches[switch] = name
    for name, least in {
        "answers_per_prompt": 2, "prompts_per_step": 1, "steps": 1, "save_every": 1, "eval_every": 0, "max_tokens": 1,
        "minibatches": 1, "epochs": 1, "max_rollouts": 0, "max_prompts": 0, "max_rounds": 1,
        "tokens_per_microbatch": 1, "rollout_batch": 1,
        "max_prompt_tokens": 1, "eval_prompts": 0, "eval_samples": 1, "threads": 0, "group_capacity": 0,
        "tensor_parallel": 1, "seed": 0, "kv_cache_gb": 0,
    }.items():  # fmt: skip
        if getattr(cfg, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(cfg, name)}")
    for name, value in vars(cfg).items():
        infinite = name in ("initial_priority", "is_cap") and value == math.inf
        if isinstance(value, float) and not math.isfinite(value) and not infinite:
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number, got {value}")
    if cfg.threads > 1024:  # PyTorch dies of too many
        raise ValueError(f"--threads must be at most 1024, got {cfg.threads}; 0 leaves it to PyTorch")
    if not 0 < cfg.gpu_memory <= 1:
        raise ValueError(f"--gpu-memory is a share of the GPU, above 0 and at most 1, got {cfg.gpu_memory}")
    if cfg.kl < 0 or cfg.is_cap < 0 or (cfg.dual_clip and cfg.dual_clip <= 1):
        raise ValueError("--kl and --is-cap must be at least 0, and --dual-clip above 1 (or 0: none)")
    if cfg.temperature <= 0:
        raise ValueError(f"--temperature must be above 0 to train on samples, got {cfg.temperature}")
    if not cfg.lr > 0 or not cfg.grad_clip > 0:
        raise ValueError(f"--lr and --grad-clip must be above 0, got {cfg.lr} and {cfg.grad_clip}")
    if not 0 <= min(cfg.betas) <= max(cfg.betas) < 1:
        raise ValueError(f"--betas must be at least 0 and below 1, got {cfg.betas[0]} and {cfg.betas[1]}")
    if not 0 <= cfg.clip_low <= 1 or cfg.clip_high < 0:
        raise ValueError(f"--clip-low must be in [0, 1] and --clip-high >= 0, got {cfg.clip_low} and {cfg.clip_high}")
    if not 0 <= cfg.difficulty[0] <= cfg.difficulty[1] <= 1:
        raise ValueError(f"--difficulty needs two pass rates in [0, 1], the lower first, got {cfg.difficulty}")
    if cfg.model and cfg.sharing != "digits":
        raise ValueError("--sharing is a knob of the embedded task; leave out --model or --sharing")
    if cfg.gpus and not cfg.dry_run:
        raise ValueError("--gpus is for --dry-run: a run takes the GPUs that it finds")
    return switches
