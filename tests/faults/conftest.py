"""The campaign: faults are counted, and a table at the end says how many were tried and how many the project held.

    python -m pytest tests/faults -m "slow or not slow"            a few minutes
    python -m pytest tests/faults -m "slow or not slow" --many     an hour: more kills and more hostile values

Where faults fall is random. The seed stands above the table; `--fault-seed N` gives the same again.
"""

import random
import time

import pytest

from tasks import tiny

TIMES = 15  # more of everything random, with --many


@pytest.fixture(scope="session", autouse=True)
def embedded_model():
    tiny.make(tiny.home())


@pytest.fixture(scope="session")
def seed(request) -> int:
    given = request.config.getoption("--fault-seed")
    if given is None:
        # xdist gives all of its workers one number
        shared = getattr(request.config, "workerinput", {}).get("testrunuid")
        given = int(shared, 16) if shared else int(time.time())
    return given % 1_000_000


@pytest.fixture
def rng(request, seed) -> random.Random:
    """Of this test alone, so that it does not matter which others run."""
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture
def times(request) -> int:
    """How often what is random is tried."""
    return TIMES if request.config.getoption("--many") else 1


@pytest.fixture
def count(record_property, seed):
    """Notes that a fault was tried, and whether it was held; the test goes on, and fails at its end."""
    record_property("fault-seed", seed)
    failures = []

    def note(kind: str, held: bool, what: str = "") -> None:
        record_property("fault", (kind, bool(held)))
        if not held:
            failures.append(f"{kind}: {what}")

    yield note
    assert not failures, "\n\n".join(failures)


def pytest_terminal_summary(terminalreporter):
    tried: dict[str, list[bool]] = {}
    seeds = set()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") != "teardown":  # the last report has all that was noted
                continue
            for name, value in report.user_properties:
                if name == "fault":
                    tried.setdefault(value[0], []).append(value[1])
                if name == "fault-seed":
                    seeds.add(value)
    if not tried:
        return
    terminalreporter.section("faults")
    terminalreporter.line(f"--fault-seed {' '.join(map(str, seeds))}")
    terminalreporter.line(f"{'':50} tried  held")
    for kind, held in sorted(tried.items()):
        terminalreporter.line(f"{kind:50} {len(held):5} {sum(held):5}")
    every = [one for held in tried.values() for one in held]
    terminalreporter.line(f"{'all':50} {len(every):5} {sum(every):5}")
