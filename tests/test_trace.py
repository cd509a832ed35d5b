"""The plan's update against a trace of the real one: Qwen3's passes on tensors that have sizes and no storage.

Nothing is computed, so that a CPU traces a model of any size. The kernel of attention is there as its own fake.
"""

import functools
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM

import grpo
from support import attention, logprobs, offload, plan
from tests.test_plan import MODELS, Config, qwen3


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that live, by every operation's results."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.now = 0
        self.peak = 0

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return out


def use_weights(policy, low: list) -> None:
    """Weights in float32, those of `low` in bf16, with gradients in float32 (as offload.working_copy, which copies
    the mode of fake tensors with them)."""
    known = {id(weight) for weight in low}
    made = {}
    for module in policy.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in made:
                kind = torch.bfloat16 if id(weight) in known else torch.float32
                made[id(weight)] = torch.nn.Parameter(weight.detach().to(kind))
                made[id(weight)].grad_dtype = torch.float32
            module._parameters[name] = made[id(weight)]


def traced(monkeypatch, config, place: str, tokens: int, checkpointing: bool) -> int:
    """Peak bytes of the second of two micro-batches, which finds the gradients of the first: two sequences that fill
    it, of a prompt of 1,024 tokens each. Without AdamW's moments."""
    half = tokens // 2
    answers = tokens - 2 * 1024
    edges = torch.tensor([0, half, tokens], dtype=torch.int32)
    kernel = attention.kernel
    monkeypatch.setattr(
        attention, "reference", lambda q, k, v, _, scale, window: kernel(q, k, v, edges, half, scale, window)
    )
    monkeypatch.setattr(attention, "borders", lambda _: (edges, half))
    as_on_a_gpu = functools.partial(logprobs.token_logprobs, chunk=plan.CHUNK // config.vocab_size)
    monkeypatch.setattr(grpo, "token_logprobs", as_on_a_gpu)

    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = grpo.Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32), "bfloat16").train()
        use_weights(policy, offload.low_precision(policy) if place == "host" else [])
        if checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        attention.use(policy.model)
        row = torch.zeros(1, tokens, dtype=torch.long)
        column = torch.zeros(answers, dtype=torch.long)
        micro = logprobs.MicroBatch(row, row, column, column, column, [0, 1])
        memory = Memory()
        for weight in policy.parameters():
            memory.note(weight)
        with memory:
            for _ in range(2):
                memory.peak = memory.now
                logprob, _ = policy(micro, 1.0)
                (-logprob.mean()).backward()
                del logprob
    assert {weight.grad.dtype for weight in policy.parameters()} == {torch.float32}
    return memory.peak


def planned(config, place: str, tokens: int, checkpointing: bool) -> float:
    """The same by the plan."""
    s = plan.shape(config)
    cfg = Config(tokens_per_microbatch=tokens, gradient_checkpointing=checkpointing)
    update = plan.plan(s, cfg, place=place)["phases"]["update"]
    return sum(update.values()) - update["optimiser"] - update[plan.OTHER]


def compare(monkeypatch, config, place: str, tokens: int, checkpointing: bool, share: float = 0.03) -> None:
    trace = traced(monkeypatch, config, place, tokens, checkpointing)
    assert planned(config, place, tokens, checkpointing) == pytest.approx(trace, rel=share)


@pytest.mark.parametrize(("place", "tied"), [("gpu", True), ("host", False)])
def test_the_planned_update_of_two_layers_is_the_traced_one(monkeypatch, place, tied):
    compare(monkeypatch, qwen3(2048, 2, 16, 8, 128, 6144, tied), place, 8192, checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["gpu", "host"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_so_is_that_of_any_few_layers(monkeypatch, place, tied, checkpointing):
    compare(monkeypatch, qwen3(2048, 3, 16, 8, 128, 6144, tied), place, 8192, checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [8192, 16_384])
@pytest.mark.parametrize("place", ["gpu", "host"])
@pytest.mark.parametrize("model", ["Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B"])
def test_so_is_that_of_qwen3(monkeypatch, model, place, tokens):
    compare(monkeypatch, MODELS[model], place, tokens, checkpointing=True, share=0.01)
