"""Stopping in good order: what the batch system's signals mean to a build."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 90.0
"""Seconds that running compilers may go on after the time limit is announced, 120 s before it."""


@contextmanager
def stopped_by_signals(stop: Callable[[str], None], kill: Callable[[], None]) -> Iterator[None]:
    """While the block runs, SIGUSR1 (the time limit is near) and SIGTERM call `stop` with the reason.

    After SIGUSR1 what runs may end, for `GRACE_S` seconds; after SIGTERM `kill` is called at once. Only the
    main thread can be told of signals: elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(GRACE_S, kill)
    timer.daemon = True

    # In threads: a handler runs in the middle of the main thread's work, which may hold a lock.
    def near_the_end(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=stop, args=("the job's time limit is near",)).start()
        if not timer.is_alive():
            timer.start()

    def terminate(number: int, frame: FrameType | None) -> None:
        def stop_and_kill() -> None:
            stop("the job is being ended")
            kill()

        threading.Thread(target=stop_and_kill).start()

    before = {
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, near_the_end),
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
    }
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
