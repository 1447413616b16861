"""Search spaces: found by name or file, joined, checked against the settings before anything starts."""

import contextlib
import importlib
import itertools
import math
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform

import tune_spaces
from entprog import config, masking
from entprog.config import Experiment
from entprog.errors import UserError

Space = dict[str, Domain]
"""Dotted setting → what its values are drawn from."""
DOMAINS = ("uniform", "loguniform", "quniform", "qloguniform", "randint", "lograndint", "choice")
"""Functions of ray.tune that a space's file may name."""
NEARLY = 1e-6
"""Share of a step that rounding may be off."""
EXAMPLE = "schedule.cei_threshold: {uniform: [0, 0.3]}"


def names() -> list[str]:
    """The spaces that come with the project: files of `tune_spaces/`."""
    return [module.name for module in pkgutil.iter_modules(tune_spaces.__path__)]


def read(given: str) -> Space:
    """'cei,convergence,mine.yaml' → one space. Raises UserError for an unknown name, a wrong file, a setting twice."""
    space: Space = {}
    origin: dict[str, str] = {}
    for name in filter(None, (part.strip() for part in given.split(","))):
        for setting, domain in _one(name).items():
            if setting in space:
                raise UserError(f"--space: {setting} is in {origin[setting]} and in {name}: leave one of them out")
            space[setting], origin[setting] = domain, name
    if not space:
        raise UserError(f"--space names no space: give one or more of {', '.join(names())}, or a YAML file")
    return space


def _one(name: str) -> Space:
    if name in names():
        return importlib.import_module(f"tune_spaces.{name}").SPACE
    if not name.endswith((".yaml", ".yml", ".json")):
        known = ", ".join(names())
        raise UserError(
            f"--space: unknown space {name!r}{config.close_to(name, names())}; there are: {known}; "
            f"your own is a YAML file with lines like {EXAMPLE}"
        )
    return {setting: _domain(name, setting, value) for setting, value in config.read_yaml(Path(name)).items()}


def _domain(file: str, setting: str, value: Any) -> Domain:
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in DOMAINS:
        raise UserError(f"{file}: {setting} needs one of {', '.join(DOMAINS)} with its numbers, like {EXAMPLE}")
    ((kind, given),) = value.items()
    where = f"{file}: {setting}: {kind}"
    if not isinstance(given, list) or not given:
        raise UserError(f"{where} needs a list of values, given {config.meaning(given)!r}")
    if kind == "choice":  # lists and mappings as YAML text: whoever draws wants plain values
        values = [_meant(setting, one) for one in given]
        return tune.choice([_text(one) if isinstance(one, list | dict) else one for one in values])
    numbers = config.meaning(given)
    _check_range(where, kind, numbers)
    try:
        return getattr(tune, kind)(*numbers)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} does not take {numbers!r}: {error}") from None


def _check_range(where: str, kind: str, numbers: list[Any]) -> None:
    """Raises UserError for what is no range: too few numbers or too many, a word, infinity, an end before its start."""
    wanted = ["lowest", "highest", *["step"] * kind.startswith("q")]
    whole = kind.endswith("randint")
    if whole:
        wanted[1] = "one above the highest"
    right = len(numbers) == len(wanted) and all(
        isinstance(n, int if whole else int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers
    )
    if not right:
        kinds = "whole numbers" if whole else "numbers"
        raise UserError(f"{where} needs {len(wanted)} {kinds} ({', '.join(wanted)}), given {numbers!r}")
    if numbers[0] >= numbers[1]:
        raise UserError(f"{where} needs its lowest value first and a higher one after it, given {numbers!r}")
    if "log" in kind and numbers[0] <= 0:
        raise UserError(f"{where} needs numbers above 0: it is even over their logarithm, given {numbers!r}")
    if len(numbers) == 3 and not 0 < numbers[2] <= numbers[1] - numbers[0]:
        raise UserError(f"{where} needs a step above 0 that fits between the ends, given {numbers!r}")


def _text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()


def _under(setting: str, value: Any) -> dict[str, Any]:
    """A value by dotted setting → nested settings."""
    for name in reversed(setting.split(".")):
        value = {name: value}
    return value


def _meant(setting: str, value: Any) -> Any:
    """What a value of a file means for a setting: words where it wants words."""
    value = config.suited(_under(setting, value), Experiment)
    for name in setting.split("."):
        value = value[name]
    return value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drawn values by dotted setting → nested settings; text is read as YAML, as after `--set`."""
    out: dict[str, Any] = {}
    for setting, value in values.items():
        if isinstance(value, str):
            part = config.parse_overrides([f"{setting}={value}"])
        else:
            part = _under(setting, value.item() if hasattr(value, "item") else value)
        out = config.merge(out, part)
    return out


def applied(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with drawn values. Raises UserError if they are wrong."""
    return config.build(config.merge(experiment.model_dump(), nested(values)))


BUDGETS = ("train.seconds", "train.steps", "train.flops")
"""How long a training lasts: the same for all trials of a sweep."""
ALIKE = (
    *(name for name in config.FREE if name != "train.accumulate"), "name", "train.threads", "train.samples",
    "train.checkpoint_every", "train.held_out_every",
)  # fmt: skip
"""Settings, and parts of them, of how a trial runs and not of what it trains: all trials hold the same of a machine, so
that their seconds are equal ones. Batches that an update adds up are of what it trains."""


def alone(space: Space) -> list[dict[str, Any]]:
    """Every choice, and of every range both ends and a value between them, each as drawn values of that setting."""
    return [{name: value} for name, domain in space.items() for value in some(domain)]


def some(domain: Domain) -> list[Any]:
    """Every choice; of a range both ends and, unless it is of whole numbers, a value between them."""
    if not isinstance(domain, Float):
        return ends(domain)
    low, high = ends(domain)
    step = _step(domain)
    return [low, high, (low // step + 1) * step if step else low + (high - low) * 0.618]


def _applied_alone(experiment: Experiment, values: Mapping[str, Any], space: Space) -> Experiment:
    try:
        return applied(experiment, values)
    except UserError as error:
        ((name, value),) = values.items()
        if value in (of := ends(space[name])):
            raise UserError(f"--space: {told(values)}: {error}") from None
        raise UserError(
            f"--space: {error}, a value between {of[0]:g} and {of[1]:g}: a setting in whole numbers takes randint"
        ) from None


def told(values: Mapping[str, Any]) -> str:
    """Drawn values in a line."""
    return ", ".join(f"{name}={masking.cut(str(value), 80)}" for name, value in values.items())


def check(space: Space, experiment: Experiment) -> list[tuple[dict[str, Any], Experiment]]:
    """(values, the experiment with them) for the values of `alone`.

    Raises UserError naming the first setting that does not exist or that all trials have alike, value that it does not
    take, or setting that none of all these trainings makes use of.
    """
    known = [name for name, *_ in config.settings_help()]
    for setting, domain in space.items():
        if setting not in known:
            raise UserError(f"--space: unknown setting {setting}{config.close_to(setting, known)}")
        if setting in BUDGETS:
            raise UserError(f"--space: {setting} cannot be searched: trials are compared at equal seconds (--seconds)")
        if config.is_part_of(setting, ALIKE):
            raise UserError(
                f"--space: {setting} cannot be searched: it says how a trial runs, not what it trains, and all trials "
                "run alike: set it by --set"
            )
        values = ends(domain)
        if not values or (not isinstance(domain, Categorical) and values[0] > values[1]):
            raise UserError(f"--space: {setting} has no value to choose from")
    tried = [(values, _applied_alone(experiment, values, space)) for values in alone(space)]
    possible = [one for _, one in tried] + _drawn_together(space, experiment)
    for name in space:
        if not any(one.uses(name) for one in possible):
            way_out = _way_out(experiment, name)
            raise UserError(f"--space: {name} changes nothing here: {way_out}, or leave it out")
    return tried


DECIDING = (
    *(f"schedule.{name}" for name in ("kind", "table", "shapes", "generators", "stages", "blocks")),
    *("priority.kind", "priority.rescore"),
)
"""Settings by which others are of use (`Experiment.uses`)."""


def _drawn_together(space: Space, experiment: Experiment) -> list[Experiment]:
    """Experiments under every joint choice of DECIDING's values, less what does not go together: some settings are of
    use only where two others are drawn beside them."""
    names, out = [name for name in DECIDING if name in space], []
    for values in itertools.product(*(ends(space[name]) for name in names)):
        with contextlib.suppress(UserError):
            out.append(applied(experiment, dict(zip(names, values, strict=True))))
    return out


def _way_out(experiment: Experiment, setting: str) -> str:
    """What would have to be for a setting to be of use, in words."""
    for part, kinds in (("schedule", config.KINDS), ("priority", config.PRIORITY_KINDS)):
        now = getattr(experiment, part)
        others = {kind: experiment.model_copy(update={part: now.model_copy(update={"kind": kind})}) for kind in kinds}
        if right := [kind for kind, other in others.items() if other.uses(setting)]:
            return f"it is of {part}.kind={' or '.join(right)}, and that is {now.kind}: set it"
    return f"train --help-settings says what {setting} is of, set that"


def ends(domain: Domain) -> list[Any]:
    """A domain's extreme values; of a choice all."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    return [domain.lower, domain.upper - 1 if isinstance(domain, Integer) and not _step(domain) else domain.upper]


def _step(domain: Domain) -> float | None:
    """What a domain's values are multiples of; None where they are not."""
    return getattr(domain.get_sampler(), "q", None)


def _is_step(domain: Domain, value: float) -> bool:
    step = _step(domain)
    return step is None or abs(value / step - round(value / step)) < NEARLY


def spread(domain: Domain, points: int) -> list[Any]:
    """Evenly spaced values, on the domain's own scale, whole numbers or multiples of a step where it wants them; of a
    choice all."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    low, high = ends(domain)
    shares = [i / (points - 1) for i in range(points)]
    values = [low * (high / low) ** share if is_log(domain) else low + (high - low) * share for share in shares]
    if step := _step(domain):
        first, last = math.ceil(low / step - NEARLY), math.floor(high / step + NEARLY)
        values = [min(max(round(value / step), first), last) * step for value in values]
    return list(dict.fromkeys(round(v) if isinstance(domain, Integer) else float(f"{v:.12g}") for v in values))


def is_log(domain: Domain) -> bool:
    """Whether values are drawn evenly over their logarithm."""
    sampler = domain.get_sampler()
    return isinstance(getattr(sampler, "sampler", sampler), LogUniform)


def grid(space: Space, points: int) -> list[dict[str, Any]]:
    """Every combination of the space's values, ranges cut into `points`."""
    return combined({name: spread(domain, points) for name, domain in space.items()})


def combined(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of some values of settings."""
    return [dict(zip(values, drawn, strict=True)) for drawn in itertools.product(*values.values())]


def own_values(space: Space, experiment: Experiment) -> dict[str, Any]:
    """The experiment's own values, for a first trial to compare with; {} where a domain does not hold its own."""
    now = config.settings(experiment)
    out = {}
    for setting, domain in space.items():
        value = now[setting]
        if isinstance(domain, Categorical):
            same = [
                c for c in domain.categories if config.settings(applied(experiment, {setting: c}))[setting] == value
            ]
            out |= {setting: same[0]} if same else {}
        elif isinstance(value, int | float) and domain.lower <= value <= ends(domain)[1] and _is_step(domain, value):
            out[setting] = float(value) if isinstance(domain, Float) else value
    return out if len(out) == len(space) else {}


def in_words(domain: Domain) -> str:
    """The domain for a table."""
    if isinstance(domain, Categorical):
        return "one of " + ", ".join(str(value) for value in domain.categories)
    low, high = ends(domain)
    return f"{low:g} … {high:g}{', even over the logarithm' if is_log(domain) else ''}"


def described(space: Space) -> Sequence[tuple[str, str]]:
    """Rows (setting, domain)."""
    return [(setting, in_words(domain)) for setting, domain in space.items()]
