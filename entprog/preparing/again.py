"""Which rejected sources another try may take: those that were not read for what may pass, and those over a limit of
the job that has been raised since. All other verdicts are on the content and on settings that never change.
"""

import os
from collections.abc import Mapping
from typing import Any

from entprog.config import Prepare
from entprog.preparing import addresses
from entprog.preparing.rows import Line, Source, is_video

DECIDES = {"max_decoded_bytes": "bad_pose", "max_work_s": "too_long", "stall_s": "crashed"}
"""Settings of the job that are limits, and the reason of what is over them."""
_PASSING = ("unreadable", "changed")
"""Reasons of sources that were away, or were being written."""


def limits(prepare: Mapping[str, Any]) -> dict[str, Any]:
    """Those among the settings of `prepare`: {name: value}."""
    return {name: prepare[name] for name in DECIDES if name in prepare}


def may_mend(row: Source, line: Line, then: Mapping[str, Any], prepare: Prepare) -> bool:
    """Whether a source with this line in a ledger may do better now. `then`: the `limits` that the line was made with.

    Nothing of a source is read but whether it may be read.
    """
    raised = [reason for name, reason in DECIDES.items() if getattr(prepare, name) > then.get(name, float("inf"))]
    return line["reason"] in raised or (is_video(row) and _not_read(row, line))


def _not_read(row: Source, line: Line) -> bool:
    """Whether a source did not answer, could not be opened or was being written, and that may have passed."""
    path = os.fsdecode(row["path"])
    if addresses.is_remote(path):
        return not line["sha256"] or line["reason"] in _PASSING
    refused = line["reason"] in _PASSING or (line["reason"] == "crashed" and not line["sha256"])
    there = os.path.isdir if row["frames_fps"] else os.path.isfile
    return refused and there(path) and os.access(path, os.R_OK)
