"""The mathematics of GRPO with replay: advantages, one clipped objective, and the update.

All data, fresh or replayed, is trained by one decoupled clipped objective. With mu the
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
3. No padding and no masks (logprobs.py); the end-of-text token is trained like any other.
4. Dead groups leave the denominators too: a step of few useful groups is as long as one of many, where GRPO and
   Dr. GRPO make it shorter by the share of dead groups. Nor does --kl act on them.

Letters: P prompts, G answers per prompt, S sequences, N answer tokens.
"""

import math
import random

import torch

from support import ranks
from support.logprobs import LogProbModel, Sequence, autocast, empty_microbatch, share_out


def advantages(rewards: torch.Tensor, kind: str = "centred") -> torch.Tensor:
    """Group-relative advantages.  rewards: [..., G] -> [..., G].  A group whose rewards are all equal gets zeros.

    centred  r - mean                        Dr. GRPO (2503.20783), and Prompt and Prioritized Replay
    std      (r - mean) / (std + 1e-4)       GRPO (2402.03300), standard deviation with G - 1 as in its public code
    rloo     r - mean of the other answers   RLOO (2402.14740) = centred * G / (G - 1)
    """
    group_size = rewards.shape[-1]
    if group_size < 2:
        raise ValueError(f"a group needs at least 2 answers to compare, got {group_size}")
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)  # the float mean of equal numbers can miss them
    centred = (rewards - rewards.mean(-1, keepdim=True)).masked_fill(equal, 0.0)
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
    """What each token's loss is multiplied by.  lengths: [S] answer tokens of ALL sequences that one optimiser step
    trains on (no dead groups, no masked answers), over all micro-batches and ranks; counts: [S] how many equal answers
    each stands for -> [S], the weight of every token of that sequence (times its count). With S the number of answers:

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


def importance_weights(old: torch.Tensor, behaviour: torch.Tensor, cap: float) -> torch.Tensor:
    """w = min(pi_old / mu, cap) without gradient, or 1 if `cap` is 0.  log-probs [N] -> [N]"""
    importance = torch.exp(old - behaviour).detach()
    return torch.ones_like(importance) if cap == 0 else importance.clamp(max=cap)


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
    dual_clip: float = 0.0,
    cap: float = 2.0,
    ratio: str = "token",
    loss: str = "clip",
    proximal: str = "old",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoupled clipped objective.  All tensors [N], one entry a token -> (loss summed over tokens, and [N]: True
    where the clip acts: there the gradient is zero, or with cispo bounded).

    logprob    log pi, with gradient             advantage  of the token's answer
    old        log pi_old                        weight     from `token_weights`
    behaviour  log mu, as sampled                segment    which sequence the token belongs to
    cap        truncation of w (inf: none; 0: w = 1, i.e. replayed data taken for on-policy)
    ratio      token (GRPO) or sequence (GSPO, 2507.18071: geometric mean over the answer)
    loss       clip (PPO) or cispo (2506.13585: the weight is clipped and every token keeps its gradient)
    proximal   old: clip around pi_old, w corrects (the decoupled objective of 2110.00641; POPO);
               birth: clip around mu, w = 1, for fresh answers too (2606.04560)
    dual_clip  for A < 0 the term is at least dual_clip * A (1912.09729); 0: no such bound
    """
    if proximal == "birth":
        old = behaviour
    w = importance_weights(old, behaviour, cap)
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
        if dual_clip:
            floor = dual_clip * advantage
            clipped = clipped | ((advantage < 0) & (term < floor))
            term = torch.where(advantage < 0, torch.maximum(term, floor), term)
    return -(weight * w * term).sum(), clipped


def k3(logprob: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(p || q) per token, never negative: exp(d) - 1 - d, d = log q - log p, on tokens sampled from p
    (k3 of joschu.net/blog/kl-approx.html)."""
    difference = other - logprob
    return torch.expm1(difference) - difference


def split_minibatches(count: int, parts: int, seed: str) -> list[list[int]]:
    """Numbers 0 .. count-1 in `parts` lists (fewer if there are fewer numbers), shuffled where there are several."""
    order = list(range(count))
    if parts > 1:
        random.Random(seed).shuffle(order)  # fresh and replayed mixed
    return [part for part in (order[i::parts] for i in range(parts)) if part]


def make_optimizer(model: torch.nn.Module, cfg) -> torch.optim.Optimizer:
    """AdamW over float32 weights: in bf16 a weight does not move at lr 1e-6. ValueError if torchao is missing."""
    common = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **common, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(f"--optimizer adamw8bit needs torchao: pip install torchao ({error})") from error
    return AdamW8bit(model.parameters(), **common)


def plan_work(model: LogProbModel, sequences: list[Sequence], cfg, step: int) -> list[tuple]:
    """For each optimiser step: this rank's sequences, the weights of their tokens, and their micro-batches."""
    device = next(model.parameters()).device
    work = []
    for part in split_minibatches(len(sequences), cfg.minibatches, f"{cfg.seed} {step}"):
        batch = [sequences[i] for i in part]
        lengths, counts = torch.tensor([[len(s.tokens) for s in batch], [s.count for s in batch]])
        weights = token_weights(lengths, cfg.normaliser, cfg.max_tokens, counts)  # over all ranks, before the split
        mine = share_out(batch, ranks.rank(), ranks.world())
        rows = [batch[i] for i in mine]
        micros = model.pack(rows, cfg.tokens_per_microbatch)
        most = int(ranks.largest(len(micros)))  # sharded models: all ranks go through together
        work.append((rows, weights[mine].to(device), micros + [empty_microbatch(device)] * (most - len(micros))))
    return work * cfg.epochs


@torch.no_grad()
def drift(model: LogProbModel, groups: list[list[Sequence]], cfg) -> list[float]:
    """How far the policy has moved from those that sampled each of `groups`: the mean over a group's tokens of k3, an
    estimate of KL(mu || pi).  [len(groups)]"""
    device, sequences = next(model.parameters()).device, [s for group in groups for s in group]
    owner = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=device)
    totals = torch.zeros(len(groups), device=device)
    with autocast(model, getattr(torch, cfg.dtype)):
        for micro in model.pack(sequences, cfg.tokens_per_microbatch):
            logprob, _ = model(micro, cfg.temperature)  # [N]
            behaviour = torch.cat([sequences[i].behaviour for i in micro.sequences]).to(device)
            totals.index_add_(0, owner[micro.sequences][micro.segment], k3(behaviour, logprob))
    tokens = [sum(len(s.tokens) for s in group) for group in groups]
    return [total / max(n, 1) for total, n in zip(totals.tolist(), tokens, strict=True)]


def update(model, optimizer, sequences: list[Sequence], cfg, step: int, reference=None) -> dict[str, float]:
    """Trains on `sequences` (the same list on every rank): `cfg.epochs` times `cfg.minibatches` optimiser steps, each
    in micro-batches of bounded size, the KL to `reference` included where there is one. Returns figures over all
    tokens.

    pi_old is the policy before the first of these optimiser steps. With a single one it equals pi while the gradient is
    taken, so that it costs no pass; with more it is computed once, before the first. FloatingPointError if the gradient
    is not finite; the weights have not moved then.
    """
    model, reference = (m if m is None or isinstance(m, LogProbModel) else LogProbModel(m) for m in (model, reference))
    precision = autocast(model, getattr(torch, cfg.dtype))
    work = plan_work(model, sequences, cfg, step)
    sums, grad_norm, old = dict.fromkeys(SUMS, 0.0), 0.0, {}
    model.train()
    if len(work) > 1:
        with torch.no_grad(), precision:
            first_epoch = work[: len(work) // cfg.epochs]
            old = {id(micro): model(micro, cfg.temperature)[0] for _, _, micros in first_epoch for micro in micros}
    for rows, weights, micros in work:
        for micro in micros:
            with precision:
                logprob, entropy = model(micro, cfg.temperature)
            weight = weights[micro.sequences][micro.segment]  # [N]
            before = old.get(id(micro), logprob.detach())
            loss, importance = _microbatch_loss(
                sums, logprob, before, entropy, [rows[i] for i in micro.sequences], weight, micro, cfg
            )
            if reference is not None:
                with torch.no_grad(), precision:
                    anchor, _ = reference(micro, cfg.temperature)
                # times pi / pi_old: k3 has the value of KL(pi || reference), but alone the gradient of the reverse;
                # and times w, as the tokens are mu's
                penalty = (k3(logprob, anchor) * torch.exp(logprob - before) * importance * weight).sum()
                loss = loss + cfg.kl * penalty
                sums["kl"] += penalty.item() / len(work)
            (loss * ranks.world()).backward()  # FSDP takes the mean over ranks, and the loss is a sum
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {step} is {norm}; the newest checkpoint is older: lower --lr or look at the "
                "rewards, and go on with --resume"
            )
        grad_norm += norm / len(work)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    most = ranks.largest(sums.pop("max_ratio"))
    sums = dict(zip(sums, ranks.total(list(sums.values())), strict=True))
    sums["loss"] /= max(len(work), 1)
    return _figures(sums) | {"engine_max_ratio": most, "grad_norm": grad_norm, "optimizer_steps": len(work)}


# sums over answer tokens; the first nine in the order in which `_microbatch_loss` makes them
SUMS = ("fresh", "stale", "fresh_clipped", "stale_clipped", "entropy", "mismatch", "capped", "w", "w2", "kl", "loss")
SUMS += ("max_ratio",)


def _microbatch_loss(sums, logprob, old, entropy, rows: list[Sequence], weight, micro, cfg) -> tuple:
    """Loss of one micro-batch, and the importance weights of its tokens [N]; adds its token sums to `sums`."""
    if not rows:
        return logprob.sum(), weight  # nothing, but with a gradient to send through the sharded model
    device, segment = logprob.device, micro.segment
    behaviour = torch.cat([s.behaviour for s in rows]).to(device)
    columns = torch.tensor([[s.advantage, s.age > 0, s.count] for s in rows], dtype=torch.float64, device=device)
    advantage, stale, count = columns[segment].unbind(1)  # [N] each
    loss, clipped = policy_loss(
        logprob, old, behaviour, advantage.float(), weight, segment,
        clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip, cap=cfg.is_cap,
        ratio=cfg.ratio, loss=cfg.loss, proximal=cfg.proximal,
    )  # fmt: skip
    importance = torch.exp(old - behaviour)
    bound = cfg.is_cap if cfg.is_cap and cfg.proximal == "old" else torch.inf
    fresh, capped = 1 - stale, importance > bound
    figures = [
        fresh, stale, clipped * fresh, clipped * stale, entropy, k3(behaviour, old) * fresh, capped,
        importance * stale, importance.square() * stale,
    ]  # fmt: skip
    for name, value in zip(SUMS, (torch.stack([f.double() for f in figures]) @ count).tolist(), strict=False):
        sums[name] += value
    sums["max_ratio"] = max(sums["max_ratio"], (importance * fresh).max().item())
    sums["loss"] += loss.item()
    return loss, importance_weights(old, behaviour, cfg.is_cap)


def _figures(sums: dict[str, float]) -> dict[str, float]:
    fresh, stale = sums["fresh"], sums["stale"]
    tokens = max(fresh + stale, 1)
    figures = {
        "loss": sums["loss"],
        "entropy_trained": sums["entropy"] / tokens,
        "clip_fraction": (sums["fresh_clipped"] + sums["stale_clipped"]) / tokens,
        "engine_kl": sums["mismatch"] / max(fresh, 1),
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
