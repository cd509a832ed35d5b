"""The mathematics of GRPO with replay: advantages, one clipped objective, and the update.

All data, fresh or replayed, is trained by one decoupled clipped objective. With mu the policy that sampled a token
(its log-prob is stored), pi_old the policy at the start of the step, and pi the one being updated:

    w    = min(pi_old / mu, cap)                             importance weight, no gradient
    rho  = pi / pi_old                                       the ratio that is clipped
    loss = -sum over tokens of  weight * w * min(rho A, clip(rho, 1 - low, 1 + high) A)

For fresh answers w mends the small mismatch between engine and trainer (truncated importance sampling); for replayed
ones it mends staleness as well. GRPO, Dr. GRPO, DAPO, RLOO, GSPO and CISPO are choices of advantage, ratio and loss.

Departures from the usual code, each on purpose:
1. With one optimiser step per batch (the default) there is no pass for pi_old: it is pi with its gradient stopped. So
   rho is 1, and neither clip nor dual clip nor CISPO's bound acts; w does. They act with several minibatches or epochs.
2. The loss is a sum over tokens times a weight that is known for the whole optimiser step before it begins, so that
   neither micro-batches nor ranks can change it.
3. There is no padding and no mask (support/logprobs.py); the end-of-text token is trained like any other.
4. Dead groups leave the denominators too: a step of few useful groups is as long as one of many, where GRPO and Dr.
   GRPO make it shorter by the share of dead groups. Nor does --kl act on them.

Letters: P prompts, G answers per prompt, S answers to train on, N answer tokens, H hidden size, V vocabulary.
"""

import math
import random
from collections import defaultdict
from dataclasses import dataclass

import torch

from support import ranks
from support.logprobs import MicroBatch, empty_microbatch, has_varlen, merge_equal, pack, share_out, token_logprobs
from support.token_sums import token_figures


@dataclass
class Answer:
    """One answer to train on."""

    prompt: tuple[int, ...]  # token ids of what came before it
    tokens: torch.Tensor  # int [T], end of text inside
    behaviour: torch.Tensor  # float32 [T], log mu
    advantage: float
    age: int  # steps since it was sampled; 0 is fresh
    count: int = 1  # how many equal answers of its group it stands for (support/logprobs.merge_equal)


def to_answers(batch: list, prompts: list, step: int, mask_truncated: bool) -> list[Answer]:
    """The answers of the groups in `batch`, ready to train on. prompts: all of the data set, with token
    `ids`."""
    answers = []
    for group in batch:
        for i, tokens in enumerate(group.tokens):
            if group.truncated[i] and mask_truncated:
                continue  # it has counted in its group's mean, but nothing is learnt from it
            answer = Answer(
                prompt=prompts[group.prompt].ids,
                tokens=tokens,
                behaviour=group.logprobs[i],
                advantage=group.advantages[i].item(),
                age=step - group.birth,
            )
            answers.append(answer)
    return merge_equal(answers)


# ---------------------------------------------------------------- the objective, in pure functions


def advantages(rewards: torch.Tensor, kind: str = "centred") -> torch.Tensor:
    """Group-relative advantages.  rewards: [..., G] -> [..., G].  A group whose rewards are all equal gets zeros.

    centred  r - mean                        Dr. GRPO (2503.20783), and Prompt and Prioritized Replay
    std      (r - mean) / (std + 1e-4)       GRPO (2402.03300), standard deviation with G - 1 as in its public code
    rloo     r - mean of the other answers   RLOO (2402.14740) = centred * G / (G - 1)

    ValueError for another kind, and for groups of one.
    """
    group_size = rewards.shape[-1]
    if group_size < 2:
        raise ValueError(f"a group needs at least 2 answers to compare, got {group_size}")
    rewards = rewards if rewards.is_floating_point() else rewards.float()  # a user's 0 and 1 may be whole numbers
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
    """What each token's loss is multiplied by: [S], the weight of every token of an answer, times its count.

    lengths: [S] tokens of ALL answers that one optimiser step trains on (no dead groups, no masked answers), over
    all micro-batches and ranks. counts: [S] how many equal answers each stands for. With S the number of answers:

    token     1 / all tokens                DAPO's token mean
    sequence  1 / (S * own length)          original GRPO: mean per answer, then over answers
    constant  1 / (S * max_tokens)          Dr. GRPO: no length in the denominator

    ValueError for another kind.
    """
    if counts is None:
        counts = torch.ones_like(lengths)
    if kind == "token":
        return counts / (lengths * counts).sum().clamp(min=1)
    if kind == "sequence":
        return counts / (counts.sum() * lengths.clamp(min=1))
    if kind == "constant":
        return counts / (counts.sum() * max_tokens)
    raise ValueError(f"unknown normaliser {kind!r}; use token, sequence or constant")


def per_sequence_mean(values: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [N] over the tokens of each answer, handed back to every token.  segment: [N] answer
    numbers."""
    size = int(segment.max()) + 1 if len(segment) else 0
    totals = values.new_zeros(size).index_add(0, segment, values)
    counts = values.new_zeros(size).index_add(0, segment, torch.ones_like(values))
    return (totals / counts.clamp(min=1))[segment]


def importance_weights(old: torch.Tensor, behaviour: torch.Tensor, cap: float) -> torch.Tensor:
    """w = min(pi_old / mu, cap) without gradient, or 1 if `cap` is 0.  log-probs [N] -> [N]"""
    importance = torch.exp(old - behaviour).detach()
    if cap == 0:
        return torch.ones_like(importance)
    return importance.clamp(max=cap)


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
    is_cap: float = 2.0,
    ratio: str = "token",
    loss: str = "clip",
    proximal: str = "old",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoupled clipped objective.  All tensors [N], one entry a token -> (loss summed over tokens, and [N]:
    True where the clip acts: there the gradient is zero, or with cispo bounded).

    logprob    log pi, with gradient             advantage  of the token's answer
    old        log pi_old                        weight     from `token_weights`
    behaviour  log mu, as sampled                segment    which answer the token belongs to
    is_cap     truncation of w (inf: none; 0: w = 1, i.e. replayed data taken for on-policy)
    ratio      token (GRPO) or sequence (GSPO, 2507.18071: geometric mean over the answer)
    loss       clip (PPO) or cispo (2506.13585: the weight is clipped and every token keeps its gradient)
    proximal   old: clip around pi_old, w corrects (the decoupled objective of 2110.00641; POPO);
               birth: clip around mu, w = 1, for fresh answers too (2606.04560)
    dual_clip  for A < 0 the term is at least dual_clip * A (1912.09729); 0: no such bound
    """
    if proximal == "birth":
        old = behaviour
    w = importance_weights(old, behaviour, is_cap)
    log_ratio = logprob - old.detach()
    if ratio == "sequence":
        log_ratio = per_sequence_mean(log_ratio, segment)
    rho = torch.exp(log_ratio)

    # CISPO: the ratio is a weight, and only the log-prob has a gradient.
    if loss == "cispo":
        clipped = rho.detach() > 1 + clip_high
        term = rho.detach().clamp(max=1 + clip_high) * advantage * logprob
        return -(weight * w * term).sum(), clipped

    # PPO: the worse of the ratio and the clipped ratio.
    unclipped = rho * advantage
    limited = rho.clamp(1 - clip_low, 1 + clip_high) * advantage
    term = torch.minimum(unclipped, limited)
    clipped = limited < unclipped
    if dual_clip:
        floor = dual_clip * advantage
        clipped = clipped | ((advantage < 0) & (term < floor))
        term = torch.where(advantage < 0, torch.maximum(term, floor), term)
    return -(weight * w * term).sum(), clipped


def k3(logprob: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(p || q) per token, never negative: exp(d) - 1 - d, d = log q - log p, on tokens
    sampled from p (k3 of joschu.net/blog/kl-approx.html)."""
    difference = other - logprob
    return torch.expm1(difference) - difference


# ---------------------------------------------------------------- the policy


class Policy(torch.nn.Module):
    """A causal language model whose forward gives log-probs of packed answers. It is the root that FSDP
    needs, to have the head's weight at hand."""

    def __init__(self, model, dtype: str = "float32"):
        super().__init__()
        self.model = model
        self.dtype = getattr(torch, dtype)  # of computation

    def pack(self, answers: list[Answer], tokens: int) -> list[MicroBatch]:
        """Micro-batches of at most `tokens` tokens, on the policy's device."""
        row_length = tokens if has_varlen(self.model) else None
        return pack(answers, tokens, row_length, next(self.parameters()).device)

    def forward(self, micro: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log-prob and entropy of every answer token of `micro`, [N] each, under softmax(logits / temperature).

        There is no mask and no cache: given either, transformers silently lets packed answers see their neighbours.
        """
        # Over several ranks FSDP's own mixed precision is in charge.
        low = self.dtype == torch.bfloat16 and ranks.WORLD == 1
        with torch.autocast(micro.targets.device.type, torch.bfloat16, enabled=low):
            output = self.model.base_model(
                input_ids=micro.input_ids, position_ids=micro.position_ids, attention_mask=None, use_cache=False
            )
            hidden = output.last_hidden_state.flatten(0, 1)[micro.index]  # [N, H]: only what predicts an answer token
            return token_logprobs(hidden, self.model.get_output_embeddings().weight, micro.targets, temperature)


# ---------------------------------------------------------------- the update


@dataclass
class Work:
    """What this rank does in one optimiser step."""

    answers: list[Answer]
    weights: torch.Tensor  # [answers], what each of their tokens is multiplied by
    micros: list[MicroBatch]
    old: list[torch.Tensor]  # log pi_old of each micro-batch, [N]; empty where pi_old is pi with its gradient stopped


def plan_work(policy: Policy, answers: list[Answer], cfg, step: int) -> list[Work]:
    """One pass over `answers`: this rank's part of each optimiser step."""
    device = next(policy.parameters()).device
    # Several minibatches are shuffled, so that fresh and replayed answers are mixed in each.
    answers = list(answers)
    if cfg.minibatches > 1:
        random.Random(f"{cfg.seed} {step}").shuffle(answers)
    work = []
    for first in range(min(cfg.minibatches, len(answers))):
        batch = answers[first :: cfg.minibatches]
        # The weights are those of the whole optimiser step, whatever part of it is this rank's.
        lengths = torch.tensor([len(answer.tokens) for answer in batch])
        counts = torch.tensor([answer.count for answer in batch])
        weights = token_weights(lengths, cfg.normaliser, cfg.max_tokens, counts)
        if ranks.WORLD > 1:
            mine = share_out(batch, ranks.RANK, ranks.WORLD)
            batch = [batch[i] for i in mine]
            weights = weights[mine]
        micros = policy.pack(batch, cfg.tokens_per_microbatch)
        if ranks.WORLD > 1:
            # All ranks go through a sharded model together, so that each needs as many micro-batches as the busiest.
            most = int(ranks.largest(len(micros)))
            micros += [empty_microbatch(device)] * (most - len(micros))
        work.append(Work(batch, weights.to(device), micros, old=[]))
    return work


@torch.no_grad()
def remember_old(policy: Policy, work: list[Work], cfg) -> None:
    """Sets `old` of all `work`: pi_old is the policy before the first of several optimiser steps."""
    for part in work:
        for micro in part.micros:
            logprob, _ = policy(micro, cfg.temperature)
            part.old.append(logprob)


def update(policy: Policy, optimizer, answers: list[Answer], cfg, step: int, reference: Policy | None = None) -> dict:
    """Trains on `answers` (the same list on every rank): cfg.epochs times cfg.minibatches optimiser steps, each in
    micro-batches of bounded size, the KL to `reference` included where there is one. Returns figures over all
    tokens.

    FloatingPointError if a gradient is not finite; its optimiser step is not taken.
    """
    # The work of each optimiser step, and pi_old if there are several: the policy moves between them.
    policy.train()
    work = plan_work(policy, answers, cfg, step)
    if len(work) * cfg.epochs > 1:
        remember_old(policy, work, cfg)

    # One optimiser step for each minibatch of each epoch.
    sums: dict[str, float] = defaultdict(float)
    norms = []
    for part in work * cfg.epochs:
        for i in range(len(part.micros)):
            loss = microbatch_loss(policy, reference, part, i, cfg, sums)
            (loss * ranks.WORLD).backward()  # FSDP takes the mean over ranks, and the loss is a sum
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        if ranks.WORLD > 1:
            norm = ranks.whole(norm)
        norms.append(norm.item())
        if not math.isfinite(norms[-1]):
            raise FloatingPointError(
                f"the gradient of step {step} is {norms[-1]}; the newest checkpoint is older: lower --lr or "
                "look at the rewards, and go on with --resume"
            )
        optimizer.step()
        optimizer.zero_grad()
    policy.eval()
    return token_figures(sums, norms)


def microbatch_loss(policy: Policy, reference, part: Work, number: int, cfg, sums: dict) -> torch.Tensor:
    """The loss of one micro-batch of `part`, summed over its tokens; adds its figures to `sums`."""
    micro = part.micros[number]
    logprob, entropy = policy(micro, cfg.temperature)  # [N] each
    if not micro.sequences:
        return logprob.sum()  # zero; its backward pass keeps the sharded ranks in step

    # One entry a token, from one an answer. float64, because the log's sums run over millions of tokens.
    rows = [part.answers[i] for i in micro.sequences]
    behaviour = torch.cat([answer.behaviour for answer in rows]).to(logprob.device)
    old = part.old[number] if part.old else logprob.detach()
    per_answer = [[answer.advantage, answer.age > 0, answer.count] for answer in rows]
    columns = torch.tensor(per_answer, dtype=torch.float64, device=logprob.device)[micro.segment]
    advantage, stale, count = columns.unbind(1)  # [N] each
    weight = part.weights[micro.sequences][micro.segment]

    # One objective for all of them.
    tokens = (logprob, old, behaviour, advantage.float(), weight, micro.segment)
    clip = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high, "dual_clip": cfg.dual_clip}
    kind = {"ratio": cfg.ratio, "loss": cfg.loss, "proximal": cfg.proximal}
    loss, clipped = policy_loss(*tokens, is_cap=cfg.is_cap, **clip, **kind)

    # For the log: how fresh and replayed tokens fared. Each token counts as often as its answer stands for equal ones.
    importance = torch.exp(old - behaviour)
    fresh = 1 - stale
    sums["loss"] += loss.item()
    sums["fresh"] += fresh @ count
    sums["stale"] += stale @ count
    sums["fresh_clipped"] += (clipped * fresh) @ count
    sums["stale_clipped"] += (clipped * stale) @ count
    sums["entropy"] += entropy.double() @ count
    sums["mismatch"] += (k3(behaviour, old) * fresh) @ count
    sums["w"] += (importance * stale) @ count
    sums["w2"] += (importance.square() * stale) @ count
    sums["max_ratio"] = max(sums["max_ratio"], (importance * fresh).max().item())
    if cfg.is_cap and cfg.proximal == "old":
        sums["capped"] += (importance > cfg.is_cap).double() @ count
    if reference is None:
        return loss

    # k3 has the value of KL(pi || reference), but alone the gradient of the reverse one: times pi / pi_old it is right;
    # and times w, as the tokens are mu's.
    with torch.no_grad():
        anchor, _ = reference(micro, cfg.temperature)
    importance = importance_weights(old, behaviour, cfg.is_cap)
    penalty = (k3(logprob, anchor) * torch.exp(logprob - old) * importance * weight).sum()
    sums["kl"] += penalty.item()
    return loss + cfg.kl * penalty
