"""Saving a run, and going on with it as if it had never stopped."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

import config
import log


def newest(folder: Path) -> Path | None:
    """Only whole ones count: a checkpoint is written as *.partial and renamed."""
    whole = [p for p in folder.glob("checkpoints/step-*") if p.suffix != ".partial" and (p / "state.pt").exists()]
    return max(whole, default=None, key=lambda p: p.name)


def save(run) -> None:
    """Written aside and renamed, so that a torn one is never picked up; then the older ones go."""
    state = {name: getattr(run, name).state_dict() for name in ("model", "optimizer", "sampler")}
    state["stores"] = {name: store.state_dict() for name, store in run.stores.items()}
    state |= {"step": run.step, "rollouts": run.rollouts, "tokens": run.tokens, "digest": run.digest}
    state |= {"config": asdict(run.cfg), "torch_rng": torch.get_rng_state()}
    final = run.folder / "checkpoints" / f"step-{run.step:08d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(partial / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in final.parent.iterdir():
        if old != final:
            shutil.rmtree(old)


def resume(run) -> None:
    """Brings `run` to where its newest checkpoint was. ValueError names every setting that matters and has changed."""
    path = newest(run.folder)
    if path is None:
        raise ValueError(f"nothing to resume in {run.folder}: it has no checkpoint; start the run without --resume")
    state = torch.load(path / "state.pt", weights_only=True)
    before, now = state["config"], asdict(run.cfg)
    changed = [f"--{k.replace('_', '-')} was {before.get(k)} and is {now[k]}" for k in now if before.get(k) != now[k]]
    changed = [text for text in changed if text.split()[0][2:].replace("-", "_") not in config.FREE]
    if changed:
        raise ValueError(f"{run.folder} was run with other settings: {'; '.join(changed)}. Resume with the same")
    if state["digest"] != run.digest:
        raise ValueError(
            f"{run.folder} was run on other prompts; the data has changed since. Resume with the same data"
        )
    for name in ("model", "optimizer", "sampler"):
        getattr(run, name).load_state_dict(state[name])
    for name, store in run.stores.items():
        store.load_state_dict(state["stores"][name])
    torch.set_rng_state(state["torch_rng"])  # dropout, where a model has it
    run.step, run.rollouts, run.tokens = state["step"], state["rollouts"], state["tokens"]
    for name in ("metrics.jsonl", "samples.jsonl"):
        log.forget_after(run.folder / name, run.step)
