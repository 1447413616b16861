"""A checkpoint that makes clips: found, checked, loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entprog import config
from entprog.config import ClipShape, Generate
from entprog.errors import UserError
from entprog.media import wholebody

if TYPE_CHECKING:
    from entprog.models import folders

# torch and diffusers are imported where they are needed: wrong arguments are told at once, not after seconds.


@dataclass(frozen=True)
class Checkpoint:
    """A folder that training wrote."""

    root: Path
    about: dict[str, Any]
    """Content of the checkpoint's entprog.json."""
    shape: ClipShape
    """Clips that it was trained on."""
    process: Any
    """The checkpoint's noise process (`entprog.diffusion.processes`)."""
    geometry: Any = None
    """How its VAE divides clips (`entprog.models.geometry.Geometry`)."""

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(self.about["conditions"])

    @property
    def last(self) -> bool:
        """Whether it sees the clip's last frame."""
        return self.about.get("last_frame", False)

    @property
    def first(self) -> bool:
        """Whether in training its reference was each clip's own first frame."""
        return self.about.get("first_frame", False)

    @property
    def texts(self) -> "folders.Texts | None":
        """Which texts it was trained with; None: one fixed text."""
        from entprog.models import folders

        kept = self.about.get("texts")
        return kept and config.build(kept, folders.Texts)

    @property
    def no_text(self) -> str:
        """What it was shown for a text that was withheld, in words."""
        return "the empty text" if self.texts else "zeros"

    @property
    def replaces(self) -> bool:
        """Whether it has a place for a video that a person is put into."""
        from entprog import models

        family = models.family(self.about["family"]).DENOISER
        return family.sees_around(self.about.get("native", False), self.about["vae"])

    @property
    def faces(self) -> bool:
        """Whether it sees faces."""
        from entprog import models

        return self.about.get("native", False) and models.family(self.about["family"]).DENOISER.FACES

    @property
    def several(self) -> bool:
        """Whether it has a place for several reference pictures."""
        from entprog import models

        return models.family(self.about["family"]).DENOISER.SEVERAL and "reference" in self.conditions

    def faceless(self, motions) -> str:
        """What it is shown no face in, in words; empty where it sees one in every motion, or none at all."""
        without = sum(len(motion.pose[0]) != wholebody.POINTS or motion.video is None for motion in motions)
        if not self.faces or not without:
            return ""
        return (
            f"{without} of {len(motions)} motions show the network no face: it takes a driving video, or shards, with "
            "whole-body poses (prepare.pose=rtmlib)"
        )

    @property
    def points(self) -> int:
        """Points of the poses that it was trained on."""
        return self.about.get("points", len(wholebody.BLAZEPOSE))

    def begins(self, motions) -> str:
        """How motions should begin that are no clips of shards, in words; empty where that does not matter."""
        if not self.first or all(motion.has_truth for motion in motions):
            return ""
        return (
            f"{self.root} was trained with each clip's own first frame as its reference (model.first_frame): motions "
            "should begin in the picture's pose"
        )

    def unlike(self, points: int) -> str:
        """What it is shown of poses of so many points that it was not trained on, in words; empty where that is the
        same."""
        from entprog.media import styles

        style = self.about.get("skeleton", styles.LIMBS)
        return styles.unlike(style, self.points, points) if "pose" in self.conditions else ""

    def unmended(self, text: str | None) -> str:
        """That a text is not mended as its base's makers mended theirs, in words; empty where it has not to be."""
        from entprog.models import captions

        return captions.unmended(self.about["family"], [text or ""])

    @property
    def dtype(self) -> str:
        """The autocast type that it was trained under; float32 where an earlier version did not say it."""
        return self.about.get("provenance", {}).get("dtype", "float32")

    def model(self, dtype: str = "float32") -> config.Model:
        """The settings that load it."""
        return config.Model(family=self.about["family"], base=str(self.root), conditions=self.conditions, dtype=dtype)


def text_source(checkpoint: Checkpoint, settings: Generate):
    """What encodes `generate.text` (`entprog.models.captions.Source`); nothing is loaded. Raises UserError, in one
    line, for what is missing."""
    from entprog import models
    from entprog.models import captions, folders

    family, elsewhere = checkpoint.about["family"], checkpoint.about.get("elsewhere", {}).get("text_encoder")
    cls = models.family(family).DENOISER
    if cls.TEXT_PIPELINE is None:
        raise UserError(f"--text: networks of family {family} are shown no text here")
    name, revision = settings.text_encoder or str(checkpoint.root), None
    if elsewhere and not settings.text_encoder:
        name, revision = elsewhere["name"], elsewhere["revision"]
    root = folders.located_text(name, "generate.text_encoder", cls.TEXT_PARTS, revision)
    if missing := folders.missing_text(root, cls.TEXT_PARTS):
        raise UserError(
            f"--text: {name} has no {missing}: set generate.text_encoder to a folder or hub name that has, such as the "
            "base"
        )
    return captions.source(checkpoint.model().model_copy(update={"text_encoder": str(root)}))


def find(given: str, settings: Generate) -> Checkpoint:
    """The checkpoint of `--checkpoint`, and whether it can be sampled as the settings say.

    Raises UserError for a folder that is none, weights that are not finite, a sampler or shift that does not fit, or
    guidance by a condition that the network does not see.
    """
    from entprog import models
    from entprog.diffusion.samplers import sampler
    from entprog.models import finite, folders
    from entprog.models.geometry import Geometry

    root = folders.locate(given, "--checkpoint")
    about = folders.saved(root)
    if not about:
        raise UserError(f"--checkpoint: {given} was not written by pipelines.train (it has no entprog.json)")
    if not about["shape"]:
        raise UserError(f"--checkpoint: {given} does not say which clips it was trained on (shape in entprog.json)")
    shape = config.build(about["shape"], ClipShape)
    unchecked = Checkpoint(root, about, shape, None)
    source = models.family(about["family"]).inspect(unchecked.model(), shape)
    sampler(source.process, settings.sampler, settings.shift)
    for network in filter(None, (folders.part(root, name) for name in (*folders.NETWORKS, folders.SECOND))):
        finite.check(network, "--checkpoint")
    found = Checkpoint(root, about, shape, source.process, Geometry.of(source.vae))
    for name in ("reference", "pose"):
        if name not in found.conditions and getattr(settings, f"{name}_guidance") != 1:
            sees = ", ".join(found.conditions) or "none"
            raise UserError(
                f"--{name}-guidance (generate.{name}_guidance): {given} sees no {name}; its conditions: {sees}"
            )
    if settings.text is not None:
        text_source(found, settings)
    return found


def check_text_guidance(checkpoint: Checkpoint, settings: Generate, given: str, captioned: bool = False) -> None:
    """Raises UserError for guidance by a text where none is shown. captioned: whether clips show their captions."""
    from entprog import models
    from entprog.models import folders

    if settings.text_guidance == 1:
        return
    family, option = checkpoint.about["family"], "--text-guidance (generate.text_guidance)"
    if models.family(family).DENOISER.TEXT_PIPELINE is None:
        raise UserError(f"{option}: networks of family {family} are shown no text here: leave it out")
    # Without --text it is the one that lies there, which is the empty one where captions were shown.
    own = not checkpoint.texts and (settings.text == "" or (checkpoint.root / folders.PROMPT).is_file())
    if settings.text or captioned or own:
        return
    raise UserError(
        f"{option}: {given} is shown {checkpoint.no_text} unless --text gives another one, and so nothing to compare "
        "it with: give --text, or leave it out"
    )


def sampler_name(checkpoint: Checkpoint, settings: Generate) -> str:
    """The sampler's class, and its timestep shift where there is one."""
    from entprog.diffusion.samplers import sampler

    shift = settings.shift or checkpoint.about["shift"]
    name = type(sampler(checkpoint.process, settings.sampler, settings.shift)).__name__
    return name if shift == 1 else f"{name}, shift {shift:g}"


def gpu_here(settings: Generate) -> bool:
    """Whether this process samples on a GPU. Raises UserError if one is asked for that is not there."""
    import torch

    if settings.gpus == "yes" and not torch.cuda.is_available():
        raise UserError("generate.gpus=yes, but torch sees no GPU here")
    return settings.gpus != "no" and torch.cuda.is_available()


def dtype_of(checkpoint: Checkpoint, settings: Generate, gpu: bool) -> str:
    """The autocast type that it is to run under, on a GPU or without."""
    if settings.dtype != "auto":
        return settings.dtype
    return checkpoint.dtype if gpu else "float32"


def load(checkpoint: Checkpoint, settings: Generate):
    """The checkpoint's denoiser on the wanted device. Raises UserError if a GPU is asked for that is not there."""
    import torch

    from entprog import models
    from entprog.blocks import blocks, round_frozen
    from entprog.models import captions

    gpu = gpu_here(settings)
    device, dtype = "cuda" if gpu else "cpu", dtype_of(checkpoint, settings, gpu)
    family, text = models.family(checkpoint.about["family"]), {}
    if settings.text is not None:  # before the network is loaded: the text encoder may be as large
        network = family.inspect(checkpoint.model()).network.config
        text = captions.one(text_source(checkpoint, settings), network, settings.text, device)
    rounded = (lambda network: round_frozen(blocks(network))) if dtype == "bfloat16" else (lambda network: None)
    denoiser = family.load(checkpoint.model(dtype), device, prepare=rounded)
    none = denoiser.no_text or {"text": torch.zeros_like(denoiser.text)}  # of as many tokens as in training
    return replace(denoiser, no_text=none, **{field: value.to(device) for field, value in text.items()})
