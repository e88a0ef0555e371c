"""A progress bar on a terminal, nothing elsewhere."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import track


def progress[Step](steps: Sequence[Step], what: str) -> Iterator[Step]:
    """The steps, one after the other; the bar is on stderr and goes when they are done."""
    console = Console(stderr=True)
    yield from track(steps, what, console=console, transient=True, disable=not console.is_terminal)
