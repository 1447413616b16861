"""Jobs that a person submits to a Ray cluster, one verb a file."""

import gc
import os

# Before torch is imported: its CPU threads must not spin while they wait for each other, for decoding shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before ray is imported: its counsel against many processes; a sweep's small ones are many, and take next to nothing.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started on node")

# What modules make while they are imported stays. To look for garbage among it again and again is a fifth of the
# seconds that torch, diffusers and Ray take for it.
_USUAL = gc.get_threshold()
gc.set_threshold(max(_USUAL[0], 100_000), *_USUAL[1:])


def imported() -> None:
    """A job begins its work: garbage is looked for as usual from now on, but not among what was imported."""
    if gc.get_threshold() != _USUAL:
        gc.freeze()
        gc.set_threshold(*_USUAL)
