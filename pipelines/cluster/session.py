"""The Ray that a job works with: the cluster that it joins, or a local one for as long as it works."""

import logging
import os
from contextlib import contextmanager

from entprog.errors import UserError
from pipelines.cluster import joining, local

LEAST_STORE_BYTES = 75 << 20
"""Least object store that Ray starts with."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_cpus(least: int) -> int:
    """Logical CPUs of a Ray that a job starts here."""
    return max(cores(), least)


def object_store_bytes() -> int | None:
    """What ENTPROG_OBJECT_STORE_BYTES says; None: as Ray chooses. Raises UserError for what cannot be."""
    given = os.environ.get("ENTPROG_OBJECT_STORE_BYTES", "")
    if not given:
        return None
    if not given.isdecimal() or int(given) < LEAST_STORE_BYTES:
        raise UserError(
            f"ENTPROG_OBJECT_STORE_BYTES={given}: give it a whole number of bytes, {LEAST_STORE_BYTES} or more, "
            "or unset it"
        )
    return int(given)


@contextmanager
def ray_cluster(cpus: int, *, dashboard: bool = False, verbose: bool = False):
    """Join the cluster that RAY_ADDRESS names (also inside `ray job submit`), or start a local one and stop it after.

    Raises UserError where no cluster answers, or a local one cannot start for the length of its folder's name, or with
    the object store that is asked for.

    A local Ray is given at least `cpus` logical CPUs: with fewer, Train's workers leave Ray Data nothing and
    both wait for ever. It is closed to the network and to the machine's other users. dashboard: a local one's; what
    frees the resources of trials that Ray Tune ends lives in it. If this process has joined a Ray already, that one is
    used and left running.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # ours (message_board) saves before it restarts
    import ray
    from ray.data import DataContext

    if ray.is_initialized():
        yield ray
        return
    quiet = {} if verbose else {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := joining.address():
        joining.check(address)
        ray.init(address=address, **quiet)
    else:
        memory = object_store_bytes()
        try:
            with local.closed() as private, local.alone(heard=dashboard or verbose):
                ray.init(
                    address="local",
                    num_cpus=local_cpus(cpus),
                    object_store_memory=memory,
                    include_dashboard=dashboard,
                    **private,
                    **quiet,
                )
        except OSError as error:
            if "AF_UNIX" not in str(error):
                raise
            folder = private["_temp_dir"]
            raise UserError(
                f"the folder for temporary files has too long a name for Ray's sockets, which may have 107 bytes: "
                f"{folder}; set RAY_TMPDIR to a shorter one, like /tmp"
            ) from None
    DataContext.get_current().enable_progress_bars = verbose
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
        for handler in logging.getLogger("ray.data").handlers:  # its file keeps everything
            if type(handler).__name__ == "PlainRayHandler":
                handler.setLevel(logging.CRITICAL)
    try:
        yield ray
    finally:
        ray.shutdown()
