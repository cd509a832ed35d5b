"""What a run writes down: figures of each step, lines on the console, metrics.jsonl and samples.jsonl."""

import contextlib
import json
import resource
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from buffer import Group
from replay import Saved
from support import ranks


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
    """What the answers generated in this step were like; `replays` are the prompts that the sampler brought back.

    Shares are of groups, `truncated` of answers; pass_rates_*: [G + 1] numbers of groups with 0 .. G right answers;
    entropy: nats per token, estimated by -log mu of the sampled tokens at their temperature.
    """
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
        "all_right": (rewards == 1).all(1).float().mean().item(),
        "all_wrong": (rewards == 0).all(1).float().mean().item(),
        "mean_abs_advantage": centred.mean().item(),
        "replayed": back.float().mean().item(),
        "truncated": sum(sum(group.truncated) for group in groups) / rewards.numel(),
        "entropy": -logprobs.mean().item(),  # dead groups included
        "pass_rates_fresh": torch.bincount(counts[~back], minlength=size + 1).tolist(),
        "pass_rates_replayed": torch.bincount(counts[back], minlength=size + 1).tolist(),
    }
    if back.any():
        figures["zero_variance_replayed"] = dead[back].mean().item()
        figures["reward_replayed"] = rewards[back].mean().item()
    return figures


class Gauge(Saved):
    """How far a visit moves a prompt: the change of its pass rate from one visit to the next, kept separately for
    visits by replay and by the epochs. Replay pays where it is small (LOG.md), so that a run can tell whether it does.

    Prompts are brought back for their measured rate, which luck is part of: some of their change is luck going away.
    """

    STATE = ("rate", "sums")

    def __init__(self, num_prompts: int):
        self.rate = np.full(num_prompts, np.nan)  # of the latest visit
        self.sums = np.zeros(6)  # number, sum and sum of squares of changes: by the epochs, by replay

    def observe(self, groups: list[Group], replays: set[int]) -> None:
        for group in groups:
            rate = float(group.rewards.mean())
            change = rate - self.rate[group.prompt]
            if not np.isnan(change):
                first = 3 * (group.prompt in replays)
                self.sums[first : first + 3] += (1, change, change**2)
            self.rate[group.prompt] = rate

    def figures(self) -> dict:
        """Mean change so far with its standard error, and the number of changes, for those of which there are some."""
        figures = {}
        for name, (n, total, squares) in zip(("epochs", "replay"), self.sums.reshape(2, 3), strict=True):
            if n > 1:
                error = (max(squares / n - (total / n) ** 2, 0) / (n - 1)) ** 0.5
                figures |= {f"gain_{name}": total / n, f"gain_{name}_se": error, f"gain_{name}_n": int(n)}
        return figures


def samples(run, own: list[tuple[Group, list[str]]], step: int, count: int = 2) -> list[dict]:
    """A few of the step's answers as text."""
    rows = []
    for group, answers in own[:count]:
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


def write(run, row: dict, progress, own: list[tuple[Group, list[str]]]) -> None:
    """One step to metrics.jsonl, to the console, and on evaluation steps some answers of `own`, this rank's groups with
    their texts, to samples.jsonl."""
    if not ranks.is_main():
        return
    append(run.folder / "metrics.jsonl", [row])
    run.mirror.log(row)
    if "eval_accuracy" in row:
        examples = samples(run, own, row["step"])
        append(run.folder / "samples.jsonl", examples)
        run.mirror.samples(examples)
    progress.write(line(row))


class Mirror:
    """Copies of metrics.jsonl and samples.jsonl in Weights & Biases and TensorBoard; without either it does nothing.

    ValueError, in one line, at once where a package is missing, and from `start` where wandb cannot begin a run.
    """

    def __init__(self, project: str = "", tensorboard: bool = False):
        self.project, self.run, self.board = project, None, None
        try:
            if project:
                import wandb

                self.wandb = wandb
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter
        except ImportError as error:
            name = "wandb" if project and not hasattr(self, "wandb") else "tensorboard"
            raise ValueError(f"--{name} needs a package: pip install {name}, or leave it out ({error})") from error

    def start(self, folder: Path, settings: dict, step: int) -> None:
        """Begins, or goes on after `step`; what an interrupted run wrote later is dropped, as far as they allow."""
        if hasattr(self, "wandb"):
            id_file = folder / "wandb-id"  # the run in wandb that belongs to this folder
            if not (step and id_file.exists()):
                id_file.write_text(uuid.uuid4().hex[:12])
            try:
                self.run = self.wandb.init(
                    project=self.project, name=folder.name, id=id_file.read_text(), resume="allow", dir=str(folder),
                    config=settings,
                )  # fmt: skip
            except self.wandb.Error as error:
                what = " ".join(str(error).split())
                raise ValueError(f"--wandb cannot start ({what}): wandb login, or set WANDB_MODE=offline") from error
        if hasattr(self, "writer"):
            self.board = self.writer(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, row: dict) -> None:
        """Numbers as curves, lists as histograms: they are counts of 0, 1, 2 ..."""
        step = row["step"]
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        counts = {name: value for name, value in row.items() if isinstance(value, list) and sum(value) > 0}
        if self.run:
            histogram = self.wandb.Histogram
            bars = {n: histogram(np_histogram=(c, [i - 0.5 for i in range(len(c) + 1)])) for n, c in counts.items()}
            self.run.log(numbers | bars, step=step)
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
            for name, c in counts.items():
                self.board.add_histogram_raw(
                    name, min=0, max=len(c) - 1, num=sum(c), sum=sum(i * n for i, n in enumerate(c)),
                    sum_squares=sum(i * i * n for i, n in enumerate(c)), bucket_limits=[i + 0.5 for i in range(len(c))],
                    bucket_counts=c, global_step=step,
                )  # fmt: skip
            self.board.flush()

    def samples(self, rows: list[dict]) -> None:
        """Rows of samples.jsonl as text."""
        if self.run and rows:
            cells = [[v if isinstance(v, str | int | float) else json.dumps(v) for v in row.values()] for row in rows]
            self.run.log({"samples": self.wandb.Table(columns=list(rows[0]), data=cells)}, step=rows[0]["step"])
        if self.board:
            for i, row in enumerate(rows):  # four spaces: Markdown leaves LaTeX and tags alone
                text = "\n".join(f"{name}: {value}" for name, value in row.items())
                self.board.add_text(f"samples/{i}", "    " + text.replace("\n", "\n    "), row["step"])

    def close(self) -> None:
        if self.run:
            self.run.finish()
        if self.board:
            self.board.close()


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
        f"cut {row['truncated']:.2f} | grad {row['grad_norm']:6.3f} | {row['seconds_total']:6.2f} s"
        + (f" | held-out {row['eval_accuracy']:.3f}" if "eval_accuracy" in row else "")
        + (" | many answers are cut off: raise --max-tokens, or --mask-truncated" if row["truncated"] > 0.3 else "")
        + (" | every prompt was last all right or all wrong" if row.get("heap") == 0 else "")
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
    for name, visitor in (("replay", "replay"), ("epochs", "the next epoch")):
        if f"gain_{name}" in rows[-1]:
            gain, error, n = (rows[-1][f"gain_{name}{part}"] for part in ("", "_se", "_n"))
            lines += [f"pass rate from one visit to the next by {visitor}: {gain:+.3f} +- {error:.3f} ({n:,} visits)"]
    if "gain_replay" in rows[-1]:
        lines += [advice(rows[-1]["gain_replay"], rows[-1]["gain_replay_se"])]
    used = [row for row in rows if sum(row.get("group_ages", [])) + sum(row.get("rollout_ages", []))]  # not DAPO's
    sizes = [row["ess_replayed"] for row in used if "ess_replayed" in row]
    if sizes:
        size = sum(sizes) / len(sizes)
        lines += [f"effective sample size of stored answers used again: {size:.3f} of 1: {advice_on_stored(size)}"]
    return "\n".join(lines)


def advice(gain: float, error: float) -> str:
    """What the gauge means for replay in this run; the bounds are from simulate.py and the embedded task (LOG.md)."""
    if any(abs(gain - bound) < 2 * error for bound in (0.1, 0.25)) or error > 0.05 or gain < 2 * error:
        return "too few visits, or too little learnt by them, to say what that means for replay"
    if gain < 0.1:
        return "a visit moves a prompt little: bringing back prompts of medium pass rate usually saves rollouts here"
    if gain < 0.25:
        return "a visit moves a prompt somewhat: replay may save or cost rollouts; --replay adaptive decides as it goes"
    return "a visit moves a prompt far: fixed rules usually cost rollouts here, fresh prompts teach more"


def advice_on_stored(size: float) -> str:
    """The bounds are what whole groups did in seven cells of the embedded task (LOG.md)."""
    if size >= 0.98:
        return "nearly on-policy, which usually saves rollouts"
    return "it may save or cost rollouts" if size >= 0.9 else "stale, which usually gains nothing or costs"
