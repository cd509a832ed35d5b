"""What asks a run to stop: the step in hand is finished and saved."""

import multiprocessing
import os
import pty
import signal
import time
from pathlib import Path

import pytest

from support import limits, ranks

SECONDS = 30  # after which a child gives up


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def child(saved: Path, ignored: bool) -> None:
    """A run in a process forked from this one. It writes down which signal it has had."""
    status = 1
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        stop = ranks.Stop()
        os.write(1, b"ready")
        end = time.monotonic() + SECONDS
        while not stop.agreed() and time.monotonic() < end:
            time.sleep(0.01)
        os.write(1, b"saving")
        saved.write_text(str(stop.agreed()))
        status = 0
    finally:
        os._exit(status)  # whatever happens: the tests go on in the parent only


def start(saved: Path, ignored: bool = False) -> tuple[int, int]:
    """Its process id, and the terminal that it runs in."""
    process, terminal = pty.fork()
    if not process:
        child(saved, ignored)
    text = b""
    while b"ready" not in text:
        text += os.read(terminal, 1000)
    return process, terminal


def end(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_long(begun) -> None:
    begun.set()
    time.sleep(SECONDS)


def test_what_a_run_forks_ends_by_sigterm():
    ranks.Stop()
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=wait_long, args=(begun,), daemon=True)
    process.start()
    assert begun.wait(SECONDS)
    process.terminate()
    process.join(SECONDS / 3)
    assert process.exitcode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish(tmp_path, number):
    process, terminal = start(tmp_path / "saved")
    os.kill(process, number)
    assert end(process) == 0 and (tmp_path / "saved").read_text() == str(int(number))
    os.close(terminal)


def test_a_closed_terminal_lets_the_step_finish(tmp_path):
    """What is written to it afterwards would raise; the kernel sends SIGHUP."""
    process, terminal = start(tmp_path / "saved")
    os.close(terminal)
    assert end(process) == 0 and (tmp_path / "saved").read_text() == str(int(signal.SIGHUP))


def test_nohup_is_respected(tmp_path):
    process, terminal = start(tmp_path / "saved", ignored=True)
    os.kill(process, signal.SIGHUP)
    time.sleep(0.3)
    assert not (tmp_path / "saved").exists()
    os.kill(process, signal.SIGTERM)
    assert end(process) == 0 and (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
    os.close(terminal)


def test_a_second_signal_is_for_those_in_a_hurry(capsys):
    stop = ranks.Stop()
    stop.note(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt) as error:
        stop.note(signal.SIGTERM, None)
    assert error.value.args == (signal.SIGTERM,) and "once more" in capsys.readouterr().err


def test_of_several_ranks_it_is_said_how_long_torchrun_waits(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "WORLD", 2)
    ranks.Stop().note(signal.SIGTERM, None)
    assert "torchrun waits 30 s for it, or --shutdown-timeout" in capsys.readouterr().err


# ---------------------------------------------------------------- limits of time


def test_a_loop_without_end_and_one_that_catches_everything_are_ended():
    with pytest.raises(limits.TookTooLong, match=r"more than 0\.1 seconds"), limits.within(0.1):
        while True:
            pass
    caught = []
    with pytest.raises(limits.TookTooLong), limits.within(0.1):
        while True:
            try:
                time.sleep(60)
            except BaseException as error:
                caught.append(error)
                if len(caught) == 2:
                    raise
    assert len(caught) == 2


def test_what_ends_in_time_is_left_alone_and_no_alarm_stays():
    before = signal.getsignal(signal.SIGALRM)
    with limits.within(0.1):
        pass
    time.sleep(0.2)
    assert signal.getsignal(signal.SIGALRM) == before
