"""What holds for code that is not ours: a limit of time, its error, and what it gives back in plain Python."""

import contextlib
import signal
import threading

SECONDS = 600  # of one call of a user's reward or rule; a judge behind a network may need minutes


class UsersCodeBroken(ValueError):
    """What a user's file defines does not do what it has to."""


class TookTooLong(BaseException):
    """No Exception, so that a user's `except Exception` does not catch it."""


@contextlib.contextmanager
def within(seconds: float):
    """Raises TookTooLong in the block after so many seconds of the clock, and each second again, should the block catch
    it. In other threads than the first nothing is limited: signals are not for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number, _frame):
        raise TookTooLong(f"it took more than {seconds} seconds, the limit of support/limits.py")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plain(value):
    """Arrays, tensors and their parts as Python's lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [part.item() if hasattr(part, "item") else part for part in value]
    return value
