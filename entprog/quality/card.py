"""The protocol card: everything that a figure depends on beside the model. Figures of unlike cards say nothing about
each other.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from entprog.config import digest


@dataclass(frozen=True, kw_only=True)
class ProtocolCard:
    """How one figure was obtained. Its id is a hash of all of it."""

    metric: str
    better: str
    """`higher` or `lower`."""
    network: str | None
    """Name of the network that judged, None for pixel formulas."""
    weights_sha256: str | None
    resize: str
    """How frames are brought to what the network sees."""
    frames: int
    height: int
    width: int
    fps: float
    codec: str
    """What both sides went through before they were measured."""
    clips: int
    """Number of clips (Fréchet distances shrink as it grows)."""
    split: str
    dataset: str
    """Fingerprint of the shards."""
    sampler: str | None
    """None where the clips came from elsewhere and nothing says how they were made."""
    steps: int | None
    guidance: str | None
    seed: int | None
    details: str = ""
    """Whatever else the metric depends on, such as a threshold."""

    @property
    def id(self) -> str:
        """Short hash over every field."""
        return digest(asdict(self))


def unlike(one: ProtocolCard | Mapping[str, Any], other: ProtocolCard | Mapping[str, Any]) -> str | None:
    """The first field in which two cards differ, None if they are alike. Takes cards as read from evaluation.json too.

    A field that only one of them has differs.
    """
    a, b = (asdict(card) if isinstance(card, ProtocolCard) else dict(card) for card in (one, other))
    known = [field.name for field in fields(ProtocolCard)]
    names = [*known, *sorted({*a, *b} - {*known})]
    missing = object()
    return next((name for name in names if a.get(name, missing) != b.get(name, missing)), None)
