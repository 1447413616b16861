"""From files and command lines to checked settings, and back to names and values."""

import difflib
import hashlib
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from entprog.config import written
from entprog.config.evaluation import Evaluation
from entprog.config.experiment import Experiment
from entprog.config.jobs import Comparison, Encoding, Generation, Preparation
from entprog.config.part import Part
from entprog.config.sweep import Sweep
from entprog.config.written import Plain
from entprog.errors import UserError
from entprog.masking import cut, masked, one_line
from entprog.storage import Where

P = TypeVar("P", bound=Part)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping → {dotted name: value}. `model.init` stays one value."""
    out = {}
    for name, value in values.items():
        dotted = prefix + name
        nested = isinstance(value, Mapping) and dotted != WHOLE
        out.update(flat(value, dotted + ".") if nested else {dotted: value})
    return out


def settings(experiment: Experiment) -> dict[str, Any]:
    """{dotted name: JSON value} of every setting, as MLflow and `settings_help` show them; `schedule.outside` as it is
    where another setting decides it."""
    return flat(experiment.model_dump(mode="json")) | {"schedule.outside": experiment.outside}


def changed(part: Part) -> dict[str, Any]:
    """{dotted name: JSON value} of the settings of a whole that are not at their defaults."""
    defaults = {name: to_jsonable_python(default, fallback=str) for name, _, default, _ in settings_help(type(part))}
    now = flat(part.model_dump(mode="json"))
    return {name: value for name, value in now.items() if name not in defaults or value != defaults[name]}


def settings_help(whole: type[Part] = Experiment) -> list[tuple[str, str, Any, str]]:
    """(dotted name, type, default, meaning) of every setting, read from the classes above."""

    def rows(part: type[Part], prefix: str):
        for name, field in part.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
                yield from rows(field.annotation, f"{prefix}{name}.")
            else:
                kind = str(field.annotation).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
                default = "required" if field.is_required() else field.default
                yield prefix + name, kind, default, (field.description or "").strip()

    return list(rows(whole, ""))


def explained(whole: type[Part] = Experiment) -> list[tuple[str, Any, str]]:
    """(dotted name, default, meaning and words) of every setting, for people: also those of parts that lie in a list
    (`schedule.table[].share`) or may be left out (`train.lora.rank`)."""

    def rows(part: type[Part], prefix: str):
        for name, field in part.model_fields.items():
            kinds = list(_kinds(field.annotation, prefix + name))
            parts = [(place, kind) for place, kind in kinds if isinstance(kind, type) and issubclass(kind, Part)]
            words = dict.fromkeys(word for _, kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
            if words and any(kind is bool for _, kind in kinds):
                words = {"true": None, "false": None} | words
            if parts != [(prefix + name, field.annotation)]:
                said = (field.description or "").strip() + (f" Words: {', '.join(words)}." if words else "")
                yield prefix + name, "required" if field.is_required() else field.default, said
            for place, one in parts:
                yield from rows(one, f"{place}.")

    return list(rows(whole, ""))


def _kinds(kind: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of all that a setting's type is made of; what lies in a list is at `name[]`."""
    if get_origin(kind) is tuple:
        place += "[]"
    if get_origin(kind) in (tuple, Annotated, Union, types.UnionType):
        for part in get_args(kind):
            yield from _kinds(part, place)
    else:
        yield place, kind


def close_to(wrong: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest name, or ''."""
    names = list(names)
    found = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    if not found:  # `cei_threshold` alone, or under another part
        found = [n for n in names if n.rsplit(".", 1)[-1] == wrong.rsplit(".", 1)[-1]][:1]
    return f" (did you mean {found[0]}?)" if found else ""


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """['a.b=1', …] → {'a': {'b': '1'}}; values are YAML, read as `written.load` does. The last of two alike counts.

    Raises UserError for a pair without '=' or a value that is not YAML.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set {pair!r} has no value: write it as name=value, e.g. schedule.stages=3")
        try:
            value = written.load(text) if text.strip() else Plain()
        except yaml.YAMLError as error:
            raise UserError(
                f"--set {name}: {one_line(text, most=80)!r} is not a YAML value ({str(error).splitlines()[0]})"
            ) from None
        *parents, leaf = name.strip().split(".")
        node = out
        for depth, parent in enumerate(parents, 1):
            node = node.setdefault(parent, _OneByOne() if ".".join(parents[:depth]) == WHOLE else {})
            if not isinstance(node, dict):
                raise UserError(f"--set {name}: {parent} was already given a value in this command")
        both = isinstance(value, dict) and isinstance(node.get(leaf), dict)
        node[leaf] = merge(node[leaf], value) if both else value
    return out


FREE = (
    "train.gpus", "train.workers", "train.min_workers", "train.resize_every_s", "train.accumulate", "train.parallel",
    "train.replicas", "train.checkpoints", "train.keep_checkpoints", "train.max_failures", "train.max_nonfinite",
    "train.save", "train.held_out_shares", "train.preview_every", "train.preview_clips", "train.preview_metrics",
    "data.verify", "data.decode", "data.decode_cpus", "data.latents", "model.trust_pickle", "model.swap_blocks",
    "tracking",
)  # fmt: skip
"""Settings, and parts of them, that do not touch what is computed: a resumed run may change them. Of workers and
accumulate only the product counts: the batches of an update."""
ADDED = (
    "train.drop.text", "train.drop.reference", "train.drop.pose", "train.timesteps", "train.timesteps_mean",
    "train.timesteps_spread", "train.min_snr", "train.optimizer", "data.text", "model.expert",
    "model.vae_dtype", "model.skeleton", "model.last_frame", "model.first_frame", "model.attention",
    "train.face_weight", "train.hand_weight",
)  # fmt: skip
"""Settings that are younger than runs that may still be resumed: at its default, one is no part of what decides."""
PATHS = (
    "model.base", "model.weights", "model.adapter", "model.vae", "model.prompt_embeds", "model.text_encoder",
)  # fmt: skip
"""Settings that name files: what counts of them is the content (`fingerprints.base`)."""
WHOLE = "model.init"
"""A mapping that is one value: its names are diffusers' own."""


class _OneByOne(dict):
    """Parts of WHOLE that were each named (`model.init.num_layers=2`): the others stay as they were."""


def deciding(experiment: Experiment) -> dict[str, Any]:
    """By name the settings that decide what is computed, but those that name files (PATHS, and the shards)."""
    defaults = {name: default for name, _, default, _ in settings_help()}
    return {
        name: value
        for name, value in settings(experiment).items()
        if not is_part_of(name, (*FREE, *PATHS, "data.shards")) and not (name in ADDED and value == defaults[name])
    }


def is_part_of(name: str, parts: Iterable[str]) -> bool:
    """Whether a dotted setting is one of `parts`, or lies in one of them."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def merge(base: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`over` on top of `base`, part by part; `model.init` is replaced whole, unless parts of it were named."""
    out = dict(base)
    for name, value in over.items():
        parts = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
        parts = parts and (prefix + name != WHOLE or isinstance(value, _OneByOne))
        out[name] = merge(out[name], value, f"{prefix}{name}.") if parts else value
    return out


def read_yaml(path: Where) -> dict[str, Any]:
    """A settings file: a YAML (or JSON) mapping, its unquoted scalars as they are written (`written.load`).

    Raises UserError if it is not one, or if a name stands in it twice.
    """
    try:
        values = written.load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no such settings file: {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read settings file {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"settings file {path} is not a mapping of settings")
    return values


def presets(folder: Path) -> dict[str, Path]:
    """{name: file} of the presets in a folder."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_preset(name: str, folder: Path) -> dict[str, Any]:
    """A preset over the one that it `extends`, if any. Raises UserError for an unknown name."""
    known = presets(folder)
    if name not in known:
        raise UserError(f"unknown preset {name!r}{close_to(name, known)}; there are: {', '.join(known)}")
    values = read_yaml(known[name])
    parent = values.pop("extends", None)
    return {**(merge(read_preset(parent, folder), values) if parent else values), "name": name}


WHOLES: tuple[type[Part], ...] = (Experiment, Sweep, Preparation, Encoding, Generation, Evaluation, Comparison)
"""What the jobs' settings are parts of."""


def only(values: Mapping[str, Any], whole: type[Part], prefix: str = "") -> dict[str, Any]:
    """Of a file's settings, which may describe other jobs too, those of `whole`; an empty section says nothing.

    Raises UserError for a name that no job knows.
    """
    known = [name for one in WHOLES for name, *_ in settings_help(one)]
    out: dict[str, Any] = {}
    for name, value in values.items():
        field, dotted = whole.model_fields.get(name), prefix + name
        part = field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Part)
        if field is None:
            for setting in flat({dotted: value}):
                if not any(f"{setting}.".startswith(f"{k}.") or f"{k}.".startswith(f"{setting}.") for k in known):
                    raise UserError(f"unknown setting {setting}{close_to(setting, known)}")
        elif part and isinstance(value, Mapping):
            out[name] = only(value, field.annotation, f"{dotted}.")
        elif not part or written.meaning(value) is not None:
            out[name] = value
    return out


WANTED = {
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be {le:g} or less",
    "finite_number": "must be a finite number",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "string_type": "must be a text",
    "literal_error": "must be {expected}",
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list, as in [1, 2]"),
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type"),
        "must be a mapping of settings (--help-settings names them)",
    ),
    "missing": "is missing",
    "byte_size": "must be a size, as 24GB",
    "byte_size_unit": "must be a size, as 24GB: there is no byte unit {unit}",
}
"""What pydantic finds wrong → what a setting must be."""


def build(values: Mapping[str, Any], whole: type[P] = Experiment) -> P:
    """A checked Experiment (or another whole made of parts) from nested values.

    Raises UserError with one line for the first wrong name (and the close match) or wrong value.
    """
    known = [name for name, *_ in settings_help(whole)]
    suited = written.suited(values, whole)
    try:
        return whole.model_validate(suited)
    except ValidationError as error:
        first, *others = error.errors()
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"unknown setting {name}{close_to(name, known)}") from None
        if first["type"] == "missing" and name == "train":
            raise UserError(
                "a run needs an end: set train.steps or train.seconds, as in --set train.steps=1000"
            ) from None
        message = _wanted(first)
        if first["type"] == "value_error" and "." not in name:
            raise UserError(message) from None
        setting = _place(suited, first)
        for other in others:  # of a setting that may be of several types
            if _place(suited, other) == setting and other["type"] != "value_error":
                message += " or " + _wanted(other).removeprefix("must be ")
        raise UserError(
            f"setting {setting}: {message[:1].lower()}{message[1:]}, given {cut(masked(repr(first['input'])), 500)}"
        ) from None


def _wanted(error: Mapping[str, Any]) -> str:
    """What a setting must be, in words."""
    words = WANTED.get(error["type"])
    return words.format_map(error.get("ctx", {})) if words else error["msg"].removeprefix("Value error, ")


def _place(values: Any, error: Mapping[str, Any]) -> str:
    """Dotted name of what is wrong; pydantic's place, but for the names of types that it tried there."""
    names = []
    for number, part in enumerate(error["loc"], 1):
        missing = error["type"] == "missing" and number == len(error["loc"])
        there = part in values if isinstance(values, Mapping) else isinstance(part, int)
        if there or missing:
            names.append(str(part))
            values = None if missing else values[part]
    return ".".join(names)


def digest(*values: Any) -> str:
    """Short stable hash of JSON values: for keys of tables and checks of equality between ranks."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
