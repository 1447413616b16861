"""How poses may be drawn: the styles by name, for who draws none and needs no torch (`drawing` draws)."""

from typing import get_args

from entprog.config import Skeleton

STYLES: tuple[Skeleton, ...] = get_args(Skeleton)
LIMBS, DWPOSE, WAN_ANIMATE = STYLES


def unlike(style: Skeleton, trained: int, shown: int) -> str:
    """What a network that was trained on poses of so many points is shown of poses of others, in words; empty where
    it is the same."""
    if style == LIMBS or trained == shown:
        return ""
    more = "face and hands" if style == DWPOSE else "hands"
    if shown < trained:
        return f"poses of {shown} points draw the body alone; the network was trained on {trained}, with {more}"
    return f"poses of {shown} points draw {more}, which the network has not seen: it was trained on {trained}"


def version(style: Skeleton) -> list[str]:
    """What tells pictures in a style from others in caches; nothing for `limbs`, which was the first."""
    changed = {
        LIMBS: [],
        DWPOSE: [style, "parts with enough points"],
        WAN_ANIMATE: [style, "joints by their mean score"],
    }
    return changed[style]
