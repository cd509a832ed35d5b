"""The contracts of samplers and stores, also for a rule of your own:

    python -m pytest tests/test_samplers.py --rule my_rule.py:Pace
    python -m pytest tests/test_stores.py --rule my_rule.py:Shelf

The class joins the project's own wherever a test has the argument `make_sampler` or `make_store`, by what it DECIDES.
Its tests have its name in brackets; `-k Pace` runs these alone. It is made as train.py makes it, with defaults only.
"""

import signal

import pytest

from support.config import load_class

# The background jobs of a shell, and of nohup, ignore these, and what tests start would ignore them too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--rule", action="append", default=[], metavar="FILE.py:CLASS", help="run its contract tests too")
    parser.addoption("--many", action="store_true", help="tests/faults: fifteen times as many")
    parser.addoption("--fault-seed", type=int, metavar="N", help="tests/faults: the same faults as in another run")


def pytest_generate_tests(metafunc):
    for argument, table, stores in (("make_sampler", "SAMPLERS", False), ("make_store", "STORES", True)):
        if argument in metafunc.fixturenames:
            kinds = getattr(metafunc.module, table) | rules(metafunc.config, stores)
            metafunc.parametrize(argument, kinds.values(), ids=kinds.keys())


def rules(config, stores: bool) -> dict[str, type]:
    """The classes named by --rule that are stores, or those that are samplers."""
    found = {}
    for name in config.getoption("rule"):
        try:
            kind = load_class(name)
        except (ValueError, FileNotFoundError, ImportError) as error:
            raise pytest.UsageError(str(error)) from error
        decides = getattr(kind, "DECIDES", None)
        if decides not in ("prompts", "places", "extra"):
            raise pytest.UsageError(f'{name}: DECIDES must be "prompts", "places" or "extra", got {decides!r}')
        if stores == (decides != "prompts"):
            found[kind.__name__] = kind
    return found


def pytest_terminal_summary(terminalreporter):
    """The table of tests/faults: what was tried, and what was held."""
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
