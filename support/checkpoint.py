"""Saving a run, and going on with it as if it had never stopped.

A checkpoint is a folder: model and optimiser as torch.distributed.checkpoint writes them, each rank its shard, to be
read by any number of ranks; and state.pt with all that the ranks share.
"""

import os
import pickle
import re
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from support import log, ranks

# with one process that is what is meant
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def newest(folder: Path) -> Path | None:
    """Only whole ones count: a checkpoint is written as *.partial and renamed."""
    whole = [p for p in folder.glob("checkpoints/step-*") if p.suffix != ".partial" and (p / "state.pt").exists()]
    return max(whole, default=None, key=lambda p: p.name)


def choose_folder(cfg, parent: Path) -> Path:
    """--out, or the first free out/MODEL-METHOD-sSEED; with --resume the newest of them that has a checkpoint."""
    if cfg.out:
        folder = Path(cfg.out)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file; give the folder of the run")
        if not cfg.resume and (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder} holds a run already; go on with it by --resume, or give another --out")
        return folder
    method = "grpo" if cfg.replay == "none" else cfg.replay
    method = re.sub(r"[^+]*/", "", method).replace(".py:", "-")  # path/to/file.py:Class: file-Class
    name = f"{Path(cfg.model or 'tiny').name}-{method}-s{cfg.seed}"
    folders = [parent / (name if i == 1 else f"{name}-{i}") for i in range(1, 1000)]
    if cfg.resume:
        return next((f for f in reversed(folders) if newest(f)), folders[0])
    return next(f for f in folders if not f.exists())


def claim(folder: Path, cfg) -> Path:
    """Makes the folder; the next free one, if another run has taken it since it was chosen."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=bool(cfg.out or cfg.resume))
            return folder
        except FileExistsError:
            folder = choose_folder(cfg, folder.parent)


def save(run) -> None:
    """Written aside and renamed, so that a torn one is never picked up; then the older ones go."""
    final = run.folder / "checkpoints" / f"step-{run.step:08d}"
    partial = final.with_suffix(".partial")
    if ranks.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    model, optimizer = get_state_dict(run.policy, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=partial, no_dist=ranks.world() == 1)
    if ranks.is_main():
        state = {"sampler": run.sampler.state_dict(), "gauge": run.gauge.state_dict()}
        state["torch_rng"] = torch.get_rng_state()
        state["stores"] = {name: store.state_dict() for name, store in run.stores.items()}
        state |= {"step": run.step, "rollouts": run.rollouts, "tokens": run.tokens}
        state |= {"config": asdict(run.cfg), "digest": run.digest}
        with open(partial / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in final.parent.iterdir():
            if old != final:
                shutil.rmtree(old)
    ranks.barrier()


def resume(run, free) -> None:
    """Brings `run` to where its newest checkpoint was. ValueError names every setting that matters and has changed."""
    path = newest(run.folder)
    if path is None:
        raise ValueError(f"nothing to resume in {run.folder}: it has no checkpoint; start the run without --resume")
    try:
        state = torch.load(path / "state.pt", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path / 'state.pt'} cannot be read ({error}); remove {path} and start anew") from error
    before, now = state["config"], asdict(run.cfg)
    changed = [k for k in now if k not in free and before.get(k) != now[k]]
    if changed:
        differences = "; ".join(f"--{k.replace('_', '-')} was {before.get(k)} and is {now[k]}" for k in changed)
        raise ValueError(f"{run.folder} was run with other settings: {differences}. Resume with the same")
    if state["digest"] != run.digest:
        raise ValueError(f"{run.folder} was run on other prompts; the data has changed since. Resume with the same")
    model, optimizer = get_state_dict(run.policy, run.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path, no_dist=ranks.world() == 1)
    set_state_dict(run.policy, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    try:
        run.sampler.load_state_dict(state["sampler"])
        run.gauge.load_state_dict(state["gauge"])
        for name, store in run.stores.items():
            store.load_state_dict(state["stores"][name])
    except KeyError as error:
        raise ValueError(f"{path} was written by another version ({error}); start the run anew") from error
    torch.set_rng_state(state["torch_rng"])
    run.step, run.rollouts, run.tokens = state["step"], state["rollouts"], state["tokens"]
    if ranks.is_main():
        for name in ("metrics.jsonl", "samples.jsonl"):
            log.forget_after(run.folder / name, run.step)
    ranks.barrier()


def export(run) -> None:
    """The trained model in Hugging Face format, float32."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(run.policy.model, options=options)
    if ranks.is_main():
        run.policy.model.save_pretrained(run.folder / "model", state_dict=state)
        run.tokenizer.save_pretrained(run.folder / "model")
    ranks.barrier()
