"""The embedded task's knobs: what prompts share, how hard they are, how many there are."""

import random
from collections import Counter

import pytest

import reward
import train as program
from support import config
from tasks import data, tiny


def rates(pupil, pairs, tries=300):
    """Measured pass rate of the pupil on each (question, gold), by the run's own reward."""
    rng = random.Random(0)
    return [
        sum(reward.grade_equation([pupil.answer(question, rng) for _ in range(tries)], [gold] * tries)) / tries
        for question, gold in pairs
    ]


@pytest.mark.parametrize("sharing", tiny.STEPS)
def test_the_reward_sees_the_pupil_err_at_its_stated_rates(sharing):
    pupil = tiny.make_pupil(sharing)
    pairs, _ = tiny.problems(sharing, 20)
    for (question, _), seen in zip(pairs[:40], rates(pupil, pairs[:40]), strict=True):
        assert abs(seen - pupil.pass_rate(question)) < 0.11
    assert {tiny.make_pupil(sharing).pass_rate(q) for q, _ in pairs} == {pupil.pass_rate(q) for q, _ in pairs}


def test_how_many_prompts_share_a_fact():
    questions = [question for question, _ in tiny.arithmetic(2000)]
    used = {}
    for sharing in ("digits", "columns"):
        pupil = tiny.make_pupil(sharing)
        facts = Counter(fact for q in questions for fact in set(pupil.facts(q)) if fact[1:3] != (0, 0))
        used[sharing] = sum(facts.values()) / len(facts)
        assert len(pupil.error_rate) == {"digits": 200, "columns": 800}[sharing]
    assert 25 < used["digits"] < 35 and 6 < used["columns"] < 10  # of 2,000 prompts
    rote = tiny.make_pupil("none")
    assert len(rote.gold) == len(rote.error_rate) == tiny.LOOKUPS and len(set(rote.questions(50, 0))) > 30


def test_pass_rates_are_far_apart_as_those_of_real_models():
    for sharing in tiny.STEPS:
        pupil = tiny.make_pupil(sharing)
        values = [pupil.pass_rate(q) for q, _ in tiny.problems(sharing, 0)[0]]
        assert sum(v < 0.1 for v in values) > 0.3 * len(values) and sum(v > 0.9 for v in values) > 0.1 * len(values)
        assert 0.2 < sum(values) / len(values) < 0.45


@pytest.mark.parametrize("sharing", tiny.STEPS)
def test_difficulty_and_size_of_the_pool(sharing):
    pupil = tiny.make_pupil(sharing)
    train, held_out = tiny.problems(sharing, 30, (0.0, 0.5))
    assert all(pupil.pass_rate(question) <= 0.5 for question, _ in train + held_out) and len(held_out) == 30
    few, _ = tiny.problems(sharing, 30, (0.0, 0.5), most=64)
    assert few == train[:64]
    assert set(held_out) <= set(train) if sharing == "none" else not set(held_out) & set(train)


def test_the_usual_task_is_what_it_was():
    train, held_out = tiny.problems("digits", 400)
    pairs = tiny.arithmetic(2400)
    assert (train, held_out) == (pairs[400:], pairs[:400])


def test_sharing_belongs_to_the_embedded_task():
    with pytest.raises(ValueError, match="--sharing is a knob of the embedded task"):
        config.check_training(program.Config(model="Qwen/Qwen3-8B", sharing="none"))


@pytest.mark.slow  # half a minute
def test_the_model_learns_the_habits_of_a_task_without_sharing():

    from rollout import TransformersEngine
    from support.model import load_model

    path = tiny.make(tiny.home("none"), sharing="none")
    model, tokenizer, stop_ids = load_model(str(path))
    pairs, _ = tiny.problems("none", 0)
    prompts, _ = data.encode(pairs, tokenizer, 32)
    engine = TransformersEngine(model, stop_ids, tiny.ANSWER_TOKENS)
    groups, pupil = engine.generate(prompts, 32, seed=0, step=0), tiny.make_pupil("none")
    texts = [[tokenizer.decode(t, skip_special_tokens=True) for t in group.tokens] for group in groups]
    seen = [sum(reward.grade_equation(t, [gold] * 32)) / 32 for t, (_, gold) in zip(texts, pairs, strict=True)]
    wanted = [pupil.pass_rate(question) for question, _ in pairs]
    assert sum(abs(a - b) < 0.3 for a, b in zip(seen, wanted, strict=True)) > 0.9 * len(pairs)
    assert abs(sum(seen) - sum(wanted)) / len(pairs) < 0.06


def test_held_out_problems_are_never_trained_on():
    for difficulty in ((0.0, 1.0), (0.0, 0.3)):
        _, held_out = tiny.problems("digits", tiny.HELD_OUT, difficulty)
        for count in (0, 20, 400):
            assert not set(tiny.problems("digits", count, difficulty)[0]) & set(held_out)
