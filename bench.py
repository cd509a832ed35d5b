"""Speed and memory, side by side with a peer in one run. Not a test: timings depend on the machine, ratios less so.

    python bench.py                     all that this machine can run
    python bench.py step replay         these sections only

Sections (every figure is a median over repetitions, with the spread, and stands beside its peer's):
    step      a training step of the embedded model against TRL's GRPOTrainer (pip install trl==1.16.0)
    replay    the samplers at a million prompts, per draw and observe
Each contender runs in a process of its own, in turn, so that peaks of memory and warm-up do not mix.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
REPETITIONS = 3


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def per_step(marks: list[tuple[float, float]], skip: int = 4) -> dict[str, float]:
    """CPU and wall seconds a step from (wall, CPU) readings at the end of each; the first few are warm-up."""
    wall, cpu = ([b[i] - a[i] for a, b in zip(marks[skip:], marks[skip + 1 :], strict=False)] for i in (0, 1))
    return {"cpu_s": statistics.mean(cpu), "wall_s": statistics.median(wall), "peak_mb": peak_mb()}


def contender(name: str) -> dict[str, float]:
    """Runs `contender_NAME` in a fresh process and returns the figures that it prints."""
    done = subprocess.run([sys.executable, __file__, "--contender", name], capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- step


def contender_step_ours() -> dict[str, float]:
    import tempfile

    import log
    import train

    marks = []
    lap = log.line

    def note(row):  # called once at the end of each step
        marks.append((time.perf_counter(), time.process_time()))
        return lap(row)

    log.line = note
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--out", f"{folder}/run", "--steps", "30", "--eval-every", "0", "--save-every", "1000"])
    return per_step(marks)


def contender_step_trl() -> dict[str, float]:
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import data
    import reward
    import rollout
    import tiny

    torch.set_num_threads(1)
    model, tokenizer, _ = rollout.load_model(str(tiny.make(HERE / "out" / "tiny-model")))
    marks = []

    class Note(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append((time.perf_counter(), time.process_time()))

    def score(completions, answer, **_):
        return reward.grade_equation(completions, answer)

    pairs = data.arithmetic(2400)[400:]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, max_steps=30, per_device_train_batch_size=128, num_generations=8,
            max_completion_length=15, learning_rate=5e-4, lr_scheduler_type="constant", beta=0.0, bf16=False, gradient_checkpointing=False,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=score, args=arguments, processing_class=tokenizer, callbacks=[Note()],
            train_dataset=Dataset.from_list([{"prompt": q, "answer": a} for q, a in pairs]),
        )  # fmt: skip
        trainer.train()
    return per_step(marks)


def section_step() -> None:
    print("a step of 16 prompts x 8 answers x 15 tokens, embedded model, one thread")
    results = {"ours": [], "trl": []}
    for _ in range(REPETITIONS):
        for name, rows in results.items():
            rows.append(contender(f"step_{name}"))
    for figure in ("cpu_s", "wall_s", "peak_mb"):
        ours, trl = ([row[figure] for row in results[name]] for name in ("ours", "trl"))
        ratio = statistics.median(ours) / statistics.median(trl)
        print(f"  {figure:8} ours {spread(ours):32} TRL {spread(trl):32} ratio {ratio:.2f}")


# ---------------------------------------------------------------- replay


def section_replay() -> None:
    import numpy as np

    from replay import GRESO, Prioritized, PromptReplay, Uniform

    print("a draw and an observe of 32 among 1,000,000 prompts, all of them seen, milliseconds")
    size, rng = 1_000_000, np.random.default_rng(0)
    for kind in (Uniform, PromptReplay, Prioritized, GRESO):
        sampler = kind(size, seed=0)
        sampler.observe(np.arange(size), rng.integers(0, 17, size), np.full(size, 16), 0)
        draws, observes = [], []
        for step in range(1, 41):
            start = time.perf_counter()
            drawn = sampler.draw(32, step)
            middle = time.perf_counter()
            sampler.observe(drawn, rng.integers(0, 17, 32).tolist(), [16] * 32, step)
            draws.append(1e3 * (middle - start))
            observes.append(1e3 * (time.perf_counter() - middle))
        print(f"  {kind.__name__:13} draw {spread(draws):32} observe {spread(observes)}")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--contender"]:
        print(json.dumps(globals()[f"contender_{argv[1]}"]()))
        return
    sections = [name.removeprefix("section_") for name in globals() if name.startswith("section_")]
    unknown = set(argv) - set(sections)
    if unknown:
        sys.exit(f"error: no section {', '.join(sorted(unknown))}; choose from {', '.join(sections)}")
    for name in argv or sections:
        globals()[f"section_{name}"]()


if __name__ == "__main__":
    main(sys.argv[1:])
