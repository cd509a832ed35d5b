"""The mathematics of GRPO with replay: advantages, one clipped objective, log-probs without full logits, packing.

Pure functions of tensors. All data, fresh or replayed, is trained by one decoupled clipped objective. With mu the
policy that sampled a token (its log-prob is stored), pi_old the policy at the start of the step, pi the one updated:

    w    = min(pi_old / mu, cap)                             importance weight, no gradient
    rho  = pi / pi_old                                       ratio that is clipped
    loss = -sum over tokens of  weight * w * min(rho A, clip(rho, 1 - low, 1 + high) A)

For fresh answers w mends the small mismatch between engine and trainer (truncated importance sampling); for replayed
ones it mends staleness as well. GRPO, Dr. GRPO, DAPO, RLOO, GSPO and CISPO are choices of advantage, ratio, loss and
`weight`; no other code path.

Departures from the usual code, each on purpose:
1. With one optimiser step per batch there is no old-log-prob pass: pi_old is pi with its gradient stopped.
2. The loss is a sum over tokens times a weight that is known for the whole optimiser step before it begins, so that
   neither micro-batches nor ranks can change it.
3. Answers are flat lists of tokens with lengths. There is no padding and no mask, so none can be wrong; the
   end-of-text token is an ordinary token of the answer, because the model must learn to stop.

Letters: P prompts, G answers per prompt, S sequences, N answer tokens, H hidden size, V vocabulary.
"""

import random
from dataclasses import dataclass

import torch


def advantages(rewards: torch.Tensor, kind: str = "centred") -> torch.Tensor:
    """Group-relative advantages.  rewards: [..., G] -> [..., G].  A group whose rewards are all equal gets zeros.

    centred  r - mean                        Dr. GRPO (2503.20783), and Prompt and Prioritized Replay
    std      (r - mean) / (std + 1e-4)       GRPO (2402.03300), standard deviation with G - 1 as in its public code
    rloo     r - mean of the other answers   RLOO (2402.14740) = centred * G / (G - 1)
    """
    group_size = rewards.shape[-1]
    if group_size < 2:
        raise ValueError(f"a group needs at least 2 answers to compare, got {group_size}")
    centred = rewards - rewards.mean(-1, keepdim=True)
    if kind == "centred":
        return centred
    if kind == "std":
        return centred / (rewards.std(-1, keepdim=True) + 1e-4)
    if kind == "rloo":
        return centred * group_size / (group_size - 1)
    raise ValueError(f"unknown advantage {kind!r}; use centred, std or rloo")


def token_weights(
    lengths: torch.Tensor, kind: str, max_tokens: int, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """What each token's loss is multiplied by.  lengths: [S] answer tokens of ALL sequences of one optimiser step,
    over all micro-batches and ranks; counts: [S] how many equal answers each stands for -> [S], the weight of every
    token of that sequence (times its count). With S the number of answers:

    token     1 / all tokens                DAPO's token mean
    sequence  1 / (S * own length)          original GRPO: mean per answer, then over answers
    constant  1 / (S * max_tokens)          Dr. GRPO: no length in the denominator
    """
    counts = torch.ones_like(lengths) if counts is None else counts
    if kind == "token":
        return counts / (lengths * counts).sum().clamp(min=1)
    if kind == "sequence":
        return counts / (counts.sum() * lengths.clamp(min=1))
    if kind == "constant":
        return counts / (counts.sum() * max_tokens)
    raise ValueError(f"unknown normaliser {kind!r}; use token, sequence or constant")


def per_sequence_mean(values: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [N] over the tokens of each sequence, handed back to every token.  segment: [N] sequence ids."""
    size = int(segment.max()) + 1 if len(segment) else 0
    totals = values.new_zeros(size).index_add(0, segment, values)
    counts = values.new_zeros(size).index_add(0, segment, torch.ones_like(values))
    return (totals / counts.clamp(min=1))[segment]


def policy_loss(
    logprob: torch.Tensor,
    old: torch.Tensor,
    behaviour: torch.Tensor,
    advantage: torch.Tensor,
    weight: torch.Tensor,
    segment: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.272,
    dual_clip: float | None = None,
    cap: float | None = 2.0,
    ratio: str = "token",
    loss: str = "clip",
    proximal: str = "old",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoupled clipped objective.  All tensors [N], one entry a token -> (loss summed over tokens, and [N]: True
    where the clip has stopped the gradient).

    logprob    log pi, with gradient             advantage  of the token's answer
    old        log pi_old                        weight     from `token_weights`
    behaviour  log mu, as sampled                segment    which sequence the token belongs to
    cap        truncation of w (None: no truncation; 0: w = 1, i.e. replayed data taken for on-policy)
    ratio      token (GRPO) or sequence (GSPO, 2507.18071: geometric mean over the answer)
    loss       clip (PPO) or cispo (2506.13585: the weight is clipped and every token keeps its gradient)
    proximal   old: clip around pi_old, w corrects (decoupled; POPO); birth: clip around mu, w = 1 (2606.04560)
    dual_clip  for A < 0 the term is at least dual_clip * A (1912.09729)
    """
    if proximal == "birth":
        old = behaviour
    importance = torch.exp(old - behaviour).detach()
    w = torch.ones_like(importance) if cap == 0 else importance if cap is None else importance.clamp(max=cap)
    log_ratio = logprob - old.detach()
    if ratio == "sequence":
        log_ratio = per_sequence_mean(log_ratio, segment)
    rho = torch.exp(log_ratio)
    if loss == "cispo":
        clipped = rho.detach() > 1 + clip_high
        term = rho.detach().clamp(max=1 + clip_high) * advantage * logprob
    else:
        unclipped, limited = rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage
        term = torch.minimum(unclipped, limited)
        clipped = limited < unclipped
        if dual_clip is not None:
            floor = dual_clip * advantage
            clipped = clipped | ((advantage < 0) & (term < floor))
            term = torch.where(advantage < 0, torch.maximum(term, floor), term)
    return -(weight * w * term).sum(), clipped


def k3(logprob: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(p || q) per token: exp(d) - 1 - d, d = log q - log p, on tokens sampled from p."""
    difference = other - logprob
    return torch.expm1(difference) - difference


class _ChunkedLogProb(torch.autograd.Function):
    """log-prob and entropy of targets from hidden states, a chunk of tokens at a time: [N, V] logits never exist."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, inverse_temperature, chunk):
        logprob = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy, normaliser = torch.empty_like(logprob), torch.empty_like(logprob)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).float().mul_(inverse_temperature)  # [chunk, V]
            normaliser[rows] = torch.logsumexp(logits, -1)
            logprob[rows] = logits.gather(1, targets[rows, None])[:, 0] - normaliser[rows]
            expected = (torch.softmax(logits, -1).mul_(logits)).sum(-1)
            entropy[rows] = normaliser[rows] - expected
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.inverse_temperature, ctx.chunk = inverse_temperature, chunk
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
            slope = torch.exp(logits.sub_(normaliser[rows, None])).neg_()  # d logprob / d logits = onehot - softmax
            slope.scatter_add_(1, targets[rows, None], torch.ones_like(slope[:, :1]))
            slope.mul_((grad[rows] * ctx.inverse_temperature)[:, None])
            slope = slope.to(weight.dtype)
            grad_hidden[rows] = slope @ weight
            grad_weight += slope.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden, weight, targets, temperature: float = 1.0, chunk: int = 1024):
    """log-prob of `targets` [N] and entropy [N] of softmax(hidden [N, H] @ weight [V, H].T / temperature), in fp32.

    Divided by the sampling temperature, because that is the distribution the answers were drawn from. The entropy is
    for the log and carries no gradient.
    """
    return _ChunkedLogProb.apply(hidden, weight, targets, 1.0 / temperature, chunk)


@dataclass
class Sequence:
    """One answer to train on: what came before it, its tokens and log-probs as sampled, and its place in the log."""

    prompt: tuple[int, ...]  # token ids
    tokens: torch.Tensor  # [T] int, end of text inside
    behaviour: torch.Tensor  # [T] float32, log mu
    advantage: float
    age: int  # steps since it was sampled; 0 is fresh
    count: int = 1  # equal answers of one group are trained once, with their number as weight

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass
class MicroBatch:
    """Sequences packed without padding into rows; R rows of L tokens, N answer tokens in all."""

    input_ids: torch.Tensor  # [R, L]
    position_ids: torch.Tensor  # [R, L], restarts at 0 with each sequence: the model reads the borders from it
    index: torch.Tensor  # [N] where, in R * L, the hidden state stands that predicts each answer token
    targets: torch.Tensor  # [N]
    segment: torch.Tensor  # [N] which sequence, counted within this micro-batch
    sequences: list[int]  # their numbers in the list given to `pack`


def pack(sequences: list[Sequence], tokens: int, row_length: int | None = None, device="cpu") -> list[MicroBatch]:
    """Micro-batches of at most `tokens` tokens each (or one sequence, where one alone is longer), longest first.

    Rows are as long as the longest sequence unless `row_length` says more: attention without a variable-length kernel
    costs rows * L^2, so that short rows are cheap, and several short sequences still share a row.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    batches: list[MicroBatch] = []
    while order:
        length = max(len(sequences[order[0]]), row_length or 0)
        rows: list[list[int]] = []
        room: list[int] = []
        waiting = []
        for i in order:  # first fit, longest first
            size = len(sequences[i])
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
        batches.append(_fill(sequences, rows, length, device))
        order = waiting
    return batches


def _fill(sequences: list[Sequence], rows: list[list[int]], length: int, device) -> MicroBatch:
    input_ids, position_ids, index, targets, lengths = [], [], [], [], []
    for r, row in enumerate(rows):
        start = r * length
        for i in row:
            s = sequences[i]
            input_ids += [torch.tensor(s.prompt, dtype=torch.long), s.tokens.long()]
            position_ids.append(torch.arange(len(s)))
            first = start + len(s.prompt) - 1  # the last prompt token predicts the first answer token
            index.append(torch.arange(first, first + len(s.tokens)))
            targets.append(s.tokens.long())
            lengths.append(len(s.tokens))
            start += len(s)
        tail = (r + 1) * length - start  # unused room becomes a sequence of its own, that nothing looks at
        input_ids.append(torch.zeros(tail, dtype=torch.long))
        position_ids.append(torch.arange(tail))
    return MicroBatch(
        torch.cat(input_ids).view(-1, length).to(device),
        torch.cat(position_ids).view(-1, length).to(device),
        torch.cat(index).to(device),
        torch.cat(targets).to(device),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device),
        [i for row in rows for i in row],
    )


def model_logprobs(model, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log-prob and entropy of every answer token of `batch`, [N] each.

    No mask and no cache: given either, transformers silently lets packed sequences see their neighbours.
    """
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False
    ).last_hidden_state
    chosen = hidden.flatten(0, 1)[batch.index]  # [N, H]: only what predicts an answer token meets the vocabulary
    return token_logprobs(chosen, model.get_output_embeddings().weight, batch.targets, temperature)


def update(model, optimizer, sequences: list[Sequence], cfg, step: int, reference=None) -> dict[str, float]:
    """Trains on `sequences`: `cfg.minibatches` optimiser steps, each in micro-batches of bounded size. Returns figures
    for the log, summed over all tokens of all minibatches.

    pi_old is the policy before the first of these optimiser steps. With one minibatch it equals pi while the gradient
    is taken, so that it costs no pass; with more it is computed once, before the first.
    """
    device = next(model.parameters()).device
    parts = [list(range(len(sequences)))]
    if cfg.minibatches > 1:
        random.Random(f"{cfg.seed} {step}").shuffle(parts[0])  # fresh and replayed mixed
        parts = [part for part in (parts[0][i :: cfg.minibatches] for i in range(cfg.minibatches)) if part]
    model.train()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    old: dict[int, torch.Tensor] = {}
    if len(parts) > 1:
        with torch.no_grad(), autocast:
            for micro in pack(sequences, cfg.tokens_per_microbatch, device=device):
                logprob, _ = model_logprobs(model, micro, cfg.temperature)
                lengths = [len(sequences[i].tokens) for i in micro.sequences]
                old.update(zip(micro.sequences, logprob.split(lengths), strict=True))
    sums = dict.fromkeys(SUMS, 0.0)
    grad_norm = 0.0
    for part in parts:
        batch = [sequences[i] for i in part]
        lengths, counts = (torch.tensor(column) for column in zip(*((len(s.tokens), s.count) for s in batch), strict=True))
        weights = token_weights(lengths, cfg.normaliser, cfg.max_tokens, counts)
        for micro in pack(batch, cfg.tokens_per_microbatch, device=device):
            with autocast:
                logprob, entropy = model_logprobs(model, micro, cfg.temperature)
            rows = [batch[i] for i in micro.sequences]
            before = torch.cat([old[part[i]] for i in micro.sequences]) if old else logprob.detach()
            weight = weights[micro.sequences].to(device)[micro.segment]
            loss = _microbatch_loss(sums, logprob, before, entropy, rows, weight, micro.segment, cfg)
            if reference is not None:
                with torch.no_grad(), autocast:
                    anchor, _ = model_logprobs(reference, micro, cfg.temperature)
                penalty = (k3(logprob, anchor) * weight).sum()
                loss = loss + cfg.kl * penalty
                sums["kl"] += penalty.item() / len(parts)
            loss.backward()
        grad_norm += torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item() / len(parts)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return _figures(sums) | {"grad_norm": grad_norm, "optimizer_steps": len(parts)}


SUMS = ("fresh", "stale", "fresh_clipped", "stale_clipped", "entropy", "mismatch", "capped", "w", "w2", "kl", "loss")


def _microbatch_loss(sums, logprob, old, entropy, rows, weight, segment, cfg):
    """Loss of one micro-batch; adds its token sums to `sums` on the way."""
    device = logprob.device
    behaviour = torch.cat([s.behaviour for s in rows]).to(device)
    advantage = torch.tensor([s.advantage for s in rows], device=device)[segment]
    stale = torch.tensor([s.age > 0 for s in rows], device=device)[segment]
    loss, clipped = policy_loss(
        logprob, old, behaviour, advantage, weight, segment,
        clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip, cap=cfg.is_cap,
        ratio=cfg.ratio, loss=cfg.loss, proximal=cfg.proximal,
    )  # fmt: skip
    importance = torch.exp(old - behaviour)
    count = torch.tensor([s.count for s in rows], dtype=torch.float64, device=device)[segment]
    columns = [
        ~stale, stale, clipped & ~stale, clipped & stale, entropy, k3(behaviour, old) * ~stale,
        importance > (cfg.is_cap or torch.inf), importance * stale, importance.square() * stale,
    ]  # fmt: skip
    for name, value in zip(SUMS, (torch.stack([c.double() for c in columns]) @ count).tolist(), strict=False):
        sums[name] += value
    sums["max_ratio"] = max(sums.get("max_ratio", 1.0), importance[~stale].max().item() if (~stale).any() else 1.0)
    sums["loss"] += loss.item()
    return loss


def _figures(sums: dict[str, float]) -> dict[str, float]:
    fresh, stale = sums["fresh"], sums["stale"]
    tokens = max(fresh + stale, 1)
    figures = {
        "loss": sums["loss"],
        "entropy_trained": sums["entropy"] / tokens,
        "clip_fraction": (sums["fresh_clipped"] + sums["stale_clipped"]) / tokens,
        "engine_kl": sums["mismatch"] / max(fresh, 1),
        "engine_max_ratio": sums.get("max_ratio", 1.0),
        "is_capped": sums["capped"] / tokens,
        "kl": sums["kl"],
        "trained_tokens": int(fresh + stale),
    }
    if stale:
        figures |= {
            "clip_fraction_fresh": sums["fresh_clipped"] / max(fresh, 1),
            "clip_fraction_replayed": sums["stale_clipped"] / stale,
            "importance_replayed": sums["w"] / stale,  # near 1 while the stored answers are still nearly on-policy
            "ess_replayed": sums["w"] ** 2 / (stale * sums["w2"]),
        }
    return figures
