"""Speed and memory, side by side with a peer in one run. Not a test: timings depend on the machine, ratios less so.

    python bench.py                     all that this machine can run
    python bench.py step replay         these sections only

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
share one engine, as its speed differs from start to start); what needs a package or a GPU that is not here is named
and left out.
"""

import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from lab import contenders
from support.config import ROOT

REPETITIONS = 3


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def per_step(marks: list[tuple[float, float]], skip: int = 4) -> dict[str, float]:
    """CPU and wall seconds a step from (wall, CPU) readings at the end of each; the first few are warm-up."""
    wall, cpu = ([b[i] - a[i] for a, b in zip(marks[skip:], marks[skip + 1 :], strict=False)] for i in (0, 1))
    return {"cpu_s": statistics.mean(cpu), "wall_s": statistics.median(wall), "peak_mb": peak_mb()}


def contender(name: str) -> dict:
    """Runs `contender_NAME` in a fresh process and returns the figures that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lab.bench", "--contender", name], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(section: str, names: tuple[str, ...], figures: tuple[str, ...]) -> None:
    """All contenders in turn, several times; ours first, and its ratio to each of the others."""
    results = {name: [] for name in names}
    for _ in range(REPETITIONS):
        for name, rows in results.items():
            rows.append(contender(f"{section}_{name}"))
    for figure in figures:
        table(figure, {name: [row[figure] for row in rows] for name, rows in results.items()})


def table(figure: str, results: dict[str, list[float]]) -> None:
    (first, ours), *peers = results.items()
    for name, peer in peers:
        ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, peer, strict=True))  # turn by turn
        print(f"  {figure:17} {first} {spread(ours):30} {name} {spread(peer):30} ratio {ratio:.2f}", flush=True)


def missing(section: str, *packages: str, gpu: bool = False) -> bool:
    """Whether something is not here that `section` needs; says so."""
    lacks = [name for name in packages if not importlib.util.find_spec(name)]
    lacks += ["a GPU"] if gpu and not torch.cuda.is_available() else []
    if lacks:
        print(f"{section}: left out, needs {' and '.join(lacks)}")
    return bool(lacks)


# ---------------------------------------------------------------- step


def contender_step_ours(*flags: str) -> dict[str, float]:
    import tempfile

    import train
    from support import log

    marks = []
    lap = log.line

    def note(row):  # called once at the end of each step
        marks.append((time.perf_counter(), time.process_time()))
        return lap(row)

    log.line = note
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--out", f"{folder}/run", "--steps", "30", "--eval-every", "0", "--save-every", "1000", *flags])
    return per_step(marks)


def contender_step_trl(**options) -> dict[str, float]:
    import tempfile

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import reward
    from support import logprobs
    from tasks import tiny

    torch.set_num_threads(1)
    model, tokenizer, _ = logprobs.load_model(str(tiny.make(tiny.home())))
    marks = []

    class Note(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append((time.perf_counter(), time.process_time()))

    def score(completions, answer, **_):
        return reward.grade_equation(completions, answer)

    pairs = tiny.problems("digits", tiny.HELD_OUT)[0]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, max_steps=30, per_device_train_batch_size=128, num_generations=8,
            max_completion_length=15, learning_rate=5e-4,
            lr_scheduler_type="constant", beta=0.0, bf16=False, gradient_checkpointing=False,
            report_to=[], save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
            **({"use_cpu": True} | options),
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=score, args=arguments, processing_class=tokenizer, callbacks=[Note()],
            train_dataset=Dataset.from_list([{"prompt": q, "answer": a} for q, a in pairs]),
        )  # fmt: skip
        trainer.train()
    return per_step(marks)


def contender_colocated_ours() -> dict[str, float]:
    return contender_step_ours("--engine", "vllm")


def contender_colocated_trl() -> dict[str, float]:
    return contender_step_trl(use_cpu=False, use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.45)


def section_colocated() -> None:
    if not missing("colocated", "trl", "vllm", gpu=True):
        print("the same step on a GPU, vLLM in the trainer's process")
        compare("colocated", ("ours", "trl"), ("wall_s",))


def section_step() -> None:
    if missing("step", "trl"):
        return
    print("a step of 16 prompts x 8 answers x 15 tokens, embedded model, one thread")
    compare("step", ("ours", "trl"), ("cpu_s", "wall_s", "peak_mb"))


# ---------------------------------------------------------------- what contenders.py has


def section_memory() -> None:
    print("one update, vocabulary 151,936, hidden 256, 2 layers, 4 x 1024 tokens, against full logits")
    compare(
        "memory",
        ("ours", "full") + (() if missing("TRL's loss", "trl") else ("trl",)),
        ("over_base_mb", "wall_s", "cpu_s"),
    )


def section_packing() -> None:
    lengths = [len(s) for s in contenders.long_tailed_answers()]
    print(f"an update over answers of {statistics.mean(lengths) / max(lengths):.2f} of the longest on average")
    compare("packing", ("ours", "padded"), ("cpu_s", "wall_s"))


def section_update() -> None:
    print(f"an update's arithmetic against a matrix product, {contenders.here()}")
    compare("update", ("ours", "matmul"), ("tflops",))


def section_engines() -> None:
    print("the transformers engine, with log-probs, against bare model.generate without")
    compare("engines", ("ours", "generate"), ("tokens_per_s",))


def section_vllm() -> None:
    if not missing("vllm", "vllm"):
        print(f"the vLLM engine against LLM.generate, a sync against a copy, {contenders.here()}")
        table("tokens_per_s", contender("vllm_both"))
        compare("sync", ("ours", "copy"), ("sync_s",))


# ---------------------------------------------------------------- replay


LEAST_STEP_S = 512 * 3500 * 8.2e9 * 8 / 8e15  # Qwen3-8B, 512 answers of 3,500 tokens, 8 operations a parameter and
# token, on eight GPUs that do 1e15 of them a second and never wait: no step is shorter


def section_replay() -> None:
    import numpy as np

    from lab.rules import Adaptive
    from replay import GRESO, Prioritized, PromptReplay, Uniform

    print(f"milliseconds, and share of the {LEAST_STEP_S:.0f} s that a step of Qwen3-8B on eight GPUs takes at least")
    size, rng = 1_000_000, np.random.default_rng(0)
    for kind in (Uniform, PromptReplay, Prioritized, GRESO, Adaptive):
        sampler, took = kind(size, seed=0), []
        sampler.observe(np.arange(size), rng.integers(0, 17, size), np.full(size, 16), 0)
        for step in range(1, 41):
            start = time.perf_counter()
            drawn = sampler.draw(32, step)
            middle = time.perf_counter()
            sampler.observe(drawn, rng.integers(0, 17, 32).tolist(), [16] * 32, step)
            took.append((1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)))
        report(f"{kind.__name__} of 1,000,000", *zip(*took, strict=True), names=("draw", "observe"))
    stores()


def stores() -> None:
    from buffer import Group, GroupReplay, RolloutReplay

    tokens, logprobs = torch.zeros(3500, dtype=torch.int32), torch.zeros(3500)
    advantages = torch.tensor([0.5, -0.5] * 8)
    for store in (GroupReplay(64), RolloutReplay()):
        took = []
        for step in range(1, 161):
            useful = [
                Group(i, [tokens] * 16, [logprobs] * 16, [False] * 16, step, advantages + 0.5, advantages)
                for i in range(16)
            ]
            start = time.perf_counter()
            store.complete(useful, 32, step)
            took.append(1e3 * (time.perf_counter() - start))
        report(f"{type(store).__name__} of {len(store.stored):,}", took[120:], names=("complete",))


def report(what: str, *took, names: tuple[str, ...]) -> None:
    parts = [f"{name} {spread(values):32}" for name, values in zip(names, took, strict=True)]
    share = sum(statistics.median(values) for values in took) / 1e3 / LEAST_STEP_S
    print(f"  {what:24} {''.join(parts)} {share:.3%} of a step")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--contender"]:
        name = f"contender_{argv[1]}"
        print(json.dumps(globals().get(name, getattr(contenders, name, None))()))
        return
    sections = [name.removeprefix("section_") for name in globals() if name.startswith("section_")]
    unknown = set(argv) - set(sections)
    if unknown:
        print(f"error: no section {', '.join(sorted(unknown))}; choose from {', '.join(sections)}", file=sys.stderr)
        sys.exit(2)
    for name in argv or sections:
        globals()[f"section_{name}"]()


if __name__ == "__main__":
    main(sys.argv[1:])
