"""Speed: answers packed without padding, and log-probs of tokens without ever making the full logits.

Nothing here is about replay, and every trick can be taken for the plain thing that it equals:

    pack               sequences side by side in rows, instead of padded ones with a mask
    token_logprobs     torch.log_softmax(hidden @ weight.T / temperature, -1).gather(...), a chunk of tokens at a time
    merge_equal        equal answers of a group trained once, with their number as weight
    share_out          sequences dealt to ranks so that all have about as many tokens

Letters: S sequences, N answer tokens, R rows of L tokens, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch

# ---------------------------------------------------------------- log-probs without full logits


class _ChunkedLogProb(torch.autograd.Function):
    """log-prob and entropy of targets from hidden states, a chunk of tokens at a time: [N, V] logits never exist.

    It equals torch.utils.checkpoint over log_softmax of each chunk (tests/test_logprobs.py has that version as an
    oracle), at half of its time and memory, because the backward pass needs no second log_softmax.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, inverse_temperature, chunk):
        logprob = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprob)
        normaliser = torch.empty_like(logprob)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).float().mul_(inverse_temperature)  # [chunk, V]
            most = logits.amax(-1)
            odds = (logits - most[:, None]).exp_()  # once, for the normaliser and the entropy
            total = odds.sum(-1)
            normaliser[rows] = most + total.log()
            logprob[rows] = logits.gather(1, targets[rows, None])[:, 0] - normaliser[rows]
            entropy[rows] = normaliser[rows] - odds.mul_(logits).sum(-1) / total
            del logits, odds  # before the next chunk is made
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.inverse_temperature = inverse_temperature
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = (hidden[rows] @ weight.T).float().mul_(ctx.inverse_temperature)
            size = (grad[rows] * ctx.inverse_temperature)[:, None]  # d logprob / d logits = onehot - softmax
            slope = logits.sub_(normaliser[rows, None]).exp_().mul_(-size)
            slope = slope.scatter_add_(1, targets[rows, None], size).to(weight.dtype)
            grad_hidden[rows] = slope @ weight
            grad_weight += slope.T @ hidden[rows]
            del logits, slope
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden, weight, targets, temperature: float = 1.0, chunk: int | None = None):
    """log-prob of `targets` [N] and entropy [N] of softmax(hidden [N, H] @ weight [V, H].T / temperature), in
    float32. `chunk` tokens at a time; by default as many as make 128 MiB of logits (512 on a GPU).

    Divided by the sampling temperature, because that is the distribution the answers were drawn from. The entropy is
    for the log and carries no gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        # by hand, because autocast is off in the backward pass, and logits made anew in float32 would not fit
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.to(dtype)
        weight = weight.to(dtype)
    if chunk is None:
        logits_at_once = 2**27 if hidden.is_cuda else 2**25
        chunk = max(logits_at_once // len(weight), 1)
    return _ChunkedLogProb.apply(hidden, weight, targets, 1.0 / temperature, chunk)


# ---------------------------------------------------------------- packing


@dataclass
class MicroBatch:
    """Answers with their prompts, packed without padding into R rows of L tokens; N answer tokens in all."""

    input_ids: torch.Tensor  # [R, L]
    position_ids: torch.Tensor  # [R, L], restarts at 0 with each sequence: the model reads the borders from it
    index: torch.Tensor  # [N] where, in R * L, the hidden state stands that predicts each answer token
    targets: torch.Tensor  # [N]
    segment: torch.Tensor  # [N] which sequence, counted within this micro-batch
    sequences: list[int]  # their numbers in the list given to `pack`


def pack(answers: list, tokens: int, row_length: int | None = None, device="cpu") -> list[MicroBatch]:
    """Micro-batches of at most `tokens` tokens each (or one sequence, where one alone is longer), longest first.

    Rows are no longer than the longest sequence unless `row_length` says so: attention without a variable-length
    kernel costs rows * L^2, so that short rows are cheap, and several short sequences still share a row.
    """
    sizes = [len(answer.prompt) + len(answer.tokens) for answer in answers]
    order = sorted(range(len(answers)), key=lambda i: -sizes[i])  # longest first
    batches: list[MicroBatch] = []
    while order:
        length = max(sizes[order[0]], row_length or 0)
        rows: list[list[int]] = []
        room: list[int] = []
        waiting = []
        # First fit, longest first: each sequence goes to the first row that has room for it.
        for i in order:
            size = sizes[i]
            row = next((r for r, free in enumerate(room) if free >= size), None)
            if row is None and (not rows or (len(rows) + 1) * length <= tokens):
                rows.append([])
                room.append(length)
                row = len(rows) - 1
            if row is None:
                waiting.append(i)
                continue
            rows[row].append(i)
            room[row] -= size
        length = max(length - free for free in room)
        batches.append(fill_rows(answers, rows, length, device))
        order = waiting
    return batches


def fill_rows(answers: list, rows: list[list[int]], length: int, device) -> MicroBatch:
    """The micro-batch of answers with these numbers in each of its rows, which are `length` tokens long."""
    input_ids = []
    position_ids = []
    index = []
    targets = []
    lengths = []
    for r, row in enumerate(rows):
        start = r * length
        for i in row:
            answer = answers[i]
            input_ids.append(torch.tensor(answer.prompt, dtype=torch.long))
            input_ids.append(answer.tokens.long())
            position_ids.append(torch.arange(len(answer.prompt) + len(answer.tokens)))
            first = start + len(answer.prompt) - 1  # the last prompt token predicts the first answer token
            index.append(torch.arange(first, first + len(answer.tokens)))
            targets.append(answer.tokens.long())
            lengths.append(len(answer.tokens))
            start += len(answer.prompt) + len(answer.tokens)
        # Unused room becomes a sequence of its own, that nothing looks at.
        tail = (r + 1) * length - start
        input_ids.append(torch.zeros(tail, dtype=torch.long))
        position_ids.append(torch.arange(tail))
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return MicroBatch(
        input_ids=torch.cat(input_ids).view(-1, length).to(device),
        position_ids=torch.cat(position_ids).view(-1, length).to(device),
        index=torch.cat(index).to(device),
        targets=torch.cat(targets).to(device),
        segment=segment.to(device),
        sequences=[i for row in rows for i in row],
    )


def empty_microbatch(device) -> MicroBatch:
    """One token that nothing looks at: keeps a rank in step with others that have more to do."""
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    none = torch.zeros(0, dtype=torch.long, device=device)
    return MicroBatch(input_ids=one, position_ids=one, index=none, targets=none, segment=none, sequences=[])


def has_varlen(model) -> bool:
    """Whether its attention reads the borders of sequences from position_ids. Packing all into one row then
    costs nothing, and is required."""
    name = model.config._attn_implementation or ""
    return "flash" in name or "varlen" in name


# ---------------------------------------------------------------- less to do


def merge_equal(answers: list) -> list:
    """Equal answers of one group become one, whose `count` is their number. The gradient is unchanged, as
    far as the engine gave equal tokens equal log-probs (in bf16 they may differ by rounding)."""
    merged: dict[tuple, object] = {}
    for answer in answers:
        key = (answer.prompt, answer.age, answer.advantage, answer.tokens.numpy().tobytes())
        if key in merged:
            merged[key].count += answer.count
        else:
            merged[key] = answer
    return list(merged.values())


def share_out(answers: list, rank: int, world: int) -> list[int]:
    """Numbers of the answers that `rank` trains on: dealt out longest first, there and back, to even out
    tokens."""
    turns = (rank, 2 * world - 1 - rank)
    order = sorted(range(len(answers)), key=lambda i: -len(answers[i].prompt) - len(answers[i].tokens))
    return [i for place, i in enumerate(order) if place % (2 * world) in turns]
