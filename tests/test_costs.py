"""Planned seconds: by hand where that can be done, and in the right order everywhere."""

import dataclasses
import math

import pytest
from transformers import Qwen3Config

from lab import gpus
from support import costs, plan
from train import Config


def planned(model: str, machine: str, **settings) -> tuple[dict, Config, dict, costs.Card]:
    s = plan.shape(Qwen3Config(**gpus.sizes_of(model)))
    cfg = Config(model=model, **settings)
    count, gpu = plan.found_gpus(machine)
    return s, cfg, plan.plan(s, cfg, count, gpu), costs.card_of(gpu)


def seconds(model: str, machine: str, **settings) -> dict[str, float]:
    return costs.step_seconds(*planned(model, machine, **settings))


def test_seconds_of_qwen3_8b_on_one_h100_by_hand():
    found = seconds("Qwen3-8B", "1x80")
    answers, length = 512, 3584
    # forward, backward twice that, and forward once more; in the head as well
    products = 8 * (7.568e9) * answers * (length + 150)
    attention = 4 * 4 * 36 * 4096 * answers * sum(150 * n + n * n / 2 for n in range(7168)) / 7168
    assert found["update"] == pytest.approx((products + attention) / (0.35 * 989e12), rel=0.01)
    assert found["optimiser"] == pytest.approx(8.19e9 * (6 / (0.7 * 64e9) + 28 / 100e9), rel=0.01)
    assert found["sync"] == pytest.approx(6 * 8.19e9 / (0.6 * 3.35e12), rel=0.01)
    # 40.9 GiB of KV cache hold 117 answers of a third of the length, so that all take so many decoding steps
    steps = answers * length / (40.9 * 2**30 / 147_456 / (150 + 7168 / 3)) + 3584
    read = steps * 2 * 8.19e9 + answers * (150 * 3584 + 7168**2 / 6) * 147_456
    made = 2 * 8.19e9 * answers * length
    assert found["rollout"] == pytest.approx(read / (0.6 * 3.35e12) + made / (0.35 * 989e12), rel=0.01)


def test_answers_of_full_length_by_hand():
    """As random weights give them: twice the tokens, which see four times a third of the square."""
    s, cfg, found, card = planned("Qwen3-1.7B", "1x80", max_tokens=2048)
    full = costs.step_seconds(s, cfg, found, card, full=True)
    pairs = 150 * 2048 + 2048**2 / 2
    work = 8 * (s["linear"] + s["vocabulary"] * s["hidden"]) * 512 * (2048 + 150)
    work += 4 * 4 * s["layers"] * s["queries"] * 512 * pairs
    assert full["update"] == pytest.approx(work / (0.35 * 989e12), rel=0.001)
    # 50.2 GiB of KV cache hold 400 answers of half the length: all take so many decoding steps, and none is alone
    at_once = found["kv"]["pool"] / found["kv"]["token"] / (150 + 1024)
    assert 350 < at_once < 450
    steps = 512 * 2048 / at_once
    read = steps * 2 * s["parameters"] + 512 * pairs * found["kv"]["token"]
    made = 2 * s["parameters"] * 512 * 2048
    assert full["rollout"] == pytest.approx(read / (0.6 * 3.35e12) + made / (0.35 * 989e12), rel=0.001)


@pytest.mark.parametrize(
    ("part", "before", "after", "factor"),
    [
        ("update", {"gradient_checkpointing": False}, {}, (1.2, 4 / 3)),
        ("update", {}, {"kl": 0.1}, (1.2, 1.3)),
        ("update", {}, {"epochs": 2}, (2.2, 2.3)),
        ("update", {}, {"max_tokens": 3584}, (0.4, 0.52)),
        ("optimiser", {}, {"epochs": 2, "minibatches": 3}, (6, 6)),
        ("rollout", {}, {"max_tokens": 3584}, (0.2, 0.5)),
        ("rollout", {}, {"rollout_batch": 1}, (10, 15)),
    ],
)
def test_what_a_setting_costs(part, before, after, factor):
    ratio = seconds("Qwen3-1.7B", "1x80", **after)[part] / seconds("Qwen3-1.7B", "1x80", **before)[part]
    assert factor[0] - 1e-9 <= ratio <= factor[1] + 1e-9


def test_more_and_better_gpus_take_less():
    times = [sum(seconds("Qwen3-8B", machine).values()) for machine in ("1x80", "1x141", "2x80", "8x80")]
    assert times == sorted(times, reverse=True)
    s, cfg, found, card = planned("Qwen3-8B", "8x80")
    parts = costs.step_seconds(s, cfg, found, card)
    assert costs.gpu_hours(cfg, found, parts) == pytest.approx(500 * 8 * sum(parts.values()) / 3600)
    assert all(math.isfinite(value) and value > 0 for value in parts.values())


def test_cards_are_found_by_name_and_else_by_memory():
    assert costs.card_of(79.1 * 2**30, "NVIDIA A100-SXM4-80GB").name == "A100"
    assert costs.card_of(80 * 2**30).name == "H100"
    assert costs.card_of(23.6 * 2**30).name == "RTX 4090"
    assert costs.card_of(141 * 2**30, "unheard of").name == "H200"


def test_the_line_names_its_card_and_is_left_out_where_nothing_is_known():
    s, cfg, found, _ = planned("Qwen3-8B", "1x80")
    line = costs.line(s, cfg, found)
    assert line.startswith("planned, not measured, on H100: ") and "GPU hours for 500 steps" in line
    for other, plan_of_it in ((cfg, found | {"fits": False}), (dataclasses.replace(cfg, engine="transformers"), found)):
        assert "where a run fits" in costs.line(s, other, plan_of_it)


def test_the_table_of_gpus_says_what_to_change_where_it_does_not_fit():
    rows = {(row[0], row[1].split(" GB")[0]): row for row in (gpus.row(*names) for names in gpus.ROWS)}
    assert len(rows) == 13 and {len(row) for row in rows.values()} == {8}
    assert rows["Qwen3-8B", "1 x 80"][2] == "on the host, 98.4 GiB there"
    assert rows["Qwen3-8B", "8 x 80"][2] == "sharded"
    assert rows["Qwen3-4B", "1 x 24"][2].startswith("does not fit: --")
    assert all(not row[2].startswith("does not fit") for row in rows.values() if row[:1] != ["Qwen3-4B"])
