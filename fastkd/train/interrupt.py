"""Ctrl-C and SIGTERM end a run after the current step, with a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading

logger = logging.getLogger("fastkd")


class Interrupt:
    """Context manager: the signals set `pressed`; a second one stops at once.

    Only the main process stops by it: with several, the others must take part in its last step (torchrun ends them).
    """

    def __init__(self, is_main: bool) -> None:
        self.is_main, self.pressed = is_main, False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if not self.is_main:
            return
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        logger.info("stopping after this step; once more stops without saving")
