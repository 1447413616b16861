"""Previews: what the network draws while it trains, as clips and as a page that plays them over time.

OUTPUT/previews/
  step-00000200/     videos/ and sheet.png, as `generate` leaves them; with the run in MLflow too
  previews.jsonl     a line a preview
  unfinished.json    while one is drawn, and after one that ended its workers: its step
  index.html         all of them, step by step
Nothing that training computes depends on them: they draw from generators of their own, between two steps. None of them
ends a run: one that fails is a warning, one that runs out of memory is the last one, and one that ends its workers all
the same, or is cut short with them, is not drawn again when they are back.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from entprog import files, storage
from entprog.blocks import Block
from entprog.config import ClipShape, Evaluate, Generate
from entprog.data.clips import Latents
from entprog.diffusion.denoiser import Denoiser
from entprog.diffusion.idle import idle_pass
from entprog.distributed import agree, fsdp
from entprog.errors import UserError
from entprog.masking import reason
from entprog.media import h264
from entprog.storage import Where
from entprog.training import averages
from pipelines.generating import rendering
from pipelines.generating.motions import Motion
from pipelines.training import steplog

if TYPE_CHECKING:
    from entprog.quality.metrics import Meter

PAGE = Path(__file__).with_name("previews.html")
UNFINISHED = "previews/unfinished.json"
MOST_UNFINISHED = 2
"""So many previews of a run that ended their workers are the last ones."""
NO_ROOM = (MemoryError, torch.OutOfMemoryError, fsdp.PassError)
"""What later previews would most likely run into again."""


@dataclass(frozen=True)
class Previews:
    """What is drawn, and where it is left. Every rank has one; rank 0 draws."""

    denoiser: Denoiser
    motions: Sequence[Motion]
    shape: ClipShape
    output: Where
    settings: Generate
    keep: Callable[[Path, str], None]
    """Keep a file with the run in MLflow, in a folder of that name."""
    warn: Callable[[str], None]
    compiled: bool = False
    """Whether blocks are compiled."""
    meter: "Meter | None" = None
    """Measures what was drawn; None: nothing does."""
    log: Callable[[int, Mapping[str, float]], None] = lambda step, values: None
    """Keep figures of a step with the run in MLflow."""
    blocks: Sequence[Block] = ()
    """In execution order, where the network is sharded."""
    spare: Latents | None = None
    """Any batch, where the network is sharded."""
    left_out: Sequence[int] = ()
    """Steps whose previews are not drawn (`unfinished`)."""

    def show(self, step: int, charged_s: float, ema: Mapping[str, torch.Tensor], gaps: Mapping[str, float]) -> bool:
        """Draw every motion with the weights as they are after this step, or with their averages where there are any
        (gaps: `RunState.ema_gaps`); every rank calls it. What goes wrong is a warning. Returns whether there is room
        for later ones."""
        if step in self.left_out:
            return True
        first, network = agree.world()[0] == 0, self.denoiser.network
        if first:
            _note_unfinished(self.output, [*self.left_out, step])
        with averages.averaged(network, ema, gaps), undisturbed(network, self.compiled):
            along = partial(idle_pass, self.denoiser, self.spare)
            fits = fsdp.led(network, self.blocks, lambda: self._tried(step, charged_s), along)
            fsdp.in_parts(network)
        if first:
            _note_unfinished(self.output, self.left_out)
        return agree.of_first(lambda: fits)  # no rank's next step pays for it

    def _tried(self, step: int, charged_s: float) -> bool:
        fits, goes_on = True, "training goes on"
        try:
            self._draw(step, charged_s)
        except Exception as error:  # memory, disk, codec: a look must not cost the run
            if isinstance(error, NO_ROOM):
                fits, goes_on = False, "training goes on without previews"
            self.warn(f"the preview after step {step} failed: {reason(error)}; {goes_on}")
        return fits

    def _draw(self, step: int, charged_s: float) -> None:
        where = self.output / "previews" / f"step-{step:08d}"
        with storage.scratch_for(where) as folder:
            records, sheet = rendering.render(lambda: self.denoiser, self.motions, self.shape, folder, self.settings)
            videos = [Path(record["video"]) for record in records]
            entry = {
                "step": step,
                "charged_s": charged_s,
                "time": time.time(),
                "motions": [record["clip"] for record in records],
                "videos": [f"previews/{where.name}/{video.relative_to(folder).as_posix()}" for video in videos],
                "figures": self._measured(records),
            }
            self.log(step, {f"preview/{name}": value for name, value in entry["figures"].items()})
            for path in (*videos, *(Path(record["result"]) for record in records), sheet):
                self.keep(path, f"previews/{where.name}")
        leave(self.output, entry)

    def _measured(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Means over the motions, of those that have a value."""
        if self.meter is None:
            return {}
        measured = []
        for motion, record in zip(self.motions, records, strict=True):
            made = h264.decode_rgb(Path(record["result"]).read_bytes())
            frames = len(made)  # some VAEs take frames in groups: the last ones may be left out
            truth, pose = motion.video[:frames], motion.pose[:frames]
            measured.append(self.meter.measure(made, truth, motion.reference, pose).values)
        means = {name: float(np.nanmean([one[name] for one in measured])) for name in measured[0]}
        return {name: value for name, value in means.items() if np.isfinite(value)}


def meter(names: Sequence[str], shape: ClipShape, clips: int, points: int) -> "Meter":
    """What measures previews of clips with poses of so many points.

    Raises UserError for a metric that there is not, that needs many clips or other ones, or whose network is not there.
    """
    from entprog.quality.metrics import METRICS, Meter, choose  # here: they take seconds to import

    try:
        chosen, _ = choose(names, shape, clips, points)
        if of_sets := [name for name in chosen if METRICS[name].of == "set"]:
            raise UserError(f"metric {of_sets[0]} is of a set of clips, not of a few: evaluate measures it")
        return Meter(chosen, Evaluate())
    except UserError as error:
        raise UserError(f"train.preview_metrics: {error}") from None


def unfinished(output: Where) -> list[int]:
    """Steps whose previews ended the workers that drew them, or were cut short with them, in order."""
    try:
        return sorted(map(int, files.from_json((output / UNFINISHED).read_text())["steps"]))
    except (OSError, ValueError, KeyError, TypeError):
        return []


def told(output: Where, steps: Sequence[int]) -> str:
    """What to tell a person of unfinished previews."""
    again = f"delete {output / UNFINISHED} to have them again"
    if len(steps) < MOST_UNFINISHED:
        return (
            f"the preview after step {steps[0]} ended its workers, or was cut short with them: it is left out; {again}"
        )
    which = ", ".join(map(str, steps))
    return f"previews after steps {which} ended their workers, or were cut short with them: no more are drawn; {again}"


def _note_unfinished(output: Where, steps: Sequence[int]) -> None:
    with contextlib.suppress(OSError):  # a full disk: it is not known then should this preview end the process
        if steps:
            files.write_json(output / UNFINISHED, {"steps": list(steps)})
        else:
            (output / UNFINISHED).unlink(missing_ok=True)


def cut(output: Where, done: int, warn: Callable[[str], None]) -> None:
    """Take previews of steps that a resume went back behind out of the list and the page: the run never had their
    weights. done: steps of the run so far. What goes wrong is a warning."""
    try:
        entries = steplog.lines_of(output / steplog.PREVIEWS)
        kept = [each for each in entries if each["step"] <= done]
        if kept != entries:
            _write(output, kept)
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"previews after step {done}, of an attempt that was lost, are still shown: {reason(error)}")


def leave(output: Where, entry: Mapping[str, Any]) -> None:
    """Add a preview to the list and to the page; one of the same step, of a run that was cut short, goes."""
    before = [each for each in steplog.lines_of(output / steplog.PREVIEWS) if each["step"] < entry["step"]]
    _write(output, [*before, dict(entry)])


def _write(output: Where, entries: Sequence[Mapping[str, Any]]) -> None:
    """Of no previews there is neither list nor page."""
    path = output / steplog.PREVIEWS
    if not entries:
        path.unlink(missing_ok=True)
        (path.parent / "index.html").unlink(missing_ok=True)
        return
    files.write_text(path, "".join(files.strict_json(each) + "\n" for each in entries))
    files.write_text(path.parent / "index.html", page(entries, output.resolve().name))


def page(entries: Sequence[Mapping[str, Any]], title: str) -> str:
    """The page that plays them: its clips are the files beside it."""
    shown = [
        {
            "step": each["step"],
            "charged_s": each["charged_s"],
            "motions": each["motions"],
            "figures": each.get("figures", {}),
            "videos": [str(Path(video).relative_to("previews")) for video in each["videos"]],
        }
        for each in entries
    ]
    content = json.dumps(shown).replace("<", "\\u003c")  # a motion's name must not end the script
    return PAGE.read_text().replace("{{ title }}", escape(title)).replace("{{ previews }}", content)


@contextlib.contextmanager
def undisturbed(network: nn.Module, compiled: bool) -> Iterator[None]:
    """Random states and measured memory stay as they are, and compiled blocks are not compiled for other shapes."""
    device = next(network.parameters()).device
    devices = [device] if device.type == "cuda" else []
    as_written = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with torch.random.fork_rng(devices=devices), as_written:
        yield
    if devices:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
