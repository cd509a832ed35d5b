"""The shipped reference runs: small, of today's settings, and to be compared with a run of one's own."""

import json
import shlex

import numpy as np
import pytest

from lab import compare, reference
from support import plot
from support.config import ROOT
from tests.helpers import code_of

SHIPPED = ROOT / "docs" / "reference"
MEMORY = {"gpu_memory", "tokens_per_microbatch", "rollout_batch"}  # its bounds change a run by rounding alone


def row(step: int, **more) -> dict:
    common = {"step": step, "rollouts": 8 * step, "optimizer_steps": 2, "seconds_total": 0.5}
    return common | {"reward": 1 / 3, "loss": 0.1, "sync_error": 0.0} | more


def test_a_thinned_row_has_sums_counts_so_far_and_means_of_what_is_kept():
    rows = [row(1, skipped=3, eval_accuracy_start=0.1), row(2, skipped=5), row(3, skipped=5), row(4, skipped=5)]
    for number, one in enumerate(rows):
        one["prompt_uses"] = [0] * number + [1]
        one["group_ages"] = [number, 1]
    # a key that only some steps have, and that stands before sync_error
    rows[1] = {"step": 2, "ess_replayed": 0.5} | {key: value for key, value in rows[1].items() if key != "step"}
    rows[3]["eval_accuracy"] = 0.25
    first, second = reference.thinned(rows, 2)
    assert (first["step"], first["rollouts"], first["optimizer_steps"], first["seconds_total"]) == (2, 16, 4, 1.0)
    assert first["skipped"] == 4 and first["ess_replayed"] == 0.5 and first["eval_accuracy_start"] == 0.1
    assert first["prompt_uses"] == [0, 1] and first["group_ages"] == [1, 2]
    assert second["eval_accuracy"] == 0.25 and "ess_replayed" not in second
    assert list(first).index("ess_replayed") < list(first).index("sync_error") < list(first).index("skipped")
    assert "loss" not in first and first["reward"] == 0.333


@pytest.mark.parametrize("method", reference.METHODS)
def test_the_shipped_runs_are_small_whole_and_of_todays_settings(method):
    folder = SHIPPED / method
    run = compare.read_run(folder)
    assert run["points"]["rollouts"].iloc[-1] >= reference.STEPS * 128 and len(run["points"]) == 16
    assert run["points"]["accuracy"].iloc[-1] > run["points"]["accuracy"].iloc[0] + 0.3
    assert (run["method"], run["seed"]) == (method, 0) and run["commit"]
    assert (folder / "metrics.jsonl").stat().st_size < 9_500 and (folder / "curves.png").stat().st_size < 60_000
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "curves.png", "metrics.jsonl"]
    # a default that has changed since would make another run of the same command: python -m lab.reference
    cfg, _ = compare.settings_of(shlex.split(run["config"]["command"])[2:])
    today = json.loads(json.dumps(vars(cfg)))
    known = today.keys() & run["config"].keys() - MEMORY
    changed = [name for name in known if today[name] != run["config"][name]]
    assert not changed


def test_a_reference_run_and_its_figure_know_what_the_rule_said():
    said = plot.Curves(SHIPPED / "prioritized").of_the_rule()
    assert {"heap", "solved_pool", "unsolved_pool"} <= set(said) and not set(said) & {"ess_replayed", "loss"}
    assert plot.Curves(SHIPPED / "none").of_the_rule() == {}


def test_two_reference_runs_are_compared_and_drawn(tmp_path, capsys):
    prompt, none = str(SHIPPED / "prompt"), str(SHIPPED / "none")
    assert compare.main([prompt, none, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["baseline"] == "none" and set(result["methods"]) == {"none", "prompt"}
    assert result["methods"]["prompt"]["budgets"]["rollouts"] == reference.STEPS * 128
    assert "`mask_truncated`: False; Prompt Replay True" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_ones_own_stands_beside_its_reference(tmp_path, capsys):
    folders = {"--docs": tmp_path / "docs", "--runs": tmp_path / "runs", "--visits": tmp_path / "lives.npz"}
    flags = [str(word) for pair in folders.items() for word in pair] + ["--methods", "prompt", "--steps", "40"]
    assert reference.main(flags) == 0
    assert len(np.load(tmp_path / "lives.npz")["visits"]) == 40 * 16
    mine, shipped = str(tmp_path / "runs" / "prompt"), str(tmp_path / "docs" / "reference" / "prompt")
    assert compare.main([mine, shipped, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["baseline"] == shipped and set(result["methods"]) == {mine, shipped}
    # it is the same run, whose costs thinning has kept
    for cost in ("rollouts", "tokens", "optimizer_steps"):
        assert result["methods"][mine]["difference"][cost]["mean"] == pytest.approx(0, abs=1e-9)
        assert result["methods"][mine]["budgets"][cost] == result["methods"][shipped]["budgets"][cost]
    capsys.readouterr()
    assert code_of(reference.main, [*flags[:-1], "30"]) == 2
    assert "no multiple of 20" in capsys.readouterr().err
