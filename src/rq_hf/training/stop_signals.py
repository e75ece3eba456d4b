"""Signals that stop a run: from a scheduler that takes the machine away, or from the keyboard."""

import os
import signal
import threading

from ..data.stream import STOP_SIGNALS


class StopSignals:
    """
    Inside, SIGTERM, SIGUSR1, SIGHUP and the first SIGINT are noted; a second SIGINT ends the process at once.

    Signals that the process ignores, as after `nohup`, stay ignored. Outside the main thread, where Python allows no
    handlers, nothing changes.

    Args:
        announced: say on stderr that a signal has arrived.

    Attributes:
        received (`int`): number of the last signal; 0 for none.
    """

    def __init__(self, announced: bool = False):
        self.announced = announced
        self.received = 0
        self.handlers = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame) -> None:
        self.received = number
        text = f"\n{signal.Signals(number).name}: the run stops after this step, with a checkpoint"
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            text += " (once more: at once, without)"
        if self.announced:
            os.write(2, f"{text}\n".encode())  # print is not reentrant

    def __exit__(self, *exception) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
