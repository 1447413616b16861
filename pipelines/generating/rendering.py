"""Clips made by a network, beside what they were made from: mp4s and a contact sheet."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from entprog import config, files, storage
from entprog.config import ClipShape, Generate
from entprog.data.clips import Clips
from entprog.diffusion import beside, dropping, sampling
from entprog.diffusion.denoiser import Denoiser
from entprog.media import color, drawing, h264, sheet, styles
from entprog.media import video as videos
from entprog.media.faces import Faces
from entprog.models.geometry import Geometry
from entprog.storage import Where
from pipelines import terminal
from pipelines.generating.motions import Motion

SHOWN = 8
"""Clips on the contact sheet."""
PARTS = ("pose", "result", "without", "truth")
"""What of a clip lies there on its own."""


def motions_of(clips: Clips, names: Sequence[str]) -> list[Motion]:
    """A batch of clips as motions whose truth is known."""
    truth = pixels(color.yuv420_to_rgb(clips.video))
    rows = zip(names, clips.reference.cpu().numpy(), clips.pose.cpu().numpy(), truth, strict=True)
    made = [Motion(*row, place=place) for place, row in enumerate(rows)]
    if clips.mask is None:
        return made
    people = clips.mask.cpu().numpy()
    return [motion.replacing(person) if person.any() else motion for motion, person in zip(made, people, strict=True)]


def make(
    denoiser: Denoiser, motions: Sequence[Motion], shape: ClipShape, settings: Generate, without: str | None = None
) -> np.ndarray:
    """The motions' clips: uint8 RGB [B, F, H, W, 3]. All have poses of one length.

    shape: of the clips that the network was trained on; longer poses are made in windows of it. without: a condition
    that is zeroed.
    """
    motions = [motion.seen(denoiser.first) for motion in motions]
    given = [_stacked(motion.reference for motion in motions), _stacked(motion.pose for motion in motions)]
    last = _stacked(motion.last_frame for motion in motions) if denoiser.last else None
    conditions = denoiser.condition(*given, last, _faces(motions) if denoiser.faces else None)
    if denoiser.replaces and any(motion.background is not None for motion in motions):
        conditions |= denoiser.background(*_scenes(motions, shape), given[1])
    if motions[0].others is not None:
        others = _stacked(motion.others for motion in motions)
        conditions["reference"] = denoiser.with_others(conditions["reference"], others)
    if (text := motions[0].text) is not None:
        device = next(denoiser.network.parameters()).device
        conditions |= {field: torch.cat([motion.text[field] for motion in motions]).to(device) for field in text}
    if without:
        conditions = dropping.without(conditions, [name for name in conditions if name != without])
    whole = shape.model_copy(update={"frames": motions[0].pose.shape[0]})
    size = (len(motions), *denoiser.latent_shape(whole))
    places = [motion.place for motion in motions]
    latents = sampling.sample(denoiser, conditions, size, settings, places, sampling.window_of(denoiser, shape))
    return pixels(denoiser.decode(latents))


def _stacked(arrays: Iterable[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(arrays)))


def _scenes(motions: Sequence[Motion], shape: ClipShape) -> tuple[torch.Tensor, torch.Tensor]:
    """The videos that people are put into, uint8 [B, F, H, W, 3], and where, bool [B, F, H, W]; nowhere in those of
    motions that have none."""
    none = np.zeros((len(motions[0].pose), shape.height, shape.width), bool)
    people = [none if motion.person is None else motion.person for motion in motions]
    blank = np.broadcast_to(np.uint8(0), (*none.shape, 3))
    return _stacked(blank if motion.background is None else motion.background for motion in motions), _stacked(people)


def _faces(motions: Sequence[Motion]) -> Faces | None:
    """Where faces are in the clips that the motions were taken from; None: without such clips."""
    if any(motion.video is None for motion in motions):
        return None
    video = _stacked(motion.video for motion in motions).movedim(-1, 2).float() / 127.5 - 1
    return Faces(video, _stacked(motion.pose if motion.driver is None else motion.driver for motion in motions))


def fitting(maker: Denoiser | Geometry, motion: Motion, shape: ClipShape) -> Motion:
    """The motion cut to a number of frames that the VAE's groups of frames make up."""
    frames = max(shape.frames, maker.whole_frames(len(motion.pose)))
    timed = ("pose", "video", "driver", "background", "person")
    cut = {name: part[:frames] for name in timed if (part := getattr(motion, name)) is not None}
    return replace(motion, **cut)


def render(
    load: Callable[[], Denoiser],
    motions: Sequence[Motion],
    shape: ClipShape,
    output: Where,
    settings: Generate,
    without: str | None = None,
    key: str | None = None,
) -> tuple[list[dict[str, Any]], Where]:
    """Sample every motion and write it: a record each (`clip`, `video` side by side, `result` alone), contact sheet.

    Pose and truth lie beside the result on their own too, for other runs' results to be shown with. load: gives the
    network, once there is a clip to make. without: a condition; each clip is made a second time with it zeroed and
    shown beside, `difference` being the largest one of the two in levels of 0..255. key: of all that decides how clips
    are made, beside the motions; clips that lie in `output` under it are kept, those of motions that are not among
    these are removed. None: all are made, nothing is removed.
    """
    identities = [None if key is None else config.digest(key, motion.digest()) for motion in motions]
    each = enumerate(zip(motions, identities, strict=True))
    files = [Files(output / "videos", number, motion, identity) for number, (motion, identity) in each]
    todo = [clip for clip in files if not clip.kept()]
    if len(todo) < len(files):
        terminal.console.print(f"{len(files) - len(todo)} of {len(files)} clips are there already: {output}")
    if todo:
        denoiser = load()
        with beside.at_hand(denoiser):
            _make_all(denoiser, todo, shape, settings, without)
    if key is not None:
        _remove_others(files)
    shown = files[:: -(-len(files) // SHOWN)]
    rows = [row for clip in shown for row in clip.rows(without)]
    return [clip.record() for clip in files], sheet.contact_sheet(rows, output / "sheet.png")


def _make_all(
    denoiser: Denoiser, todo: Sequence["Files"], shape: ClipShape, settings: Generate, without: str | None
) -> None:
    todo = [replace(clip, motion=fitting(denoiser, clip.motion.seen(denoiser.first), shape)) for clip in todo]
    most = settings.max_bytes // (3 * shape.height * shape.width)
    with terminal.advancing("generating", len(todo)) as advance:
        for batch in _batches(todo, settings.batch_size, most):
            motions = [clip.motion for clip in batch]
            made = make(denoiser, motions, shape, settings)
            bare = None if without is None else make(denoiser, motions, shape, settings, without)
            for number, clip in enumerate(batch):
                clip.write(
                    made[number], shape.fps, denoiser.skeleton, *(() if bare is None else (without, bare[number]))
                )
            advance(len(batch))


def _remove_others(clips: Sequence["Files"]) -> None:
    """Remove the clips that an earlier call left whole under other names: a folder has other pictures or motions since,
    and all after them another number."""
    folder, mine = clips[0].folder, {clip.name for clip in clips}
    notes = [path for path in folder.iterdir() if path.name.endswith(".json")]
    gone = sorted(name for path in notes if (name := path.name.removesuffix(".json")) not in mine and _is_note(path))
    for name in gone:
        for end in (*(f"_{part}.mp4" for part in PARTS), ".mp4", ".json"):
            (folder / f"{name}{end}").unlink(missing_ok=True)
    if gone:
        terminal.console.print(f"Removed {len(gone)} clips of files that are given no longer: {', '.join(gone)}")


def _is_note(path: Where) -> bool:
    """Whether a file is a clip's NAME.json."""
    try:
        return "identity" in files.from_json(path.read_text())
    except (ValueError, TypeError):
        return False


def _batches(clips: Sequence["Files"], size: int, most: int) -> Iterator[list["Files"]]:
    """Neighbours of one length, at most `size` at once, and of more than one at most `most` frames."""
    for length, group in itertools.groupby(clips, lambda clip: len(clip.motion.pose)):
        of_length, together = list(group), max(1, min(size, most // length))
        for first in range(0, len(of_length), together):
            yield of_length[first : first + together]


@dataclass(frozen=True)
class Files:
    """What is left of one clip: NAME.mp4 side by side, NAME_pose.mp4 and others alone; NAME.json once it is whole,
    where that is of use."""

    folder: Where
    number: int
    motion: Motion
    identity: str | None
    """Hash of everything that decides what the clip looks like; None: a clip that is made anew each time."""

    @property
    def name(self) -> str:
        return f"{self.number:03d}_{re.sub(r'[^A-Za-z0-9.-]+', '_', self.motion.name)[:80]}"

    def path(self, end: str) -> Where:
        return self.folder / f"{self.name}{end}"

    def kept(self) -> bool:
        """Whether it is there already, made of this very motion in this very way."""
        there = all(self.path(end).is_file() for end in (".json", ".mp4", "_result.mp4"))
        return self.identity is not None and there and self._note()["identity"] == self.identity

    def write(
        self,
        result: np.ndarray,
        fps: float,
        style: config.Skeleton = styles.LIMBS,
        without: str = "",
        bare: np.ndarray | None = None,
    ) -> None:
        motion = self.motion
        drawn = pixels(drawing.draw(torch.from_numpy(motion.pose), *result.shape[1:3], style))
        alone = {"pose": drawn, "result": result}
        alone |= {} if bare is None else {"without": bare}
        alone |= {} if motion.video is None else {"truth": motion.video}
        still = ("reference", np.broadcast_to(motion.reference, result.shape))
        titles = self._titles(without)
        self.path(".json").unlink(missing_ok=True)
        for part, frames in alone.items():
            h264.write(self.path(f"_{part}.mp4"), frames, fps)
        parts = [still, *((titles[part], frames) for part, frames in alone.items())]
        h264.write(self.path(".mp4"), sheet.side_by_side(parts), fps)
        if self.identity is not None:
            found = {} if bare is None else {"difference": int(np.abs(result.astype(int) - bare).max())}
            files.write_json(self.path(".json"), {"identity": self.identity, **found})

    def record(self) -> dict[str, Any]:
        """The clip as result.json has it."""
        note = {} if self.identity is None else self._note()
        about = {name: value for name, value in note.items() if name != "identity"}
        video, result = str(self.path(".mp4")), str(self.path("_result.mp4"))
        return {"clip": self.motion.name, "video": video, "result": result, **about}

    def rows(self, without: str | None) -> list[tuple[str, np.ndarray]]:
        """The clip on a contact sheet."""
        paths = {title: self.path(f"_{part}.mp4") for part, title in self._titles(without).items()}
        return [(f"{self.motion.name}: {title}", _glance(path)) for title, path in paths.items() if path.is_file()]

    def _titles(self, without: str | None) -> dict[str, str]:
        bare = {"without": f"without {without}"} if without else {}
        return {"pose": "pose", "result": "result", **bare, "truth": self.motion.video_title}

    def _note(self) -> dict[str, Any]:
        return json.loads(self.path(".json").read_text())


def _glance(path: Where) -> np.ndarray:
    """The frames of a clip that a contact sheet has room for."""
    with storage.local_copy(path) as file:
        frames = [frame for _, frame in videos.iter_frames(file)]
    return np.stack([frames[i] for i in sheet.spread(len(frames))])


def pixels(video) -> np.ndarray:
    """float [..., F, 3, H, W] in -1..1 → uint8 RGB [..., F, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()
