"""Engines: prompts in as token ids, answers out as token ids with the log-probs they were sampled with.

    generate(prompts, n, seed, step) -> list[Group]    n answers to each prompt from the current policy
    sync()                                             the trainer's new weights; returns how far the engine is off

Every answer has a random stream of its own, from (seed, step, prompt, sample): runs repeat, an answer depends neither
on the batch it was sampled in nor on the rank that sampled it, and evaluations share their noise from step to step.
Sampling is at a temperature and nothing else: with top-p or top-k the log-probs would be those of another distribution.
"""

import hashlib

import numpy as np
import torch

from buffer import Group
from data import Prompt


def request_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """A 63-bit seed for one answer, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {step} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row by inverting the cumulative distribution.

    logits: [B, V], noise: [B] uniform in [0, 1) -> token [B] and its log-prob [B] in float32, under
    softmax(logits / temperature); temperature 0 is greedy, with log-probs at temperature 1.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        # scaled by the total, which rounding leaves a little off 1: noise near 1 must not fall past the last token
        token = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(1, token[:, None])[:, 0]


def load_model(path: str, gradient_checkpointing: bool = False):
    """Model in float32 (bf16 weights do not move at lr 1e-6), tokenizer, and the ids that end an answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # transformers raises half a dozen kinds here, some with pages of text
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no model can be loaded from {path!r} ({type(error).__name__}: {first}); give a Hugging Face id, or a "
            "folder with config.json, weights and tokenizer"
        ) from error
    stop = model.generation_config.eos_token_id
    stop = set(stop if isinstance(stop, list) else [stop]) | {tokenizer.eos_token_id}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).eval(), tokenizer, sorted(stop - {None})


class TransformersEngine:
    """Batched sampling with a KV cache from the trainer's own weights: nothing to sync, runs anywhere."""

    name = "transformers"

    def __init__(self, model, stop_ids, max_tokens: int, temperature: float = 1.0, batch_size: int = 512):
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.stop = torch.tensor(sorted(stop_ids), device=model.device)
        self.batch_size = batch_size  # answers decoded side by side; bounds the KV cache

    def sync(self) -> float:
        return 0.0

    def generate(
        self, prompts: list[Prompt], n: int, seed: int, step: int, temperature: float | None = None
    ) -> list[Group]:
        """`n` answers to each prompt, as groups born at `step`, without rewards."""
        temperature = self.temperature if temperature is None else temperature
        at_once = max(self.batch_size // n, 1)
        groups: list[Group] = []
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            seeds = [request_seed(seed, step, prompt.index, i) for prompt in part for i in range(n)]
            tokens, logprobs, lengths, finished = self._decode([p.ids for p in part], n, seeds, temperature)
            for p, prompt in enumerate(part):
                rows = range(p * n, (p + 1) * n)
                groups.append(
                    Group(
                        prompt=prompt.index,
                        tokens=[tokens[r, : lengths[r]].clone() for r in rows],
                        logprobs=[logprobs[r, : lengths[r]].clone() for r in rows],
                        truncated=[not finished[r] for r in rows],
                        birth=step,
                    )
                )
        return groups

    @torch.inference_mode()
    def _decode(self, prompts: list[tuple[int, ...]], n: int, seeds: list[int], temperature: float):
        """Tokens and log-probs, [B, T] on the CPU with rubbish after each answer's end, lengths [B], finished [B]."""
        device = self.model.device
        size, longest = len(prompts) * n, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)  # [P, T], padded left
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        positions = (torch.arange(longest, device=device) - (longest - lengths)[:, None]).clamp(min=0)
        mask = None
        if int(lengths.min()) < longest:
            mask = (torch.arange(longest, device=device) >= (longest - lengths)[:, None]).long()
        noise = np.stack([np.random.Generator(np.random.SFC64(s)).random(self.max_tokens, np.float32) for s in seeds])
        noise = torch.from_numpy(noise).to(device)  # [B, T]
        tokens = torch.zeros(size, self.max_tokens, dtype=torch.int32)
        logprobs = torch.zeros(size, self.max_tokens)
        ends = torch.full((size,), self.max_tokens)
        finished = torch.zeros(size, dtype=torch.bool)

        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        cache, logits, position = out.past_key_values, out.logits[:, -1], lengths
        # The running batch holds each distinct prefix once: at first the prompts, and answers part where they differ.
        alive = torch.arange(size)  # answers still being written
        row = torch.arange(len(prompts), device=device).repeat_interleave(n)  # the row that each of them continues
        for t in range(self.max_tokens):
            token, logprob = sample(logits[row], noise[alive, t], temperature)
            tokens[alive, t], logprobs[alive, t] = token.int().cpu(), logprob.cpu()
            stopped = torch.isin(token, self.stop)
            ends[alive[stopped.cpu()]] = t + 1
            finished[alive[stopped.cpu()]] = True
            alive = alive[~stopped.cpu()]
            if t + 1 == self.max_tokens or not len(alive):
                break
            vocabulary = logits.shape[-1]
            prefix, row = torch.unique(row[~stopped] * vocabulary + token[~stopped], return_inverse=True)
            parent, token = prefix // vocabulary, prefix % vocabulary
            if len(parent) != len(logits) or bool((parent[1:] == parent[:-1]).any()):
                cache.batch_select_indices(parent)
                position, mask = position[parent], None if mask is None else mask[parent]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self.model(
                input_ids=token[:, None], attention_mask=mask, position_ids=position[:, None],
                past_key_values=cache, use_cache=True,
            ).logits[:, -1]  # fmt: skip
            position = position + 1
        return tokens, logprobs, ends.tolist(), finished.tolist()
