"""Elastic runs: how many workers the cluster has room for now, and word when there is room for more.

Ray's own scheduler is asked, by placement groups that are given back at once: it alone knows what other jobs hold, and
that a node which is still listed does not answer any more. An autoscaler sees what could not be placed and starts
machines for it. (Ray Train's elastic groups take the last CPU too, and Ray Data then waits for ever.)
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SETTLE_S = 5.0
"""Without a further worker placed for so long, those that are placed are all there is room for."""
LOOK_S = 0.2
CPUS_FOR_DATA = 1
"""Logical CPUs that must be left beside the workers: with none, Ray Data waits for ever."""


def resources(gpus: bool) -> dict[str, float]:
    """Resources that each worker reserves."""
    return {"GPU": 1} if gpus else {"CPU": 1}


def room(least: int, most: int, gpus: bool, warn: Callable[[str], None]) -> int:
    """Workers, `least` to `most`, that can be placed now beside Ray Data; waits for the `least`, and says so."""
    data, workers = [{"CPU": CPUS_FOR_DATA}], [resources(gpus)]
    with _wanted([data, *[workers] * most]) as groups:
        count, since, waited = 0, time.monotonic(), False
        while count < 1 + most:
            before, count = count, _placed(groups)
            if count > before:
                since = time.monotonic()
            elif time.monotonic() - since > SETTLE_S:
                if count >= 1 + least:
                    break
                if not waited:
                    here = max(count - 1, 0)
                    warn(f"there is room for {here} of {most} workers, train.min_workers={least}: waiting for more")
                    waited = True
            time.sleep(LOOK_S)
        return count - 1


@contextmanager
def growing(
    missing: int, gpus: bool, begun: threading.Event, after_s: float, grow: Callable[[], None]
) -> Iterator[None]:
    """While the block lasts: once, `after_s` or more after `begun`, call `grow` when there is room for one more.

    begun: the other workers are at work, and in their places.
    """
    over = threading.Event()

    def watch() -> None:
        while not begun.wait(LOOK_S):
            if over.is_set():
                return
        if over.wait(after_s):
            return
        # A CPU that Ray Data has left for a moment is no room for a worker: a second one must be free.
        with _wanted([[resources(gpus), {"CPU": CPUS_FOR_DATA}]] * missing) as groups:
            while not _placed(groups):
                if over.wait(LOOK_S):
                    return
        grow()

    thread = threading.Thread(target=watch, name="room", daemon=True)
    if missing:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if missing:
            thread.join()


@contextmanager
def _wanted(wishes: Sequence[list[dict[str, float]]]) -> Iterator[list]:
    """Placement groups of these bundles, for as long as the block lasts."""
    from ray.util.placement_group import placement_group, remove_placement_group

    groups = [placement_group(bundles) for bundles in wishes]
    try:
        yield groups
    finally:
        for group in groups:
            remove_placement_group(group)


def _placed(groups: list) -> int:
    from ray.util import placement_group_table

    table = placement_group_table()
    return sum(table.get(group.id.hex(), {}).get("state") == "CREATED" for group in groups)
