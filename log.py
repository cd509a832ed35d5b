"""What a run writes down: figures of each step, lines on the console, metrics.jsonl and samples.jsonl."""

import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import ranks
from buffer import Group


def append(path: Path, rows: list[dict]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def forget_after(path: Path, step: int) -> None:
    """Forget what was written after the checkpoint at `step`, so that it is not there twice."""
    if path.exists():
        kept = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        path.write_text("".join(line + "\n" for line in kept))


def rollout_figures(groups: list[Group], replays: set[int]) -> dict:
    """What the answers generated in this step were like, prompts that came back apart from fresh ones."""
    rewards = torch.stack([group.rewards for group in groups])  # [P, G]
    dead = torch.tensor([group.dead for group in groups]).float()
    back = torch.tensor([group.prompt in replays for group in groups])
    size = rewards.shape[1]
    centred = (rewards - rewards.mean(1, keepdim=True)).abs().mean(1)  # [P], whatever --advantage is
    counts = (rewards.mean(1) * size).round().long()
    logprobs = torch.cat([lp for group in groups for lp in group.logprobs])
    figures = {
        "reward": rewards.mean().item(),
        "zero_variance": dead.mean().item(),
        "zero_variance_fresh": dead[~back].mean().item() if (~back).any() else 0.0,
        "all_right": (counts == size).float().mean().item(),
        "all_wrong": (counts == 0).float().mean().item(),
        "mean_abs_advantage": centred.mean().item(),
        "replayed": back.float().mean().item(),
        "truncated": sum(sum(group.truncated) for group in groups) / rewards.numel(),
        "entropy": -logprobs.mean().item(),  # of the policy on its own answers, dead groups included
        "pass_rates_fresh": torch.bincount(counts[~back], minlength=size + 1).tolist(),
        "pass_rates_replayed": torch.bincount(counts[back], minlength=size + 1).tolist(),
    }
    if back.any():
        figures["zero_variance_replayed"] = dead[back].mean().item()
        figures["reward_replayed"] = rewards[back].mean().item()
    return figures


def samples(run, groups: list[Group], texts: list[list[str]], step: int, count: int = 2) -> list[dict]:
    """A few of the step's answers as text."""
    rows = []
    for group, answers in list(zip(groups, texts, strict=True))[:count]:
        prompt = run.prompts[group.prompt]
        for i in range(min(count, len(answers))):
            row = {"step": step, "prompt": prompt.text, "response": answers[i], "answer": prompt.answer}
            rows.append(row | {"reward": group.rewards[i].item(), "truncated": group.truncated[i]})
    return rows


def peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


class Clock:
    """Seconds since the last lap."""

    def __init__(self):
        self.then = time.perf_counter()

    def lap(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self.then = now - self.then, now
        return seconds


def progress(run):
    """The steps that are left, with a bar on rank 0 where there is a terminal."""
    return tqdm(
        range(run.step + 1, run.cfg.steps + 1), initial=run.step, total=run.cfg.steps, unit="step",
        disable=None if ranks.is_main() else True,
    )  # fmt: skip


def write(run, row: dict, progress, groups: list[Group], texts: list[list[str]]) -> None:
    """One step to metrics.jsonl, to the console, and on evaluation steps some of its answers to samples.jsonl."""
    if not ranks.is_main():
        return
    append(run.folder / "metrics.jsonl", [row])
    if "eval_accuracy" in row:
        append(run.folder / "samples.jsonl", samples(run, ranks.share(groups), texts, row["step"]))
    progress.write(line(row))


def profiler(folder: Path, on: bool):
    """A context whose step() is called after each step; with `on` it writes steps 3 and 4 to trace.json, which opens in
    Perfetto or chrome://tracing."""
    import torch.profiler as tp

    if not on:
        return contextlib.nullcontext(SimpleNamespace(step=lambda: None))
    return tp.profile(
        schedule=tp.schedule(wait=1, warmup=1, active=2, repeat=1), record_shapes=True,
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / "trace.json")),
    )  # fmt: skip


def line(row: dict) -> str:
    return (
        f"step {row['step']:>5} | reward {row['reward']:.3f} | dead {row['zero_variance']:.2f} | "
        f"replayed {row['replayed']:.2f} | |A| {row['mean_abs_advantage']:.3f} | entropy {row['entropy']:.3f} | "
        f"grad {row['grad_norm']:6.3f} | {row['seconds_total']:6.2f} s"
        + (f" | held-out {row['eval_accuracy']:.3f}" if "eval_accuracy" in row else "")
    )


def summary(rows: list[dict]) -> str:
    """The run in a few lines: accuracy, cost, and where time went."""
    parts = {n: sum(row[f"seconds_{n}"] for row in rows) for n in ("rollout", "reward", "update", "sync", "total")}
    time_went = ", ".join(f"{n} {parts[n] / max(parts['total'], 1e-9):.0%}" for n in list(parts)[:-1])
    evaluated = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    start = rows[0].get("eval_accuracy_start")
    lines = [f"{rows[-1]['step']} steps, {rows[-1]['rollouts']:,} rollouts, {rows[-1]['tokens']:,} tokens sampled"]
    lines += [f"time in steps: {parts['total']:.0f} s ({time_went})"]
    if evaluated and start is not None:
        lines += [f"held-out accuracy: {start:.3f} at the start, {evaluated[-1]:.3f} at the end"]
    return "\n".join(lines)
