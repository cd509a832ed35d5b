"""Rules that are no paper's method: a baseline, our own, and ablations. `--replay NAME` knows them like the others.

GRESO                   greso         a baseline (2506.02177): pass over prompts that were dead lately
Beta                    beta          a baseline (MoPPS and its kin): Thompson sampling of pass rates
Adaptive                adaptive      our own, of prompts: bring back what has lately been worth more than fresh ones
OnPolicyGroupReplay     adaptive      our own, of answers: POPO as far as stored groups are still nearly on-policy
SecondPass              (no name)     our own, of updates: a second pass where the first moved the policy little
LeastDriftGroupReplay   group-kl      POPO's ablation: the groups first that the policy has moved away from least
OldestGroupReplay       group-oldest  POPO's ablation: the oldest groups first
"""

from dataclasses import replace

import numpy as np
import torch

import grpo
from replay import Group, GroupReplay, ReplayStore, Uniform
from support.epochs import within_reach


class GRESO(Uniform):
    """GRESO (2506.02177), a baseline. It walks the epochs, but passes over prompts that were dead lately:

    1. A prompt whose latest z groups in a row were dead is passed over with chance 1 - max(p^z, floor).
    2. p is kept apart for all-right and all-wrong prompts. After each batch it falls by `pace` where the share of
       such groups reached its target (a third of `target` for all-right ones, two thirds for all-wrong ones), else
       it rises.

    Left out: generation batches of adaptive size, and its code's bounds of 0.98 and 0.11 for all right and all wrong.
    """

    STATE = (*Uniform.STATE, "chance_rng", "in_a_row", "chance", "skipped")

    def __init__(self, num_prompts: int, seed: int = 0, target=0.25, floor=0.01, pace=0.01, start=0.5):
        if not 0 <= target <= 1 or not 0 < floor <= 1:
            raise ValueError(f"need 0 <= target <= 1 and 0 < floor <= 1, got {target} and {floor}")
        super().__init__(num_prompts, seed)
        self.targets = (target / 3, target * 2 / 3)
        self.floor = floor
        self.pace = pace
        self.chance_rng = np.random.default_rng([seed, 1])
        self.in_a_row = np.zeros(num_prompts, int)  # dead groups: +z all right, -z all wrong
        self.chance = np.array([start, start])  # p of all-right and of all-wrong prompts
        self.skipped = 0

    def draw(self, n: int, step: int) -> list[int]:
        return self.take_fresh(self.begin(n, step), self.passes_over)

    def passes_over(self, x: int) -> bool:
        z = int(self.in_a_row[x])
        if z == 0:
            return False
        p = self.chance[0] if z > 0 else self.chance[1]
        passed = bool(self.chance_rng.random() >= max(p ** abs(z), self.floor))
        self.skipped += passed
        return passed

    def observe(self, prompts, num_correct, num_answers, step: int) -> None:
        if not len(prompts):
            return
        rate = np.array(num_correct, float) / np.array(num_answers)
        kind = np.where(rate >= 1, 1, np.where(rate <= 0, -1, 0))  # all right, all wrong, or useful
        self.in_a_row[prompts] = kind * (np.abs(self.in_a_row[prompts]) + 1)
        shares = ((kind > 0).mean(), (kind < 0).mean())
        for i in range(2):
            change = -self.pace if shares[i] >= self.targets[i] else self.pace
            self.chance[i] = np.clip(self.chance[i] + change, 0.05, 0.95)

    def figures(self) -> dict:
        return {"p_easy": float(self.chance[0]), "p_hard": float(self.chance[1]), "skipped": self.skipped}


class Beta(Uniform):
    """MoPPS (2507.04632), a baseline: Thompson sampling of prompts. It keeps a Beta posterior of each prompt's pass
    rate, which forgets:

    1. A group multiplies what the posterior has beyond its prior by `decay`, then adds its right answers to a, its
       wrong ones to b. A prompt never seen has the prior, Beta(prior, prior).
    2. For a batch, a pass rate p is drawn from every posterior. The prompts of largest p(1-p) are taken. So there
       are no epochs, and a prompt of which little is known is tried sooner than one known to be dead.

    Its kin differ in what tracks the pass rate, and in the draw. KGPS (2607.27610) has a Kalman filter of its logit,
    and draws by the expected p(1-p). ThinkPrior (2609.09075) begins at another model's pass rates. SPO (2509.13232)
    forgets by the policy's drift, and draws with chances sqrt(p(1-p)) and a floor.

    As in the authors' code: decay 0.5, prior Beta(1, 1), all prompts at hand are candidates. Ours: these are the whole
    data set, where the authors choose among the next ones of the loader.
    """

    STATE = (*Uniform.STATE, "thompson_rng", "a", "b")

    def __init__(self, num_prompts: int, seed: int = 0, decay: float = 0.5, prior: float = 1.0):
        if not 0 <= decay <= 1 or prior <= 0:
            raise ValueError(f"need decay in [0, 1] and prior > 0, got {decay} and {prior}")
        super().__init__(num_prompts, seed)
        self.decay = decay
        self.prior = prior
        self.thompson_rng = np.random.default_rng([seed, 1])
        self.a = np.full(num_prompts, float(prior))
        self.b = np.full(num_prompts, float(prior))

    def draw(self, n: int, step: int) -> list[int]:
        room = self.begin(n, step)
        p = self.thompson_rng.beta(self.a, self.b)  # [N]
        distance = np.abs(p - 0.5)  # p(1-p) is largest at one half
        distance[list(self.batch)] = np.inf
        x = within_reach(np.arange(len(p)), distance, room)
        x = x[np.argsort(distance[x], kind="stable")][:room]
        again = self.seen[x]
        self.take(x[again], replayed=True)
        self.take(x[~again])
        return x.tolist()

    def observe(self, prompts, num_correct, num_answers, step: int) -> None:
        right = np.array(num_correct, float)
        wrong = np.array(num_answers) - right
        self.a[prompts] = self.decay * self.a[prompts] + (1 - self.decay) * self.prior + right
        self.b[prompts] = self.decay * self.b[prompts] + (1 - self.decay) * self.prior + wrong


# ---------------------------------------------------------------- our own rule, of prompts

LEVELS = 16  # pass rates 0, 1/16 .. 1
MEMORY = 320  # visits that an average goes back, or so
MARGIN = 1.25  # how many times the worth of a visit by the epochs a return visit must have
GUESS = 8  # weight, in visits, of the first guess: that a prompt has not moved


def worth(rate: np.ndarray) -> np.ndarray:
    """How much a visit taught that found pass rate p: the spread p(1-p), times what is left to gain, (1-p)^2."""
    return rate * (1 - rate) * (1 - rate) ** 2


class Adaptive(Uniform):
    """Our own rule: prompts come back while return visits teach more than the next prompts of the epoch.

    The papers fix beforehand which pass rates are worth another visit. Whether that saves rollouts depends on how
    far one visit moves a prompt, and here the run itself tells:

    1. A visit that finds pass rate p is worth p(1-p)(1-p)^2. Two averages are kept over the latest visits: of visits
       by the epochs, and of return visits to prompts whose group before was at a given pass rate.
    2. A prompt comes back if return visits to prompts of its pass rate were worth `MARGIN` times a visit by the
       epochs. The best pass rates come first, and of one pass rate the prompts that have waited longest.
    3. At most floor(share * P) of a batch, each after `cooldown` steps. All else comes from the epochs.

    Where one visit all but solves a prompt, return visits find it solved and are worth nothing: replay all but ends.
    The power and the constants were chosen in lab/simulate.py; lab/LOG.md has what was tried, and how it did on
    other cells.
    """

    STATE = (*Uniform.STATE, "level", "last", "back", "returns", "fresh")

    def __init__(self, num_prompts: int, seed: int = 0, share: float = 0.5, cooldown: int = 10):
        if not 0 <= share <= 1 or cooldown < 0:
            raise ValueError(f"need share in [0, 1] and cooldown >= 0, got {share} and {cooldown}")
        super().__init__(num_prompts, seed)
        self.share = share
        self.cooldown = cooldown
        self.level = np.full(num_prompts, -1)  # pass rate of the latest group, in LEVELS; -1: none yet
        self.last = np.full(num_prompts, -np.inf)  # step of the latest use
        self.back = np.zeros(num_prompts, bool)  # whether replay brought it to its latest use
        self.returns = np.zeros((2, LEVELS + 1))  # by the level before: number and worth of return visits
        self.fresh = np.zeros(2)  # number and worth of visits by the epochs

    def promise(self) -> np.ndarray:
        """What a visit to a prompt of each level will be worth [LEVELS + 1]."""
        number, total = self.returns
        guess = worth(np.arange(LEVELS + 1) / LEVELS)
        return (total + GUESS * guess) / (number + GUESS)

    def better(self) -> np.ndarray:
        """Which levels' prompts come back [LEVELS + 1]: none before the epochs had a visit to compare with."""
        number, total = self.fresh
        if number == 0:
            return np.zeros(LEVELS + 1, bool)
        return self.promise() > MARGIN * total / number

    def draw(self, n: int, step: int) -> list[int]:
        room = self.begin(n, step)
        budget = int(self.share * self.size + 1e-9) - len(self.replays)
        back = self.candidates(step)[: max(min(budget, room), 0)]
        chosen = self.take(back, replayed=True) + self.take_fresh(room - len(back))
        self.last[chosen] = step
        self.back[chosen] = False
        self.back[back] = True
        return chosen

    def candidates(self, step: int) -> np.ndarray:
        """The prompts that may come back at `step`, best first."""
        ready = self.last <= step - self.cooldown
        ready[list(self.batch)] = False
        better = self.better()
        found = [np.zeros(0, int)]
        for level in np.argsort(-self.promise(), kind="stable"):
            if better[level]:
                x = np.flatnonzero(ready & (self.level == level))
                found.append(x[np.argsort(self.last[x], kind="stable")])
        return np.concatenate(found)

    def observe(self, prompts, num_correct, num_answers, step: int) -> None:
        rates = np.array(num_correct, float) / np.array(num_answers)
        keep = (1 - 1 / MEMORY) ** len(prompts)
        self.returns *= keep
        self.fresh *= keep
        for x, rate in zip(prompts, rates, strict=True):
            visit = (1.0, worth(rate))
            if self.level[x] >= 0:
                self.returns[:, self.level[x]] += visit
            if not self.back[x]:
                self.fresh += visit
        self.level[prompts] = np.round(rates * LEVELS)
        self.last[prompts] = step

    def figures(self) -> dict:
        number, total = self.fresh
        better = self.better()
        waiting = better[self.level] & (self.level >= 0)
        return {
            "worth_fresh": float(total / number) if number else 0.0,
            "levels_back": better.astype(int).tolist(),
            "buffer": int(waiting.sum()),
        }


# ---------------------------------------------------------------- our own rule, of answers


class OnPolicyGroupReplay(GroupReplay):
    """POPO as long as it is right: the other half of `--replay adaptive`.

    A second use is right as long as the policy is nearly the one that sampled. Each update tells, by the effective
    sample size of the replayed tokens' importance weights as a share of their number:

    1. Stored groups take the share `fill` of the dead groups' places; a fraction of a place is decided by chance, so
       that even a small `fill` replays a group now and then, to see how it does.
    2. Where the effective sample size stays above `min_ess`, `fill` grows by a fifth, up to `max_fill`; else it
       falls by three tenths. Where steps are large, and a second use harms, replay all but ends by itself.
    """

    STATE = (*GroupReplay.STATE, "fill")
    EXCLUDES = ("extra",)  # the sample size is that of all replayed tokens, whoever stored them

    def __init__(self, seed: int = 0, group_capacity: int = 0, prompts_per_step: int = 32, min_ess=0.99, max_fill=1.0):
        if not 0 <= min_ess < 1 or not 0 <= max_fill <= 1:
            raise ValueError(f"need min_ess in [0, 1) and max_fill in [0, 1], got {min_ess} and {max_fill}")
        super().__init__(seed, group_capacity, prompts_per_step)
        self.min_ess = min_ess
        self.max_fill = max_fill
        self.fill = 0.1 * max_fill

    def choose(self, dead: int) -> list[Group]:
        room = self.fill * dead
        if self.fill < 1:
            room += self.rng.random()
        return super().choose(int(room))

    def learn(self, trained: dict) -> None:
        if "ess_replayed" in trained:
            change = 1.2 if trained["ess_replayed"] >= self.min_ess else 0.7
            self.fill = min(max(self.fill * change, 0.02 * self.max_fill), self.max_fill)

    def figures(self, step: int) -> dict:
        return super().figures(step) | {"fill": self.fill}


# ---------------------------------------------------------------- our own rule, of updates


class SecondPass(ReplayStore):
    """A second pass over the fresh useful groups, as long as it is right: `--replay lab/rules.py:SecondPass`.

    1. After the update the effective sample size of pi / pi_old is taken over its tokens, as a share of their number.
    2. Where it is at least `min_ess`, the same answers are trained on once more, clipped around mu. That is pi_old but
       for the mismatch of a vLLM engine, which w does not correct in this pass.

    `min_ess` was chosen in the simulator (lab/gates.py), where this is at no rate behind one pass. In the network it is
    so without sharing; where prompts share digits it does no better than two passes always (docs/results.md). It stores
    nothing. It costs a forward pass a step, and a backward one where the second pass is taken.
    """

    DECIDES = "places"

    def __init__(self, min_ess: float = 0.97):
        if not 0 <= min_ess <= 1:
            raise ValueError(f"need min_ess in [0, 1], got {min_ess}")
        super().__init__()
        self.min_ess = min_ess
        self.near = 1.0  # effective sample size after the latest first pass
        self.taken = False

    def attach(self, run) -> None:
        """ValueError where the run has more than one optimiser step for a batch anyway."""
        if run.cfg.epochs * run.cfg.minibatches > 1:
            raise ValueError("SecondPass needs --epochs 1 and --minibatches 1: it decides on the second pass itself")
        self.run = run

    def complete(self, useful: list[Group], places: int, step: int) -> list[Group]:
        self.answers = grpo.to_answers(useful, self.run.prompts, step, self.run.cfg.mask_truncated)
        self.step = step
        return useful

    def learn(self, trained: dict) -> None:
        self.near = on_policy_share(self.answers, self.run.policy, self.run.cfg) if self.answers else 1.0
        self.taken = bool(self.answers) and self.near >= self.min_ess
        if self.taken:
            # pi_old is gone by now, and mu, which is at hand, is all but the same for fresh answers
            cfg = replace(self.run.cfg, proximal="birth")
            again = grpo.update(self.run.policy, self.run.optimizer, self.answers, cfg, self.step, self.run.reference)
            trained["optimizer_steps"] += again["optimizer_steps"]

    def figures(self, step: int) -> dict:
        return {"ess_first_pass": self.near, "second_pass": float(self.taken)}


@torch.no_grad()
def on_policy_share(answers: list[grpo.Answer], policy: grpo.Policy, cfg) -> float:
    """Effective sample size of pi / mu over the tokens of `answers`, as a share of their number."""
    totals = torch.zeros(3, dtype=torch.float64)  # number, sum and sum of squares
    for micro in policy.pack(answers, cfg.tokens_per_microbatch):
        logprob, _ = policy(micro, cfg.temperature)  # [N]
        behaviour = torch.cat([answers[i].behaviour for i in micro.sequences])
        count = torch.tensor([answers[i].count for i in micro.sequences])[micro.segment.cpu()]
        ratio = torch.exp(logprob.cpu() - behaviour).double()
        totals += torch.stack([count.double().sum(), ratio @ count.double(), ratio.square() @ count.double()])
    number, total, squares = totals.tolist()
    return total**2 / (number * squares)


# ---------------------------------------------------------------- POPO's ablations


class OldestGroupReplay(GroupReplay):
    """POPO's ablation: the oldest groups first."""

    def choose(self, dead: int) -> list[Group]:
        return list(self.stored)[:dead]


class LeastDriftGroupReplay(GroupReplay):
    """POPO's ablation: the groups first that the policy has moved away from least. It costs a pass over the
    whole store."""

    def attach(self, run) -> None:
        self.drift = lambda groups: drift_of(groups, run.policy, run.prompts, run.cfg)

    def choose(self, dead: int) -> list[Group]:
        newest_first = super().choose(len(self.stored))
        if not dead or not newest_first:
            return []
        drift = self.drift(newest_first)
        order = sorted(range(len(newest_first)), key=drift.__getitem__)
        return [newest_first[i] for i in order[:dead]]


@torch.no_grad()
def drift_of(groups: list[Group], policy: grpo.Policy, prompts: list, cfg) -> list[float]:
    """How far `policy` has moved from those that sampled each of `groups`: the mean over a group's tokens
    of k3, an estimate of KL(mu || pi), in nats. Prompts' token ids are `prompts[group.prompt].ids`."""
    answers = []
    owner = []
    for i, group in enumerate(groups):
        for tokens, logprobs in zip(group.tokens, group.logprobs, strict=True):
            answers.append(grpo.Answer(prompts[group.prompt].ids, tokens, logprobs, advantage=0.0, age=0))
            owner.append(i)
    device = next(policy.parameters()).device
    owner = torch.tensor(owner, device=device)
    totals = torch.zeros(len(groups), device=device)
    counts = torch.zeros(len(groups), device=device)
    for micro in policy.pack(answers, cfg.tokens_per_microbatch):
        logprob, _ = policy(micro, cfg.temperature)  # [N]
        behaviour = torch.cat([answers[i].behaviour for i in micro.sequences]).to(device)
        group_of_token = owner[micro.sequences][micro.segment]  # [N]
        totals.index_add_(0, group_of_token, grpo.k3(behaviour, logprob))
        counts.index_add_(0, group_of_token, torch.ones_like(logprob))
    return (totals / counts.clamp(min=1)).tolist()
