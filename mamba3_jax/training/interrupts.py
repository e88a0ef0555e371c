"""Ctrl-C and SIGTERM as something to look at between two steps, so that what is under way can be saved."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that becomes true at the first Ctrl-C or SIGTERM; the second one interrupts at once."""
    received: list[int] = []

    def handler(number, frame):
        received.append(number)
        print("finishing what is under way, to save it; again stops at once", flush=True)
        signal.signal(number, signal.default_int_handler)

    before: dict[int, Callable | int | None] = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, original in before.items():
            signal.signal(number, original)
