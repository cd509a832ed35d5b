"""Attention without a mask: packed equals unpacked through the real Qwen3, and the kernel equals the loop."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import grpo
from rollout import TransformersEngine
from support import attention
from support.logprobs import has_varlen, pack
from support.model import check_policy, use_varlen_attention
from tasks.data import Prompt
from tests.models import shape

VOCABULARY = 32


def small_model(window: int | None = None, forced: bool = True) -> Qwen3ForCausalLM:
    """Two layers, four query heads on two key heads; `window`: sliding, in both layers. forced: computes in
    support/attention.py, which a CPU does not choose by itself."""
    torch.manual_seed(0)
    sliding = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    more = {"head_dim": 8, "initializer_range": 0.5, "eos_token_id": 1}
    config = shape(Qwen3Config, 32, 2, 4, 2, 32, VOCABULARY, **sliding, **more)
    model = Qwen3ForCausalLM(config).eval()
    if forced:
        attention.use(model)
    return model


def some_answers(count: int, seed: int = 0) -> list[grpo.Answer]:
    """Of 1 to 6 tokens, after prompts of 1 to 9."""
    generator = torch.Generator().manual_seed(seed)
    answers = []
    for _ in range(count):
        before, length = torch.randint(1, 10, (2,), generator=generator).tolist()
        length = min(length, 6)
        ids = torch.randint(VOCABULARY, (before + length,), generator=generator)
        answers.append(grpo.Answer(tuple(ids[:before].tolist()), ids[before:], torch.zeros(length), 1.0, age=0))
    return answers


def one_by_one(model, answers: list) -> torch.Tensor:
    """Log-probs of all answer tokens, each answer in a micro-batch of its own: no packing, and no border to see."""
    policy = grpo.Policy(model)
    found = []
    for answer in answers:
        (micro,) = pack([answer], 1000)
        found.append(policy(micro, 1.0)[0])
    return torch.cat(found)


# ---------------------------------------------------------------- borders


def test_borders_are_where_positions_restart_and_at_each_row():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    edges, longest = attention.borders(positions)
    assert edges.tolist() == [0, 3, 5, 6, 12] and longest == 6
    assert edges.dtype == torch.int32


def test_the_unused_tail_of_a_row_is_a_sequence_of_its_own():
    answers = some_answers(3)
    sizes = [len(answer.prompt) + len(answer.tokens) for answer in answers]
    (micro,) = pack(answers, 200, row_length=max(sizes))
    rows, length = micro.position_ids.shape
    edges, _ = attention.borders(micro.position_ids)
    tails = int((edges.diff().sum() - sum(sizes)).item())
    assert rows > 1 and tails > 0 and int(edges[-1]) == rows * length


# ---------------------------------------------------------------- packed and unpacked


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("row_length", [None, 1000])
def test_packed_equals_unpacked_in_values_and_gradients(window, row_length):
    answers = some_answers(9)
    plain = small_model(window, forced=False)
    expected = one_by_one(plain, answers)
    weights = torch.linspace(-1, 1, len(expected))
    (expected * weights).sum().backward()

    model = small_model(window)
    (micro,) = pack(answers, 1000, row_length)
    found, _ = grpo.Policy(model)(micro, 1.0)
    order = torch.cat([torch.full((len(answer.tokens),), i) for i, answer in enumerate(answers)])
    places = torch.cat([(order == i).nonzero()[:, 0] for i in micro.sequences])
    torch.testing.assert_close(found, expected[places], rtol=0, atol=1e-5)
    (found * weights[places]).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_without_borders_it_would_be_wrong(monkeypatch):
    """The negative control of the test above: one long sequence instead of nine."""
    answers = some_answers(9)
    (micro,) = pack(answers, 1000, row_length=1000)
    policy = grpo.Policy(small_model())
    right, _ = policy(micro, 1.0)
    length = micro.input_ids.numel()
    monkeypatch.setattr(attention, "borders", lambda _: (torch.tensor([0, length]), length))
    wrong, _ = policy(micro, 1.0)
    assert (right - wrong).abs().max() > 0.1


def test_no_mask_is_made_for_packed_sequences_where_transformers_makes_one(monkeypatch):
    masks = []
    attend = attention.attend

    def watch(module, query, key, value, attention_mask, **rest):
        masks.append(attention_mask)
        return attend(module, query, key, value, attention_mask, **rest)

    def refuse(**_):
        raise AssertionError("a mask was made")

    answers = some_answers(9)
    (micro,) = pack(answers, 1000, row_length=1000)
    monkeypatch.setattr(attention, "attend", watch)
    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    grpo.Policy(small_model())(micro, 1.0)
    assert masks == [None, None]  # of two layers

    # transformers' own choice makes one of L x L
    plain = small_model(forced=False)
    from transformers.models.qwen3 import modeling_qwen3

    made = []
    create = modeling_qwen3.create_causal_mask
    monkeypatch.setattr(modeling_qwen3, "create_causal_mask", lambda **given: made.append(create(**given)) or made[-1])
    grpo.Policy(plain)(micro, 1.0)
    length = micro.input_ids.shape[1]
    assert made[0].shape[-2:] == (length, length)


def test_gradient_checkpointing_computes_the_same():
    answers = some_answers(5)
    (micro,) = pack(answers, 1000, row_length=1000)
    gradients = []
    for checkpointing in (False, True):
        model = small_model()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        grpo.Policy(model)(micro, 1.0)[0].sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- the rest of the program


def test_its_name_means_one_row_a_micro_batch():
    model = small_model()
    assert has_varlen(model) and not has_varlen(small_model(forced=False))
    micros = grpo.Policy(model).pack(some_answers(9), 40)
    assert len(micros) > 1 and all(len(micro.input_ids) == 1 for micro in micros)
    check_policy(grpo.Policy(model))


@pytest.mark.parametrize("prompts", [[(3, 4, 5), (6, 7, 8)], [(3, 4, 5, 6, 7), (8, 9)]])
def test_generation_from_the_same_model_is_what_it_was(prompts):
    """It has a cache, and a mask where prompts differ in length: both go the usual way."""
    prompts = [Prompt(i, "", "", ids) for i, ids in enumerate(prompts)]
    groups = []
    for forced in (False, True):
        engine = TransformersEngine(small_model(forced=forced), [1], max_tokens=6)
        groups.append(engine.generate(prompts, 4, seed=0, step=0))
    for one, other in zip(*groups, strict=True):
        for i in range(4):
            assert torch.equal(one.tokens[i], other.tokens[i])
            torch.testing.assert_close(one.logprobs[i], other.logprobs[i], rtol=0, atol=1e-5)


def test_a_model_that_the_kernel_does_not_know_keeps_its_own():
    config = small_model().config
    assert attention.knows(config)
    config.head_dim = 512
    assert not attention.knows(config)
    config.head_dim = 8
    config.attn_logit_softcapping = 50.0
    assert not attention.knows(config)
    config.attn_logit_softcapping = None
    config.layer_types = ["full_attention", "chunked_attention"]
    assert not attention.knows(config)


def test_caps_and_sinks_are_refused():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="caps"):
        attention.attend(None, x, x, x, None, softcap=30.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may choose it")
def test_a_cpu_does_not_choose_it():
    model = small_model(forced=False)
    use_varlen_attention(model, "bfloat16")
    assert model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------- the kernel


def random_heads(lengths: list[int], device: str, dtype: torch.dtype, size: int = 64):
    """Query of eight heads, key and value of two, and the edges of sequences of these lengths."""
    generator = torch.Generator().manual_seed(1)
    tensors = []
    for heads in (8, 2, 2):
        x = torch.randn(sum(lengths), heads, size, generator=generator)
        tensors.append(x.to(device, dtype).requires_grad_())
    edges = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return tensors, edges


def test_the_kernel_takes_what_it_is_given():
    """Shapes alone: on the meta device PyTorch runs the checks of its arguments, and no kernel."""
    (query, key, value), edges = random_heads([5, 1, 30], "meta", torch.bfloat16)
    out = attention.kernel(query, key, value, edges, 30, scale=0.1, window=4)
    assert out.shape == query.shape and out.dtype == torch.bfloat16
    out.sum().backward()
    assert query.grad.shape == query.shape and key.grad.shape == key.shape and value.grad.shape == value.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("size", [64, 128])
def test_the_kernel_equals_the_loop(window, size):
    lengths = [5, 1, 300, 128]
    results = []
    for computes in (attention.kernel, attention.reference):
        heads, edges = random_heads(lengths, "cuda", torch.bfloat16, size)
        longest = [max(lengths)] if computes is attention.kernel else []
        out = computes(*heads, edges, *longest, size**-0.5, window)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in heads)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
def test_log_probs_on_a_gpu_are_those_of_the_usual_attention():
    answers = some_answers(9)
    found = []
    for forced in (False, True):
        model = small_model(forced=False).cuda()
        if forced:
            use_varlen_attention(model, "bfloat16")
            assert model.config._attn_implementation == attention.NAME
        (micro,) = pack(answers, 1000, row_length=1000, device="cuda")
        found.append(grpo.Policy(model, "bfloat16")(micro, 1.0)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0.2)
