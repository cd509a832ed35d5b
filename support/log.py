"""What a run writes down: figures of each step, lines on the console, metrics.jsonl, samples.jsonl and their
mirrors.

A group here is any record with the attributes of replay.Group.
"""

import json
import math
import os
import resource
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support import lives, ranks
from support.rows import read_rows, stage_keys
from support.state import Saved

# ---------------------------------------------------------------- files


def write_aside(path: Path, text: str) -> None:
    """Writes a whole file under another name and renames it: a kill or a full disk leaves the old file as
    it was. OSError, in one line, where it cannot be written."""
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}); make room if the disk is full") from error


def cannot_write(path: Path, folder: Path, error: Exception) -> OSError:
    """What a run says, in one line, where it cannot write a file: what was saved last, and how to go on. folder: the
    run's."""
    saved = [one.name for one in folder.glob("checkpoints/step-????????")]
    last = f"the last checkpoint is {max(saved)}" if saved else "there is no checkpoint yet"
    why = " ".join(str(error).split())[:300] or type(error).__name__
    how = f"make room if the disk is full, and go on with --resume --out {folder}"
    return OSError(f"{path} cannot be written ({why}); {last}: {how}")


def write_settings(path: Path, settings: dict) -> None:
    write_aside(path, json.dumps(settings | {"commit": commit()}, indent=2) + "\n")


def append(path: Path, new: list[dict]) -> None:
    """OSError, in one line, where that cannot be done; what is torn then is cut off by `--resume`."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            for row in new:
                file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise cannot_write(path, path.parent, error) from error


def forget_after(path: Path, step: int) -> None:
    """Drops the rows that were written after the checkpoint at `step`, so that they are not there twice, and half a
    last line. ValueError, in one line, for any other that is no row."""
    if not path.exists():
        return
    kept = []
    for line, row in read_rows(path, {"step": int}):
        if row["step"] <= step:
            kept.append(line.decode().rstrip("\r\n") + "\n")
    text = "".join(kept)
    if text.encode() != path.read_bytes():
        write_aside(path, text)


def commit() -> str:
    """The commit of this code; empty outside of a git checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return ""
    return done.stdout.strip()


# ---------------------------------------------------------------- figures


def rollout_figures(groups: list, replays: set[int]) -> dict:
    """What the answers generated in this step were like; `replays` are the prompts that the sampler brought back.

    Shares are of groups, `truncated` of answers. pass_rates_*: [G + 1] numbers of groups with 0 .. G right answers.
    entropy: nats per token, estimated by -log mu of the sampled tokens at their temperature, dead groups included.
    """
    rewards = torch.stack([group.rewards for group in groups])  # [P, G]
    dead = (rewards == rewards[:, :1]).all(1)
    back = torch.tensor([group.prompt in replays for group in groups])
    logprobs = torch.cat([answer for group in groups for answer in group.logprobs])
    size = rewards.shape[1]
    # of rewards less their mean, whatever --advantage divides them by
    distance = (rewards - rewards.mean(1, keepdim=True)).abs().mean(1)
    right = torch.tensor([group.num_correct for group in groups]).round().long()
    figures = {
        "reward": rewards.mean().item(),
        "zero_variance": dead.float().mean().item(),
        "zero_variance_fresh": 0.0,
        "all_right": (dead & (right == size)).float().mean().item(),
        "all_wrong": (dead & (right == 0)).float().mean().item(),
        "mean_abs_advantage": distance.mean().item(),
        "replayed": back.float().mean().item(),
        "truncated": sum(sum(group.truncated) for group in groups) / rewards.numel(),
        "entropy": -logprobs.mean().item(),
        "pass_rates_fresh": torch.bincount(right[~back], minlength=size + 1).tolist(),
        "pass_rates_replayed": torch.bincount(right[back], minlength=size + 1).tolist(),
    }
    if (~back).any():
        figures["zero_variance_fresh"] = dead[~back].float().mean().item()
    if back.any():
        figures["zero_variance_replayed"] = dead[back].float().mean().item()
        figures["reward_replayed"] = rewards[back].mean().item()
    return figures


def accuracies(held_out: list, mine: list, values: list[list[float]], when: str = "") -> dict[str, float]:
    """Shares of right answers over all ranks: to all held-out prompts, and to those of each stage where their rows
    have several. values: the rewards of the answers to each of `mine`, this rank's prompts. when: the end of the
    names."""
    parts = {"eval_accuracy": None}
    stages = {stage_of(prompt) for prompt in held_out}
    if len(stages) > 1 and None not in stages:
        parts |= {f"eval_accuracy_stage_{stage}": stage for stage in sorted(stages)}

    counts = []
    for stage in parts.values():
        found = [part for part, prompt in zip(values, mine, strict=True) if stage in (None, stage_of(prompt))]
        counts += [sum(value >= 1 for part in found for value in part), sum(map(len, found))]
    totals = iter(ranks.total(counts))
    return {name + when: right / max(count, 1) for name, right, count in zip(parts, totals, totals, strict=True)}


def stage_of(prompt) -> int | None:
    """The number in a prompt's column `stage`; None where it has none."""
    stage = (prompt.row or {}).get("stage")
    return stage if type(stage) is int else None


def reuse(kind: str, drawn: list, step: int) -> dict:
    """How old, and how often used, the groups or answers are that a store brought back; histograms from 0
    up."""
    ages = [step - group.birth for group in drawn]
    uses = [group.uses for group in drawn]
    return {
        f"{kind}_ages": np.bincount(ages, minlength=1).tolist(),
        f"{kind}_uses": np.bincount(uses, minlength=1).tolist(),
    }


def pool_figures(sampler) -> dict:
    """Of replay.Prioritized: where prompts are, how many left the pools, and their pass rates and priorities."""
    seen = sampler.visits > 0
    counts = np.bincount(sampler.place, minlength=3)
    rate = sampler.rate[seen] if seen.any() else np.zeros(1)
    priority = sampler.priority[seen] if seen.any() else np.zeros(1)
    return {
        "heap": int(counts[sampler.HEAP]),
        "solved_pool": int(counts[sampler.SOLVED]),
        "unsolved_pool": int(counts[sampler.UNSOLVED]),
        "flips_solved": int(sampler.flips[0]),
        "flips_unsolved": int(sampler.flips[1]),
        "rate_mean": float(rate.mean()),
        "rate_spread": float(rate.std()),
        "priority_mean": float(priority.mean()),
        "prompt_uses": np.bincount(sampler.visits[seen] - 1, minlength=1).tolist(),
    }


class Gauge(Saved):
    """How far a visit moves a prompt: the change of its pass rate from one visit to the next.

    Visits by replay and by the epochs are kept apart. Replay pays where the change is small (lab/LOG.md), so that a
    run can tell whether it does. Prompts are brought back for their measured rate, which luck is part of: some of
    their change is luck going away. With a `file` every visit is appended to it, as support/lives.py reads them.
    """

    STATE = ("rate", "sums")

    def __init__(self, num_prompts: int):
        self.rate = np.full(num_prompts, np.nan)  # of the latest visit
        self.sums = np.zeros(6)  # number, sum and sum of squares of changes: by the epochs, by replay
        self.file: Path | None = None  # of visits, on rank 0 alone

    def observe(self, groups: list, replays: set[int]) -> dict:
        """Takes in the groups of a step. Returns, over all steps so far, the mean change with its standard
        error and the number of changes, for visits of which there were some."""
        if groups:
            # All rewards at once: to ask each group for its num_correct takes longer than all that follows.
            rewards = torch.stack([group.rewards for group in groups]).numpy()  # [P, G]
            prompts = [group.prompt for group in groups]
            rates = rewards.clip(0, 1).mean(1)
            rates[(rewards == rewards[:, :1]).all(1) & (rewards[:, 0] < 1)] = 0  # as Group.num_correct has it
            for prompt, rate in zip(prompts, rates.tolist(), strict=True):
                change = rate - self.rate[prompt]
                if not math.isnan(change):
                    first = 3 if prompt in replays else 0
                    self.sums[first : first + 3] += (1, change, change**2)
                self.rate[prompt] = rate

            # One record a visit, as support/lives.py reads it.
            if self.file:
                visits = np.empty(len(groups), lives.VISIT)
                visits["step"] = groups[0].birth
                visits["prompt"] = prompts
                visits["right"] = (rewards >= 1).sum(1)
                visits["answers"] = rewards.shape[1]
                visits["replayed"] = [prompt in replays for prompt in prompts]
                try:
                    with open(self.file, "ab") as file:
                        file.write(visits.tobytes())
                except OSError as error:
                    raise cannot_write(self.file, self.file.parent, error) from error
        figures = {}
        for first, name in ((0, "epochs"), (3, "replay")):
            n, total, squares = self.sums[first : first + 3]
            if n > 1:
                mean = total / n
                variance = max(squares / n - mean**2, 0)
                figures[f"gain_{name}"] = mean
                figures[f"gain_{name}_se"] = (variance / (n - 1)) ** 0.5
                figures[f"gain_{name}_n"] = int(n)
        return figures


def peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---------------------------------------------------------------- one step


def steps_left(run):
    """The steps that are left, with a bar on rank 0 where there is a terminal."""
    steps = range(run.step + 1, run.cfg.steps + 1)
    disable = None if ranks.is_main() else True  # None: no bar where there is no terminal
    return tqdm(steps, initial=run.step, total=run.cfg.steps, unit="step", disable=disable)


def samples(run, groups: list, step: int, count: int = 2) -> list[dict]:
    """A few of the step's answers as text."""
    rows = []
    for group in groups[:count]:
        prompt = run.prompts[group.prompt]
        for i, tokens in enumerate(group.tokens[:count]):
            response = run.tokenizer.decode(tokens, skip_special_tokens=True)
            rows.append(
                {
                    "step": step,
                    "prompt": prompt.text,
                    "response": response,
                    "answer": prompt.answer,
                    "reward": group.rewards[i].item(),
                    "truncated": group.truncated[i],
                }
            )
    return rows


def write(run, row: dict, bar, groups: list) -> None:
    """One step to metrics.jsonl, to the console, and on evaluation steps some answers of `groups` to
    samples.jsonl."""
    if ranks.RANK > 0:
        return
    append(run.folder / "metrics.jsonl", [row])
    examples = []
    if "eval_accuracy" in row:
        examples = samples(run, groups, row["step"])
        append(run.folder / "samples.jsonl", examples)
    if run.mirror.board:
        run.mirror.log(row)
        run.mirror.samples(examples)
    try:
        bar.write(line(row, EVALUATED.get(run.cfg.sharing, "held-out")))
    except BrokenPipeError:  # of `| head`, or of a pipe to a program that was killed
        ranks.lost_reader()


class Mirror:
    """Copies of metrics.jsonl and samples.jsonl in TensorBoard and, synchronised from there, in Weights & Biases.

    Without either it does nothing. ValueError, in one line, at once where a package is missing, and from `start`
    where wandb cannot begin a run.
    """

    def __init__(self, project: str = "", tensorboard: bool = False):
        self.project = project
        self.wandb = None  # the module
        self.run = None  # its run
        self.writer = None  # the class
        self.board = None  # its object
        if project:
            try:
                import wandb
            except ImportError as error:
                raise ValueError(missing("--wandb", "wandb", error)) from error
            self.wandb = wandb
        if project or tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                flag = "--tensorboard" if tensorboard else "--wandb"
                raise ValueError(missing(flag, "tensorboard", error)) from error
            self.writer = SummaryWriter

    def start(self, folder: Path, settings: dict, step: int) -> None:
        """Begins, or goes on after `step`; what an interrupted run wrote later is dropped, as far as they
        allow."""
        # wandb first: it watches the writers that are opened after it
        if self.wandb:
            id_file = folder / "wandb-id"  # the run in wandb that belongs to this folder
            if not step or not id_file.exists():
                write_aside(id_file, uuid.uuid4().hex[:12])
            try:
                self.run = self.wandb.init(
                    project=self.project,
                    name=folder.name,
                    id=id_file.read_text(),
                    resume="allow",
                    dir=str(folder),
                    config=settings,
                    sync_tensorboard=True,
                )
            except self.wandb.Error as error:
                what = " ".join(str(error).split())
                raise ValueError(f"--wandb cannot start ({what}): wandb login, or set WANDB_MODE=offline") from error
        if self.writer:
            self.board = self.writer(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, row: dict) -> None:
        """Numbers as curves, lists as histograms: they are counts of 0, 1, 2 ..."""
        if not self.board:
            return
        step = row["step"]
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self.board.add_scalar(name, value, step)
            elif isinstance(value, list) and sum(value) > 0:
                values = np.arange(len(value))
                counts = np.array(value)
                self.board.add_histogram_raw(
                    name,
                    min=0,
                    max=len(value) - 1,
                    num=sum(value),
                    sum=int((values * counts).sum()),
                    sum_squares=int((values**2 * counts).sum()),
                    bucket_limits=(values + 0.5).tolist(),
                    bucket_counts=value,
                    global_step=step,
                )
        self.board.flush()

    def samples(self, rows: list[dict]) -> None:
        """Rows of samples.jsonl as text."""
        if not self.board or not rows:
            return
        for i, row in enumerate(rows):
            text = "\n".join(f"{name}: {value}" for name, value in row.items())
            # four spaces before each line: Markdown then leaves LaTeX and tags alone
            indented = "    " + text.replace("\n", "\n    ")
            self.board.add_text(f"samples/{i}", indented, row["step"])
        # wandb takes curves and histograms over from TensorBoard, and no texts
        if self.run:
            table = self.wandb.Table(columns=list(rows[0]))
            for row in rows:
                table.add_data(*[v if isinstance(v, str | int | float) else json.dumps(v) for v in row.values()])
            self.run.log({"samples": table, "global_step": rows[0]["step"]})

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()


def missing(flag: str, package: str, error: ImportError) -> str:
    return f"{flag} needs a package: pip install {package}, or leave it out ({error})"


# ---------------------------------------------------------------- for reading


# What an accuracy is called: the embedded task that shares nothing has no held-out prompts.
EVALUATED = {"none": "on the training prompts"}


def evaluated_on(cfg) -> str:
    return EVALUATED.get(cfg.sharing, "held-out")


def line(row: dict, evaluated: str = "held-out") -> str:
    """A step on the console. evaluated: from `evaluated_on`."""
    parts = [
        f"step {row['step']:>5}",
        f"reward {row['reward']:.3f}",
        f"dead {row['zero_variance']:.2f}",
        f"replayed {row['replayed']:.2f}",
        f"|A| {row['mean_abs_advantage']:.3f}",
        f"entropy {row['entropy']:.3f}",
        f"cut {row['truncated']:.2f}",
        f"grad {row['grad_norm']:6.3f}",
        f"{row['seconds_total']:6.2f} s",
    ]
    if "eval_accuracy" in row:
        parts.append(f"{evaluated} {row['eval_accuracy']:.3f}")
        stages = [f"{row[name]:.3f}" for name in stage_keys(row)]
        if stages:
            parts[-1] += f" (stages {' '.join(stages)})"
    if row["truncated"] > 0.3:
        parts.append("many answers are cut off: raise --max-tokens, or --mask-truncated")
    if row.get("heap") == 0:
        parts.append("every prompt was last all right or all wrong")
    return " | ".join(parts)


def summary(rows: list[dict], evaluated: str = "held-out") -> str:
    """The run in a few lines: accuracy, cost, and where time went. evaluated: from `evaluated_on`."""
    last = rows[-1]
    lines = [f"{last['step']} steps, {last['rollouts']:,} rollouts, {last['tokens']:,} tokens sampled"]

    # where time went
    total = sum(row["seconds_total"] for row in rows)
    shares = []
    for name in ("rollout", "reward", "update", "sync"):
        seconds = sum(row[f"seconds_{name}"] for row in rows)
        shares.append(f"{name} {seconds / max(total, 1e-9):.0%}")
    lines.append(f"time in steps: {total:.0f} s ({', '.join(shares)})")

    # what came of it
    accuracies = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    start = rows[0].get("eval_accuracy_start")
    if accuracies and start is not None:
        name = "held-out accuracy" if evaluated == "held-out" else f"accuracy {evaluated}"
        lines.append(f"{name}: {start:.3f} at the start, {accuracies[-1]:.3f} at the end")

    # a run that could learn nothing looks like any other, but for a figure or two
    if not any(row.get("trained_groups", 1) for row in rows):
        what = "problems that the model solves now and then"
        if last["reward"] >= 1:
            what = "harder problems"
        lines.append(f"nothing was trained on: in every group all rewards were equal; give it {what}")

    # whether bringing prompts back pays here
    for name, visitor in (("replay", "replay"), ("epochs", "the next epoch")):
        if f"gain_{name}" in last:
            gain = last[f"gain_{name}"]
            error = last[f"gain_{name}_se"]
            visits = last[f"gain_{name}_n"]
            lines.append(
                f"pass rate from one visit to the next by {visitor}: {gain:+.3f} +- {error:.3f} ({visits:,} visits)"
            )
    if "gain_replay" in last:
        lines.append(advice(last["gain_replay"], last["gain_replay_se"]))

    # whether stored answers do; those that dynamic sampling carries over have no ages, and do not count
    sizes = []
    for row in rows:
        stored = sum(row.get("group_ages", [])) + sum(row.get("rollout_ages", []))
        if stored and "ess_replayed" in row:
            sizes.append(row["ess_replayed"])
    if sizes:
        size = sum(sizes) / len(sizes)
        lines.append(f"effective sample size of stored answers used again: {size:.3f} of 1: {advice_on_stored(size)}")
    return "\n".join(lines)


def advice(gain: float, error: float) -> str:
    """What the gauge means for replay in this run; the bounds come from lab/simulate.py and the embedded
    task."""
    near_a_bound = abs(gain - 0.1) < 2 * error or abs(gain - 0.25) < 2 * error
    if near_a_bound or error > 0.05 or gain < 2 * error:
        return "too few visits, or too little learnt by them, to say what that means for replay"
    if gain < 0.1:
        return "a visit moves a prompt little: bringing back prompts of medium pass rate usually saves rollouts here"
    if gain < 0.25:
        return "a visit moves a prompt somewhat: replay may save or cost rollouts; --replay adaptive decides as it goes"
    return "a visit moves a prompt far: fixed rules usually cost rollouts here, fresh prompts teach more"


def advice_on_stored(size: float) -> str:
    """The bounds are what whole groups did in seven cells of the embedded task (lab/LOG.md)."""
    if size >= 0.98:
        return "nearly on-policy, which usually saves rollouts"
    if size >= 0.9:
        return "it may save or cost rollouts"
    return "stale, which usually gains nothing or costs"
