"""Clips of shards with their own captions as text, for networks that were trained with captions: where these lie
encoded beside the shards, as a training with `data.text=caption` leaves them. No text encoder is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entprog.config import Generate
from entprog.storage import Where
from pipelines.generating.checkpoints import Checkpoint

if TYPE_CHECKING:
    from entprog.models.captions import Texts


@dataclass(frozen=True)
class Shown:
    """What clips of shards are shown as text."""

    texts: "Texts | None"
    """Encoded captions of the clips; None: one text is shown to all."""
    line: str
    """It in words for the terminal; empty where nothing is to be said."""
    name: str = ""
    """It in words for the protocol, where that is not the same for all clips of such a network."""


def shown(maker: Checkpoint, settings: Generate, shards: Where, captions: Sequence[str]) -> Shown:
    """What clips with these captions are shown. shards: their folder."""
    from entprog import models
    from entprog.models import captions as encoded

    family = models.family(maker.about["family"])
    if settings.text is not None or family.DENOISER.TEXT_PIPELINE is None:
        return Shown(None, "")
    one = "every clip is made with {} (generate.text gives another one)"
    begins = "Captions of the clips are not shown to the network: "
    if maker.texts is None or maker.texts.shown != "caption":
        return Shown(None, begins + one.format("the text that lies with the checkpoint") if any(captions) else "")
    if not any(captions):
        return Shown(None, "", "the empty text")
    network = family.inspect(maker.model()).network.config
    folder = encoded.folder_of(shards, maker.texts.key)
    if texts := encoded.there(folder, family.DENOISER, network, captions):
        return Shown(texts, "Clips are shown with their own captions.", "each clip's caption")
    line = begins + one.format("the empty text")
    why = f"not all of them lie encoded in {folder}, as a training with data.text=caption leaves them"
    return Shown(None, f"{line}; {why}", "the empty text")
