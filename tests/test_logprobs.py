"""The tricks of speed against the plain things that they equal: full logits, unpacked answers, answers one by one."""

import dataclasses
import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grpo import Answer, Policy
from support.logprobs import empty_microbatch, merge_equal, pack, share_out, token_logprobs
from tests.models import (
    VOCABULARY,
    assert_same_gradients,
    gradients,
    naive_logprobs,
    random_answers,
    relative,
    small_model,
)

F64 = torch.float64


def length_of(answer) -> int:
    return len(answer.prompt) + len(answer.tokens)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------- log-probs without full logits


def naive_head(hidden, weight, targets, temperature):
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def head_inputs(dtype, tokens=37, scale=1.0):
    hidden, weight = torch.randn(tokens, 8, dtype=dtype), scale * torch.randn(VOCABULARY, 8, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(VOCABULARY, (tokens,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # computed in float32 in either case
@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_equal_full_logits(dtype, chunk, temperature):
    hidden, weight, targets = head_inputs(dtype)
    logprob, entropy = token_logprobs(hidden, weight, targets, temperature, chunk)
    expected, expected_entropy = naive_head(hidden, weight, targets, temperature)
    assert logprob.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    torch.testing.assert_close(logprob.to(dtype), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.to(dtype), expected_entropy, rtol=1e-5, atol=1e-5)
    slope = torch.randn(37)
    ours, theirs = (torch.autograd.grad((slope * x).sum(), (hidden, weight)) for x in (logprob, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_token_logprobs_gradcheck():
    # logits are brought to float32, so that steps of 1e-2 and tolerances of float32 are what can be asked
    hidden, weight, targets = head_inputs(F64, tokens=5)
    torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, 0.8, 2)[0].double(), (hidden, weight), eps=1e-2, atol=2e-3, rtol=1e-2
    )


def test_token_logprobs_of_nothing():
    hidden, weight, targets = head_inputs(torch.float32, tokens=0)
    logprob, entropy = token_logprobs(hidden, weight, targets)
    logprob.sum().backward()
    assert logprob.shape == entropy.shape == (0,) and weight.grad.abs().sum() == 0


@pytest.mark.parametrize("way", ["inputs", "autocast"])
def test_token_logprobs_in_bfloat16(way):
    """bf16 inputs, or float32 inputs under autocast: log-probs and gradients stay near those of float32."""
    hidden, weight, targets = head_inputs(torch.float32, tokens=200)
    if way == "inputs":
        low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
        hidden, weight = (x.detach().float().requires_grad_() for x in low)
        logprob, entropy = token_logprobs(*low, targets, 0.9, 64)
    else:
        low = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16):
            logprob, entropy = token_logprobs(*low, targets, 0.9, 64)
    expected, expected_entropy = naive_head(hidden, weight, targets, 0.9)
    assert logprob.dtype == torch.float32
    torch.testing.assert_close(logprob, expected, rtol=0, atol=0.1)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=0.05)
    assert (logprob - expected).abs().mean() < 0.02
    slope = torch.randn(200)
    ours, theirs = (
        torch.autograd.grad((slope * x).sum(), inputs) for x, inputs in ((logprob, low), (expected, (hidden, weight)))
    )
    for a, b, parameter in zip(ours, theirs, low, strict=True):
        assert a.dtype == parameter.dtype and relative(a.float(), b) < 0.02


def test_gradient_under_autocast_is_that_of_the_log_probs_returned():
    # The trap: autocast is off in a backward pass. Logits made anew in float32 do not fit the normaliser of bf16 ones,
    # and tokens that the model is sure of, whose gradient is next to nothing, get one of several per cent.
    hidden, weight, _ = head_inputs(torch.float32, tokens=200, scale=4.0)
    targets = (hidden @ weight.T).argmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        logprob, _ = token_logprobs(hidden, weight, targets, chunk=64)
    low = hidden.bfloat16(), weight.bfloat16()
    expected = torch.log_softmax((low[0] @ low[1].T).float(), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-4)
    ours, theirs = (torch.autograd.grad(x.sum(), (hidden, weight)) for x in (logprob, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 0.02


def checkpointed_logprobs(hidden, weight, targets, temperature, chunk):
    """The plain chunked version that the kernel replaces: torch.utils.checkpoint over log_softmax, chunk by chunk."""

    def one_chunk(rows, answers):
        logprobs = torch.log_softmax((rows @ weight.T).float() / temperature, -1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, answers[:, None])[:, 0], entropy.detach()

    parts = []
    for rows, answers in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        parts.append(checkpoint(one_chunk, rows, answers, use_reentrant=False))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("chunk", [1, 7, 37, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_kernel_equals_checkpointed_log_softmax(chunk, temperature):
    hidden, weight, targets = head_inputs(torch.float32, scale=3.0)
    slope = torch.randn(37)
    expected, spread = checkpointed_logprobs(hidden, weight, targets, temperature, chunk)
    theirs = torch.autograd.grad(expected, (hidden, weight), slope)
    logprob, entropy = token_logprobs(hidden, weight, targets, temperature, chunk)
    ours = torch.autograd.grad(logprob, (hidden, weight), slope)
    torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, spread, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize(("tokens", "row_length"), [(10_000, None), (10_000, 60), (70, None), (1, None)])
def test_packed_equals_unpacked(kind, tokens, row_length):
    model, sequences = small_model(kind), random_answers(9, seed=1)
    slopes = [torch.randn(len(s.tokens)) for s in sequences]
    packed: dict[int, tuple] = {}
    for micro in pack(sequences, tokens, row_length):
        logprob, entropy = Policy(model)(micro, 0.8)
        lengths = [len(sequences[i].tokens) for i in micro.sequences]
        parts = zip(logprob.split(lengths), entropy.split(lengths), strict=True)
        for i, (part, spread) in zip(micro.sequences, parts, strict=True):
            packed[i] = part.detach(), spread
        (logprob * torch.cat([slopes[i] for i in micro.sequences])).sum().backward()
    ours = gradients(model)
    model.zero_grad()
    for i, s in enumerate(sequences):
        logprob, entropy = naive_logprobs(model, s, 0.8)
        torch.testing.assert_close(packed[i][0], logprob.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(packed[i][1], entropy, rtol=0, atol=1e-5)
        (logprob * slopes[i]).sum().backward()
    assert_same_gradients(ours, gradients(model))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("trap", ["use_cache", "attention_mask"])
def test_the_silent_traps_of_packing(kind, trap):
    # with a cache or an all-ones mask transformers ignores the borders: packed sequences see their neighbours
    model, sequences = small_model(kind).train(), random_answers(6, seed=2)
    (micro,) = pack(sequences, 10_000, row_length=60)
    assert len(micro.input_ids) < len(sequences)
    with torch.no_grad():
        right, _ = Policy(model)(micro, 1.0)
        options = {"attention_mask": None, "use_cache": False}
        options[trap] = True if trap == "use_cache" else torch.ones_like(micro.input_ids)
        hidden = model.base_model(input_ids=micro.input_ids, position_ids=micro.position_ids, **options)[0]
        wrong, _ = token_logprobs(hidden.flatten(0, 1)[micro.index], model.lm_head.weight, micro.targets)
    assert (wrong - right).abs().max() > 1e-2


def test_pack_keeps_every_sequence_whole_and_within_bounds():
    """Random lengths, budgets and row lengths; what is packed is read back through index and positions."""
    rng = random.Random(0)
    for trial in range(150):
        sequences = random_answers(rng.randint(1, 25), seed=trial, longest=rng.choice([3, 12, 40]))
        tokens, row_length = rng.choice([1, 17, 50, 120, 1000]), rng.choice([None, None, 30, 64])
        found: list[int] = []
        for micro in pack(sequences, tokens, row_length):
            rows, length = micro.input_ids.shape
            assert rows * length <= tokens or rows == 1
            if rows * length > tokens and row_length is None:
                assert len(micro.sequences) == 1 and length == length_of(sequences[micro.sequences[0]])
            assert micro.position_ids.shape == (rows, length) and (micro.position_ids[:, 0] == 0).all()
            ids, positions = micro.input_ids.flatten(), micro.position_ids.flatten()
            owner = torch.full((rows * length,), -1)
            for k, i in enumerate(micro.sequences):
                s, mine = sequences[i], micro.segment == k
                whole = torch.cat([torch.tensor(s.prompt), s.tokens.long()])
                start = int(micro.index[mine][0]) - len(s.prompt) + 1
                place = slice(start, start + length_of(s))
                assert start // length == (start + length_of(s) - 1) // length  # within one row
                assert (owner[place] == -1).all()
                owner[place] = i
                assert torch.equal(ids[place], whole)
                assert torch.equal(positions[place], torch.arange(length_of(s)))
                assert torch.equal(micro.index[mine], torch.arange(start + len(s.prompt) - 1, start + length_of(s) - 1))
                assert torch.equal(micro.targets[mine], s.tokens.long())
            left_over = (owner[1:] == -1) & (owner[:-1] != -1)  # where it begins; it is a sequence of its own
            assert (positions[1:][left_over] == 0).all()
            assert len(micro.index) == sum(len(sequences[i].tokens) for i in micro.sequences)
            found += micro.sequences
        assert sorted(found) == list(range(len(sequences)))
    assert pack([], 100) == []


def test_a_sequence_longer_than_the_budget_is_alone():
    sequences = random_answers(6, seed=3, longest=5)
    sequences[4] = dataclasses.replace(sequences[4], prompt=(2,) * 30)
    batches = pack(sequences, 20)
    assert [micro.sequences for micro in batches if 4 in micro.sequences] == [[4]]
    assert all(micro.input_ids.numel() <= 20 for micro in batches if 4 not in micro.sequences)


def test_a_variable_length_kernel_gets_one_row_without_slack():
    """Flash attention reads the borders of packed sequences from one row alone; with several it mixes them."""
    model, sequences = small_model("qwen3"), random_answers(9, seed=5)
    total = sum(map(length_of, sequences))
    for tokens in (1, 40, 10_000):
        model.config._attn_implementation = "flash_attention_2"
        micros = Policy(model).pack(sequences, tokens)
        assert all(micro.input_ids.shape[0] == 1 for micro in micros)
        assert sum(micro.input_ids.numel() for micro in micros) == total
        model.config._attn_implementation = "sdpa"
        plain = Policy(model).pack(sequences, tokens)
        assert max(len(micro.input_ids) for micro in plain) > 1 or tokens == 1
    assert len(micros) == 1


def test_an_empty_micro_batch_goes_through_the_model():
    model = small_model()
    policy = Policy(model)
    logprob, entropy = policy(empty_microbatch("cpu"), 1.0)
    assert logprob.shape == entropy.shape == (0,)
    logprob.sum().backward()
    found = gradients(model)
    assert found and all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


# ---------------------------------------------------------------- less to do


def answer(tokens=(4, 1), prompt=(2, 3), advantage=0.5, age=0, count=1) -> Answer:
    tokens = torch.tensor(tokens, dtype=torch.int32)
    return Answer(prompt, tokens, torch.zeros(len(tokens)), advantage, age, count)


def test_equal_answers_become_one_with_their_number():
    others = [answer(tokens=(4, 5)), answer(prompt=(2, 4)), answer(advantage=-0.5), answer(age=1), answer(tokens=(4,))]
    merged = merge_equal([answer(), others[0], answer(count=3), *others[1:], answer()])
    assert [s.count for s in merged] == [5, 1, 1, 1, 1, 1]
    for s, expected in zip(merged[1:], others, strict=True):
        assert s is expected  # in the order in which they came
    assert merge_equal([]) == []


@pytest.mark.parametrize("world", [1, 2, 3, 4, 64])
def test_ranks_share_out_all_sequences_evenly(world):
    sequences = random_answers(40, seed=20, longest=30)
    parts = [share_out(sequences, rank, world) for rank in range(world)]
    assert sorted(i for part in parts for i in part) == list(range(40))
    sequences = [dataclasses.replace(s, prompt=(2,) * (80 - i - len(s.tokens))) for i, s in enumerate(sequences)]
    if 20 % world == 0:  # lengths 80, 79, ... 41: there and back again, each rank has the same sum
        loads = {sum(length_of(sequences[i]) for i in share_out(sequences, rank, world)) for rank in range(world)}
        assert len(loads) == 1
