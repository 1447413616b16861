"""Joining a Ray cluster that is there, and finding out within a minute that it is not."""

import os
import re
import socket
import subprocess
import sys

from entprog.errors import UserError

REACH_S = 10.0
"""Longest wait for the head's port to open."""
ANSWER_S = 45.0
"""Longest wait for Ray to answer there, the start of the process that asks included."""


def address() -> str | None:
    """The cluster that RAY_ADDRESS names; None: a Ray of this machine alone is started, which nothing joins later."""
    given = os.environ.get("RAY_ADDRESS")
    return None if given in (None, "", "local") else given


def has() -> str:
    """Whose resources a job is told of, in words."""
    return "the cluster has" if address() else "a Ray of this machine has"


def check_form() -> None:
    """Raises UserError if RAY_ADDRESS is none that a job can join a cluster by; nothing is asked there."""
    if given := address():
        _parts(given)


def _parts(address: str) -> tuple[str, int] | None:
    """(host, port) of an address as RAY_ADDRESS has it; None: auto. Raises UserError."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is a dashboard's address: send the job there with `ray job submit --address "
            f"{address} -- …`, or give the head's HOST:PORT (6379 unless it was started with another)"
        )
    if address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS={address} is for Ray's client, which jobs do not run through: give the head's HOST:PORT, or "
            "send the job with `ray job submit`"
        )
    if address == "auto":
        return None
    found = re.fullmatch(r"\[?([^\[\]/\s]+?)\]?:([0-9]{1,5})", address)
    if not found or not 0 < int(found[2]) < 2**16:
        raise UserError(f"RAY_ADDRESS={address} is no address of a cluster: give HOST:PORT, auto or local, or unset it")
    return found[1], int(found[2])


def check(address: str) -> None:
    """Raises UserError, within REACH_S + ANSWER_S, if no Ray cluster answers at an address as RAY_ADDRESS has it.

    Ray's own attempt to connect tries again for minutes, and no exception of ours could end it: so another process
    asks, which can be ended.
    """
    if parts := _parts(address):
        _reach(address, parts)
    ask = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]  # `ray status`
    try:
        done = subprocess.run(ask, capture_output=True, text=True, errors="replace", timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} (silent for {ANSWER_S:.0f} s): start one, or unset it"
        ) from None
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = f" ({said[-1][:200]})" if said else ""
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address}{reason}: start one, or unset it")


def _reach(address: str, parts: tuple[str, int]) -> None:
    """Raises UserError if nothing listens at (host, port)."""
    try:
        socket.create_connection(parts, timeout=REACH_S).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or error
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}): start one, or unset it") from None
