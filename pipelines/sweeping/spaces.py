"""Search spaces: found by name or file, joined, checked against the settings before anything starts."""

import importlib
import itertools
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform

import tune_spaces
from entprog import config
from entprog.config import Experiment
from entprog.errors import UserError

Space = dict[str, Domain]
"""Dotted setting → what its values are drawn from."""
DOMAINS = ("uniform", "loguniform", "quniform", "qloguniform", "randint", "lograndint", "choice")
"""Functions of ray.tune that a space's file may name."""
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
    ((kind, numbers),) = value.items()
    try:
        if kind == "choice":  # lists and mappings as YAML text: whoever draws wants plain values
            return tune.choice([_text(one) if isinstance(one, list | dict) else one for one in numbers])
        return getattr(tune, kind)(*(float(n) if isinstance(n, str) else n for n in numbers))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {setting}: {kind} does not take {numbers!r}: {error}") from None


def _text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drawn values by dotted setting → nested settings; text is read as YAML, as after `--set`."""
    out: dict[str, Any] = {}
    for setting, value in values.items():
        if isinstance(value, str):
            part = config.parse_overrides([f"{setting}={value}"])
        else:
            *parents, leaf = setting.split(".")
            part = {leaf: value.item() if hasattr(value, "item") else value}
            for parent in reversed(parents):
                part = {parent: part}
        out = config.merge(out, part)
    return out


def applied(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with drawn values. Raises UserError if they are wrong."""
    return config.build(config.merge(experiment.model_dump(), nested(values)))


def check(space: Space, experiment: Experiment) -> list[Experiment]:
    """Every choice and both ends of every range, each alone on top of the experiment.

    Raises UserError naming the first setting that does not exist or value that it does not take.
    """
    known = [name for name, *_ in config.settings_help()]
    for setting in space:
        if setting not in known:
            raise UserError(f"--space: unknown setting {setting}{config.close_to(setting, known)}")
    return [applied(experiment, {name: value}) for name, domain in space.items() for value in ends(domain)]


def ends(domain: Domain) -> list[Any]:
    """A domain's extreme values; of a choice all."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    return [domain.lower, domain.upper - 1 if isinstance(domain, Integer) and not _quantized(domain) else domain.upper]


def _quantized(domain: Domain) -> bool:
    return hasattr(domain.get_sampler(), "q")


def spread(domain: Domain, points: int) -> list[Any]:
    """Evenly spaced values, on the domain's own scale, whole numbers where it wants them; of a choice all."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    low, high = ends(domain)
    shares = [i / (points - 1) for i in range(points)]
    values = [low * (high / low) ** share if is_log(domain) else low + (high - low) * share for share in shares]
    return list(dict.fromkeys(round(v) if isinstance(domain, Integer) else v for v in values))


def is_log(domain: Domain) -> bool:
    """Whether values are drawn evenly over their logarithm."""
    sampler = domain.get_sampler()
    return isinstance(getattr(sampler, "sampler", sampler), LogUniform)


def grid(space: Space, points: int) -> list[dict[str, Any]]:
    """Every combination of the space's values, ranges cut into `points`."""
    return [
        dict(zip(space, values, strict=True))
        for values in itertools.product(*(spread(domain, points) for domain in space.values()))
    ]


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
        elif isinstance(value, int | float) and domain.lower <= value <= ends(domain)[1]:
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
