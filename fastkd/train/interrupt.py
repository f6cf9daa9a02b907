"""Ctrl-C, SIGTERM and SIGUSR1 (a scheduler's early warning) end a run after the current step, with a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
import time

logger = logging.getLogger("fastkd")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """Context manager: the first signal's number stands in `pressed`, 0 before; a second one stops at once.

    Several processes ask each other for it, and stop together (`Processes.agreed`).

    Args:
        echo: seconds in which further signals count as the first one: a scheduler tells every process of a job, and
            torchrun, which is one of them, tells those that it has started again.
    """

    def __init__(self, echo: float = 0.0) -> None:
        self.pressed, self.echo, self._first = 0, echo, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.pressed and time.monotonic() - self._first < self.echo:
            return
        if self.pressed:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.pressed, self._first = number, time.monotonic()
        logger.info("%s: stopping after this step; once more stops without saving", signal.Signals(number).name)
