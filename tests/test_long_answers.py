"""The task of long answers: what the pupil writes, what is right, and lessons of varying length."""

import random
from statistics import fmean

import pytest
import torch

from lab import long_answers
from lab.long_answers import Chain, gold, score
from support.config import ROOT
from tasks import own, tiny

QUESTION = "0317+0085*c="


def sure(chain: Chain) -> Chain:
    """The same pupil without an error."""
    chain.pupil.error_rate = dict.fromkeys(chain.pupil.error_rate, 0.0)
    return chain


def test_a_pupil_without_errors_is_always_right():
    chain = sure(Chain())
    rng = random.Random(0)
    for question in chain.questions(200, 0):
        assert score([chain.answer(question, rng)], [gold(question)]) == [1.0]
    # 317 + 85 = 402, + 85 = 487, + 85 = 572; digit and carry of each column from the right
    text = chain.answer(QUESTION, rng).replace("~0402", "").replace("~0487", "").replace("~0572", "")
    assert text == "a+008521014000=00402b+008570804000=00487c+008521715000=00572!0572"


def test_the_reward_sees_the_pupil_err_at_about_its_stated_rates():
    chain = Chain()
    rng = random.Random(0)
    gaps = []
    for question in chain.questions(60, 0):
        seen = fmean(score([chain.answer(question, rng) for _ in range(150)], [gold(question)] * 150))
        gaps.append(seen - chain.pass_rate(question))
    # errors that make up for each other are right, and are not counted
    assert max(map(abs, gaps)) < 0.15 and abs(fmean(gaps)) < 0.02


def test_an_error_goes_into_all_that_follows():
    chain = sure(Chain())
    chain.pupil.error_rate["+", 7, 5, 0] = 1.0  # the first digit of all
    answer = chain.answer(QUESTION, random.Random(0))
    wrong = (2 + chain.pupil.shift["+", 7, 5, 0]) % 10
    assert f"=0040{wrong}" in answer and score([answer], [gold(QUESTION)]) == [0.0]


def test_answers_are_long_vary_in_length_and_fit():
    chain = Chain()
    rng = random.Random(0)
    ranges = []
    lengths = []
    for question in chain.questions(100, 0):
        own_lengths = [len(chain.answer(question, rng)) + 1 for _ in range(8)]
        ranges.append(max(own_lengths) - min(own_lengths))
        lengths += own_lengths
    assert min(lengths) >= 60 and max(lengths) <= long_answers.MOST_TOKENS < 210
    assert fmean(lengths) > 90 and fmean(ranges) >= 5


@pytest.mark.parametrize("text", ["a+0085!572", "0572", "!0572x", "!0571", "!0572!0572", ""])
def test_only_one_whole_number_at_the_end_is_right(text):
    assert score([text, "anything!0572"], ["0572", "0572"]) == [0.0, 1.0]


def test_it_is_a_task_that_train_py_takes():
    training, held_out, _ = own.problems(str(ROOT / "lab" / "long_answers.py"))
    questions = [pair[0] for pair in training + held_out]
    assert len(set(questions)) == len(questions) > 1400 and len(held_out) > 140
    tokenizer = tiny.make_tokenizer(long_answers.ALPHABET)
    assert {len(ids) for ids in tokenizer(questions)["input_ids"]} == {12}
    answer = Chain().answer(questions[0], random.Random(0))
    assert tokenizer.decode(tokenizer(answer)["input_ids"]) == answer
    assert all(gold(question) == pair[1] for question, pair in zip(questions, training, strict=False))


def test_lessons_of_unequal_length_count_no_padding():
    tokenizer = tiny.make_tokenizer(long_answers.ALPHABET)
    model = tiny.make_model(0, **long_answers.SHAPE)
    chain = Chain((1, 1, 1))
    texts = []

    def remember(question, rng):
        texts.append(Chain.answer(chain, question, rng))
        return texts[-1]

    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pupil = type("Pupil", (), {"questions": staticmethod(chain.questions), "answer": staticmethod(remember)})
    loss = tiny.train(model, tokenizer, pupil, seed=0, steps=1, batch=4)
    model.load_state_dict(before)
    questions = chain.questions(4, random.Random(0).getrandbits(32))
    assert len({len(text) for text in texts}) > 1
    total = 0.0
    count = 0
    for question, text in zip(questions, texts, strict=True):
        ids = torch.tensor(tokenizer([question + text + "<eos>"])["input_ids"])
        labels = ids.clone()
        labels[:, : len(question)] = -100
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * (len(text) + 1)
        count += len(text) + 1
    assert loss == pytest.approx(total / count, rel=1e-4)
