"""The campaign: faults are counted, and a table at the end says how many were tried and how many the project held.

    python -m pytest tests/faults -m "slow or not slow"            a few minutes
    python -m pytest tests/faults -m "slow or not slow" --many     ten minutes: fifteen times as many

Where faults fall is random. The seed stands above the table; `--fault-seed N` gives the same again. The table is
printed by tests/conftest.py, since pytest-xdist reads no other conftest of a run without paths.
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
