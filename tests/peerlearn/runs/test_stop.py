"""Signals that ask, and signals that interrupt."""

import os
import signal
import time

import pytest

from peerlearn.runs.stop import (
    STOP_SIGNALS,
    StoppedError,
    check_stop,
    interrupted_by_signals,
    not_interrupted,
    stop_signals,
)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    # The handler runs before the next instruction, or within it.
    time.sleep(0.01)


def test_a_signal_asks_and_a_block_that_has_nothing_to_save_is_interrupted(capfd):
    with stop_signals((signal.SIGTERM,), "saving") as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert (stop.requested, stop.name) == (True, "SIGTERM")
        check_stop()
        with pytest.raises(StoppedError, match=r"\Astopped by SIGTERM\Z"), stop.at_once():
            raise AssertionError("it was asked before")
        check_stop()
    assert capfd.readouterr().err == "SIGTERM: saving\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_an_interruption_comes_wherever_the_work_stands_and_passes_by_except_exception(
    number, capfd
):
    before = [signal.getsignal(each) for each in STOP_SIGNALS]

    @interrupted_by_signals()
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except Exception:
            raise AssertionError("it was taken for an error of the work") from None

    with pytest.raises(StoppedError, match=f"stopped by {number.name}"):
        work()
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
    assert capfd.readouterr().err == ""


def test_what_a_library_swallows_is_raised_at_the_next_check():
    with interrupted_by_signals():
        with pytest.raises(StoppedError):
            send(signal.SIGTERM)
        with pytest.raises(StoppedError):
            check_stop()


def test_what_others_count_on_is_finished_first():
    done = []

    @interrupted_by_signals()
    def work() -> None:
        with not_interrupted():
            send(signal.SIGUSR2)
            check_stop()
            done.append("as a whole")
        done.append("more")

    with pytest.raises(StoppedError):
        work()
    assert done == ["as a whole"]
    with not_interrupted():
        done.append("without signals")
    assert len(done) == 2


def test_what_saves_within_a_verb_takes_the_signals_itself():
    with interrupted_by_signals():
        with stop_signals(STOP_SIGNALS, "saving") as stop:
            send(signal.SIGINT)
            assert stop.requested
        with pytest.raises(StoppedError, match="SIGTERM"):
            send(signal.SIGTERM)


def test_a_second_ctrl_c_interrupts_what_saves():
    with stop_signals(STOP_SIGNALS, "saving"):
        send(signal.SIGINT)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            send(signal.SIGINT)
        assert not isinstance(interrupted.value, StoppedError)
