"""How rank 0 tells the driver what happens, and the driver rank 0 that the job is to end: without a shared disk."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from entprog.masking import one_line
from pipelines.cluster import ray_internals, silence

LAST_WORDS = ("result", "user_error", "failure", "stopped", "grows")
"""Items with which a group of workers ends."""
DRAINING_EVERY_S = 2.0
"""Between looks at the nodes that Ray drains; AWS gives two minutes."""
GOES_ON, GROWS, MACHINE_ENDS, JOB_ENDS = range(4)
"""Notices to workers (`pipelines.cluster.stopping`): the higher, the more urgent."""


class Board:
    """A tiny actor on the driver's node: it must outlive the workers' nodes."""

    def __init__(self):
        self.items: list[dict[str, Any]] = []
        self.notice = GOES_ON
        self.noticed = asyncio.Event()
        self.nodes: set[str] = set()
        """Where the workers are."""
        self.watching: asyncio.Task | None = None

    async def join(self, node: str) -> None:
        """A worker has begun on this node: should Ray drain it, as it does before a spot machine ends, all are told."""
        self.nodes.add(node)
        self.watching = self.watching or asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            with suppress(Exception):  # Ray's own server may not answer now, and it will be asked again
                if self.nodes & await asyncio.to_thread(ray_internals.draining_nodes):
                    await self.tell(MACHINE_ENDS)
            await asyncio.sleep(DRAINING_EVERY_S)

    async def post(self, item: dict[str, Any]) -> None:
        self.items.append(item)

    async def take(self) -> list[dict[str, Any]]:
        out, self.items = self.items, []
        return out

    async def tell(self, notice: int) -> None:
        """Give the workers a notice; none takes the place of a more urgent one."""
        self.notice = max(self.notice, notice)
        self.noticed.set()

    async def anew(self) -> None:
        """New workers begin: what was meant for those before them is taken back. That the job ends stays."""
        self.nodes.clear()
        if self.notice != JOB_ENDS:
            self.notice = GOES_ON
            self.noticed.clear()

    async def notices(self) -> int:
        """The notice, once there is one."""
        await self.noticed.wait()
        return self.notice


class Listener:
    """The driver's end: hands on what is posted, from a thread."""

    def __init__(self, on_item: Callable[[dict[str, Any]], None]):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Should its process end it is made anew: what was posted a moment before is lost, the run goes on.
        lasting = {"max_restarts": -1, "max_task_retries": -1}
        self.board = ray.remote(num_cpus=0, scheduling_strategy=here, **lasting)(Board).remote()
        self.on_item = on_item
        self.last: dict[str, Any] = {}
        """The newest message."""
        self.step = 0
        """The furthest step heard of."""
        self.begun = threading.Event()
        """A group of workers has made a step; whoever starts one clears it."""
        self.silence = silence.Silence(time.monotonic())
        self._reading = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def read(self) -> None:
        """Hand on what is there now."""
        import ray

        with self._reading:
            items = ray.get(self.board.take.remote())
            for item in items:  # first: they are taken off the board, and handing on may fail
                if item.keys() & set(LAST_WORDS):
                    self.last |= item
            if items:
                self.silence.heard(time.monotonic())
            for item in items:
                if item.keys() & set(LAST_WORDS):
                    continue
                if "step" in item:
                    self.step = max(self.step, item["step"]["step"])
                    if not self.begun.is_set():
                        self.silence = silence.Silence(time.monotonic())
                    self.begun.set()
                self._hand_on(item)

    def _hand_on(self, item: dict[str, Any]) -> None:
        try:
            self.on_item(item)
        except OSError as error:  # a disk or bucket that is away now; what comes after is heard
            with suppress(OSError):
                self.on_item({"warning": f"a worker's message could not be kept: {one_line(error)}"})

    def _listen(self) -> None:
        from ray.exceptions import RayError

        while not self._done.wait(0.3):
            with suppress(RayError):  # a board that does not answer now may do so later
                self.read()
            if self.begun.is_set() and (silent_s := self.silence.to_tell(time.monotonic())):
                with suppress(Exception):  # nor may Ray say what is free
                    self._hand_on({"warning": silence.line(silent_s, self.step)})

    def close(self) -> None:
        import ray

        self._done.set()
        self._thread.join(timeout=10)
        ray.kill(self.board)
