"""Settings as people write them: YAML 1.2's core schema, where a word stays a word wherever a setting wants words.

YAML 1.1, which PyYAML reads, makes `no` a truth value, `010` eight and `1e-4` a word. Here an unquoted scalar keeps its
text (`Plain`) until it is known what is wanted: the setting's own type decides (`suited`).
"""

import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from entprog.config.part import Part


class Plain(str):
    """An unquoted scalar, as its text."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """Mappings, lists, words in quotes, and plain scalars as `Plain`: no tags (`!!int`), which a setting's type makes
    needless. A name may stand once in a mapping."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merging anchors: << alone

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"{name} stands in line {lines[name]} and again in line {line}: write it once")
            lines[name] = line
        return node


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> str:
    return Plain(node.value) if node.style is None else node.value


_Loader.yaml_constructors = {
    "tag:yaml.org,2002:str": _scalar,
    # At once, not when all is read: what holds itself is refused.
    "tag:yaml.org,2002:seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    "tag:yaml.org,2002:map": lambda loader, node: loader.construct_mapping(node, deep=True),
    None: yaml.SafeLoader.construct_undefined,
}

WORDS: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{f"{sign}.{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")},
}  # fmt: skip
WHOLE_NUMBER = re.compile(r"[-+]?[0-9]+")
BASED_NUMBER = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

MOST_DIGITS = 1000
"""Characters of a number; Python reads none of 4300 digits, and what is longer is no setting's."""


def load(text: str) -> Any:
    """A YAML (or JSON) document whose unquoted scalars are `Plain`. Raises yaml.YAMLError, also for a name given twice,
    with both lines."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def meaning(value: Any) -> Any:
    """What YAML 1.2 reads a value as, and all that lies in it: null, a truth value, a number, or the word itself."""
    if isinstance(value, Mapping):
        return {str(name): meaning(one) for name, one in value.items()}
    if isinstance(value, list):
        return [meaning(one) for one in value]
    if not isinstance(value, Plain):
        return value
    if value in WORDS:
        return WORDS[value]
    if len(value) > MOST_DIGITS:
        return str(value)
    if WHOLE_NUMBER.fullmatch(value):
        return int(value)
    if BASED_NUMBER.fullmatch(value):
        return int(value, 0)
    return float(value) if NUMBER.fullmatch(value) else str(value)


def suited(value: Any, kind: Any) -> Any:
    """The value with every unquoted scalar read as `kind`, a setting's type, wants it.

    Where only words are wanted, `no`, `2024` and `1e3` are words; a truth value where a number is wanted stays the word
    that it was written as, which is no number.
    """
    kinds = _alternatives(kind)
    if isinstance(value, Mapping):
        part = next((one for one in kinds if isinstance(one, type) and issubclass(one, Part)), None)
        if part is not None:
            fields = part.model_fields
            # What a phase sets over the common settings are settings of the same experiment.
            of = {name: field.annotation for name, field in fields.items()} | {"phases": dict[str, part]}
            return {str(name): suited(one, of[name] if name in fields else Any) for name, one in value.items()}
        inner = next((get_args(one)[1] for one in kinds if get_origin(one) is dict), Any)
        return {str(name): suited(one, inner) for name, one in value.items()}
    if isinstance(value, list):
        inner = next((get_args(one) for one in kinds if get_origin(one) is tuple), (Any, ...))
        each = inner if inner[-1] is not ... else [inner[0]] * len(value)
        return [suited(one, each[i] if i < len(each) else Any) for i, one in enumerate(value)]
    if not isinstance(value, Plain):
        return value
    read = meaning(value)
    return read if value == "" or any(_takes(one, read) for one in kinds) else str(value)


def _alternatives(kind: Any) -> list[Any]:
    """The types that a setting's type joins, without what they are annotated with."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _alternatives(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return [one for part in get_args(kind) for one in _alternatives(part)]
    return [kind]


def _takes(kind: Any, read: Any) -> bool:
    """Whether a type takes what an unquoted scalar was read as."""
    if kind is Any:
        return True
    if not isinstance(kind, type):  # a Literal's words, a tuple
        return False
    if isinstance(read, bool | None):
        return kind is type(read)
    return isinstance(read, int | float) and issubclass(kind, int | float) and kind is not bool
