"""What all trials of a sweep have alike, for they are ranked at equal seconds: kept where it begins, looked at where it
goes on."""

from collections.abc import Mapping
from typing import Any

from entprog import config
from entprog.config import Experiment
from entprog.errors import UserError
from pipelines.tracking import ways
from pipelines.tracking.tracker import versions

RUNS = (*ways.SPEED, "train.workers")
"""Settings that a training may change when it goes on, a sweep may not: they decide what is done in a second."""


def kept(experiment: Experiment, gpus: str, commit: str) -> dict[str, Any]:
    """What is kept beside a sweep that begins. gpus: "yes" or "no", as it was found. commit: of the code."""
    return {"gpus": gpus, "runs": _runs(experiment), "code": {"commit": commit, **versions()}}


def check(experiment: Experiment, known: Mapping[str, Any]) -> None:
    """Raises UserError where trials to come would run otherwise than those of the sweep so far. known: what is `kept`,
    all or some of it: of an earlier version's sweep nothing is known."""
    now, before = _runs(experiment), dict(known.get("runs", {}))
    if experiment.train.gpus != "auto" and "gpus" in known:
        now["train.gpus"], before["train.gpus"] = experiment.train.gpus, known["gpus"]
    if other := _differing(before, now):
        raise UserError(
            f"trials of this sweep have run otherwise ({other}), and all are to run alike, for they are ranked at "
            "equal seconds: go on as it was begun, or choose another --output"
        )


def other_code(known: Mapping[str, Any], commit: str) -> str:
    """In a line what of the code is another than the sweep began with; '' for nothing. Arguments as above."""
    other = _differing(known.get("code", {}), {"commit": commit, **versions()})
    return other and f"trials so far are of other code than those to come ({other}): a loss may differ for that alone"


def _runs(experiment: Experiment) -> dict[str, Any]:
    return {name: value for name, value in config.settings(experiment).items() if name in RUNS}


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    pairs = [(name, *(ways.text(values.get(name)) for values in (before, now))) for name in before]
    return ", ".join(f"{name} was {was}, now {is_now}" for name, was, is_now in pairs if was != is_now)
