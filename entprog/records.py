"""Dataclasses that go to JSON and back."""

import functools
from collections.abc import Mapping
from typing import Any, Self

from pydantic import TypeAdapter


class Record:
    """A dataclass of numbers, words, and tuples and records of them."""

    def as_json(self) -> dict[str, Any]:
        """Its fields as JSON's own values; floats survive to the bit."""
        return _adapter(type(self)).dump_python(self, mode="json")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Take back what `as_json` gave. Raises ValueError for anything else."""
        return _adapter(cls).validate_python(values)


@functools.cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)
