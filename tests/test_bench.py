"""The measurements for a GPU, on a CPU: every part runs, is stored, and is not run again. No timings."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lab import bench, bench_gpu
from support.config import ROOT

NEEDS_MORE = {"weights", "generation", "sync", "colocated"}  # vLLM and TRL, which may not be here


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert bench.main(["gpu", "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: there is no GPU here; --tiny") and text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_part_that_there_is_not(tmp_path, capsys):
    assert bench.main(["gpu", "--tiny", "--parts", "step-9B", "--out", str(tmp_path / "out")]) == 2
    assert "no part step-9B; choose from attention, step-8B" in capsys.readouterr().err


def test_phases_lie_in_one_another():
    phases = bench_gpu.Phases()
    with phases("update"):
        time.sleep(0.05)
        with phases("optimiser"):
            kept = torch.ones(2**26)  # 256 MiB
        del kept
    with phases("sync"):
        pass
    phases.over.set()
    (update,), (optimiser,) = phases.seconds["update"], phases.seconds["optimiser"]
    assert update >= optimiser + 0.05
    assert phases.used["update"] >= phases.used["optimiser"] > phases.used["sync"] > 0 and not phases.open


def test_bits_of_weights_do_not_depend_on_their_order_and_find_one_that_moved():
    one, two = torch.randn(2, 24, 16).bfloat16()
    whole = bench_gpu.bits([one, two])
    fused = torch.cat([two, one, torch.zeros(4, 16, dtype=torch.bfloat16)])
    assert bench_gpu.bits([fused])[1] == whole[1] and whole[0] == 768
    fused[3, 3] *= 1 + 2**-7
    assert bench_gpu.bits([fused])[1] != whole[1]


def test_packed_attention_is_measured_against_what_rounding_does(monkeypatch):
    found = bench_gpu.attention(tiny=True)
    assert all(0 < found["ours"][name] < 2 * found["bf16"][name] < 0.05 for name in ("out", "query", "key", "value"))
    # borders that are not seen are no matter of rounding
    one = torch.tensor([0, 50], dtype=torch.int32)
    monkeypatch.setattr(bench_gpu.contenders, "GPU", False)
    monkeypatch.setattr("support.attention.borders", lambda _: (one, 50))
    assert bench_gpu.attention(tiny=True)["ours"]["out"] > 0.1


def command(out, *flags: str) -> list[str]:
    return [sys.executable, "-m", "lab.bench", "gpu", "--tiny", "--out", str(out), *flags]


@pytest.mark.slow
def test_all_parts_run_and_what_is_measured_is_not_measured_again(tmp_path):
    settings = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command(tmp_path), start_new_session=True, **settings)
    while not (tmp_path / "attention.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and errors.endswith("stopped; the same command goes on\n")
    before = (tmp_path / "attention.json").stat().st_mtime_ns
    assert not (tmp_path / "table.json").exists()

    second = subprocess.run(command(tmp_path), **settings)
    assert second.returncode == 0, second.stderr
    assert "attention: measured before" in second.stdout
    assert (tmp_path / "attention.json").stat().st_mtime_ns == before
    parts = json.loads((tmp_path / "table.json").read_text())["parts"]
    assert parts.keys() == bench_gpu.PARTS.keys()
    for name, record in parts.items():
        if "error" in record:
            assert name in NEEDS_MORE and record["error"].startswith("needs ")
            assert f"| {name} | failed: {record['error']} |" in second.stdout
    figures = parts["step-8B"]["figures"]["step-8B"]
    for kind, phases in (("seconds", "rollout update optimiser sync"), ("gib", "start-up rollout update sync")):
        assert all(figures[kind][phase] and figures[f"planned_{kind}"][phase] for phase in phases.split())
    assert not list(tmp_path.glob("tmp*"))  # the random weights are gone

    (tmp_path / "machine.json").write_text("{}")
    third = subprocess.run(command(tmp_path), **settings)
    assert third.returncode == 2 and "figures of another machine" in third.stderr


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_is_named_and_is_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu, "PARTS", {"broken": ("nothing",), "slow": ("attention",)})
    flags = bench_gpu.Flags(tiny=True)
    monkeypatch.setattr(bench_gpu, "LIMIT_S", 60)
    for _ in range(2):
        bench_gpu.run_parts(bench_gpu.Flags(tiny=True, parts=("broken",)), tmp_path)
        assert "failed: nothing: AttributeError" in capsys.readouterr().out
    monkeypatch.setattr(bench_gpu, "LIMIT_S", 0.1)
    assert "attention took more than 0 s" in bench_gpu.measure("slow", flags, tmp_path)["error"]
