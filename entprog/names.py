"""Texts from outside (names of files, runs and settings, messages about them) made harmless for whoever shows them;
and how many there are of a thing, in words."""

import re

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 controls, what overrides the direction of writing or ends a line, halves of characters."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def plain(text: str, keep: str = "") -> str:
    r"""The text with escapes in place of control characters: a terminal is not steered by it, and it is whole UTF-8.

    `\x1b[2J` stands for an escape sequence that clears the screen. keep: control characters that stay as they are.
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def counted(number: int, thing: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{number} {thing}{'s' * (number != 1)}"


def cell(value: object) -> object:
    """A value for a table that a spreadsheet may open: a text that it would run as a formula begins with an apostrophe.

    Numbers stay numbers, also negative ones.
    """
    if not isinstance(value, str):
        return value
    return f"'{plain(value)}" if value.lstrip(" ").startswith(_FORMULA) else plain(value)
