import os
import signal

import pytest

from halos_jax.rounds.interrupt import EXIT_CODE, Interrupted, catch_sigterm


def test_a_signal_is_remembered_until_the_run_can_stop():
    before = signal.getsignal(signal.SIGTERM)
    with catch_sigterm() as stop:
        stop.check()
        assert not stop.received(step=1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received(step=2) and stop.received(step=3)
        with pytest.raises(Interrupted, match="run the same command again"):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_handler_comes_back_after_an_error_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), catch_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not before
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_exit_code_says_try_again():
    assert os.EX_TEMPFAIL == EXIT_CODE
