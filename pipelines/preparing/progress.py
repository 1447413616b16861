"""How far a job that goes over many sources is: a bar with rate and ETA, and what was rejected so far."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipelines import terminal

SAID_EVERY_S = 30.0
"""Time between lines where there is no terminal to draw a bar on."""


class TooManyRejectedError(Exception):
    """More of the videos are rejected than `prepare.max_rejected` allows. The message says how many and why."""


@dataclass
class Tally:
    """Rejected videos so far."""

    videos: int
    """All that there are in this job."""
    max_rejected: float
    reasons: Counter = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)

    def count(self, file: str, reason: str) -> None:
        """Raises TooManyRejectedError as soon as the share of all videos that is rejected is sure to be too large."""
        if reason and reason != "not_a_video":
            self.reasons[reason] += 1
            self.example.setdefault(reason, file)
        rejected = self.reasons.total()
        if self.max_rejected < 1 and rejected > self.max_rejected * self.videos:
            top = ", ".join(f"{why} {n} (like {self.example[why]})" for why, n in self.reasons.most_common(3))
            raise TooManyRejectedError(
                f"{rejected} of {self.videos} videos are rejected, more than "
                f"prepare.max_rejected={self.max_rejected:g} allows: {top}"
            )


@contextmanager
def bar(total: int, what: str = "videos") -> Iterator[Callable[[int], None]]:
    """Gives a function to call after each of `what` with its clips: draws a bar, or says a line now and then."""
    with terminal.progress_bar() as drawn:
        task = drawn.add_task(what, total=total)
        started = said = time.monotonic()
        clips = 0

        def advance(more: int) -> None:
            nonlocal clips, said
            clips += more
            now = time.monotonic()
            rate = f"{clips / (now - started + 1e-9):.1f} clips/s"
            drawn.update(task, advance=1, description=f"{what}, {clips} clips, {rate}")
            if not terminal.console.is_terminal and now - said > SAID_EVERY_S:
                said, done = now, int(drawn.tasks[0].completed)
                left_s = (now - started) / done * (total - done)
                terminal.console.print(
                    f"{done} of {total} {what}, {clips} clips, {rate}, ETA {terminal.duration(left_s)}"
                )

        yield advance
