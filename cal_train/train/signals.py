"""SIGTERM and SIGINT during training: the step in hand is finished and saved, then the process ends.

The exit code is what a shell gives for the signal, 143 or 130: a scheduler that restarts what did not end with 0
restarts the run. Signals before the first and after the last step act as in any program.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_S = 3.0
"""Launchers and schedulers both pass a signal on: what arrives within seconds of the first is the same request."""


@dataclass
class StopRequest:
    """The first signal that this process received, if any.

    Attributes:
        number: Of the signal.
        received_at: Clock time of the first, seconds.
    """

    number: int | None = None
    received_at: float = 0.0


class StoppedBySignal(SystemExit):
    """Training was stopped by a signal and is saved; uncaught, it ends the process with 128 + the signal's number.

    Attributes:
        checkpoint: Where to go on from.
        is_main_process: Whether this rank is the one that speaks to the user.
    """

    def __init__(self, number: int, checkpoint: Path, is_main_process: bool):
        super().__init__(128 + number)
        self.checkpoint = checkpoint
        self.is_main_process = is_main_process


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of ending; a second one, later than `SAME_REQUEST_S`, ends the process at once.

    Outside the main thread, where Python allows no handlers, signals act as before.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    owner = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked loader worker: Ctrl-C reaches it too, but the step still needs its batches
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif request.number is None:
            request.number, request.received_at = number, time.monotonic()
            name = signal.Signals(number).name
            # a handler may interrupt a log line that is being written: no logging here
            os.write(2, f"{name}: saving after this step; a second signal exits at once\n".encode())
        elif time.monotonic() - request.received_at > SAME_REQUEST_S:
            os._exit(128 + number)

    before = {number: signal.signal(number, receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_name(number: int) -> str:
    """Return the name of a signal, SIGTERM for 15."""
    return signal.Signals(number).name
