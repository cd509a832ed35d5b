"""Offload is the run without, bit for bit; and why the masters are needed at all."""

import copy
import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import Qwen3Config, Qwen3ForCausalLM

import grpo
import train
from lab import gpus
from support import checkpoint, model, offload, plan, plot, ranks
from tasks import tiny
from tests.models import shape

TINY = str(tiny.home())
SMALL = ["--prompts-per-step", "6", "--answers-per-prompt", "4", "--eval-every", "0"]
# constants small enough that every part of every method acts within a few steps
QUICK = ["--cooldown", "2", "--replay-warmup", "1", "--retest-every", "3", "--max-rounds", "3"]
NOT_COMPARED = ("seconds_", "peak_memory_mb")
GIB = 2**30


@pytest.fixture(scope="session", autouse=True)
def embedded_model():
    tiny.make(TINY)


def run(out, *flags: str) -> list[dict]:
    """The rows of metrics.jsonl, without what a clock or the machine decides."""
    assert train.main([*SMALL, *QUICK, "--out", str(out), *flags]) == 0
    rows = []
    for row in plot.read(out / "metrics.jsonl"):
        rows.append({name: value for name, value in row.items() if not name.startswith(NOT_COMPARED)})
    return rows


def weights(out) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_equal_runs(one, other, rows: list[dict], others: list[dict]) -> None:
    assert others == rows
    mine = weights(one)
    theirs = weights(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert weight.dtype == theirs[name].dtype == torch.float32
        assert torch.equal(weight, theirs[name]), name


# ---------------------------------------------------------------- whole runs


def with_and_without(tmp_path, *flags: str) -> None:
    """A run without offload against one that has it, is resumed with it, then without, then with it again."""
    rows = run(tmp_path / "without", *flags, "--steps", "8", "--offload", "off")
    run(tmp_path / "with", *flags, "--steps", "2", "--offload", "on")
    run(tmp_path / "with", *flags, "--steps", "4", "--offload", "on", "--resume")
    run(tmp_path / "with", *flags, "--steps", "6", "--offload", "off", "--resume")
    others = run(tmp_path / "with", *flags, "--steps", "8", "--offload", "on", "--resume")
    assert_equal_runs(tmp_path / "without", tmp_path / "with", rows, others)
    start = load_file(os.path.join(TINY, "model.safetensors"))
    assert any(not torch.equal(weight, start[name]) for name, weight in weights(tmp_path / "with").items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_offload_is_the_run_without(tmp_path, dtype):
    with_and_without(tmp_path, "--replay", "prompt", "--dtype", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["none", *sorted(train.METHODS.keys() - {"continual"}), "prompt+group+rollout"])
def test_so_is_that_of_every_method(tmp_path, method, dtype):
    with_and_without(tmp_path, "--replay", method, "--dtype", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_is_one_with_all_that_an_optimiser_can_be_asked(tmp_path, dtype):
    flags = ["--minibatches", "2", "--epochs", "2", "--weight-decay", "0.1", "--grad-clip", "0.01", "--kl", "0.1"]
    with_and_without(tmp_path, *flags, "--dtype", dtype, "--gradient-checkpointing", "--replay", "group")


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"]])
def test_a_checkpoint_has_the_masters_in_the_same_format(tmp_path, flags):
    found = []
    for choice in ("off", "on"):
        run(tmp_path / choice, *flags, "--steps", "1", "--offload", choice)
        folder = checkpoint.newest(tmp_path / choice)
        found.append(FileSystemReader(folder).read_metadata().state_dict_metadata)
    assert found[0] == found[1]
    sizes = [entry.properties.dtype for name, entry in found[1].items() if name.startswith("model.")]
    assert sizes and set(sizes) == {torch.float32}


# ---------------------------------------------------------------- the parts


def small_model(tied: bool, scale: float = 0.02) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    more = {"head_dim": 8, "initializer_range": scale, "attention_bias": True, "tie_word_embeddings": tied}
    return Qwen3ForCausalLM(shape(Qwen3Config, 32, 2, 4, 2, 64, 32, **more)).eval()


def some_answers(seed: int) -> list[grpo.Answer]:
    """Eight, in which every token of the vocabulary is seen, with advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    answers = []
    for i in range(8):
        ids = torch.randperm(32, generator=generator)
        advantage = 1.0 if i % 2 else -1.0
        answers.append(grpo.Answer(tuple(ids[:8].tolist()), ids[8:], -3 * torch.ones(24), advantage, age=0))
    return answers


def updates(policy, optimizer, cfg, steps: int) -> list[dict]:
    return [grpo.update(policy, optimizer, some_answers(step), cfg, step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_updates_are_equal_whatever_the_head_and_with_clipping(tied, dtype, checkpointing):
    cfg = train.Config(lr=1e-2, dtype=dtype, tokens_per_microbatch=70, grad_clip=0.05, minibatches=2)
    policies = []
    figures = []
    for on in (False, True):
        trained = grpo.Policy(small_model(tied), dtype)
        if checkpointing:
            trained.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = offload.working_copy(trained, dtype) if on else trained
        optimizer = model.make_optimizer(trained, cfg, policy)
        assert isinstance(optimizer, offload.HostAdamW) == on
        figures.append(updates(policy, optimizer, cfg, 3))
        policies.append(trained)
    assert figures[0] == figures[1]
    assert all(row["grad_norm"] > 2 * cfg.grad_clip for row in figures[0])  # so clipping acts
    start = small_model(tied).state_dict()
    for (name, one), other in zip(policies[0].model.named_parameters(), policies[1].parameters(), strict=True):
        assert torch.equal(one, other) and not torch.equal(one, start[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_working_copy_has_linear_layers_in_bf16_and_all_else_in_float32(tied):
    trained = grpo.Policy(small_model(tied), "bfloat16")
    working = offload.working_copy(trained, "bfloat16")
    for (name, master), (_, copied) in zip(trained.named_parameters(), working.named_parameters(), strict=True):
        linear = "proj" in name or "lm_head" in name
        assert copied.dtype == (torch.bfloat16 if linear else torch.float32), name
        assert torch.equal(copied, master.to(copied.dtype))
        assert copied.grad_dtype == torch.float32 and copied.data_ptr() != master.data_ptr()
    head = working.model.lm_head.weight
    assert (head is working.model.model.embed_tokens.weight) == tied
    grpo.update(working, torch.optim.SGD([head], lr=0.0), some_answers(1), train.Config(grad_clip=1e9), 1)
    gradients = [weight.grad for weight in working.parameters() if weight is not head]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    # in float32 nothing is cast
    assert {weight.dtype for weight in offload.working_copy(trained, "float32").parameters()} == {torch.float32}


def test_no_more_than_one_gradient_is_on_the_host_and_none_stays(monkeypatch):
    trained = grpo.Policy(small_model(False), "bfloat16")
    working = offload.working_copy(trained, "bfloat16")
    optimizer = offload.HostAdamW(trained, working, lr=1e-2)
    buffer = optimizer.staging.data_ptr()
    seen = []
    step = torch.optim.AdamW.step

    def watch(self, closure=None):
        gradients = [weight.grad for weight in trained.parameters() if weight.grad is not None]
        seen.append([gradient.data_ptr() for gradient in gradients])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    updates(working, optimizer, train.Config(), 1)
    assert seen == [[buffer]] * len(list(trained.parameters()))
    for weight, copied in zip(trained.parameters(), working.parameters(), strict=True):
        assert weight.grad is None and copied.grad is None
        assert torch.equal(copied, weight.to(copied.dtype))


def test_a_step_has_its_threads_and_gives_them_back(monkeypatch):
    trained = grpo.Policy(small_model(True))
    counts = []

    def watch(inner):
        def call(*args, **given):
            counts.append(torch.get_num_threads())
            return inner(*args, **given)

        return call

    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "zeros_like", watch(torch.zeros_like))
    monkeypatch.setattr(torch.optim.AdamW, "step", watch(torch.optim.AdamW.step))
    try:
        torch.set_num_threads(1)  # as vLLM leaves it
        working = offload.working_copy(trained, "float32")
        optimizer = offload.HostAdamW(trained, working, threads=3, lr=1e-2)
        assert set(counts) == {3} and torch.get_num_threads() == 1
        counts.clear()
        for weight in working.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert set(counts) == {3} and torch.get_num_threads() == 1
        assert all(weight.grad is None for weight in working.parameters())  # the GPU has their room at once
        with pytest.raises(RuntimeError), offload.cpu_threads(2):
            raise RuntimeError
        assert torch.get_num_threads() == 1
        assert offload.HostAdamW(trained, working, lr=1e-2).threads == offload.THREADS
    finally:
        torch.set_num_threads(before)


def test_weights_in_bf16_stand_still_where_float32_masters_move():
    """The negative control: AdamW on bf16 weights, rounding to nearest, at the rate of RL."""
    cfg = train.Config(lr=1e-6, dtype="bfloat16")
    masters = grpo.Policy(small_model(True), "bfloat16")
    start = copy.deepcopy(masters)
    working = offload.working_copy(masters, "bfloat16")
    updates(working, offload.HostAdamW(masters, working, lr=cfg.lr), cfg, 30)
    plain = copy.deepcopy(start).bfloat16()
    rounded = copy.deepcopy(plain)
    updates(plain, torch.optim.AdamW(plain.parameters(), lr=cfg.lr, weight_decay=0.0), cfg, 30)

    def movement(after, before) -> torch.Tensor:
        pairs = zip(after.parameters(), before.parameters(), strict=True)
        return torch.cat([(one.detach().float() - other.detach().float()).flatten() for one, other in pairs])

    right = movement(masters, start)
    stuck = movement(plain, rounded)
    assert (right != 0).float().mean() > 0.99
    assert (stuck != 0).float().mean() < 0.03
    assert (stuck @ right) / (right @ right) < 0.02  # of the way that the masters went


# ---------------------------------------------------------------- the choice, and what can be wrong with it


def mistake(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as end:
        train.main([*SMALL, "--steps", "1", *flags])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_too_little_host_memory_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "host_memory", lambda: 1e6)
    line = mistake(capsys, "--out", str(tmp_path / "run"), "--offload", "on")
    assert "host memory" in line and "--offload off" in line
    assert not (tmp_path / "run").exists()


def test_host_memory_that_cannot_be_known_is_no_reason_to_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "host_memory", lambda: 0.0)
    assert offload.wants_offload(train.Config(offload="on"), TINY)


def test_eight_bit_moments_are_not_for_the_host(tmp_path, capsys):
    line = mistake(capsys, "--out", str(tmp_path / "run"), "--offload", "on", "--optimizer", "adamw8bit")
    assert "adamw8bit" in line


def test_several_ranks_shard_instead(monkeypatch):
    monkeypatch.setattr(ranks, "WORLD", 2)
    with pytest.raises(ValueError, match="one GPU"):
        offload.wants_offload(train.Config(offload="on"), TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be short of memory")
def test_a_cpu_does_not_choose_it_and_says_nothing(capsys):
    assert not offload.wants_offload(train.Config(), TINY)
    assert not offload.wants_offload(train.Config(offload="off"), TINY)
    assert capsys.readouterr().out == ""


@pytest.fixture
def one_gpu(monkeypatch):
    """A function that makes this a machine with so many GiB on its GPU, free there, and free on the host."""

    def make(model: str, gpu: float, free: float, host: float) -> train.Config:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(plan, "found_gpus", lambda: (8, gpu * GIB))  # one rank has one, however many there are
        monkeypatch.setattr(plan, "free_memory", lambda: free * GIB)
        monkeypatch.setattr(plan, "host_memory", lambda: host * GIB)
        monkeypatch.setattr(plan, "choose_engine", lambda _: ("vllm", "it is here"))
        monkeypatch.setattr(plan, "read", lambda _: (Qwen3Config(**gpus.sizes_of(model)), None))
        return train.Config(model=model)

    return make


@pytest.mark.parametrize(
    ("model", "host", "offloads", "reason"),
    [
        ("Qwen3-0.6B", 500, False, "on the GPU (everything fits there)"),
        ("Qwen3-8B", 500, True, "in host memory (on the GPU they do not fit"),
    ],
)
def test_one_gpu_of_80_gb_chooses_by_what_fits(one_gpu, capsys, model, host, offloads, reason):
    cfg = one_gpu(model, 79.1, 79.1, host)
    assert offload.wants_offload(cfg, model) == offloads
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and reason in lines[0]
    assert json.dumps(lines[0]).isascii()


@pytest.mark.parametrize(
    ("gpu", "free", "host", "message"),
    [
        (79.1, 79.1, 90, "the host would need 98.4 GiB of memory for them and has 90.0; change 2 such GPUs"),
        (79.1, 40, 500, "does not fit 1 GPU of 40 GB .*; other programs hold 39.1 GiB of the GPU, see nvidia-smi"),
        (23.6, 23.6, 500, "does not fit 1 GPU of 24 GB .* take larger GPUs or a smaller model"),
    ],
)
def test_auto_refuses_what_does_not_fit_before_it_loads(one_gpu, gpu, free, host, message):
    cfg = one_gpu("Qwen3-8B", gpu, free, host)
    with pytest.raises(ValueError, match=message) as error:
        offload.wants_offload(cfg, "Qwen3-8B")
    assert "\n" not in str(error.value)
    others = "other programs" in message
    assert ("--offload on or off starts it" in str(error.value)) != others
    forced = dataclasses.replace(cfg, offload="off")
    if others:  # that is no matter of the plan
        with pytest.raises(ValueError, match="other programs hold 39.1 GiB"):
            offload.wants_offload(forced, "Qwen3-8B")
    else:
        assert not offload.wants_offload(forced, "Qwen3-8B")


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_a_gpu_that_others_have_half_filled_is_refused_whatever_was_asked_for(one_gpu, choice):
    cfg = dataclasses.replace(one_gpu("Qwen3-4B", 80, 31, 500), offload=choice)
    with pytest.raises(ValueError, match="by the plan it does not fit 1 GPU of 31 GB.*other programs hold 49.0 GiB"):
        offload.wants_offload(cfg, "Qwen3-4B")
    if choice != "auto":  # a screen is no reason
        cfg = dataclasses.replace(one_gpu("Qwen3-8B", 50, 49, 500), offload=choice)
        assert offload.wants_offload(cfg, "Qwen3-8B") == (choice == "on")


def test_a_gpu_that_others_use_in_part_is_planned_with_what_is_free(one_gpu, capsys):
    assert not offload.wants_offload(one_gpu("Qwen3-4B", 80, 80, 500), "Qwen3-4B")
    assert offload.wants_offload(one_gpu("Qwen3-4B", 80, 60, 500), "Qwen3-4B")
    assert "other programs hold 20.0 GiB" in capsys.readouterr().out


def test_free_memory_is_all_but_what_other_programs_hold(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (76 * GIB, 80 * GIB))  # CUDA's own, and ours
    assert plan.free_memory() == 80 * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (37 * GIB, 80 * GIB))
    assert plan.free_memory() == 40 * GIB


def test_the_choice_may_change_on_resume():
    assert "offload" in train.FREE
