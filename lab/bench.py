"""Speed and memory, side by side with a peer in one run. Not a test: timings depend on the machine, ratios less so.

    python -m lab.bench                     all that this machine can run
    python -m lab.bench step replay         these sections only
    python -m lab.bench gpu [--tiny]        all that needs a GPU, in parts, with a table at the end (lab/bench_gpu.py)
    python -m lab.bench profile [flags of train.py]     a trace of a run's steps 3 and 4, to open in Perfetto

Sections (every figure is a median over repetitions, with the spread, and stands beside its peer's):
    step       a training step of the embedded model against TRL's GRPOTrainer (pip install trl==1.16.0)
    colocated  the same with vLLM in the trainer's process, on a GPU
    memory     one update at a vocabulary of 151,936 against full logits and against TRL's loss
    packing    answers of very different lengths, packed against padded
    update     the arithmetic of an update against a large matrix product, Qwen3-8B's shape on a GPU
    engines    the transformers engine against bare model.generate
    vllm       the vLLM engine against bare LLM.generate, and a sync against a copy
    replay     samplers at a million prompts, stores full of long answers

Each contender runs in a process of its own, in turn, so that peaks of memory and warm-up do not mix (the two of vllm
share one engine, as its speed differs from start to start). What needs a package or a GPU that is not here is named
and left out.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from tyro.conf import Positional

from lab import bench_gpu, contenders
from support.config import OUT, ROOT, exits, parse

REPETITIONS = 3


@dataclass
class Flags:
    sections: Positional[tuple[str, ...]] = ()  # sections to run, or gpu or profile; default: all sections
    contender: str = ""  # for this program itself: run one contender and print its figures


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def run_contender(name: str) -> dict:
    """Runs `contender_NAME` of contenders.py in a fresh process and returns the figures that it prints."""
    command = [sys.executable, "-m", "lab.bench", "--contender", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def side_by_side(section: str, names: tuple[str, ...], figures: tuple[str, ...]) -> None:
    """All contenders in turn, several times; ours first, and its ratio to each of the others."""
    results = {name: [] for name in names}
    for _ in range(REPETITIONS):
        for name in names:
            results[name].append(run_contender(f"{section}_{name}"))
    for figure in figures:
        print_ratios(figure, {name: [row[figure] for row in rows] for name, rows in results.items()})


def print_ratios(figure: str, results: dict[str, list[float]]) -> None:
    """One line for each peer: both medians, and the median ratio of those that ran in the same turn."""
    first = next(iter(results))
    ours = results[first]
    for name, theirs in results.items():
        if name == first:
            continue
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"  {figure:17} {first} {spread(ours):30} {name} {spread(theirs):30} ratio {ratio:.2f}", flush=True)


def is_missing(section: str, *packages: str, gpu: bool = False) -> bool:
    """Whether something is not here that `section` needs; says so."""
    lacks = [name for name in packages if not importlib.util.find_spec(name)]
    if gpu and not torch.cuda.is_available():
        lacks.append("a GPU")
    if lacks:
        print(f"{section}: left out, needs {' and '.join(lacks)}")
    return bool(lacks)


# ---------------------------------------------------------------- sections


def section_step() -> None:
    if not is_missing("step", "trl"):
        print("a step of 16 prompts x 8 answers x 15 tokens, embedded model, one thread")
        side_by_side("step", ("ours", "trl"), ("cpu_s", "wall_s", "peak_mb"))


def section_colocated() -> None:
    if not is_missing("colocated", "trl", "vllm", gpu=True):
        print("the same step on a GPU, vLLM in the trainer's process")
        side_by_side("colocated", ("ours", "trl"), ("wall_s",))


def section_memory() -> None:
    print("one update, vocabulary 151,936, hidden 256, 2 layers, 4 x 1024 tokens, against full logits")
    names = ("ours", "full")
    if not is_missing("TRL's loss", "trl"):
        names += ("trl",)
    side_by_side("memory", names, ("over_base_mb", "wall_s", "cpu_s"))


def section_packing() -> None:
    lengths = [contenders.length_of(answer) for answer in contenders.long_tailed_answers()]
    print(f"an update over answers of {statistics.mean(lengths) / max(lengths):.2f} of the longest on average")
    side_by_side("packing", ("ours", "padded"), ("cpu_s", "wall_s"))


def section_update() -> None:
    print(f"an update's arithmetic against a matrix product, {contenders.here()}")
    side_by_side("update", ("ours", "matmul"), ("tflops",))


def section_engines() -> None:
    print("the transformers engine, with log-probs, against bare model.generate without")
    side_by_side("engines", ("ours", "generate"), ("tokens_per_s",))


def section_vllm() -> None:
    if not is_missing("vllm", "vllm"):
        print(f"the vLLM engine against LLM.generate, a sync against a copy, {contenders.here()}")
        print_ratios("tokens_per_s", run_contender("vllm_both"))
        side_by_side("sync", ("ours", "copy"), ("sync_s",))


# ---------------------------------------------------------------- replay


# A step of Qwen3-8B takes 512 answers of 3,500 tokens, 8 operations a parameter and token. Eight GPUs that do 1e15 of
# them a second and never wait need this many seconds: no step is shorter.
LEAST_STEP_S = 512 * 3500 * 8.2e9 * 8 / 8e15
PROMPTS = 1_000_000
DRAWN = 32
ANSWERS = 16


def section_replay() -> None:
    print(f"milliseconds, and share of the {LEAST_STEP_S:.0f} s that a step of Qwen3-8B on eight GPUs takes at least")
    time_samplers()
    time_stores()


def time_samplers() -> None:
    """Draws and observations of samplers that have seen every prompt once."""
    import numpy as np

    from lab.rules import GRESO, Adaptive
    from replay import Prioritized, PromptReplay, Uniform

    rng = np.random.default_rng(0)
    for kind in (Uniform, PromptReplay, Prioritized, GRESO, Adaptive):
        sampler = kind(PROMPTS, seed=0)
        sampler.observe(np.arange(PROMPTS), rng.integers(0, ANSWERS + 1, PROMPTS), ANSWERS, 0)
        draws = []
        observations = []
        for step in range(1, 41):
            start = time.perf_counter()
            drawn = sampler.draw(DRAWN, step)
            middle = time.perf_counter()
            sampler.observe(drawn, rng.integers(0, ANSWERS + 1, DRAWN).tolist(), ANSWERS, step)
            draws.append(1e3 * (middle - start))
            observations.append(1e3 * (time.perf_counter() - middle))
        print_share(f"{kind.__name__} of {PROMPTS:,}", {"draw": draws, "observe": observations})


def time_stores() -> None:
    """`complete` of stores that are full, with answers of 3,500 tokens; half of the groups of a step are
    dead."""
    from replay import Group, GroupReplay, RolloutReplay

    tokens = torch.zeros(3500, dtype=torch.int32)
    logprobs = torch.zeros(3500)
    advantages = torch.tensor([0.5, -0.5] * (ANSWERS // 2))
    for store in (GroupReplay(prompts_per_step=DRAWN), RolloutReplay()):
        took = []
        for step in range(1, 161):
            useful = []
            for i in range(DRAWN // 2):
                group = Group(i, [tokens] * ANSWERS, [logprobs] * ANSWERS, [False] * ANSWERS, step)
                group.rewards = advantages + 0.5
                group.advantages = advantages
                useful.append(group)
            start = time.perf_counter()
            store.complete(useful, DRAWN, step)
            took.append(1e3 * (time.perf_counter() - start))
        print_share(f"{type(store).__name__} of {len(store.stored):,}", {"complete": took[120:]})


def print_share(what: str, took: dict[str, list[float]]) -> None:
    """took: milliseconds by name."""
    parts = [f"{name} {spread(values):32}" for name, values in took.items()]
    share = sum(statistics.median(values) for values in took.values()) / 1e3 / LEAST_STEP_S
    print(f"  {what:24} {''.join(parts)} {share:.3%} of a step")


# ---------------------------------------------------------------- profile


def profile(argv: list[str]) -> int:
    """Runs train.py with `argv` and writes where the time of its steps 3 and 4 went to out/trace.json."""
    from torch.profiler import profile as torch_profile
    from torch.profiler import schedule

    import train

    path = OUT / "trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = schedule(wait=1, warmup=1, active=2, repeat=1)  # the first has one-off costs, the second the profiler's own

    def save(trace) -> None:
        trace.export_chrome_trace(str(path))
        print(f"trace of steps 3 and 4: {path} (open it at ui.perfetto.dev or chrome://tracing)")

    with torch_profile(schedule=steps, record_shapes=True, on_trace_ready=save) as profiler:
        contenders.after_each_step(profiler.step)
        return train.main(argv)


# ---------------------------------------------------------------- the command


def sections() -> dict:
    """The sections of this file by name."""
    prefix = "section_"
    return {name.removeprefix(prefix): work for name, work in globals().items() if name.startswith(prefix)}


@exits(2, ValueError)
def main(argv: list[str]) -> int:
    if argv[:1] == ["profile"]:
        return profile(argv[1:])
    if argv[:1] == ["gpu"]:
        return bench_gpu.main(argv[1:])
    flags, _ = parse(Flags, argv, __doc__)
    if flags.contender:
        print(json.dumps(getattr(contenders, f"contender_{flags.contender}")()))
        return 0
    known = sections()
    unknown = sorted(set(flags.sections) - set(known))
    if unknown:
        choices = ", ".join([*known, "gpu", "profile"])
        raise ValueError(f"no section {', '.join(unknown)}; choose from {choices}")
    for name in flags.sections or known:
        known[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
