"""Jobs that a person submits to a Ray cluster, one verb a file."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Before torch is imported: its CPU threads must not spin while they wait for each other, for decoding shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before ray is imported: its counsel against many processes; a sweep's small ones are many, and take next to nothing.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started on node")


@contextmanager
def importing() -> Iterator[None]:
    """Modules are imported inside, and nobody looks for garbage meanwhile: what they make stays, and to go through it
    again and again is a fifth of the seconds that torch and diffusers take."""
    gc.disable()
    try:
        yield
    finally:
        imported()


def imported() -> None:
    """What a job needs is there: garbage is looked for from now on, but not among modules."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


# Python looks for garbage among all that is there once more when it ends: a second or more after torch and diffusers.
atexit.register(gc.freeze)

if sys.argv[:1] == ["-m"]:  # as Python has it while `python -m pipelines.VERB` imports this, before the verb
    gc.disable()  # until `cli.run`
