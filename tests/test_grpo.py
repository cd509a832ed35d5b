"""The objective and the update: hand values, exact enumeration, a naive implementation, and TRL as oracles."""

import copy
import dataclasses
import itertools
import math
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

import grpo
from grpo import Answer, Policy, advantages, k3, policy_loss, to_answers, token_weights, update
from lab import rules
from replay import Group
from support import attention
from support.logprobs import pack
from support.model import check_policy, make_optimizer, use_varlen_attention, without_dropout
from tasks import tiny
from tests.models import (
    EOS,
    PAD,
    VOCABULARY,
    assert_same_gradients,
    gradients,
    naive_logprobs,
    random_answers,
    relative,
    small_model,
    with_behaviour,
)
from train import Config

F64 = torch.float64
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("centred", [0.75, -0.25, -0.25, -0.25]),
        ("std", [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]),  # std with G - 1: 0.5
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_advantages_by_hand(kind, expected):
    groups = tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])  # [P, G]
    torch.testing.assert_close(advantages(groups, kind), tensor([expected, [0] * 4, [0] * 4]))
    torch.testing.assert_close(advantages(groups[0], kind), tensor(expected))


@pytest.mark.parametrize("kind", ["centred", "std", "rloo"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_rewards_of_any_type_have_the_same_advantages(kind, dtype):
    rewards = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]])
    assert torch.allclose(grpo.advantages(rewards.to(dtype), kind).float(), grpo.advantages(rewards.float(), kind))


def test_rloo_is_the_mean_of_the_others():
    rewards = torch.rand(7, dtype=F64)
    others = torch.stack([torch.cat([rewards[:i], rewards[i + 1 :]]).mean() for i in range(7)])
    torch.testing.assert_close(advantages(rewards, "rloo"), rewards - others)


@pytest.mark.parametrize("kind", ["centred", "std", "rloo"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.3, 1e4 / 7])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_rewards_give_exact_zeros(kind, value, size):
    # in float32 the mean of equal numbers may differ from them in the last bit, and std divides by next to nothing
    assert advantages(torch.full((size,), value), kind).tolist() == [0.0] * size


@pytest.mark.parametrize("right", range(17))
def test_binary_group_identities(right):
    # prompt_replay.md section 3: mean |A| = 2 p (1 - p), mean A^2 = p (1 - p)
    p = right / 16
    values = advantages(tensor([1.0] * right + [0.0] * (16 - right)))
    assert values.abs().mean().item() == pytest.approx(2 * p * (1 - p))
    assert values.square().mean().item() == pytest.approx(p * (1 - p))
    assert values.sum().item() == pytest.approx(0)


@pytest.mark.parametrize("size", [0, 1])
def test_a_group_of_fewer_than_two_is_refused(size):
    with pytest.raises(ValueError, match="at least 2 answers"):
        advantages(torch.zeros(3, size))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="centred, std or rloo"):
        advantages(torch.zeros(4), "mean")
    with pytest.raises(ValueError, match="token, sequence or constant"):
        token_weights(torch.tensor([1]), "mean", 1)


# ---------------------------------------------------------------- the objective by hand


def one_token(rho, advantage, w=1.0, **options):
    """Loss, d loss / d log pi and the clip flag of one token of weight 1, at ratio `rho` and pi_old / mu = `w`."""
    old = tensor([-1.3])
    logprob = (old + math.log(rho)).requires_grad_()
    ones, segment = torch.ones(1, dtype=F64), torch.zeros(1, dtype=torch.long)
    behaviour = old - math.log(w)
    loss, clipped = policy_loss(logprob, old, behaviour, ones * advantage, ones, segment, **CLIP | options)
    loss.backward()
    return loss.item(), logprob.grad.item(), clipped.item()


@pytest.mark.parametrize(
    ("rho", "sign", "dual_clip", "term", "slope"),
    [
        (0.5, +1, 0.0, 0.5, 0.5),
        (1.0, +1, 0.0, 1.0, 1.0),
        (1.5, +1, 0.0, 1.28, 0.0),
        (20.0, +1, 0.0, 1.28, 0.0),
        (0.5, -1, 0.0, -0.8, 0.0),
        (1.0, -1, 0.0, -1.0, -1.0),
        (1.5, -1, 0.0, -1.5, -1.5),
        (20.0, -1, 0.0, -20.0, -20.0),
        (0.5, +1, 10.0, 0.5, 0.5),  # the dual clip touches wrong answers grown likely, nothing else
        (1.0, +1, 10.0, 1.0, 1.0),
        (1.5, +1, 10.0, 1.28, 0.0),
        (20.0, +1, 10.0, 1.28, 0.0),
        (0.5, -1, 10.0, -0.8, 0.0),
        (1.0, -1, 10.0, -1.0, -1.0),
        (1.5, -1, 10.0, -1.5, -1.5),
        (20.0, -1, 10.0, -10.0, 0.0),
    ],
)
def test_clip_by_hand(rho, sign, dual_clip, term, slope):
    size = 0.7
    loss, gradient, clipped = one_token(rho, sign * size, dual_clip=dual_clip)
    assert (loss, gradient) == pytest.approx((-size * term, -size * slope))
    assert clipped == (slope == 0)


def test_clip_higher():
    assert one_token(1.25, 1.0, clip_high=0.2)[:2] == pytest.approx((-1.2, 0.0))
    assert one_token(1.25, 1.0, clip_high=0.28)[:2] == pytest.approx((-1.25, -1.25))
    assert one_token(0.75, -1.0, clip_low=0.2)[:2] == pytest.approx((0.8, 0.0))
    assert one_token(0.75, -1.0, clip_low=0.3)[:2] == pytest.approx((0.75, 0.75))


def test_zero_advantage_has_no_gradient_and_counts_as_unclipped():
    assert one_token(20.0, 0.0, dual_clip=10.0) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("w", "cap", "used"), [(3, math.inf, 3), (3, 2.0, 2), (3, 0, 1), (0.5, math.inf, 0.5), (0.5, 2.0, 0.5), (0.5, 0, 1)]
)
@pytest.mark.parametrize(("rho", "sign"), [(1.1, 1), (1.1, -1), (1.5, 1), (0.5, -1)])
@pytest.mark.parametrize("loss", ["clip", "cispo"])
def test_importance_weight_multiplies_loss_and_gradient(w, cap, used, rho, sign, loss):
    # the clip acts on rho alone, so that w changes nothing but the size
    plain, weighted = (one_token(rho, sign, w=x, is_cap=c, loss=loss) for x, c in ((1.0, math.inf), (w, cap)))
    assert weighted[:2] == pytest.approx((used * plain[0], used * plain[1]))
    assert weighted[2] == plain[2]


def test_only_the_ratio_carries_gradient():
    ones, segment = torch.ones(4, dtype=F64), torch.arange(4)
    logprob, old, behaviour = (torch.randn(4, dtype=F64, requires_grad=True) for _ in range(3))
    for loss, ratio, proximal in itertools.product(("clip", "cispo"), ("token", "sequence"), ("old", "birth")):
        value, _ = policy_loss(
            logprob, old, behaviour, ones, ones, segment, is_cap=math.inf, ratio=ratio, loss=loss, proximal=proximal
        )
        value.backward()
        assert old.grad is None and behaviour.grad is None
    # pi_old may be the very tensor that is trained: gradient w A, without a part from d w / d theta
    logprob.grad = None
    policy_loss(logprob, logprob, behaviour.detach(), ones, ones, segment, is_cap=math.inf)[0].backward()
    torch.testing.assert_close(logprob.grad, -torch.exp(logprob - behaviour).detach())


def token_batch(drift: float = 0.3):
    """Seven tokens of three answers: log pi, log pi_old, log mu, advantage, weight, segment."""
    segment = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    old = -torch.rand(7, dtype=F64) * 2 - 0.1
    logprob = (old + drift * torch.randn(7, dtype=F64)).requires_grad_()
    behaviour = old + 0.3 * torch.randn(7, dtype=F64)
    return logprob, old, behaviour, tensor([0.5, -1.0, 0.8])[segment], torch.rand(7, dtype=F64), segment


@pytest.mark.parametrize("cap", [math.inf, 2.0, 0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_birth_is_ppo_against_the_behaviour_policy(cap, ratio):
    logprob, old, behaviour, *rest = token_batch()
    options = CLIP | {"dual_clip": 10.0, "ratio": ratio}
    birth, flags = policy_loss(logprob, old, behaviour, *rest, is_cap=cap, proximal="birth", **options)
    plain, plain_flags = policy_loss(logprob, behaviour, behaviour, *rest, is_cap=0, **options)
    torch.testing.assert_close(birth, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, logprob)[0] for x in (birth, plain)))
    assert torch.equal(flags, plain_flags)
    decoupled, _ = policy_loss(logprob, old, behaviour, *rest, is_cap=cap, **options)
    assert abs((birth - decoupled).item()) > 1e-3


@pytest.mark.parametrize("loss", ["clip", "cispo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("cap", [math.inf, 2.0, 0])
def test_on_policy_gradient_is_the_weighted_policy_gradient(loss, ratio, cap):
    # popo.md section 9 point 7: at theta = pi_old the ratio is 1, and d loss / d log pi = - weight w A
    logprob, old, behaviour, advantage, weight, segment = token_batch(drift=0.0)
    value, clipped = policy_loss(
        logprob, old, behaviour, advantage, weight, segment, loss=loss, ratio=ratio, is_cap=cap, dual_clip=10.0, **CLIP
    )
    w = torch.exp(old - behaviour)
    w = torch.ones(7, dtype=F64) if cap == 0 else w.clamp(max=cap or math.inf)
    expected = -weight * w * advantage
    if ratio == "sequence" and loss == "clip":  # one ratio an answer: its tokens share their gradient
        expected = torch.cat([part.mean().expand(len(part)) for part in expected.split([3, 2, 2])])
    (gradient,) = torch.autograd.grad(value, logprob)
    torch.testing.assert_close(gradient, expected)
    assert not clipped.any()


def test_sequence_ratio_by_hand():
    # answer 0: mean log-ratio log 1.1, inside the clip although its tokens are outside; answer 1: log 1.5, clipped
    ratios = tensor([1.1 * 4, 1.1 / 4, 1.5, 1.5])
    old, segment = tensor([-2.0, -3.0, -1.0, -1.5]), torch.tensor([0, 0, 1, 1])
    logprob = (old + ratios.log()).requires_grad_()
    weight, advantage = tensor([0.1, 0.3, 0.2, 0.2]), tensor([1.0, 1.0, 2.0, 2.0])
    loss, clipped = policy_loss(logprob, old, old, advantage, weight, segment, ratio="sequence", **CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.4 * 1.1 * 1.0 + 0.4 * 1.28 * 2.0))
    # d s / d log pi_t = s / |y|, and each of the answer's tokens holds s
    torch.testing.assert_close(logprob.grad, tensor([-0.4 * 1.1 / 2] * 2 + [0.0] * 2))
    assert clipped.tolist() == [False, False, True, True]


@pytest.mark.parametrize("rho", [0.5, 1.0, 1.5, 20.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_cispo_clips_the_weight_and_keeps_every_gradient(rho, sign):
    loss, gradient, clipped = one_token(rho, sign * 0.7, loss="cispo", clip_high=0.28)
    used = min(rho, 1.28)
    assert gradient == pytest.approx(-used * sign * 0.7)
    assert loss == pytest.approx(-used * sign * 0.7 * (-1.3 + math.log(rho)))
    assert clipped == (rho > 1.28)


def test_per_sequence_mean():
    values = tensor([1.0, 5.0, 2.0, 4.0, 6.0]).requires_grad_()
    means = grpo.per_sequence_mean(values, torch.tensor([0, 2, 0, 2, 2]))  # sequence 1 has no token
    torch.testing.assert_close(means, tensor([1.5, 5.0, 1.5, 5.0, 5.0]))
    means[1].backward()
    torch.testing.assert_close(values.grad, tensor([0.0, 1 / 3, 0.0, 1 / 3, 1 / 3]))
    assert grpo.per_sequence_mean(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


# ---------------------------------------------------------------- normalisers, KL


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("token", [1 / 15] * 3), ("sequence", [1 / 6, 1 / 9, 1 / 30]), ("constant", [1 / 36] * 3)],
)
def test_token_weights_by_hand(kind, expected):
    weights = token_weights(torch.tensor([2, 3, 10]), kind, max_tokens=12)
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
def test_token_weights_of_nothing_are_finite(kind):
    assert token_weights(torch.zeros(0, dtype=torch.long), kind, 12).shape == (0,)
    assert torch.isfinite(token_weights(torch.tensor([0, 0]), kind, 12)).all()


def test_one_mean_over_the_union_of_fresh_and_replayed_tokens():
    # rollout_replay.md section 9 point 8: 5 fresh tokens of A = 1, 10 replayed ones of A = -1: the mean is -1/3; a mean
    # of the two parts' means would be 0
    weights = token_weights(torch.tensor([2, 3, 10]), "token", 0).double()
    total = 0.0
    for segment, size, advantage in ((0, 2, 1.0), (1, 3, 1.0), (2, 10, -1.0)):  # three micro-batches
        zeros, ones = torch.zeros(size, dtype=F64), torch.ones(size, dtype=F64)
        loss, _ = policy_loss(zeros, zeros, zeros, advantage * ones, weights[segment] * ones, zeros.long())
        total += loss.item()
    assert total == pytest.approx(1 / 3)


def test_k3_is_an_unbiased_nonnegative_estimate_of_the_kl():
    p, q = (torch.log_softmax(2 * torch.randn(50, dtype=F64), -1) for _ in range(2))
    assert (k3(p, q) >= 0).all() and k3(p, q).max() > 0.1
    assert k3(p, p).abs().max() == 0
    kl = (p.exp() * (p - q)).sum()  # KL(p || q), p the first argument
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), kl)
    tiny = torch.full((1,), 1e-6, dtype=torch.float32)  # expm1: exp(d) - 1 - d would round to 0 or below
    assert k3(torch.zeros(1), tiny).item() >= 0


# ---------------------------------------------------------------- exact expectations on a categorical policy


def expected_gradient(theta, behaviour, advantage, **options):
    """Gradient of the objective's expectation over answers of one token drawn from `behaviour`, by enumeration."""
    theta = theta.clone().requires_grad_()
    logprob = torch.log_softmax(theta, -1)
    chance, each = behaviour.exp(), torch.arange(len(theta))
    loss, _ = policy_loss(logprob, logprob.detach(), behaviour, advantage, chance, each, **options)
    return torch.autograd.grad(loss, theta)[0]


def test_replayed_gradient_equals_the_on_policy_gradient_in_expectation():
    theta, stale = 2 * torch.randn(6, dtype=F64), torch.log_softmax(2 * torch.randn(6, dtype=F64), -1)
    advantage = torch.randn(6, dtype=F64)
    policy = torch.softmax(theta, -1)
    on_policy = expected_gradient(theta, policy.log(), advantage)
    by_hand = -policy * (advantage - (policy * advantage).sum())  # - sum pi A grad log pi
    torch.testing.assert_close(on_policy, by_hand)
    torch.testing.assert_close(expected_gradient(theta, stale, advantage, is_cap=math.inf), by_hand)
    # negative control (popo.md section 9 point 9): taken for on-policy, the same data point elsewhere
    wrong = expected_gradient(theta, stale, advantage, is_cap=0)
    assert (wrong - by_hand).norm() > 0.5 * by_hand.norm()
    # truncation leaves a bias, but a smaller one
    truncated = expected_gradient(theta, stale, advantage, is_cap=2.0)
    assert 0 < (truncated - by_hand).norm() < (wrong - by_hand).norm()


@pytest.mark.parametrize("kind", ["centred", "rloo"])
def test_expected_group_gradient_is_that_of_the_pass_rate(kind):
    # prompt_replay.md section 3: E[mean A s] = (1 - 1/G) grad p; RLOO has no factor. All 4^3 groups are enumerated
    size, reward = 3, tensor([1.0, 0.0, 0.0, 1.0])
    theta = torch.randn(4, dtype=F64, requires_grad=True)
    logprob = torch.log_softmax(theta, -1)
    groups = torch.tensor(list(itertools.product(range(4), repeat=size)))  # [64, G]
    chance = logprob.detach()[groups].sum(1, keepdim=True).exp().expand(-1, size) / size
    flat, values = logprob[groups].flatten(), advantages(reward[groups], kind).flatten()
    loss, _ = policy_loss(flat, flat.detach(), flat.detach(), values, chance.flatten(), torch.arange(len(flat)))
    (gradient,) = torch.autograd.grad(loss, theta)
    (pass_rate,) = torch.autograd.grad((torch.softmax(theta, -1) * reward).sum(), theta)
    torch.testing.assert_close(-gradient, pass_rate * (1 if kind == "rloo" else 1 - 1 / size))


def learn(seed: int, cap: float, age: int, steps: int = 200, groups: int = 16, size: int = 8) -> float:
    """Final pass rate of a policy over three habits, right with chance 0.05, 0.5 and 0.95, trained on answers that are
    `age` steps old."""
    generator = torch.Generator().manual_seed(seed)
    right, theta, stored = tensor([0.05, 0.5, 0.95]), tensor([3.0, 2.0, 0.0]).requires_grad_(), []
    for step in range(steps):
        logprob = torch.log_softmax(theta, -1)
        drawn = torch.multinomial(logprob.detach().exp(), groups * size, True, generator=generator)
        rewards = (torch.rand(len(drawn), generator=generator, dtype=F64) < right[drawn]).double()
        stored.append((drawn, logprob.detach()[drawn], advantages(rewards.view(groups, size)).flatten()))
        drawn, behaviour, values = stored[max(step - age, 0)]
        new, weight = logprob[drawn], torch.full_like(behaviour, 1 / len(drawn))
        loss, _ = policy_loss(new, new.detach(), behaviour, values, weight, torch.arange(len(drawn)), is_cap=cap)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - 0.5 * gradient).detach().requires_grad_()
    return (torch.softmax(theta, -1) @ right).item()


def test_stale_replay_learns_with_weights_and_stalls_without():
    # Old data praise the middling habit long after it has won; without weights that drowns the better one.
    seeds = range(4)
    exact, truncated, uncorrected = ([learn(seed, cap, age=40) for seed in seeds] for cap in (math.inf, 2.0, 0))
    fresh = [learn(seed, math.inf, age=0) for seed in seeds]
    assert min(fresh) > 0.9
    assert min(exact) > 0.85 and min(truncated) > 0.85
    assert max(uncorrected) < 0.75


# ---------------------------------------------------------------- the update against a naive implementation


class Recorder(torch.optim.SGD):
    """SGD that keeps the gradient of every step."""

    def __init__(self, model, lr=0.0):
        super().__init__(model.parameters(), lr=lr)
        self.model, self.seen = model, []

    def step(self, closure=None):
        self.seen.append(gradients(self.model))
        return super().step(closure)


def settings(**changes) -> Config:
    usual = {"dtype": "float32", "grad_clip": 1e9, "max_tokens": 12, "tokens_per_microbatch": 10_000}
    return dataclasses.replace(Config(), **usual | changes)


def run_update(model, sequences, cfg, step=3, lr=0.0, reference=None):
    """`update` on a copy of `model` -> the copy, gradients of each optimiser step, figures."""
    model = copy.deepcopy(model)
    optimizer = Recorder(model, lr)
    figures = update(
        Policy(model, cfg.dtype), optimizer, sequences, cfg, step, reference and Policy(reference, cfg.dtype)
    )
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    return model, optimizer.seen, figures


def naive_term(rho, advantage, cfg):
    """PPO's term of one answer's tokens, case by case."""
    if advantage >= 0:
        return rho.clamp(max=1 + cfg.clip_high) * advantage
    return rho.clamp(min=1 - cfg.clip_low, max=cfg.dual_clip or math.inf) * advantage


def naive_loss(model, sequences, cfg, old=None, reference=None):
    """The loss of one optimiser step, an answer at a time; `old`: log pi_old of each answer, else pi's own."""
    answers, tokens = sum(s.count for s in sequences), sum(len(s.tokens) * s.count for s in sequences)
    total = 0.0
    for i, s in enumerate(sequences):
        logprob, _ = naive_logprobs(model, s, cfg.temperature)
        before = logprob.detach() if old is None else old[i]
        w, start = torch.exp(before - s.behaviour).clamp(max=cfg.is_cap or math.inf), before
        if cfg.proximal == "birth":
            before = s.behaviour
        if cfg.is_cap == 0:
            w = torch.ones_like(w)
        kl_weight = w
        if cfg.proximal == "birth":
            w = torch.ones_like(w)
        rho = torch.exp(logprob - before)
        if cfg.ratio == "sequence":
            rho = torch.exp((logprob - before).mean()).expand(len(logprob))
        if cfg.loss == "cispo":
            term = rho.detach().clamp(max=1 + cfg.clip_high) * s.advantage * logprob
        else:
            term = naive_term(rho, s.advantage, cfg)
        value = -(w * term).sum()
        if reference is not None:
            with torch.no_grad():
                anchor, _ = naive_logprobs(reference, s, cfg.temperature)
            k3_terms = torch.exp(anchor - logprob) - 1 - (anchor - logprob)
            value = value + cfg.kl * (k3_terms * torch.exp(logprob - start) * kl_weight).sum()
        divisor = {"token": tokens, "sequence": answers * len(s.tokens), "constant": answers * cfg.max_tokens}
        total = total + s.count * value / divisor[cfg.normaliser]
    return total


OBJECTIVES = {
    "default": {},
    "grpo": {"normaliser": "sequence", "temperature": 0.7},
    "dr_grpo": {"normaliser": "constant", "is_cap": math.inf},
    "uncorrected": {"is_cap": 0},
    "birth": {"proximal": "birth", "dual_clip": 1.6, "clip_low": 0.1, "clip_high": 0.15},
    "gspo": {"ratio": "sequence", "proximal": "birth", "normaliser": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    "cispo": {"loss": "cispo", "proximal": "birth", "clip_high": 0.1},
    "kl": {"kl": 0.3},
}


@pytest.mark.parametrize("changes", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("tokens", [10_000, 60, 1])
def test_update_equals_a_naive_implementation(changes, tokens):
    cfg = settings(**changes, tokens_per_microbatch=tokens)
    model, reference = small_model(), small_model(seed=9) if cfg.kl else None
    sequences = with_behaviour(model, random_answers(9, seed=4), cfg.temperature)
    sequences[2] = dataclasses.replace(sequences[2], count=3)
    _, (ours,), figures = run_update(model, sequences, cfg, reference=reference)
    loss = naive_loss(model, sequences, cfg, reference=reference)
    loss.backward()
    assert_same_gradients(ours, gradients(model))
    if reference is None:
        assert figures["loss"] == pytest.approx(loss.item(), abs=1e-5)
    norm = math.sqrt(sum(g.square().sum().item() for g in ours.values()))
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("changes", [OBJECTIVES["default"], OBJECTIVES["gspo"]], ids=["default", "gspo"])
def test_micro_batches_change_nothing(minibatches, changes):
    model, count = small_model(), 12
    sequences = with_behaviour(model, random_answers(count, seed=6))
    base = settings(**changes, minibatches=minibatches, seed=1)
    sizes, results = set(), []
    for tokens in (10_000, 150, 70, 40, 1):
        sizes.add(len(pack(sequences, tokens)))
        cfg = dataclasses.replace(base, tokens_per_microbatch=tokens)
        results.append(run_update(model, sequences, cfg, lr=0.2))
    assert len(sizes) == 5 and {1, count} <= sizes
    trained, seen, figures = results[0]
    for other_trained, other_seen, other_figures in results[1:]:
        for ours, theirs in zip(other_seen, seen, strict=True):
            assert_same_gradients(ours, theirs)
        assert other_figures == pytest.approx(figures, rel=1e-4, abs=1e-6)
        for p, q in zip(other_trained.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normaliser", ["token", "sequence", "constant"])
def test_an_answer_with_a_count_is_that_many_answers(normaliser):
    model, cfg = small_model(), settings(normaliser=normaliser)
    sequences = with_behaviour(model, random_answers(5, seed=7))
    counted = [dataclasses.replace(s, count=1 + i % 3) for i, s in enumerate(sequences)]
    copies = [s for i, s in enumerate(sequences) for _ in range(1 + i % 3)]
    (_, (ours,), figures), (_, (theirs,), expected) = (run_update(model, x, cfg) for x in (counted, copies))
    assert_same_gradients(ours, theirs)
    assert figures == pytest.approx(expected, rel=1e-4, abs=1e-6)


class Calls:
    """Counts forward passes of a model's trunk."""

    def __init__(self, model):
        self.count = 0
        model.base_model.register_forward_hook(self.note)

    def note(self, *_):
        self.count += 1


@pytest.mark.parametrize(
    ("minibatches", "epochs", "steps", "forwards"),
    [(1, 1, 1, 1), (2, 1, 2, 2 + 2), (3, 1, 3, 3 + 3), (50, 1, 6, 6 + 6), (1, 2, 2, 1 + 2), (2, 3, 6, 2 + 6)],
)
def test_one_optimiser_step_a_minibatch_and_one_old_pass_if_any(minibatches, epochs, steps, forwards):
    model = small_model()
    sequences, optimizer, calls = with_behaviour(model, random_answers(6, seed=8)), Recorder(model), Calls(model)
    figures = update(Policy(model), optimizer, sequences, settings(minibatches=minibatches, epochs=epochs), 0)
    assert (len(optimizer.seen), figures["optimizer_steps"], calls.count) == (steps, steps, forwards)
    assert figures["trained_tokens"] == epochs * sum(len(s.tokens) for s in sequences)


def test_epochs_share_one_old_policy():
    model, cfg = small_model(), settings(epochs=3, clip_low=0.02, clip_high=0.02)
    sequences = with_behaviour(model, random_answers(6, seed=23))
    _, seen, figures = run_update(model, sequences, cfg, lr=0.2)
    with torch.no_grad():
        old = [naive_logprobs(model, s)[0] for s in sequences]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for ours in seen:
        optimizer.zero_grad()
        naive_loss(model, sequences, cfg, old).backward()
        assert_same_gradients(ours, gradients(model), 1e-4)
        optimizer.step()
    assert figures["clip_fraction"] > 0


def test_pi_old_is_fixed_during_all_minibatches(monkeypatch):
    """popo.md section 9 point 8: the second minibatch has a ratio, but against the policy before the first step."""
    model = small_model()
    cfg = settings(minibatches=2, tokens_per_microbatch=50, clip_low=0.02, clip_high=0.02, temperature=0.8)
    sequences = with_behaviour(model, random_answers(10, seed=10), cfg.temperature)
    by_mark = {s.behaviour[0].item(): i for i, s in enumerate(sequences)}  # log mu of the first token names the answer
    with torch.no_grad():
        before = [naive_logprobs(model, s, cfg.temperature)[0] for s in sequences]
    calls = []

    def spy(logprob, old, behaviour, *rest, **options):
        segment = rest[2]
        ids = [by_mark[behaviour[segment == k][0].item()] for k in range(int(segment.max()) + 1)]
        calls.append((ids, logprob.detach(), old.detach()))
        return policy_loss(logprob, old, behaviour, *rest, **options)

    monkeypatch.setattr(grpo, "policy_loss", spy)
    _, seen, figures = run_update(model, sequences, cfg, lr=0.5)
    minibatches: list[list[int]] = [[], []]
    for ids, logprob, old in calls:
        torch.testing.assert_close(old, torch.cat([before[i] for i in ids]), rtol=0, atol=1e-5)
        second = sum(map(len, minibatches)) >= 5
        minibatches[second] += ids
        assert ((logprob - old).abs().max() > 0.05) == second
    assert sorted(minibatches[0] + minibatches[1]) == list(range(10)) and len(minibatches[0]) == 5
    assert any(sequences[i].age for i in minibatches[0]) and any(sequences[i].age == 0 for i in minibatches[0])

    trainer = copy.deepcopy(model)
    losses, optimizer = [], torch.optim.SGD(trainer.parameters(), lr=0.5)
    for ids, ours in zip(minibatches, seen, strict=True):
        optimizer.zero_grad()
        loss = naive_loss(trainer, [sequences[i] for i in ids], cfg, [before[i] for i in ids])
        loss.backward()
        assert_same_gradients(ours, gradients(trainer), 1e-4)
        optimizer.step()
        losses.append(loss.item())
    assert figures["clip_fraction"] > 0
    assert sum(losses) / len(losses) == pytest.approx(figures["loss"], abs=1e-4)


def test_an_update_leaves_nothing_behind_in_its_answers():
    """The same answers once more, after an update of several optimiser steps: pi_old is the policy as it is now."""
    model = small_model()
    sequences = with_behaviour(model, random_answers(6, seed=24))
    _, (expected,), figures = run_update(model, sequences, settings())
    run_update(small_model(seed=25), sequences, settings(minibatches=2), lr=0.5)
    _, (again,), others = run_update(model, sequences, settings())
    assert_same_gradients(again, expected)
    assert others == pytest.approx(figures)


def test_minibatches_depend_on_seed_and_step_alone():
    model = small_model()
    sequences = with_behaviour(model, random_answers(8, seed=11))
    (_, first, _), (_, again, _), (_, later, _) = (
        run_update(model, sequences, settings(minibatches=2), step) for step in (1, 1, 2)
    )
    assert_same_gradients(first[0], again[0], 0)
    with pytest.raises(AssertionError):
        assert_same_gradients(first[0], later[0])


@pytest.mark.parametrize("minibatches", [1, 2])
def test_an_empty_batch_takes_no_step(minibatches):
    model = small_model()
    optimizer, before = Recorder(model, lr=0.1), copy.deepcopy(model.state_dict())
    policy, reference = Policy(model), Policy(copy.deepcopy(model))
    figures = update(policy, optimizer, [], settings(minibatches=minibatches, kl=0.1), 0, reference)
    assert optimizer.seen == [] and figures["optimizer_steps"] == 0 and figures["trained_tokens"] == 0
    assert all(math.isfinite(value) for value in figures.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradient_clipping_and_its_figure():
    model = small_model()
    sequences = with_behaviour(model, random_answers(6, seed=12))
    _, (free,), figures = run_update(model, sequences, settings())
    limit = figures["grad_norm"] / 4
    _, (clipped,), limited = run_update(model, sequences, settings(grad_clip=limit))
    assert limited["grad_norm"] == pytest.approx(figures["grad_norm"])
    assert_same_gradients(clipped, {name: gradient / 4 for name, gradient in free.items()})


@pytest.mark.parametrize("tokens", [[EOS], [PAD], [5, PAD, 7, EOS]])
def test_end_of_text_and_padding_ids_are_ordinary_tokens(tokens):
    model = small_model()
    sequence = Answer((3, 4), torch.tensor(tokens, dtype=torch.int32), torch.zeros(len(tokens)), 1.0, 0)
    (sequence,) = with_behaviour(model, [sequence], noise=0.0)
    trained, _, figures = run_update(model, [sequence], settings(grad_clip=1.0), lr=0.02)
    with torch.no_grad():
        gain = naive_logprobs(trained, sequence)[0] - sequence.behaviour
    assert figures["trained_tokens"] == len(tokens)
    assert gain[-1] > 0.01 and gain.mean() > 0.01


def test_kl_pulls_towards_the_reference():
    model, reference = small_model(), small_model(seed=13).requires_grad_(False)
    sequences = [dataclasses.replace(s, advantage=0.0) for s in random_answers(8, seed=14)]
    sequences, cfg = with_behaviour(model, sequences, noise=0.0), settings(kl=1.0)
    with torch.no_grad():
        pairs = [[naive_logprobs(m, s)[0] for m in (reference, model)] for s in sequences]
    differences = torch.cat([a - b for a, b in pairs])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    policy = Policy(model)
    seen = [update(policy, optimizer, sequences, cfg, step, Policy(reference))["kl"] for step in range(20)]
    assert seen[0] == pytest.approx((differences.exp() - 1 - differences).mean().item(), rel=1e-4)
    assert seen[-1] < 0.5 * seen[0]
    figures = update(policy, optimizer, sequences, cfg, 0, Policy(copy.deepcopy(model)))
    assert figures["kl"] == pytest.approx(0, abs=1e-6)


def test_figures_by_hand():
    """Three answers whose importance pi_old / mu is set: fresh 1 and 1.5, replayed 4, 3 and 0.5."""
    model = small_model()
    parts = [([3, EOS], [1.0, 1.5], 0), ([4, 5], [4.0, 3.0], 1), ([EOS], [0.5], 7)]
    sequences = [
        Answer((2, 6, 7), torch.tensor(tokens, dtype=torch.int32), torch.zeros(len(tokens)), 1.0, age)
        for tokens, _, age in parts
    ]
    sequences = with_behaviour(model, sequences, noise=0.0)
    with torch.no_grad():
        entropy = torch.cat([naive_logprobs(model, s)[1] for s in sequences]).mean().item()
    for s, (_, importance, _) in zip(sequences, parts, strict=True):
        s.behaviour = s.behaviour - torch.tensor(importance).log()
    _, _, figures = run_update(model, sequences, settings())
    expected = {
        "loss": -(1 + 1.5 + 2 + 2 + 0.5) / 5, "clip_fraction": 0.0, "is_capped": 2 / 5, "trained_tokens": 5,
        "importance_replayed": 7.5 / 3, "ess_replayed": 7.5**2 / (3 * 25.25), "engine_max_ratio": 1.5,
        "engine_kl": (1.5 - 1 - math.log(1.5)) / 2, "entropy_trained": entropy, "kl": 0.0,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # around the birth policy the same numbers are the ratio: 1.5, 4 and 3 are clipped, and no weight is in use
    _, _, figures = run_update(model, sequences, settings(proximal="birth", **CLIP))
    expected = {
        "loss": -(1 + 1.28 + 1.28 + 1.28 + 0.5) / 5, "clip_fraction": 3 / 5, "clip_fraction_fresh": 1 / 2,
        "clip_fraction_replayed": 2 / 3, "is_capped": 0.0, "importance_replayed": 7.5 / 3,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_figures_of_replay_are_absent_without_replay():
    model = small_model()
    sequences = [dataclasses.replace(s, age=0) for s in random_answers(3, seed=15)]
    _, _, figures = run_update(model, with_behaviour(model, sequences), settings())
    assert not [name for name in figures if "replayed" in name]


def test_bfloat16_computes_low_and_keeps_float32_weights():
    """One step at lr 1e-6 moves float32 weights; the same weights in bf16 would stand still."""
    model = small_model()
    sequences = with_behaviour(model, random_answers(8, seed=16))
    _, (exact,), _ = run_update(model, sequences, settings())
    _, (low,), figures = run_update(model, sequences, settings(dtype="bfloat16"))
    flat, expected = (torch.cat([g[name].flatten() for name in exact]) for g in (low, exact))
    assert 1e-5 < relative(flat, expected) < 0.05 and flat.dtype == torch.float32
    assert math.isfinite(figures["loss"])

    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    update(Policy(model, "bfloat16"), optimizer, sequences, settings(dtype="bfloat16"), 0)
    pairs = [(before[name], p) for name, p in model.named_parameters() if "proj" in name]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    old, new = (torch.cat([pair[side].detach().flatten() for pair in pairs]) for side in (0, 1))
    assert (new != old).float().mean() > 0.95
    assert (new.bfloat16() != old.bfloat16()).float().mean() < 0.02


def test_gradient_checkpointing_changes_nothing():
    model, cfg = small_model(), settings(minibatches=2)
    sequences = with_behaviour(model, random_answers(6, seed=17))
    _, expected, _ = run_update(model, sequences, cfg, lr=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, seen, _ = run_update(model, sequences, cfg, lr=0.1)
    for ours, theirs in zip(seen, expected, strict=True):
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("case", ["no GPU", "an old GPU", "float32", "fits"])
def test_a_model_gets_the_attention_that_reads_borders_where_it_can(monkeypatch, case):
    model = small_model()
    usual = model.config._attn_implementation
    dtype = "float32" if case == "float32" else "bfloat16"
    capability = (7, 5) if case == "an old GPU" else (8, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: case != "no GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    # The model is on the CPU: there is nothing to check yet.
    assert use_varlen_attention(model, dtype) is False
    assert model.config._attn_implementation == (attention.NAME if case == "fits" else usual)
    if case == "fits":
        monkeypatch.setattr(type(model), "device", SimpleNamespace(type="cuda"))
        assert use_varlen_attention(model, dtype) is True


def test_answers_of_a_batch_carry_what_their_groups_know():
    def group(number: int, birth: int) -> Group:
        tokens = [torch.tensor(row, dtype=torch.int32) for row in ([4, EOS], [5, 6, 7])]
        logprobs = [-torch.rand(len(row)) for row in tokens]
        rewards = torch.tensor([1.0, 0.0])
        return Group(number, tokens, logprobs, [False, True], birth, rewards, advantages=rewards - 0.25)

    prompts = [SimpleNamespace(ids=(2, 3)), SimpleNamespace(ids=(8,))]
    batch = [group(1, birth=7), group(0, birth=4)]
    found = to_answers(batch, prompts, step=7, mask_truncated=False)
    assert [s.prompt for s in found] == [(8,), (8,), (2, 3), (2, 3)]
    assert [s.advantage for s in found] == [0.75, -0.25, 0.75, -0.25]
    assert [s.age for s in found] == [0, 0, 3, 3] and all(s.count == 1 for s in found)
    for s, tokens, logprobs in zip(
        found, batch[0].tokens + batch[1].tokens, batch[0].logprobs + batch[1].logprobs, strict=True
    ):
        assert torch.equal(s.tokens, tokens) and torch.equal(s.behaviour, logprobs)
    masked = to_answers(batch, prompts, step=7, mask_truncated=True)
    assert [len(s.tokens) for s in masked] == [2, 2]


def test_weights_are_optimised_by_adamw_with_the_settings_given():
    policy = Policy(small_model())
    cfg = settings(lr=0.1, betas=(0.5, 0.7), weight_decay=0.3)
    (group,) = make_optimizer(policy, cfg).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.5, 0.7), 0.3)
    assert len(group["params"]) == len(list(policy.parameters()))
    try:
        import torchao  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install torchao"):
            make_optimizer(policy, settings(optimizer="adamw8bit"))


# ---------------------------------------------------------------- several ranks


RANKS = {"minibatches": 4, "epochs": 2, "tokens_per_microbatch": 20, "proximal": "birth", "grad_clip": 0.5, "kl": 0.1}


def rank_case():
    """Minibatches of 2, 2, 2 and 1 answers: ranks have unequal numbers of micro-batches, and once none."""
    model = small_model()
    sequences = with_behaviour(model, random_answers(7, seed=21))
    sequences[0] = dataclasses.replace(sequences[0], prompt=(2,) * 40)
    return model, small_model(seed=22).requires_grad_(False), sequences


def one_rank(rank: int, world: int, folder: str):
    """Trains sharded over `world` processes and writes down weights and figures."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    patience = timedelta(seconds=90)  # ranks that fall out of step shall fail, not hang
    dist.init_process_group("gloo", f"file://{folder}/meet", patience, world, rank)
    model, reference, sequences = rank_case()
    scorers = [Policy(m) for m in (model, reference)]
    for scorer in scorers:
        for part in (*scorer.model.base_model.layers, scorer):
            fully_shard(part)
    model_part, reference_part = scorers
    optimizer = torch.optim.SGD(model_part.parameters(), lr=0.1)
    figures = update(model_part, optimizer, sequences, settings(**RANKS), 3, reference_part)
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    torch.save((weights, figures), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # two more processes
def test_two_ranks_train_as_one_does(tmp_path):
    model, reference, sequences = rank_case()
    trained, _, figures = run_update(model, sequences, settings(**RANKS), lr=0.1, reference=reference)
    torch.multiprocessing.spawn(one_rank, (2, str(tmp_path)), nprocs=2)
    before = dict(model.named_parameters())
    for rank in range(2):
        weights, sharded_figures = torch.load(tmp_path / f"rank{rank}.pt")
        assert sharded_figures == pytest.approx(figures, rel=1e-4, abs=1e-6)
        for name, p in trained.named_parameters():
            assert not torch.equal(p, before[name])
            torch.testing.assert_close(weights[name], p.detach(), rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------- TRL as an oracle


def trl_trainer(model, folder, **options):
    """TRL's trainer around `model`; nothing is trained, only its loss is asked for."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    arguments = trl.GRPOConfig(
        output_dir=str(folder), bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False,
        per_device_train_batch_size=2, num_generations=2, max_completion_length=12, **options,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, args=arguments, processing_class=tiny.make_tokenizer(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 2),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def padded(rows, left=False, value=0.0):
    return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side="left" if left else "right")


def trl_inputs(sequences, old, anchor):
    """The batch as TRL has it: prompts padded left, answers right, with masks."""
    prompts = [torch.tensor(s.prompt) for s in sequences]
    answers = [s.tokens.long() for s in sequences]
    return {
        "prompt_ids": padded(prompts, True, PAD), "prompt_mask": padded([torch.ones_like(p) for p in prompts], True),
        "completion_ids": padded(answers, value=PAD), "completion_mask": padded([torch.ones_like(a) for a in answers]),
        "advantages": torch.tensor([s.advantage for s in sequences]),
        "old_per_token_logps": padded(old), "ref_per_token_logps": padded(anchor),
        "importance_sampling_ratio": padded(
            [torch.exp(o - s.behaviour).clamp(max=2.0) for o, s in zip(old, sequences, strict=True)]
        ),
        "num_items_in_batch": torch.tensor(sum(len(s.tokens) for s in sequences)),
    }  # fmt: skip


TRL = {  # TRL's options -> ours; its dual clip is `delta`, and its CISPO bound is 1 + our clip_high
    "dapo": ({"loss_type": "dapo", "delta": None}, {}),
    "dual-clip": ({"loss_type": "dapo", "delta": 1.6}, {"dual_clip": 1.6}),
    "grpo": ({"loss_type": "grpo"}, {"normaliser": "sequence"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"normaliser": "constant"}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
        {"normaliser": "sequence", "ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    ),
    "gspo-token-mean": (
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
        {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.28}, {"loss": "cispo"}),
    "kl": ({"loss_type": "dapo"}, {"kl": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), TRL.values(), ids=TRL)
@pytest.mark.parametrize("corrected", [False, True])
def test_loss_and_gradient_equal_those_of_trl(tmp_path, theirs, ours, corrected):
    ours = {"normaliser": "token", "ratio": "token", "kl": 0.0} | ours
    normaliser, kl = ours.pop("normaliser"), ours.pop("kl")
    model = small_model()
    sequences = with_behaviour(model, random_answers(8, seed=18))
    with torch.no_grad():
        old = [naive_logprobs(model, s)[0] + 0.3 * torch.randn(len(s.tokens)) for s in sequences]
        anchor = [naive_logprobs(small_model(seed=19), s)[0] for s in sequences]

    trained = copy.deepcopy(model)
    trainer = trl_trainer(trained, tmp_path, **{"epsilon": 0.2, "epsilon_high": 0.28, "temperature": 1.0} | theirs)
    trainer.beta = kl  # given to its constructor, it would look for a reference model to load
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = corrected  # multiplies by the ratio it is given
    trained.train()
    expected = trainer._compute_loss(trained, trl_inputs(sequences, old, anchor))
    expected.backward()

    total, clipped = 0.0, []
    weights = token_weights(torch.tensor([len(s.tokens) for s in sequences]), normaliser, max_tokens=12)
    for micro in pack(sequences, 60):
        rows = [sequences[i] for i in micro.sequences]
        before, target = (torch.cat([x[i] for i in micro.sequences]) for x in (old, anchor))
        weight = weights[micro.sequences][micro.segment]
        advantage = torch.tensor([s.advantage for s in rows])[micro.segment]
        behaviour = torch.cat([s.behaviour for s in rows])
        logprob, _ = Policy(model)(micro, 1.0)
        loss, flags = policy_loss(
            logprob, before, behaviour, advantage, weight, micro.segment, is_cap=2.0 if corrected else 0, **CLIP | ours
        )
        loss = loss + kl * (weight * k3(logprob, target) * torch.exp(logprob - before)).sum()
        loss.backward()
        total += loss.item()
        clipped += flags.tolist()
    assert total == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradients(gradients(model), gradients(trained))
    assert 0 < sum(clipped) < len(clipped)
    if ours == {"ratio": "token"}:  # TRL counts clipped tokens in the same way here
        share = trainer._metrics["train"]["clip_ratio/region_mean"][0]
        assert sum(clipped) / len(clipped) == pytest.approx(share)


def test_the_policy_that_is_trained_has_no_dropout(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    models = [GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64))]
    models += [small_model("llama")]
    models[1].model.layers[0].self_attn.attention_dropout = 0.5
    ids = torch.randint(VOCABULARY, (3, 20))
    for model in models:
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        without_dropout(model)
        torch.testing.assert_close(model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_drift_is_the_mean_k3_from_each_groups_own_sampler():
    model, sequences = small_model(), random_answers(7, seed=3)
    shifts = (0.0, 0.0, 0.4, -0.3, 0.1, 0.0, 1.0)  # log mu - log pi
    groups, prompts, expected = [], [], []
    for number, part in enumerate((slice(0, 2), slice(2, 4), slice(4, 7))):
        prompts.append(SimpleNamespace(ids=sequences[part][0].prompt))
        answers = [dataclasses.replace(s, prompt=prompts[number].ids) for s in sequences[part]]
        with torch.no_grad():
            now = [naive_logprobs(model, s)[0] for s in answers]
        logprobs = [row + shift for row, shift in zip(now, shifts[part], strict=True)]
        groups.append(Group(number, [s.tokens for s in answers], logprobs, [False] * len(answers), birth=0))
        values = [math.exp(-d) - 1 + d for d, row in zip(shifts[part], now, strict=True) for _ in row]
        expected.append(sum(values) / len(values))
    for tokens in (20, 1000):  # however it is cut
        cfg = Config(dtype="float32", tokens_per_microbatch=tokens)
        found = rules.drift_of(groups, Policy(model), prompts, cfg)
        assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found[0]) < 1e-6 < min(found[1:])


def test_models_that_would_get_wrong_log_probs_are_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    check_policy(Policy(small_model("qwen3")))
    check_policy(Policy(small_model("llama")))
    config = GraniteConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.logits_scaling = 0.1
    with pytest.raises(ValueError, match="granite"):
        check_policy(Policy(GraniteForCausalLM(config).eval()))
