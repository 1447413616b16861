"""What the denoisers of all families share: clips to latents, conditions, a prediction, and the folder it is kept in.

A family derives its class from `VideoDenoiser`, and says in it what `interface.Family` asks for.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entprog import config
from entprog.blocks import blocks
from entprog.config import ClipShape
from entprog.data.clips import Clips, Latents
from entprog.diffusion.objectives import ALL
from entprog.diffusion.processes import Flow, Process
from entprog.media import drawing, styles, wholebody
from entprog.media.color import yuv420_to_rgb
from entprog.media.faces import Faces
from entprog.models import experts, folders, inputs, saving, texts, vaes, whole
from entprog.models.geometry import Geometry
from entprog.models.interface import Family

SCHEDULER_FILE = "scheduler/scheduler_config.json"
"""Of a pipeline: says which noise process its network was trained with."""

GIVEN_FRAME = "given frame"
"""Form of a reference that is the clip's first latent frame itself: the loss is on the others."""


@dataclass(frozen=True, kw_only=True)
class VideoDenoiser(Family):
    """A network with its VAE, conditions and text (`entprog.diffusion.denoiser.Denoiser`)."""

    network: nn.Module
    vae: nn.Module | None
    """None: the network works on pixels."""
    conditions: tuple[str, ...]
    """Conditions that the network sees, in the order of its input channels."""
    text: torch.Tensor
    """What text cross-attention sees [1, tokens, width]."""
    no_text: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What stands for a text that is withheld, by field; empty: zeros do."""
    texts: folders.Texts | None = None
    """Which texts it is trained with; None: one fixed text."""
    process: Process
    """How noise and clip mix, and what the network predicts."""
    autocast: torch.dtype | None
    """Type of the forward pass; None: float32."""
    vae_autocast: torch.dtype | None = None
    """Type in which the VAE encodes, and to which latents are rounded; None: float32."""
    shape: ClipShape | None
    """Clip shape that a saved checkpoint was trained on, if it says so."""
    skeleton: config.Skeleton = styles.LIMBS
    """How poses are drawn for it."""
    points: int = len(wholebody.BLAZEPOSE)
    """Points of the poses that its base was trained on, 33 or 133."""
    last: bool = False
    """Whether it sees the clip's last frame beside its first one."""
    first: bool = False
    """Whether in training its reference is each clip's own first frame."""
    native: bool = False
    """Whether it sees all that its base's pipeline shows it, where earlier versions left something out."""
    expert: experts.Expert | None = None
    """Which of a base's two networks this is; None: it has one."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it came from: kept in `entprog.json`."""
    origins: dict[str, whole.Origin] = field(default_factory=dict)
    """Where VAE and encoders of its pipeline come from, by name."""
    base_index: dict[str, Any] = field(default_factory=dict)
    """The model_index.json of its base."""

    @property
    def device(self) -> torch.device:
        """The network's, or its VAE's where only that has weights (`loading.encoder`)."""
        module = self.vae if self.vae is not None and next(self.network.parameters()).is_meta else self.network
        return next(module.parameters()).device

    @property
    def form(self) -> str:
        """As `form_of` says; part of what cached latents belong to."""
        return self.form_of(self.input_channels, self.latent_channels, self.conditions)

    @property
    def part(self) -> str:
        """The network's folder in its pipeline."""
        return self.PART if self.expert is None else experts.FOLDERS[self.expert.name]

    @property
    def input_channels(self) -> tuple[int, ...]:
        """Channels of the input layer, in the groups that are summed apart."""
        return inputs.splits(self.network.get_submodule(self.INPUT), self.network.config.in_channels)

    @property
    def time_range(self) -> tuple[float, float]:
        """Times that the network is trained for."""
        return ALL if self.expert is None else self.expert.time_range

    def sampling(self) -> AbstractContextManager[Callable[[torch.Tensor], "VideoDenoiser"]]:
        """While it lasts: scheduler's timestep → the denoiser that predicts there (`entprog.models.experts`)."""
        return experts.in_turns(self)

    @property
    def latent_channels(self) -> int:
        return 3 if self.vae is None else vaes.channels(self.vae)

    @property
    def shift(self) -> float:
        """Timestep shift for sampling; 1 where the process has none."""
        return self.process.shift

    @property
    def _geometry(self) -> Geometry:
        return self.geometry(self.network.config, self.vae)

    @property
    def faces(self) -> bool:
        """Whether it sees faces."""
        return self.FACES and self.native

    @property
    def trained_with(self) -> str:
        """What it is shown in training alone, in words; part of what cached latents and runs belong to."""
        return self.TRAINED_WITH if self.native else ""

    @property
    def replaces(self) -> bool:
        """Whether it sees a video that a person is put into (condition `background`)."""
        return self.sees_around(self.native, self.vae is not None)

    def scheduler(self, shift: float | None = None):
        """A diffusers scheduler of the checkpoint's own process (`entprog.diffusion.processes`)."""
        return self.process.scheduler(shift)

    def check(self, shape: ClipShape) -> None:
        """Raises UserError if clips of this shape do not fit the VAE, the network's patches or its conditions."""
        self._geometry.check(shape, given=self.form == GIVEN_FRAME)

    def whole_frames(self, frames: int) -> int:
        """The most clip frames, up to so many, that the VAE takes."""
        return self._geometry.whole_frames(frames)

    def latent_shape(self, shape: ClipShape) -> tuple[int, int, int, int]:
        """Clip shape → C, F', H', W' of one clip's latents."""
        return self.latent_channels, *self._geometry.latents(shape)

    @torch.no_grad()
    def encode(self, clips: Clips) -> Latents:
        """Clips → latents and conditions on the network's device, no gradient."""
        video = yuv420_to_rgb(clips.video.to(self.device, non_blocking=True))
        clean = self.latents(video.transpose(1, 2))
        reference = _bytes(video[:, 0]) if self.first else clips.reference
        last = _bytes(video[:, -1]) if self.last else None
        faces = Faces(video, clips.pose) if self.faces else None
        conditions = self.condition(reference, clips.pose, last, faces)
        if self.replaces and clips.mask is not None:
            around = _bytes(video).masked_fill_(clips.mask.to(self.device)[..., None], 0)
            conditions |= self.background(around, clips.mask, clips.pose)
        return Latents(clean, conditions, clips.position, clips.pose)

    def background(self, video: torch.Tensor, person: torch.Tensor, pose: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of networks that `replaces` is true of: as `diffusion.denoiser.Denoiser` says."""
        raise NotImplementedError

    def with_others(self, reference: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Of networks with a place for several pictures (SEVERAL): as `diffusion.denoiser.Denoiser` says."""
        raise NotImplementedError

    @torch.no_grad()
    def condition(
        self,
        reference: torch.Tensor,
        pose: torch.Tensor,
        last: torch.Tensor | None = None,
        faces: Faces | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the network sees beside the noisy clip: {name: float32 [B, C, F', H', W']}, on the network's device.

        reference uint8 [B, H, W, 3] is encoded as a clip of one frame and repeated; pose float [B, F, 33 or 133, 3] is
        drawn and encoded as a video; last, as the reference, is the last frame, and faces are where they lie, of
        networks that see that.
        """
        frames, (height, width) = pose.shape[1], reference.shape[1:3]
        out = {}
        if "reference" in self.conditions:
            first, end = (None if given is None else self._pixels(given) for given in (reference, last))
            out["reference"] = self.reference(first, frames, end)
        if "pose" in self.conditions:
            drawn = drawing.draw(pose.to(self.device, non_blocking=True), height, width, self.skeleton)
            out["pose"] = self.latents(drawn.transpose(1, 2))
        return out

    def _pixels(self, picture: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] → float [B, 3, 1, H, W] in -1..1 on the network's device."""
        pixels = picture.to(self.device, non_blocking=True).permute(0, 3, 1, 2).unsqueeze(2)
        return pixels.float() / 127.5 - 1

    def reference(self, image: torch.Tensor, frames: int, last: torch.Tensor | None = None) -> torch.Tensor:
        """The condition `reference` of clips of so many frames, [B, C', F', H', W']. image, and last, the last frame:
        [B, 3, 1, H, W], -1..1."""
        return self.latents(image).expand(-1, -1, self._geometry.latent_frames(frames), -1, -1)

    def given(self, conditions: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What conditions say of the clip itself: (mask [B, 1, F', H', W'], 1 where latents are given; those latents);
        None: nothing."""
        return None

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """The process's target, float32 [B, C, F', H', W'], of noisy latents [B, C, F', H', W'] at times t [B]."""
        given = [noisy, *(conditions[name] for name in self.conditions)]
        unused = self.network.config.in_channels - sum(part.shape[1] for part in given)
        if unused:  # of a network that an earlier version trained so (`inputs`)
            given.insert(1, noisy.new_zeros(1).expand(len(noisy), unused, *noisy.shape[2:]))
        with self.in_its_type():
            inputs = torch.cat(given, dim=1) if len(given) > 1 else noisy
            prediction = self.run(inputs, self.process.timestep(t), conditions.get("text", self.text))
        return prediction.float()

    def in_its_type(self):
        """Autocast, if there is any."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, F', H', W'] → video float32 [B, F, 3, H, W] in -1..1."""
        video = latents.float() if self.vae is None else vaes.decode(self.vae, latents.float())
        return video.clamp(-1, 1).transpose(1, 2)

    def outside(self) -> dict[str, list[nn.Parameter]]:
        """Parameters outside blocks: the input layer, through which conditions enter, and all others."""
        conditions = list(self.network.get_submodule(self.INPUT).parameters())
        inside = {id(p) for block in blocks(self.network) for p in block.module.parameters()}
        known = inside | {id(p) for p in conditions}
        return {"conditions": conditions, "rest": [p for p in self.network.parameters() if id(p) not in known]}

    def save(
        self,
        folder: str | Path,
        shape: ClipShape | None = None,
        shift: float | None = None,
        parts: whole.Save = "whole",
        points: int | None = None,
        **record,
    ) -> None:
        """Write a pipeline's folder: the network's part, `vae/` if any, `scheduler/`, the base's encoders, its index
        and code (`entprog.models.whole`), and `entprog.json` beside.

        It runs with plain diffusers; `load` reads it too. shape: the clips it was trained on; shift: timestep shift for
        sampling; parts: `light` names VAE and encoders instead of copying them; points: of the poses it
        was trained on, where these are not its base's; record: JSON values to keep under `provenance`.

        An existing folder is replaced, whole or not at all. While rank 0 saves a sharded network the others give it
        their parts (`saving.lend`). Raises UserError for a shift where the process has none.
        """
        shape = shape or self.shape
        scheduler = self.scheduler(shift)
        left_out = whole.elsewhere(self.origins, parts)
        about = {
            "format": folders.FORMAT,
            "family": self.FAMILY,
            "conditions": self.conditions,
            "latent_channels": self.latent_channels,
            "input_channels": self.input_channels,
            "vae": self.vae is not None,
            "shape": shape and shape.model_dump(),
            "shift": self.shift if shift is None else shift,
            "skeleton": self.skeleton,
            "points": points or self.points,
            **({"last_frame": True} if self.last else {}),
            **({"first_frame": True} if self.first else {}),
            **({"native": True} if self.native else {}),
            **({"texts": self.texts.model_dump()} if self.texts else {}),
            "provenance": self.provenance | record,
            "elsewhere": {name: place.model_dump() for name, place in left_out.items()},
        }
        if self.expert is not None:
            about |= {"expert": self.expert.name, "experts": self.expert.inputs(self)}
        with folders.replacing(Path(folder)) as scratch:
            saving.save(self.network, scratch / self.part)
            if self.vae is not None and "vae" not in left_out:
                self.vae.save_pretrained(scratch / "vae")
            whole.copy_others(self.origins, left_out, scratch)
            scheduler.save_pretrained(scratch / "scheduler")
            self.save_text(scratch)
            (scratch / "entprog.json").write_text(json.dumps(about, indent=2) + "\n")
            whole.leave(
                scratch,
                network=(self.part, self.NETWORK.__name__),
                scheduler=type(scheduler).__name__,
                vae=self.vae and type(self.vae).__name__,
                origins=self.origins,
                about=about,
                base=self.base_index,
                form=self.form,
                text_shape=tuple(self.text.shape),
                encodes=self.TEXT_PIPELINE and (self.TEXT_PIPELINE, self.text_tokens(self.network.config)),
                compression=(self._geometry.temporal, self._geometry.spatial),
                more=self.index_entries,
            )

    @property
    def index_entries(self) -> dict[str, Any]:
        """Further entries of the saved index: those of the base's that say something of its networks, and what its text
        is."""
        own = {whole.EXPAND: True} if self.base_index.get(whole.EXPAND) is True else {}
        own |= {"empty_text": True} if self.texts else {}
        return own if self.expert is None else own | self.expert.entries(self)

    def save_text(self, folder: Path) -> None:
        """Keep what text cross-attention sees in a folder, as `model.prompt_embeds` takes it; zeros need no file."""
        texts.save(self.text, folder, {name: getattr(self, field) for field, name in self.FIXED.items()})

    def latents(self, video: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, F, H, W] in -1..1 → what the network works on, float32 and contiguous."""
        if self.vae is None:
            return video.contiguous()
        if self.vae_autocast is None:
            return vaes.encode(self.vae, video)
        with torch.autocast(self.device.type, self.vae_autocast):
            encoded = vaes.encode(self.vae, video)
        return encoded.to(self.vae_autocast).float()


def _bytes(pixels: torch.Tensor) -> torch.Tensor:
    """float [..., 3, H, W] in -1..1 → uint8 [..., H, W, 3]."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1)


def own_noise(pictures: torch.Tensor) -> torch.Tensor:
    """Noise for pictures [B, 3, 1, H, W] in -1..1, of each by the sum of its levels: the same wherever a picture is
    encoded. Drawn on the CPU, whose generator differs from a GPU's."""
    sums = ((pictures + 1) * 127.5).round().long().flatten(1).sum(1).tolist()
    size = pictures.shape[1:]
    drawn = [torch.empty(size).normal_(generator=torch.Generator().manual_seed(seed)) for seed in sums]
    return torch.stack(drawn).to(pictures)


def process_of(cls: type[VideoDenoiser], root: Path | None, about: dict[str, Any]) -> Process:
    """The base's own noise process, or the family's where the base does not say. Raises UserError for a foreign one."""
    path = root and root / SCHEDULER_FILE
    values = folders.read_json(path) if path and path.is_file() else cls.SCHEDULER
    process = cls.PROCESS.of(values)
    return replace(process, shift=float(about["shift"])) if about and isinstance(process, Flow) else process
