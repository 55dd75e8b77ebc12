"""A first signal is noted, a second one obeyed; outside the blocks all is as before."""

import os
import signal
import threading
import time

import pytest

from ofb.engine.signals import SIGNALS, Stopped, StopRequests, sigterm_raises


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """A shell's background jobs ignore Ctrl-C, and so would tests that run there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_one_is_obeyed(number, capfd):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt), sigterm_raises(), StopRequests() as requests:
        os.kill(os.getpid(), number)
        assert requests.asked() == number
        assert "once more to stop at once" in capfd.readouterr().err
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_nobody_asked():
    with StopRequests() as requests:
        assert requests.asked() == 0


def test_sigterm_is_told_from_ctrl_c():
    with pytest.raises(Stopped) as stopped, sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.number == signal.SIGTERM


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.asked() == 0


def test_other_threads_leave_handlers_alone():
    failures = []

    def enter() -> None:
        try:
            with sigterm_raises(), StopRequests():
                pass
        except ValueError as error:  # Python's, outside of the main thread
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failures == []
