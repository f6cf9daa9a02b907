"""A run whose processes wait for one that is gone must end, with a message, instead of hanging.

The processes stand in a ring. Each of them waits, on a thread of its own, for word from its left neighbour: "good-bye"
at the end of the run, or the bad news that a process failed, which it passes on to the right. The operating system
closes the connections of a process that was killed, so that silence breaks off at once. Nothing is sent meanwhile and
training does not notice. A thread is needed because training itself may be stuck in a collective that will never end.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
from collections.abc import Callable, Iterator

import torch
from torch.distributed import ProcessGroup

from .config import ConfigError

logger = logging.getLogger("fastkd")

_TAG = 1
_LENGTH = 2048  # bytes of news; none at all is the good-bye
_FOREVER = datetime.timedelta(days=365)
_OWN_WORDS = 3.0  # seconds that a process has to fail by itself where another one has failed: it may know more
_FAILED = 1  # exit code


class EverywhereError(ConfigError):
    """Wrong arguments that all processes have found together; only the first one says which."""


class Watch:
    """Ends this process, with exit code 1 and one line in the log, when another process of the run is gone.

    Args:
        rank: of this process.
        names: of all processes, for messages.
        group: of all of them, by gloo, for hosts alone.
        advice: what the user can do, asked for when it is needed.
    """

    def __init__(self, rank: int, names: list[str], group: ProcessGroup, advice: Callable[[], str]) -> None:
        self._names, self._rank, self._group, self._advice = names, rank, group, advice
        self._ending, self._heard, self._once = threading.Event(), threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="fastkd-watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Around anything that may fail: the others learn why this process ends."""
        try:
            yield
        except EverywhereError:
            self.close()
            raise
        except BaseException as error:
            # A collective whose partner is gone fails with one of these. The thread then knows better, and exits.
            if type(error) is RuntimeError or isinstance(error, torch.distributed.DistError):
                if self._heard.wait(2 * _OWN_WORDS):
                    self._thread.join()
            if not self._ending.is_set():
                self._ending.set()
                text = str(error) or type(error).__name__
                self._tell(f"{self._names[self._rank]} has stopped: {text}")
            raise

    def close(self) -> None:
        """Says good-bye: this process ends because its work is done."""
        self._ending.set()
        self._tell("")
        self._thread.join(_OWN_WORDS)

    def _tell(self, news: str) -> None:
        """Sends it to the right neighbour, who waits for one message and no more."""
        if not self._once.acquire(blocking=False):
            return
        message = torch.zeros(_LENGTH, dtype=torch.uint8)
        text = news.encode()[:_LENGTH]
        message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else 0
        with contextlib.suppress(RuntimeError):  # the right neighbour may be the one that is gone
            torch.distributed.send(message, (self._rank + 1) % len(self._names), self._group, _TAG)

    def _listen(self) -> None:
        left = (self._rank - 1) % len(self._names)
        message = torch.zeros(_LENGTH, dtype=torch.uint8)
        try:
            torch.distributed.irecv(message, left, self._group, _TAG).wait(_FOREVER)
            news = bytes(message.tolist()).rstrip(b"\0").decode(errors="ignore")
            patience = _OWN_WORDS
        except RuntimeError as error:
            late = "Timed out" in str(error) or "timeout" in str(error)
            news = f"{self._names[left]} " + ("has not answered for --timeout-minutes" if late else "has died")
            patience = 0.0
        if not news or self._ending.is_set():
            return
        self._tell(news)
        if self._ending.wait(patience):
            return
        self._heard.set()
        logger.error("another process of this run is gone: %s. This one stops, too; %s", news, self._advice())
        os._exit(_FAILED)  # the main thread may wait in a collective for ever
