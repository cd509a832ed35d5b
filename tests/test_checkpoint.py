"""Checkpoints: exact resume, damage, strangers' checkpoints, users' files, and two processes in one folder."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from support import checkpoint, log
from support.state import Saved, Store

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    lr: float = 0.1
    out: str = ""
    model: str = ""
    replay: str = "none"
    seed: int = 0
    resume: bool = False
    betas: tuple = (0.9, 0.99)


@dataclass
class Group:
    prompt: int
    tokens: list
    logprobs: list
    truncated: list
    birth: int
    rewards: torch.Tensor
    advantages: torch.Tensor
    uses: int = 0


class Sampler(Saved):
    STATE = ("rng", "seen", "position", "batch", "left")

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.seen = np.zeros(8, bool)
        self.position = 0
        self.batch = {}
        self.left = set()

    def draw(self) -> int:
        x = int(self.rng.integers(8))
        self.seen[x] = True
        self.position += 1
        self.batch[x] = bool(self.rng.random() < 0.5)
        self.left |= {x}
        return x


class Replay(Saved):
    STATE = ("stored",)

    def __init__(self):
        self.stored = Store(Group, 3)


def make_run(folder: Path, **settings) -> SimpleNamespace:
    torch.manual_seed(0)
    cfg = Config(out=str(folder), **settings)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    return SimpleNamespace(
        cfg=cfg,
        folder=folder,
        trained=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=cfg.lr),
        sampler=Sampler(),
        stores={"group": Replay()},
        gauge=log.Gauge(8),
        digest="abc",
        step=0,
        rollouts=0,
        tokens=0,
    )


def train(run, steps: int, save_every: int = 2) -> list[float]:
    """Some steps of anything, with all that a checkpoint keeps."""
    losses = []
    while run.step < steps:
        run.step += 1
        x = run.sampler.draw()
        answers = [torch.randint(9, (n,), dtype=torch.int32) for n in (2, 3)]
        rewards = torch.rand(2)
        group = Group(x, answers, [a / 10 for a in answers], [True, False], run.step, rewards, rewards - 0.5)
        run.stores["group"].stored.append(group)
        run.gauge.observe([group], set())
        stored = sum(float(one.rewards.sum()) for one in run.stores["group"].stored)
        loss = (run.trained(torch.randn(4, 8)) - stored).square().mean()
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.rollouts += 2
        run.tokens += 5
        losses.append(loss.item())
        log.append(run.folder / "metrics.jsonl", [{"step": run.step, "loss": loss.item()}])
        if run.step % save_every == 0:
            checkpoint.save(run)
    return losses


def begin(folder: Path, **settings) -> SimpleNamespace:
    run = make_run(folder, **settings)
    checkpoint.claim(folder, run.cfg)
    return run


def resumed(folder: Path, **settings) -> SimpleNamespace:
    run = make_run(folder, resume=True, **settings)
    checkpoint.resume(run, {"out", "resume"})
    return run


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.trained.parameters()]


def equal(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of six steps with checkpoints at 4 and 6; and what it went on to at step 9."""
    folder = tmp_path_factory.mktemp("original") / "run"
    run = begin(folder)
    train(run, 6)
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    losses = train(run, 9, save_every=100)
    return kept, losses, weights(run), rows(folder)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of it, at step 6."""
    return Path(shutil.copytree(original[0], tmp_path / "run"))


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


# ---------------------------------------------------------------- whole ones


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(original, folder):
    _, losses, after, whole = original
    run = resumed(folder)
    assert (run.step, run.rollouts, run.tokens) == (6, 12, 30)
    assert train(run, 9, save_every=100) == losses
    assert equal(weights(run), after) and rows(folder) == whole


def test_two_checkpoints_are_kept_and_each_file_has_its_check_sum(folder):
    assert names(folder) == {"step-00000004", "step-00000006"}
    for path in checkpoint.checkpoints(folder / "checkpoints"):
        sums = json.loads((path / "manifest.json").read_text())["sha256"]
        assert set(sums) == {p.name for p in path.iterdir()} - {"manifest.json"} >= {".metadata", "state.pt"}
    assert checkpoint.newest(folder).name == "step-00000006"
    train(resumed(folder), 8)
    assert names(folder) == {"step-00000006", "step-00000008"}


def test_saving_a_step_again_replaces_it(folder):
    run = resumed(folder)
    run.rollouts = 99
    checkpoint.save(run)
    assert names(folder) == {"step-00000004", "step-00000006"} and resumed(folder).rollouts == 99


def test_steps_are_ordered_by_number(folder):
    for name in ("step-100000000", "step-99999999"):
        shutil.copytree(folder / "checkpoints" / "step-00000004", folder / "checkpoints" / name)
    found = [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]
    assert found == ["step-100000000", "step-99999999", "step-00000006", "step-00000004"]


def test_other_settings_and_other_data_are_named_and_change_nothing(folder):
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"--lr was 0.1 and is 0.5; --betas was \(0.9, 0.99\) and is \(0.5, 0.9\)"):
        resumed(folder, lr=0.5, betas=(0.5, 0.9))
    run = make_run(folder)
    run.digest = "other"
    with pytest.raises(ValueError, match="other prompts"):
        checkpoint.resume(run, {"out", "resume"})
    run = make_run(folder, lr=0.5)
    checkpoint.resume(run, {"out", "resume", "lr"})
    assert run.step == 6 and (folder / "metrics.jsonl").read_bytes() == before


# ---------------------------------------------------------------- damage

FILES = (".metadata", "__0_0.distcp", "state.pt", "manifest.json")


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


def check_goes_on_from_the_one_before(original, folder, capsys) -> None:
    _, losses, after, whole = original
    run = resumed(folder)
    error = capsys.readouterr().err
    assert run.step == 4 and [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    assert "step-00000006" in error and "going on from step-00000004" in error and error.count("\n") == 1
    assert train(run, 9)[-3:] == losses and equal(weights(run), after) and rows(folder) == whole
    assert names(folder) == {"step-00000006", "step-00000006.damaged", "step-00000008"}


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_and_the_one_before_is_taken(original, folder, capsys, name, at):
    flip(folder / "checkpoints" / "step-00000006" / name, at)
    check_goes_on_from_the_one_before(original, folder, capsys)


@pytest.mark.parametrize("length", [0, 100, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_noticed(original, folder, capsys, name, length):
    path = folder / "checkpoints" / "step-00000006" / name
    cut = path.read_bytes()[:length]
    if name == "manifest.json" and length == -1:
        cut = cut[:-1]  # the last byte is a newline, which nobody misses
    path.write_bytes(cut)
    check_goes_on_from_the_one_before(original, folder, capsys)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(original, folder, capsys, name):
    (folder / "checkpoints" / "step-00000006" / name).unlink()
    check_goes_on_from_the_one_before(original, folder, capsys)


@pytest.mark.parametrize(
    "text", ["[]", "null", "7", '{"sha256": 7}', '{"sha256": {}}', '{"sha256": {"/etc/passwd": "x"}}']
)
def test_a_manifest_of_something_else_is_damage(original, folder, capsys, text):
    (folder / "checkpoints" / "step-00000006" / "manifest.json").write_text(text)
    check_goes_on_from_the_one_before(original, folder, capsys)


def test_where_both_are_damaged_both_are_named_and_nothing_is_lost(folder):
    flip(folder / "checkpoints" / "step-00000006" / "state.pt", 0.5)
    flip(folder / "checkpoints" / "step-00000004" / "__0_0.distcp", 0.5)
    with pytest.raises(ValueError, match="cannot be read") as error:
        resumed(folder)
    message = str(error.value)
    assert "step-00000006 is damaged (state.pt); step-00000004 is damaged (__0_0.distcp)" in message
    assert "another --out" in message and "\n" not in message
    assert names(folder) == {"step-00000004", "step-00000006"} and len(rows(folder)) == 6


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(folder):
    for path in checkpoint.checkpoints(folder / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="earlier version") as error:
        resumed(folder)
    assert "\n" not in str(error.value) and names(folder) == {"step-00000004", "step-00000006"}


def test_a_state_with_an_earlier_versions_keys_is_refused_in_one_line(folder, monkeypatch):
    monkeypatch.setattr(Sampler, "STATE", ("epochs", "rng"))
    with pytest.raises(ValueError, match="earlier version.*epochs") as error:
        resumed(folder)
    assert "\n" not in str(error.value)


def test_settings_that_an_earlier_version_did_not_have_are_named(folder):
    @dataclass
    class Later(Config):
        judge: str = "math"

    run = make_run(folder)
    run.cfg = Later(out=str(folder))
    with pytest.raises(ValueError, match="begun by an earlier version of this program, which had no --judge; go on"):
        checkpoint.resume(run, {"out", "resume"})


def test_a_model_of_another_shape_is_one_line(folder):
    run = make_run(folder)
    run.trained = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    run.optimizer = torch.optim.AdamW(run.trained.parameters())
    with pytest.raises(ValueError, match="cannot be read") as error:
        checkpoint.resume(run, {"out", "resume"})
    assert "\n" not in str(error.value)


def test_a_torn_checkpoint_is_not_looked_at_and_goes_with_the_next_save(folder):
    torn = folder / "checkpoints" / "step-00000099.partial"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half")
    run = resumed(folder)
    assert run.step == 6
    train(run, 8)
    assert names(folder) == {"step-00000006", "step-00000008"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["__0_0.distcp", "state.pt", "manifest.json"])
def test_a_full_disk_is_one_line_and_loses_no_checkpoint(folder, monkeypatch, name):
    run = resumed(folder)
    real = os.fsync

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").removesuffix(".partial").endswith(name):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot be written.*No space left.*--resume") as error:
        train(run, 8)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert resumed(folder).step == 6


# ---------------------------------------------------------------- strangers' checkpoints


class Evil:
    """A pickle of it makes a file when it is read."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


def sign(path: Path) -> None:
    """What a stranger would do, too: check sums protect from damage only."""
    sums = {p.name: checkpoint.checksum(p) for p in path.iterdir() if p.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps({"sha256": sums}))


def check_refused(folder: Path, proof: Path) -> None:
    sign(folder / "checkpoints" / "step-00000006")
    with pytest.raises(ValueError, match="cannot be read") as error:
        resumed(folder)
    assert not proof.exists() and "\n" not in str(error.value)


def test_the_metadata_of_a_checkpoint_runs_no_code(folder, tmp_path):
    path = folder / "checkpoints" / "step-00000006" / ".metadata"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "proof")))
    check_refused(folder, tmp_path / "proof")


def test_another_file_of_metadata_runs_no_code(folder, tmp_path):
    """torch looks for one by rank where it cannot read the usual one."""
    path = folder / "checkpoints" / "step-00000006"
    (path / ".metadata").write_bytes(pickle.dumps(torch.Size([1])))
    (path / "__0.metadata").write_bytes(pickle.dumps(Evil(tmp_path / "proof")))
    check_refused(folder, tmp_path / "proof")


def test_code_within_whole_metadata_does_not_run(folder, tmp_path):
    path = folder / "checkpoints" / "step-00000006" / ".metadata"
    described = pickle.loads(path.read_bytes())
    described.planner_data = Evil(tmp_path / "proof")
    path.write_bytes(pickle.dumps(described))
    check_refused(folder, tmp_path / "proof")


@pytest.mark.parametrize(
    "name",
    [
        "builtins:eval",
        "os:system",
        "torch:load",
        "torch:hub.load",
        "functools:partial",
        "torch.distributed.checkpoint.metadata:os",
        "torch.distributed.checkpoint.metadata:Sequence",
        "torch.distributed.checkpoint.metadata:Metadata.__init__",
        "torch.distributed.checkpoint.filesystem:os.system",
        "torch:float32.__class__",
    ],
)
def test_nothing_but_records_can_be_named(name):
    module, _, attribute = name.partition(":")
    asked = []
    for text in (module, attribute):
        asked.append(b"\x8c" + bytes([len(text)]) + text.encode())
    asked.append(b"\x93.")  # as a pickle of protocol 4 asks for a name
    with pytest.raises(pickle.UnpicklingError, match="it names"):
        checkpoint.DataOnly(io.BytesIO(b"\x80\x04" + b"".join(asked))).load()


def test_a_setting_of_the_optimizer_runs_no_code(folder, tmp_path, monkeypatch):
    """torch reads what is no tensor without `weights_only`."""
    path = folder / "checkpoints" / "step-00000006"
    run = resumed(folder)
    model, optimizer = checkpoint.get_state_dict(run.trained, run.optimizer)
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-00000004"), path, ignore=lambda *_: [".metadata", "__0_0.distcp"])
    optimizer["param_groups"][0]["lr"] = Evil(tmp_path / "proof")
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path, no_dist=True)
    check_refused(folder, tmp_path / "proof")
    # without the guard it does run: the test would notice
    monkeypatch.setattr(checkpoint, "Planner", checkpoint.DefaultLoadPlanner)
    with pytest.raises((ValueError, TypeError, CheckpointException)):
        train(resumed(folder), 7)
    assert (tmp_path / "proof").exists()


def test_evil_state_and_evil_shards_are_refused(folder, tmp_path):
    path = folder / "checkpoints" / "step-00000006" / "state.pt"
    torch.save({"config": Evil(tmp_path / "proof")}, path)
    check_refused(folder, tmp_path / "proof")


# ---------------------------------------------------------------- users' files


def test_a_save_touches_nothing_that_no_save_has_written(folder):
    kept = folder / "checkpoints"
    shutil.copytree(kept / "step-00000004", kept / "keep-best")
    shutil.copytree(kept / "step-00000004", kept / "step-00000004-best")
    (kept / "step-00000001").mkdir()
    (kept / "step-00000001" / "notes.txt").write_text("mine")
    (kept / ".DS_Store").write_text("")
    (kept / "step-00000002").symlink_to("keep-best")
    (kept / "step-00000003").symlink_to("nowhere")
    (kept / "step-00000099").symlink_to("keep-best")
    (kept / "step-00000008").write_text("a file in the way")
    users = names(folder) - {"step-00000004", "step-00000006", "step-00000008"}
    run = resumed(folder)
    assert run.step == 6
    train(run, 12)
    assert names(folder) == users | {"step-00000010", "step-00000012", "step-00000008.damaged"}
    assert (kept / "step-00000001" / "notes.txt").read_text() == "mine"
    assert (kept / "keep-best" / "state.pt").exists()


def test_an_export_leaves_what_lies_beside_it(tmp_path):
    class Model:
        def save_pretrained(self, path, state_dict):
            path.mkdir()
            (path / "model.safetensors").write_text("new")

    run = SimpleNamespace(folder=tmp_path, trained=SimpleNamespace(model=torch.nn.Linear(1, 1)))
    run.trained.model.save_pretrained = Model().save_pretrained
    run.tokenizer = SimpleNamespace(save_pretrained=lambda path: (path / "tokenizer.json").write_text("new"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "model" / "model.safetensors").write_text("old")
    checkpoint.export(run)
    found = {path.name: path.read_text() for path in (tmp_path / "model").iterdir()}
    assert found == {"notes.txt": "mine", "model.safetensors": "new", "tokenizer.json": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# ---------------------------------------------------------------- folders


def test_folders_that_are_no_runs_are_refused(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen3"}')
    (model / "model.safetensors").write_text("")
    for folder in (model, Path("/"), ROOT):
        cfg = Config(out=str(folder))
        with pytest.raises(ValueError, match="is no run's folder"):
            checkpoint.choose_folder(cfg, tmp_path)
        run = make_run(folder, resume=True)
        with pytest.raises(ValueError, match="nothing to resume"):
            checkpoint.resume(run, set())
    assert {path.name for path in model.iterdir()} == {"config.json", "model.safetensors"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        checkpoint.choose_folder(Config(out=str(tmp_path / "file")), tmp_path)


def test_new_empty_and_folders_with_only_a_log_are_taken(tmp_path):
    for name, inside in (("new", None), ("empty", ""), ("logs", "slurm-12.out"), ("console", "log.txt")):
        folder = tmp_path / name
        if inside is not None:
            folder.mkdir()
        if inside:
            (folder / inside).write_text("")
        cfg = Config(out=str(folder))
        assert checkpoint.choose_folder(cfg, tmp_path) == folder == checkpoint.claim(folder, cfg)


def test_a_run_is_not_overwritten(folder, tmp_path):
    with pytest.raises(ValueError, match="go on with it by --resume"):
        checkpoint.choose_folder(Config(out=str(folder)), tmp_path)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="go on with it by --resume"):
        checkpoint.choose_folder(Config(out=str(folder)), tmp_path)


def test_without_a_name_the_first_free_folder_is_taken_and_the_newest_with_a_checkpoint_resumed(folder, tmp_path):
    parent = tmp_path / "out"
    cfg = Config(model="org/Model-8B", replay="prompt")
    first = checkpoint.claim(checkpoint.choose_folder(cfg, parent), cfg)
    second = checkpoint.claim(first, cfg)  # another run has taken it since it was chosen
    assert [first.name, second.name] == ["Model-8B-prompt-s0", "Model-8B-prompt-s0-2"]
    cfg.resume = True
    assert checkpoint.choose_folder(cfg, parent) == second  # neither has a checkpoint
    shutil.copytree(folder / "checkpoints", first / "checkpoints")
    assert checkpoint.choose_folder(cfg, parent) == first
    assert checkpoint.choose_folder(Config(resume=True), parent) == parent / "tiny-grpo-s0"


def test_a_model_in_the_current_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert checkpoint.choose_folder(Config(model="."), tmp_path / "out").name == "mine-grpo-s0"


def test_stopped_before_its_first_checkpoint_a_run_starts_anew(tmp_path, capsys):
    folder = tmp_path / "run"
    run = begin(folder)
    losses = train(run, 3, save_every=100)
    with pytest.raises(ValueError, match="--resume"):
        checkpoint.choose_folder(Config(out=str(folder)), tmp_path)
    assert checkpoint.choose_folder(Config(out=str(folder), resume=True), tmp_path) == folder
    run = resumed(folder)
    assert "starts anew" in capsys.readouterr().err and run.step == 0 and rows(folder) == []
    assert train(run, 3, save_every=100) == losses and len(rows(folder)) == 3


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_rows(folder):
    log.write_aside(folder / "config.json", json.dumps({"save_every": 2}))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="has done 6 steps, and its checkpoints are gone"):
        resumed(folder)
    assert len(rows(folder)) == 6
    log.write_aside(folder / "config.json", json.dumps({"save_every": 6}))  # killed inside its first save
    assert resumed(folder).step == 0 and rows(folder) == []


def test_stopped_before_its_first_step_a_run_starts_anew_both_ways(tmp_path):
    folder = tmp_path / "run"
    cfg = begin(folder).cfg
    log.write_aside(folder / "config.json", json.dumps(asdict(cfg)))
    assert checkpoint.choose_folder(cfg, tmp_path) == folder
    assert resumed(folder).step == 0


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume.*without --resume"):
        resumed(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


# ---------------------------------------------------------------- two processes

HOLD = """
import os, sys, time
from pathlib import Path
from support import checkpoint
checkpoint.lock(Path(sys.argv[1]))
child = os.fork()  # it has the open file and outlives its parent
if child:
    print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder():
    """Starts processes that hold a folder."""
    started = []
    children = []

    def hold(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(folder)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        children.append(int(process.stdout.readline()))
        return process

    yield hold
    for child in children:
        os.kill(child, signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait()


def test_a_second_process_is_told_who_has_the_folder_until_the_first_is_killed(folder, tmp_path, holder):
    process = holder(folder)
    before = (folder / "metrics.jsonl").read_bytes()
    cfg = Config(out=str(folder), resume=True)
    for attempt in (
        lambda: checkpoint.choose_folder(cfg, tmp_path),
        lambda: resumed(folder),
        lambda: checkpoint.claim(folder, cfg),
    ):
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on ") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert (folder / "metrics.jsonl").read_bytes() == before
    process.send_signal(signal.SIGKILL)
    process.wait()  # a child of it is still there
    assert checkpoint.choose_folder(cfg, tmp_path) == folder and resumed(folder).step == 6


def test_the_lock_is_kept_while_this_process_lives(folder):
    resumed(folder)
    checkpoint.claim(folder, Config(out=str(folder), resume=True))  # again: it has it already
    code = "import sys; from pathlib import Path; from support import checkpoint\n"
    code += "print(checkpoint.in_use(Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert f"in use by process {os.getpid()}" in done.stdout


def test_ranks_that_look_at_the_same_moment_do_not_see_each_other(folder):
    code = "import fcntl, sys, time\nfile = open(sys.argv[1])\nfcntl.lockf(file, fcntl.LOCK_SH)\n"
    code += "print(flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder / "run.lock")], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        assert checkpoint.in_use(folder) == ""
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- state


def test_state_survives_a_file_and_is_strict(tmp_path):
    sampler = Sampler()
    for _ in range(5):
        sampler.draw()
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = Sampler()
    again.load_state_dict(state)
    assert [again.draw() for _ in range(9)] == [sampler.draw() for _ in range(9)]
    assert again.batch == sampler.batch and again.left == sampler.left and (again.seen == sampler.seen).all()
    assert state["position"] == 5  # not shared
    for wrong in (state | {"surprise": 1}, {k: v for k, v in state.items() if k != "rng"}):
        with pytest.raises(KeyError, match="too many or too few"):
            Sampler().load_state_dict(wrong)
    with pytest.raises(ValueError, match="of 3 prompts, not 8"):
        Sampler().load_state_dict(state | {"seen": torch.zeros(3)})


def test_a_store_survives_a_file(tmp_path):
    run = make_run(tmp_path)
    checkpoint.claim(tmp_path / "run", Config(out=str(tmp_path / "run")))
    run.folder = tmp_path / "run"
    train(run, 5, save_every=100)
    store = run.stores["group"].stored
    torch.save(store.state_dict(), tmp_path / "store.pt")
    again = Store(Group, 3)
    again.load_state_dict(torch.load(tmp_path / "store.pt", weights_only=True))
    assert len(again) == 3 and again.maxlen == 3
    for one, two in zip(store, again, strict=True):
        for name, value in vars(one).items():
            other = getattr(two, name)
            if name in ("tokens", "logprobs"):
                assert equal(value, other) and other[0].dtype == value[0].dtype
            else:
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    empty = Store(Group)
    again.load_state_dict(empty.state_dict())
    assert len(again) == 0
