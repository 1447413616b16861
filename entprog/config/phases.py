"""A training in phases: one experiment a phase, each the common settings with its own over them. A training of both
experts of a base is two phases, `high` and `low`."""

import re

from entprog.config.experiment import Experiment
from entprog.config.reading import build, merge
from entprog.errors import UserError
from entprog.storage import Where, address, within

START = ("base", "init", "weights", "adapter")
"""Settings that only the first phase of a training may give."""


def phases(experiment: Experiment, output: Where) -> dict[str, Experiment]:
    """Name → experiment of every phase, in order; each but the first starts from `output/NAME/model` of the one before.

    Raises UserError for a wrong setting, a name that is no folder's, a phase with a base of its own, or one that drops
    conditions of the one before.
    """
    common = experiment.model_dump(exclude={"phases"})
    out: dict[str, Experiment] = {}
    for name, own in experiment.parts.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "model":
            raise UserError(f"phase {name!r}: a name is letters, digits, _ and -, and not model; it becomes a folder")
        wrong = ["phases"] * ("phases" in own) or [f"model.{key}" for key in START if key in own.get("model", {})]
        if wrong:
            raise UserError(
                f"phase {name} sets {wrong[0]}: the first phase starts from the common model.base or model.init, every "
                "other from the one before"
            )
        values = merge(common, own) | {"name": f"{experiment.name}-{name}"}
        if "run_name" not in own.get("tracking", {}):
            whole = experiment.tracking.run_name or output.resolve().name
            values = merge(values, {"tracking": {"run_name": f"{whole}-{name}"}})
        if experiment.train.checkpoints and "checkpoints" not in own.get("train", {}):
            values = merge(values, {"train": {"checkpoints": within(experiment.train.checkpoints, name)}})
        if out:
            before = next(reversed(out))
            start = {"base": address(output / before / "model"), "init": {}, "weights": None, "adapter": None}
            if values["data"]["text"] != "fixed":  # encoders are not saved with weights
                start["text_encoder"] = values["model"]["text_encoder"] or experiment.model.base
            values = merge(values, {"model": start})
        try:
            out[name] = build(values)
        except UserError as error:
            raise UserError(f"phase {name}: {error}") from None
        if len(out) > 1:
            _follows(name, out[name], before, out[before])
    return out


def _follows(name: str, phase: Experiment, before_name: str, before: Experiment) -> None:
    lost = [c for c in before.model.conditions if c not in phase.model.conditions]
    if lost:
        raise UserError(
            f"phase {name} has no condition {lost[0]}, which phase {before_name} trains: conditions may only be added"
        )
    if phase.model.family != before.model.family:
        raise UserError(f"phase {name} is of family {phase.model.family}, phase {before_name} of {before.model.family}")
