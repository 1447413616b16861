"""Room on the cluster: waited for while there is too little, and word when a smaller group of workers can grow.

Ray's own scheduler is asked, by placement groups that are given back at once: it alone knows what other jobs hold, and
that a node which is still listed does not answer any more. An autoscaler sees what could not be placed and starts
machines for it. (Ray Train waits for one minute and then fails; its elastic groups take the last CPU too, and Ray Data
then waits for ever.)
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from entprog.errors import UserError
from entprog.storage import Where
from pipelines.cluster import joining, ray_internals

SETTLE_S = 5.0
"""Without anything more placed for so long, what is placed is all that there is room for now."""
REMIND_S = 60.0
"""Between two lines on what is waited for."""
LOOK_S = 0.2
CPUS_FOR_DATA = 1
"""Logical CPUs that must be left beside the workers: with none, Ray Data waits for ever."""
Bundle = dict[str, float]
"""Resources on one node, by name."""


def bundles(workers: int, each: Bundle) -> list[Bundle]:
    """What must be free for some workers, each bundle on whatever node: CPUs for Ray Data, then what Ray Train reserves
    for `each` worker."""
    return [{"CPU": CPUS_FOR_DATA}, *[each] * workers]


def workers(
    least: int,
    most: int,
    each: Bundle,
    say: Callable[[str], None],
    *,
    settle_s: float = SETTLE_S,
    stop: threading.Event | None = None,
    run: Where | None = None,
) -> int:
    """Workers, `least` to `most`, that can be placed now beside Ray Data.

    Waits for the `least` as long as it takes, and for others until none has been added for `settle_s`; `say` gets a
    line now and then. Raises KeyboardInterrupt once `stop` is set. each: what a worker takes. run: the folder of the
    run that asks (`forget`).
    """
    wanted = bundles(most, each)
    beside = len(wanted) - most
    elastic = f", train.min_workers={least}" if least < most else ""

    def line(placed: int) -> str:
        taken = " and ".join(f"{amount:.3g} {name}{'s' * (amount > 1)}" for name, amount in each.items())
        needs = f"{taken} each, {CPUS_FOR_DATA} CPU for decoding"
        return f"there is room for {max(placed - beside, 0)} of {most} workers ({needs}){elastic}"

    return wait(wanted, least + beside, line, say, settle_s=settle_s, stop=stop, run=run) - beside


def wait(
    wanted: Sequence[Bundle],
    least: int,
    line: Callable[[int], str],
    say: Callable[[str], None],
    *,
    settle_s: float = SETTLE_S,
    stop: threading.Event | None = None,
    run: Where | None = None,
) -> int:
    """How many of the wanted bundles can be placed now, the first `least` of them or more; waits, and says so, as
    `workers` does.

    The first are asked for together: while they do not fit, none of them holds anything, so that two jobs cannot wait
    for what the other one holds. What is placed is held until this returns.

    line: what is said of the number that is placed.
    """
    stop = stop or threading.Event()
    begun, said = time.monotonic(), 0
    since = time.strftime("%H:%M:%S")

    def look(placed: int) -> None:
        nonlocal said
        if stop.wait(LOOK_S):
            raise KeyboardInterrupt
        if (after := time.monotonic() - begun) > (SETTLE_S if not said else said * REMIND_S):
            minutes = f", for {after / 60:.0f} min" if said else ""
            say(f"{line(placed)}: waiting for nodes since {since}{minutes}")
            said += 1

    with _wanted([list(wanted[:least])], run) as first:
        while not _placed(first):
            look(min(_fitting(wanted), least - 1))
        added, more = time.monotonic(), 0
        with _wanted([[bundle] for bundle in wanted[least:]], run) as others:
            while more < len(others):
                before, more, now = more, _placed(others), time.monotonic()
                if more > before:
                    added = now
                elif now - added > settle_s:
                    break
                if more < len(others):
                    look(least + more)
    if said:
        say(f"{line(least + more)}: going on")
    return least + more


def _fitting(wanted: Sequence[Bundle]) -> int:
    """How many of the bundles fit into what is free now, on whatever nodes."""
    import ray

    free = ray.available_resources()
    for number, bundle in enumerate(wanted):
        if any(free.get(name, 0.0) < amount for name, amount in bundle.items()):
            return number
        free |= {name: free[name] - amount for name, amount in bundle.items()}
    return len(wanted)


def cpus(least: int, say: Callable[[str], None]) -> int:
    """CPUs of the connected Ray, once `least` of them are free: a cluster that has fewer is waited for.

    Raises UserError for a Ray of this machine alone, to which none will come.
    """
    import ray

    if joining.address():
        wait([{"CPU": 1}] * least, least, lambda placed: f"{placed} of {least} CPUs are free", say)
    there = int(ray.cluster_resources().get("CPU", 0))
    if there < least:
        raise UserError(f"Ray has {there} CPU here, {least} are needed: join a cluster that has them")
    return there


@contextmanager
def growing(
    missing: int,
    each: Bundle,
    begun: threading.Event,
    after_s: float,
    grow: Callable[[], None],
    run: Where | None = None,
) -> Iterator[None]:
    """While the block lasts: once, `after_s` or more after `begun`, call `grow` when there is room for one more.

    begun: the other workers are at work, and in their places. each, run: as `workers` has them.
    """
    over = threading.Event()

    def watch() -> None:
        while not begun.wait(LOOK_S):
            if over.is_set():
                return
        if over.wait(after_s):
            return
        # What `workers` asks for anew: less would end the workers for nothing, again and again. A CPU that Ray Data has
        # left for a moment is no room for a worker: a second one must be free.
        with _wanted([bundles(1, each)] * missing, run) as groups:
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


def forget(folder: Where) -> None:
    """Give back what runs of this job in a folder, or below it, asked for and left behind.

    What a process asks for ends with its job, not with itself: a trial that was killed while it waited would hold CPUs
    and GPUs for the rest of its sweep.
    """
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    for key, group in placement_group_table().items():
        mine = group["name"].startswith(f"{folder}/") and key.endswith(job)
        if mine and group["state"] != "REMOVED":
            ray_internals.remove_placement_group(key)


@contextmanager
def _wanted(wishes: Sequence[list[Bundle]], run: Where | None) -> Iterator[list]:
    """Placement groups of these bundles, for as long as the block lasts; of a run, with its folder in their names."""
    from ray.util.placement_group import placement_group, remove_placement_group

    groups = [placement_group(bundles, name=f"{run}/{uuid.uuid4()}" if run else "") for bundles in wishes]
    try:
        yield groups
    finally:
        for group in groups:
            remove_placement_group(group)


def _placed(groups: list) -> int:
    from ray.util import placement_group_table

    table = placement_group_table()
    return sum(table.get(group.id.hex(), {}).get("state") == "CREATED" for group in groups)
