"""Several ranks on a CPU over gloo: the same numbers as one rank, resume on another number of ranks, and no hanging."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import grpo
import reward
import train
from lab import contenders
from support import config, lives, plot, ranks
from support.model import check_policy, load_model
from tasks import tiny

FLAGS = [
    "--prompts-per-step",
    "6",
    "--answers-per-prompt",
    "4",
    "--eval-prompts",
    "10",
    "--eval-every",
    "5",
    "--cooldown",
    "2",
    "--replay-warmup",
    "2",
    "--save-every",
    "5",
    "--replay",
    "prompt+group+rollout",
]


@pytest.fixture(scope="session", autouse=True)
def embedded_model():
    tiny.make(tiny.home())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(out, *flags: str, processes: int = 2, torchrun: tuple[str, ...] = ()) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    if not torchrun:
        launcher += [f"--master-port={free_port()}"]
    return subprocess.Popen(
        [*launcher, *torchrun, "train.py", *FLAGS, "--out", str(out), *flags],
        cwd=config.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(*processes: subprocess.Popen) -> str:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs[0]


def assert_same_run(first, second, tolerance=2e-4) -> None:
    """All figures but times and memory, to rounding, and the weights."""
    one, two = plot.read(first / "metrics.jsonl"), plot.read(second / "metrics.jsonl")
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        for name in a.keys() | b.keys():
            if not name.startswith(("seconds_", "peak_", "reward_", "sync_error")):
                assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-5), (a["step"], name)
    assert (np.sort(lives.read(first)) == np.sort(lives.read(second))).all()  # one rank writes each visit, once
    weights, others = (load_file(f / "model" / "model.safetensors") for f in (first, second))
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-3, atol=2e-4)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "one"
    assert train.main([*FLAGS, "--steps", "10", "--minibatches", "2", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_ranks_give_the_numbers_of_one(one_rank, tmp_path, processes):
    flags = ["--steps", "10", "--minibatches", "2"]
    text = finish(start(tmp_path / "many", *flags, processes=processes))
    assert_same_run(one_rank, tmp_path / "many")
    assert len(re.findall(r"^step +7 ", text, re.M)) == 1  # one rank speaks


@pytest.mark.slow
def test_refills_that_ranks_cannot_share_evenly(tmp_path):
    """Five prompts on two ranks, in several rounds: whose answers are whose must not be guessed from their places."""
    flags = ["--replay", "dapo", "--prompts-per-step", "5", "--steps", "4", "--eval-every", "2"]
    finish(start(tmp_path / "run", *flags))
    rows, golds = plot.read(tmp_path / "run" / "samples.jsonl"), dict(tiny.problems("digits", 10)[0])
    assert rows and all(row["answer"] == golds[row["prompt"]] for row in rows)
    assert all(row["reward"] == reward.grade_equation([row["response"]], [row["answer"]])[0] for row in rows)
    figures = plot.read(tmp_path / "run" / "metrics.jsonl")
    assert any(row["rollouts"] - before["rollouts"] > 20 for before, row in zip(figures, figures[1:], strict=False))


TASK = """
from reward import grade_equation
from tasks.tiny import arithmetic

def rows():
    return [{"problem": p, "answer": a, "both": p + a} for p, a in arithmetic(200)]

def score(responses, golds, both, prompts, lengths):
    assert both == [p + a for p, a in zip(prompts, golds, strict=True)] and len(lengths) == len(responses)
    return [right + int(one[-1]) / 100 for right, one in zip(grade_equation(responses, golds), both, strict=True)]
"""


@pytest.mark.slow
def test_a_reward_has_the_columns_of_its_own_ranks_prompts(tmp_path):
    (tmp_path / "mine.py").write_text(TASK)
    flags = ["--task", str(tmp_path / "mine.py"), "--prompts-per-step", "5", "--steps", "4", "--eval-every", "2"]
    assert train.main([*FLAGS, *flags, "--out", str(tmp_path / "one")]) == 0
    finish(start(tmp_path / "two", *flags))
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_micro_batches_do_not_change_the_numbers(one_rank, tmp_path):
    out = tmp_path / "small"
    flags = ["--steps", "10", "--minibatches", "2", "--tokens-per-microbatch", "60"]
    assert train.main([*FLAGS, *flags, "--out", str(out)]) == 0
    assert_same_run(one_rank, out)


@pytest.mark.slow
def test_two_nodes_of_one_rank(one_rank, tmp_path):
    port = free_port()
    where = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test")
    flags = ["--steps", "10", "--minibatches", "2"]
    nodes = [start(tmp_path / "nodes", *flags, processes=1, torchrun=where) for _ in range(2)]
    finish(*nodes)
    assert_same_run(one_rank, tmp_path / "nodes")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_on_another_number_of_ranks(one_rank, tmp_path, before, after):
    out, flags = tmp_path / "run", ["--minibatches", "2"]
    finish(start(out, *flags, "--steps", "5", processes=before))
    finish(start(out, *flags, "--steps", "10", "--resume", processes=after))
    assert_same_run(one_rank, out)


def wait_for_steps(out, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < count:
        assert time.monotonic() < deadline, "the run did not get that far in two minutes"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_job_down_within_a_minute(tmp_path):
    process = start(tmp_path / "run", "--steps", "100000", "--eval-every", "0")
    wait_for_steps(tmp_path / "run", 3)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    workers = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(max(workers), signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "exitcode" in text and "Signal 9" in text
    # the other rank says what it has lost, in one line
    assert len(re.findall("^error: rank . has lost another rank", text, re.M)) <= 1 and "train.py" not in re.findall(
        r'File "([^"]*)"', text
    )


@pytest.mark.slow
def test_a_signal_stops_all_ranks_after_the_same_step(tmp_path):
    process = start(tmp_path / "run", "--steps", "100000", "--eval-every", "0", "--save-every", "100000")
    wait_for_steps(tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    rows = plot.read(tmp_path / "run" / "metrics.jsonl")
    finish(start(tmp_path / "run", "--steps", str(len(rows) + 2), "--eval-every", "0", "--resume"))
    assert [row["step"] for row in plot.read(tmp_path / "run" / "metrics.jsonl")] == list(range(1, len(rows) + 3))


@pytest.mark.slow
def test_bad_weights_are_said_once_though_one_rank_alone_reads_them(tmp_path):
    model, tokenizer, _ = load_model(str(tiny.home()))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "mine.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')
    flags = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "mine.jsonl"), "--instruction", "none"]
    process = start(tmp_path / "run", *flags)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and len(re.findall("^error: .*not finite", text, re.M)) == 1
    assert "lost another rank" not in text


def test_bad_input_is_said_once_and_ends_every_rank(tmp_path):
    process = start(tmp_path / "run", "--share", "2")
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and len(re.findall("^error: .*share", text, re.M)) == 1
    # torchrun's own report of forty lines ends with it
    assert re.search(r"Root Cause.*traceback : error: --share must be at most 1, got 2.0\n=+\s*$", text, re.S)
    # torchrun ends the other rank, perhaps among its imports, where nothing of ours could hear of it
    other, cause = re.findall(r"exitcode +: (-?\d+)", text)
    assert cause == "2" and int(other) in (2, -signal.SIGTERM)


def test_a_rank_that_waits_for_the_first_is_ended_with_the_code_of_the_mistake(tmp_path):
    left = tmp_path / "error.json"
    process = subprocess.Popen(
        [sys.executable, "train.py", *FLAGS, "--out", str(tmp_path / "run"), "--share", "2"],
        cwd=config.ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"RANK": "1", "TORCHELASTIC_ERROR_FILE": str(left)},
    )  # fmt: skip
    while not left.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()  # as torchrun does
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 2
    assert "--share must be at most 1" in left.read_text()


@pytest.mark.slow
def test_what_breaks_on_one_rank_alone_is_said_by_it(tmp_path):
    value = "[1.0] * len(responses) if os.environ['RANK'] == '0' else 7"
    body = f"import os\n\ndef reward(responses, golds):\n    return {value}\n"
    (tmp_path / "mine.py").write_text(body)
    process = start(tmp_path / "run", "--steps", "3", "--reward", f"{tmp_path / 'mine.py'}:reward")
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and len(re.findall("^error: .*mine.py", text, re.M)) == 1, text


# ---------------------------------------------------------------- the parts, in processes of their own


def parts_in_one_process(rank: int, world: int, port: int, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    ranks.start()
    items = list(range(7))
    result = {
        "share": ranks.share(items),
        "gathered": ranks.gather([x * 10 for x in ranks.share(items)]),
        "few": ranks.gather(ranks.share([5])),
        "none": ranks.gather([]),
        "main": ranks.from_main(f"rank {rank}"),
        "total": ranks.total([rank + 1.0, 0.5]),
        "largest": ranks.largest(rank),
    }
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump(result, file)
    dist.destroy_process_group()


def test_ranks_share_gather_and_agree(tmp_path):
    torch.multiprocessing.spawn(parts_in_one_process, (3, free_port(), str(tmp_path)), nprocs=3)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [r["share"] for r in results] == [[0, 3, 6], [1, 4], [2, 5]]
    for r in results:
        assert r["gathered"] == [0, 10, 20, 30, 40, 50, 60] and r["few"] == [5] and r["none"] == []
        assert r["main"] == "rank 0" and r["total"] == [6.0, 1.5] and r["largest"] == 2


def load_in_one_process(rank: int, world: int, port: int, out: str) -> None:
    """How much memory a model takes once it is loaded, and once it is sharded, as shares of its size; and whether all
    weights are those of the file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    ranks.start()

    def refuse(*_, **__):
        raise AssertionError("another rank reads the weights")

    if rank:
        AutoModelForCausalLM.from_pretrained = refuse
    before = contenders.resident_mb()
    model, _, stop_ids = load_model(f"{out}/model")
    loaded = contenders.resident_mb() - before
    policy = grpo.Policy(model)
    check_policy(policy)
    ranks.shard(policy, list(model.model.layers), False)
    sharded = contenders.resident_mb() - before
    right = load_file(f"{out}/model/model.safetensors")
    names = dict(model.named_parameters())
    equal = all(torch.equal(ranks.whole(weight.detach()), right[name].float()) for name, weight in names.items())
    size = sum(weight.numel() for weight in names.values()) * 4 / 2**20
    result = {"loaded": loaded / size, "sharded": sharded / size, "equal": equal, "stop": stop_ids}
    result["names"] = names.keys() == right.keys()
    result["buffers"] = [buffer.tolist() for buffer in model.buffers()]
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump(result, file)
    dist.destroy_process_group()


def test_only_the_first_rank_reads_the_weights_and_the_others_have_no_memory_for_them(tmp_path):
    """120 MB of weights on two ranks."""
    shape = contenders.SMALL | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    contenders.write_model(shape | {"vocab_size": 4000, "tie_word_embeddings": False}, tmp_path)
    torch.multiprocessing.spawn(load_in_one_process, (2, free_port(), str(tmp_path)), nprocs=2)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["equal"] and two["equal"] and one["names"] and two["names"]
    assert one["stop"] == two["stop"] == [1, 999] and one["buffers"] == two["buffers"]
    assert one["loaded"] > 0.9 and two["loaded"] < 0.2
    assert two["sharded"] < 0.8, two["sharded"]  # its half, and a layer


def test_one_process_is_its_own_whole():
    assert ranks.share([1, 2]) == ranks.gather([1, 2]) == [1, 2]
    assert ranks.total([2.0]) == [2.0] and ranks.largest(3) == 3 and ranks.from_main("x") == "x" and ranks.is_main()
