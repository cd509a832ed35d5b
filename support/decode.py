"""Sampling with transformers: answers to a batch of prompts, with a KV cache, token by token.

It draws what the plain loop in tests/test_rollout.py draws: a forward pass over all answers, one token for each,
until all have ended. It is quicker by one trick: **every distinct prefix is decoded once.** The n answers to a
prompt are equal up to the token where they part, and reading equal tokens n times gives n equal rows of logits. So
the batch that runs through the model has one row for each distinct prefix: one a prompt at first, and more as
answers part. `row` says which of these rows each answer continues. After each token, equal pairs of (row, token) are
joined; the KV cache is copied where a row has several successors, and dropped where it has none. Short answers over
a small vocabulary, as in the embedded task, stay together for long. Long answers part early, and nothing is lost.
"""

import numpy as np
import torch


def sample(logits, noise, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row, by inverting the cumulative distribution.

    logits: [B, V], noise: [B] uniform in [0, 1) -> token [B] and its log-prob [B] in float32, under softmax(logits /
    temperature). Temperature 0 is greedy, with log-probs at temperature 1.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        # Rounding leaves the total a little off 1, and noise near 1 must not fall past the last token.
        target = noise * cumulative[:, -1]
        token = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(1, token[:, None])[:, 0]


@torch.inference_mode()
def sample_answers(
    model,
    prompts: list[tuple[int, ...]],
    n: int,
    seeds: list[int],
    stop: torch.Tensor,
    max_tokens: int,
    temperature: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[bool]]:
    """`n` answers to each prompt in turn: their tokens, their log-probs, and whether they were truncated.

    prompts: token ids, of different lengths. seeds: one for each answer, which alone decides its noise. stop: the
    ids that end an answer, on the model's device. Returns len(prompts) * n tensors int32 [T], the stop token inside,
    as many tensors float32 [T], and as many bools; all on the CPU.
    """
    device = model.device
    size = len(prompts) * n
    streams = [np.random.Generator(np.random.SFC64(seed)) for seed in seeds]
    noise = np.stack([stream.random(max_tokens, np.float32) for stream in streams])
    noise = torch.from_numpy(noise).to(device)  # [size, max_tokens]

    # What is written lies on the CPU; it is undefined after the end of each answer.
    tokens = torch.zeros(size, max_tokens, dtype=torch.int32)
    logprobs = torch.zeros(size, max_tokens)
    ends = torch.full((size,), max_tokens)
    truncated = torch.ones(size, dtype=torch.bool)

    prefixes = Prefixes(model, prompts)
    alive = torch.arange(size)  # the answers still being written
    row = torch.arange(len(prompts), device=device).repeat_interleave(n)  # the prefix that each continues
    for t in range(max_tokens):
        token, logprob = sample(prefixes.logits[row], noise[alive, t], temperature)
        tokens[alive, t] = token.int().cpu()
        logprobs[alive, t] = logprob.cpu()

        # An answer that has stopped keeps its stop token and leaves the batch.
        going = ~torch.isin(token, stop)
        stopped = alive[~going.cpu()]
        ends[stopped] = t + 1
        truncated[stopped] = False
        alive = alive[going.cpu()]
        if t + 1 == max_tokens or len(alive) == 0:
            break
        row = prefixes.extend(row[going], token[going])

    # Copies, because a view would keep the memory of the whole batch.
    lengths = ends.tolist()
    answers = [tokens[i, :length].clone() for i, length in enumerate(lengths)]
    scores = [logprobs[i, :length].clone() for i, length in enumerate(lengths)]
    return answers, scores, truncated.tolist()


class Prefixes:
    """The distinct prefixes of all running answers: a row of the KV cache and of the next logits for each."""

    def __init__(self, model, prompts: list[tuple[int, ...]]):
        """Reads the prompts, padded on the left, so that all of them end at the same place."""
        self.model = model
        device = model.device
        longest = max(len(prompt) for prompt in prompts)
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        padding = (longest - lengths)[:, None]
        place = torch.arange(longest, device=device)

        # Prompts of equal length need no mask, and attention is quicker without one.
        self.mask = None
        if int(lengths.min()) < longest:
            self.mask = (place >= padding).long()  # [rows, tokens so far]
        self.position = lengths  # [rows] of the next token
        out = model(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=self.mask,
            position_ids=(place - padding).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        self.logits = out.logits[:, -1]  # [rows, V]

    def extend(self, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Every running answer goes on: the one at `row` [A] by `token` [A]. Returns their new rows [A]."""
        # One number stands for a pair, so that equal pairs become one.
        vocabulary = self.logits.shape[-1]
        pair, new_row = torch.unique(row * vocabulary + token, return_inverse=True)
        parent = pair // vocabulary
        token = pair % vocabulary

        # The cache stays as it is where every row has exactly one successor, because copying it is dear.
        if len(parent) != len(self.logits) or bool((parent[1:] == parent[:-1]).any()):
            self.cache.batch_select_indices(parent)
            self.position = self.position[parent]
            if self.mask is not None:
                self.mask = self.mask[parent]
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        out = self.model(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = out.logits[:, -1]
        self.position = self.position + 1
        return new_row
