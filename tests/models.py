"""Small random models and answers, and the plain way to get log-probs: what several test files stand on."""

import dataclasses
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from grpo import Answer

VOCABULARY, PAD, EOS = 23, 0, 1


def shape(kind: type, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, **more):
    """A config of this shape; `kind`: of transformers, such as Qwen3Config."""
    return kind(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        **more,
    )


def small_model(kind: str = "qwen3", seed: int = 0):
    """A random model of two layers; weights large enough that attention matters."""
    torch.manual_seed(seed)
    more = {"max_position_embeddings": 128, "initializer_range": 0.15, "tie_word_embeddings": kind == "qwen3"}
    more |= {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    if kind == "qwen3":
        return Qwen3ForCausalLM(shape(Qwen3Config, 32, 2, 4, 2, 48, VOCABULARY, head_dim=8, **more)).eval()
    return LlamaForCausalLM(shape(LlamaConfig, 32, 2, 4, 2, 48, VOCABULARY, **more)).eval()


def naive_logprobs(model, sequence, temperature=1.0):
    """Log-probs and entropies of one answer: an ordinary forward of it alone with full logits."""
    ids = torch.cat([torch.tensor(sequence.prompt), sequence.tokens.long()])
    logits = model(input_ids=ids[None]).logits[0, len(sequence.prompt) - 1 : -1] / temperature
    logprobs = torch.log_softmax(logits, -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, sequence.tokens.long()[:, None])[:, 0], entropy.detach()


def random_answers(count: int, seed: int, longest: int = 12) -> list[Answer]:
    """Answers of 1 to `longest` tokens, any id inside, most ending in EOS. Log mu is set by `with_behaviour`."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest)))
        tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]
        tokens[-1] = EOS if rng.random() < 0.8 else tokens[-1]
        answer = torch.tensor(tokens, dtype=torch.int32)
        advantage = rng.choice([-1.0, -0.4, 0.3, 0.9])
        made.append(Answer(prompt, answer, torch.zeros(len(tokens)), advantage, age=i % 3))
    return made


def with_behaviour(model, sequences, temperature=1.0, noise=0.4) -> list[Answer]:
    """The same answers, sampled by a policy that is off from `model` by `noise` in log-probs."""
    generator = torch.Generator().manual_seed(5)
    moved = []
    for s in sequences:
        with torch.no_grad():
            logprob, _ = naive_logprobs(model, s, temperature)
        moved.append(
            dataclasses.replace(s, behaviour=logprob + noise * torch.randn(len(s.tokens), generator=generator))
        )
    return moved


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    scale = max(g.abs().max() for g in theirs.values())
    assert scale > 0
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=tolerance * scale.item(), msg=name)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
