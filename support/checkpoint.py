"""Saving a run, and going on with it as if it had never stopped.

    checkpoints/step-00000020/
        .metadata, *.distcp     model and optimiser as torch.distributed.checkpoint writes them: each rank its shard,
                                to be read by any number of ranks
        state.pt                all that the ranks share: sampler, stores, gauge, counts, settings
        manifest.json           the SHA-256 of every other file

Two checkpoints are kept. One that is damaged is told from a whole one by its manifest, and the one before is taken.
A checkpoint may come from a stranger: nothing of it is unpickled but data.
"""

import fcntl
import hashlib
import inspect
import json
import os
import pickle
import re
import shutil
import socket
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from support import lives, log, ranks

KEPT = 2  # checkpoints
LOCK = "run.lock"  # held by the process that runs in this folder; and the sign that the folder is a run's
LOGS = {".log", ".txt", ".out", ".err"}  # what a shell or a scheduler may have put into a new run's folder

# with one process that is what is meant
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


# ---------------------------------------------------------------- the folder of a run


def choose_folder(cfg, parent: Path) -> Path:
    """--out, or the first free out/MODEL-METHOD-sSEED; with --resume the newest of them that has a checkpoint.

    ValueError for a folder that is no run's, that holds another run, or in which one is going on.
    """
    if cfg.out:
        folder = Path(cfg.out)
        check_folder(folder, cfg.resume)
        return folder
    model = Path(os.path.abspath(cfg.model or "tiny")).name  # of --model . as well
    method = "grpo" if cfg.replay == "none" else cfg.replay
    parts = [part.rpartition("/")[2] for part in method.split("+")]
    method = "+".join(parts).replace(".py:", "-")  # path/to/file.py:Class: file-Class
    name = f"{model}-{method}-s{cfg.seed}"
    folders = [parent / name] + [parent / f"{name}-{i}" for i in range(2, 1000)]
    if not cfg.resume:
        return next(folder for folder in folders if not folder.exists())
    # a run that was stopped before its first checkpoint counts where no other is there
    for has in (newest, is_run):
        for folder in reversed(folders):
            if has(folder):
                check_folder(folder, resume=True)
                return folder
    return folders[0]


def check_folder(folder: Path, resume: bool) -> None:
    """ValueError, in one line, if no run can begin, or with `resume` go on, in this folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give the folder of the run")
    taken = in_use(folder)
    if taken:
        raise ValueError(taken)
    if resume or not folder.exists():
        return
    if (folder / "metrics.jsonl").exists() or newest(folder):
        raise ValueError(f"{folder} holds a run already; go on with it by --resume, or give another --out")
    strange = []
    for path in folder.iterdir():
        if path.is_dir() or (path.suffix not in LOGS and path.name != ".DS_Store"):
            strange.append(path.name)
    if strange and not is_run(folder):
        raise ValueError(f"{folder} is no run's folder: it has {min(strange)} in it; give --out a new or an empty one")


def is_run(folder: Path) -> bool:
    return (folder / LOCK).exists() or (folder / "metrics.jsonl").exists()


def claim(folder: Path, cfg) -> Path:
    """Makes the folder and locks it; takes the next free one, if another run has taken it since it was chosen.

    For rank 0. Call `resume` first: it looks for a run that is there.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=bool(cfg.out or cfg.resume))
            break
        except FileExistsError:
            folder = choose_folder(cfg, folder.parent)
    lock(folder)
    if not cfg.resume:
        check_folder(folder, resume=False)  # a short run may have come and gone in between
    return folder


held: dict[Path, object] = {}  # the open lock files of this process


def lock(folder: Path) -> None:
    """Takes the folder for this process, for as long as it lives. ValueError if another one has it.

    A record lock: the system drops it when the process dies, however it dies, and children do not inherit it, so
    that none that outlives its parent keeps it. (Closing any other handle of the file would drop it, too.)
    """
    if folder.resolve() in held:
        return
    file = open(folder / LOCK, "a+")  # noqa: SIM115  it stays open; "a" keeps what another process wrote
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise ValueError(in_use(folder) or f"{folder} is in use by another run") from error
    except OSError as error:
        print(f"{folder} cannot be locked ({error}): see to it that no second run uses it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    held[folder.resolve()] = file


def in_use(folder: Path) -> str:
    """Says, in one line, that another process runs in this folder; empty if none does."""
    path = folder / LOCK
    if folder.resolve() in held or not path.exists():
        return ""
    try:
        with open(path) as file:
            # shared, so that ranks which look at the same moment do not see each other; dropped at once
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        who = path.read_text() or "another process"
        return f"{folder} is in use by {who}; wait for it or stop it, or give another --out"
    except OSError:  # it cannot be told; `lock` will say so
        return ""
    return ""


# ---------------------------------------------------------------- saving


def save(run) -> None:
    """Written aside and renamed, so that a torn one is never picked up; then all but the newest `KEPT` go.

    OSError, in one line, where it cannot be written.
    """
    final = run.folder / "checkpoints" / f"step-{run.step:08d}"
    partial = final.with_suffix(".partial")
    model, optimizer = get_state_dict(run.trained, run.optimizer)
    try:
        if ranks.is_main():
            remove(partial)
            partial.mkdir(parents=True)
        ranks.barrier()
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=partial, no_dist=ranks.WORLD == 1)
        if ranks.is_main():
            write_state(run, partial / "state.pt")
        ranks.barrier()
        write_manifest(partial)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise log.cannot_write(partial, run.folder, cause(error)) from error
    if ranks.is_main():
        if (final / "manifest.json").exists():
            remove(final)
        if os.path.lexists(final):
            set_aside(final)
        partial.rename(final)
        prune(final.parent)
    ranks.barrier()


def write_state(run, path: Path) -> None:
    """What is not sharded, as tensors and plain values."""
    state = {
        "sampler": run.sampler.state_dict(),
        "stores": {name: store.state_dict() for name, store in run.stores.items()},
        "gauge": run.gauge.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "step": run.step,
        "rollouts": run.rollouts,
        "tokens": run.tokens,
        "config": asdict(run.cfg),
        "digest": run.digest,
    }
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path) -> None:
    """The check sums of all files of a checkpoint; each rank reads its share of them."""
    names = ranks.from_main(sorted(path.name for path in folder.iterdir()))
    sums = ranks.gather([checksum(folder / name) for name in ranks.share(names)])
    if ranks.is_main():
        manifest = {"sha256": dict(zip(names, sums, strict=True))}
        log.write_aside(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prune(folder: Path) -> None:
    """Removes what saves have left behind: older checkpoints and torn ones. Nothing else is touched."""
    ours = [path for path in checkpoints(folder) if (path / "manifest.json").exists()]
    for path in ours[KEPT:]:
        remove(path)
    for path in folder.iterdir():
        if re.fullmatch(r"step-\d{8,}\.partial", path.name):
            remove(path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Gives what is in a checkpoint's place another name, and returns that."""
    aside = path.with_suffix(".damaged")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_suffix(f".damaged-{number}")
    return path.rename(aside)


# ---------------------------------------------------------------- going on


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder checkpoints/, newest first; copies and links that users make are
    none."""
    found = []
    for path in folder.glob("step-*"):
        if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir() and not path.is_symlink():
            found.append(path)
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run. It is written as *.partial and renamed, so that it is whole, unless
    damaged."""
    return next(iter(checkpoints(folder / "checkpoints")), None)


def resume(run, free: set[str]) -> None:
    """Brings `run` to where its newest whole checkpoint was. free: settings that may have changed since.

    Without any checkpoint, a run that was stopped before its first one starts anew. ValueError, in one line, where
    there is no run, where another process is in it, and for every setting that matters and has changed.
    """
    paths = ranks.from_main(checkpoints(run.folder / "checkpoints"))
    if not paths and not ranks.from_main(is_run(run.folder)):
        raise ValueError(f"nothing to resume in {run.folder}: it has no checkpoint; start the run without --resume")
    ranks.on_main(lambda: lock(run.folder))
    if not paths:
        ranks.on_main(lambda: check_unsaved(run.folder))

    # the newest one that is whole
    damaged = []
    path = None
    for candidate in paths:
        wrong = fault(candidate)
        if not wrong:
            path = candidate
            break
        damaged.append((candidate, wrong))
    if damaged and path is None:
        reasons = "; ".join(f"{candidate.name} {wrong}" for candidate, wrong in damaged)
        raise ValueError(f"what {run.folder} has saved cannot be read: {reasons}; start anew with another --out")

    if path is not None:
        load(run, path, free)

    # Only now that all is well is anything changed on disk.
    def tidy() -> None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            log.forget_after(run.folder / name, run.step)
        lives.forget_after(run.folder / lives.FILE, run.step)
        for candidate, wrong in damaged:
            aside = set_aside(candidate)
            print(f"{candidate} {wrong}: going on from {path.name}; it is kept as {aside.name}", file=sys.stderr)
        if path is None:
            print(f"{run.folder} was stopped before its first checkpoint: it starts anew", file=sys.stderr)

    ranks.on_main(tidy)


def check_unsaved(folder: Path) -> None:
    """ValueError if a run without a checkpoint has gone so far that it had one: begun anew, it would lose its rows."""
    try:
        every = int(json.loads((folder / "config.json").read_bytes())["save_every"])
        done = (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except (OSError, ValueError, TypeError, LookupError, RecursionError):  # stopped before these were there
        return
    if done > every:  # one that was killed inside its first save has done as many
        raise ValueError(f"{folder} has done {done} steps, and its checkpoints are gone; start anew with another --out")


def fault(folder: Path) -> str:
    """What is wrong with a checkpoint, in the same words on every rank; empty if nothing is."""
    sums = {}
    wrong = ""
    if ranks.is_main():
        try:
            sums = dict(json.loads((folder / "manifest.json").read_text())["sha256"])
        except FileNotFoundError:
            wrong = "has no manifest.json (it was written by an earlier version of this program, or is damaged)"
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            wrong = "is damaged (manifest.json)"
        if not wrong and not {".metadata", "state.pt"} <= set(sums):
            wrong = "is damaged (manifest.json)"
    sums, wrong = ranks.from_main((sums, wrong))
    if wrong:
        return wrong

    # each rank reads its share of the files
    mine = []
    for name in ranks.share(sorted(sums)):
        try:
            whole = checksum(folder / name) == sums[name]
        except (OSError, ValueError):  # missing, unreadable, or no file's name
            whole = False
        mine.append(whole)
    for name, whole in zip(sorted(sums), ranks.gather(mine), strict=True):
        if not whole:
            return f"is damaged ({name})"
    return ""


def load(run, path: Path, free: set[str]) -> None:
    """Fills `run` from a checkpoint. ValueError for other settings, other prompts, or contents that do not
    fit."""
    try:
        state = torch.load(path / "state.pt", weights_only=True)
        check_same(run, state["config"], state["digest"], free)
        check_metadata(path)
        model, optimizer = get_state_dict(run.trained, run.optimizer)
        target = {"model": model, "optimizer": optimizer}
        dcp.load(target, storage_reader=Reader(path), planner=Planner(), no_dist=ranks.WORLD == 1)
        set_state_dict(run.trained, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        run.sampler.load_state_dict(state["sampler"])
        run.gauge.load_state_dict(state["gauge"])
        for name, store in run.stores.items():
            store.load_state_dict(state["stores"][name])
        torch.set_rng_state(state["torch_rng"])
        run.step = state["step"]
        run.rollouts = state["rollouts"]
        run.tokens = state["tokens"]
    except torch.OutOfMemoryError:
        raise
    except KeyError as error:
        raise ValueError(
            f"{path} was written by an earlier version of this program ({reason(error)}); start anew with another --out"
        ) from error
    except (
        OSError,
        EOFError,
        RuntimeError,
        TypeError,
        AttributeError,
        LookupError,
        pickle.UnpicklingError,
        CheckpointException,
    ) as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}); start anew with another --out") from error


def check_same(run, before: dict, digest: str, free: set[str]) -> None:
    """ValueError names every setting outside `free` that has changed since the checkpoint was written, and those that
    were not there then."""
    changed = []
    unknown = []
    for name, value in asdict(run.cfg).items():
        flag = f"--{name.replace('_', '-')}"
        if name not in before and name not in free:
            unknown.append(flag)
        elif name not in free and before[name] != value:
            changed.append(f"{flag} was {before[name]} and is {value}")
    if unknown:
        raise ValueError(
            f"{run.folder} was begun by an earlier version of this program, which had no {' and no '.join(unknown)}; "
            "go on with that version, or start anew with another --out"
        )
    if changed:
        raise ValueError(f"{run.folder} was run with other settings: {'; '.join(changed)}. Resume with the same")
    if digest != run.digest:
        raise ValueError(f"{run.folder} was run on other prompts; the data has changed since. Resume with the same")


# ---------------------------------------------------------------- nothing but data


class DataOnly(pickle.Unpickler):
    """Unpickles what torch.distributed.checkpoint writes about a checkpoint, and refuses whatever else is named.

    torch reads it with a plain `pickle.load`, which runs any function that a pickle names.
    """

    ALLOWED = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
    }

    def find_class(self, module: str, name: str):
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        # records, of which a name without dots is one that is defined there
        if module == metadata.__name__:
            found = getattr(metadata, name, None)
            if inspect.isclass(found) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of this program does")


def check_metadata(path: Path) -> None:
    """UnpicklingError if a checkpoint's description of its shards names anything but records."""
    with open(path / ".metadata", "rb") as file:
        DataOnly(file).load()


class Reader(dcp.FileSystemReader):
    """Reads the description that `check_metadata` has seen; torch itself would then try another file, by
    rank."""

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        return super().read_metadata()


class Planner(DefaultLoadPlanner):
    """Reads what is no tensor (the optimiser's settings) only after torch's own restricted unpickler has."""

    def load_bytes(self, read_item, value) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def cause(error: Exception) -> BaseException:
    """What torch.distributed.checkpoint met on some rank; it puts tracebacks beside it."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def reason(error: Exception) -> str:
    """An error in one line."""
    error = cause(error)
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---------------------------------------------------------------- the model


def export(run) -> None:
    """The trained model in Hugging Face format, float32, in the run's folder model/. OSError, in one line, where it
    cannot be written."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(run.trained.model, options=options)
    if ranks.is_main():
        final = run.folder / "model"
        partial = run.folder / "model.partial"
        try:
            remove(partial)
            run.trained.model.save_pretrained(partial, state_dict=state)
            run.tokenizer.save_pretrained(partial)
            # file by file into what is there: a user may have put something beside them
            final.mkdir(exist_ok=True)
            for path in sorted(partial.iterdir()):
                path.replace(final / path.name)
            partial.rmdir()
        except (OSError, SafetensorError) as error:
            raise log.cannot_write(final, run.folder, error) from error
    ranks.barrier()
