"""What is shown of an address: never its user, its password or its query, in which signatures and tokens stand.

Everything that is printed, stored, logged or raised passes `masked`, `one_line` or `reason` first, and is cut only
after that: half a secret cannot be recognised any more.
"""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

HIDDEN = "***"
_ADDRESS = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{0,31}://"  # no longer than schemes are: a run of letters is not read again from each
    # A user or a password may hold a quote or a space, which else end an address in a text: it goes on to the '@',
    # unless what follows ':' is a port, or ': ' words. Only so far: long texts are not read again for each address.
    r"(?:(?:[^\s/?#@]{0,500}?"
    r"|[^\s/?#@:\"'<>`]*:(?!\d*(?:[/?#\s]|$)|\d+[^\w\s@]{1,4}(?:\s|$))[^@\n]{0,500}?"
    r"|(?<=s3://|gs://)[^\s/?#@:\"'<>`]*:(?!\s)[^@\n]{0,500}?"
    r")@)?[^\s\"'<>`]*"
)
_PARTS = re.compile(
    r"(?P<scheme>(?:\w+::)*[^:]+://)"
    # A password may hold a '/' or worse, so that its '@' stands beyond it: what follows ':' is no port then.
    r"(?:(?P<user>[^/?#]*|(?!\[)[^/?#:]+:(?!\d*(?:[/?#]|$)).*|(?<=(?:s3|gs)://)[^/?#:]+:.*)@)?"
    r"(?P<place>[^?#]*)"
    r"(?P<query>\?[^#]*)?"
    r"(?P<fragment>#.*)?",
    re.DOTALL,
)
_LEAST = 6
"""Shortest value of a query that is looked for outside its address: shorter ones are words such as `1` or `mp4`."""


def masked(text: str, *addresses: str) -> str:
    """The text with `***` for the user, password, query and fragment of every address in it.

    `addresses`: ones whose secrets may also stand in the text by themselves, as in a library's message.
    """
    for secret in sorted({secret for address in addresses for secret in _secrets(address)}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return _ADDRESS.sub(lambda found: _hidden(found[0]), text)


def shown(address: str) -> str:
    """The same of a text that is one address as a whole, whatever signs its password has."""
    return _hidden(address)


def masked_in(value: Any) -> Any:
    """The same of every text in a JSON value, for what is stored."""
    if isinstance(value, Mapping):
        return {name: masked_in(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked_in(each) for each in value]
    return masked(value) if isinstance(value, str) else value


def one_line(what: object, *addresses: str, most: int = 200) -> str:
    """An exception or a text as one masked line, cut to `most` characters; an exception without words is its name."""
    text = " ".join(str(what).split()) or (type(what).__name__ if isinstance(what, BaseException) else "")
    return cut(masked(text, *addresses), most)


def cut(text: str, most: int) -> str:
    """The beginning of a text, at most so many characters, that ends with a word and `…` where there is more."""
    if len(text) <= most:
        return text
    words, _, _ = text[: most - 1].rpartition(" ")
    return f"{words if len(words) > most // 2 else text[: most - 1]}…"


def reason(error: BaseException, *addresses: str, most: int = 300) -> str:
    """An exception's name and words as one masked line."""
    return one_line(f"{type(error).__name__}: {error}", *addresses, most=most)


def bare(address: str) -> str:
    """An address without user, password, query and fragment: a name for what lies there."""
    found = _PARTS.fullmatch(address)
    return f"{found['scheme']}{found['place']}" if found else masked(address)


def has_credentials(address: str) -> bool:
    """Whether an address holds a user or a password; `anonymous@` is pyarrow's word for neither."""
    found = _PARTS.fullmatch(address)
    return bool(found and found["user"] not in (None, "anonymous"))


def query(address: str) -> str:
    """An address's query without '?', empty if there is none."""
    found = _PARTS.fullmatch(address)
    return (found["query"] or "")[1:] if found else ""


def _hidden(address: str) -> str:
    found = _PARTS.fullmatch(address)
    if not found:
        return address
    user = "" if found["user"] is None else f"{HIDDEN}@"
    return f"{found['scheme']}{user}{found['place']}{'?' + HIDDEN if found['query'] or found['fragment'] else ''}"


def _secrets(address: str) -> set[str]:
    found = _PARTS.fullmatch(address)
    if not found:
        return set()
    user, hidden = found["user"] or "", query(address)
    name, _, password = user.partition(":")
    values = {value for _, value in parse_qsl(hidden) if len(value) >= _LEAST}
    values |= {part.partition("=")[2] for part in hidden.split("&") if len(part.partition("=")[2]) >= _LEAST}
    parts = {user, name, password, hidden, (found["fragment"] or "")[1:], *values}
    plain = parts | {unquote(part) for part in parts}
    return {part for part in plain | {quote(part, safe="") for part in plain} if part}
