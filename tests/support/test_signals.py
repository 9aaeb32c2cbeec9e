"""Signals only ask to leave, and the strongest of them counts."""

from __future__ import annotations

import os
import signal

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from llada_lightning.support.signals import SIGNALS, LeaveRequest, leaving_at_a_steps_end


@pytest.mark.parametrize(
    ("sent", "counts"),
    [
        ([signal.SIGTERM], signal.SIGTERM),
        ([signal.SIGTERM, signal.SIGUSR1], signal.SIGUSR1),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], signal.SIGUSR1),
        ([signal.SIGHUP, signal.SIGINT], signal.SIGINT),
    ],
)
def test_the_strongest_signal_counts_and_says_so_once(
    sent: list[signal.Signals], counts: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    request = LeaveRequest()
    with leaving_at_a_steps_end(request):
        for number in sent:
            os.kill(os.getpid(), number)
    assert request.received == counts
    assert capsys.readouterr().err.count("stopping at the end of this step") == 1
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_ctrl_c_twice_stops_at_once() -> None:
    with leaving_at_a_steps_end(LeaveRequest()):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("agreed", [None, *SIGNALS])
def test_the_exit_code_names_the_signal(agreed: signal.Signals | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr("llada_lightning.support.signals.requeue_together", lambda: asked.append(None))
    request = LeaveRequest()
    request.agreed = agreed

    def run() -> None:
        with leaving_at_a_steps_end(request):
            raise SIGTERMException

    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == 128 + (agreed or signal.SIGTERM)
    assert len(asked) == (agreed == signal.SIGUSR1)
