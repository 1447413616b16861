"""Shapes of clips: the one that shards hold, and smaller ones that are made of it."""

from pydantic import Field, ValidationError

from entprog.config.part import Part
from entprog.errors import UserError


class ClipShape(Part):
    """Shape of one clip in pixels, the unit that shards hold and batches are made of."""

    frames: int = Field(default=8, ge=1, le=10_000)
    """Frames in a clip."""
    height: int = Field(default=96, ge=16, le=16_384, multiple_of=2)
    """Height in pixels (even: H.264 4:2:0)."""
    width: int = Field(default=64, ge=16, le=16_384, multiple_of=2)
    """Width in pixels (even)."""
    fps: float = Field(default=12.0, gt=0, le=1000)
    """Frames per second."""

    @property
    def pixels(self) -> int:
        """Pixels of a clip, over all its frames."""
        return self.frames * self.height * self.width

    def is_cut_of(self, whole: "ClipShape") -> bool:
        """Whether clips of `whole` can be cut to this shape: fewer frames, height and width divided by one number."""
        shrink = whole.height // self.height
        sizes = (self.height * shrink, self.width * shrink) == (whole.height, whole.width)
        return sizes and self.frames <= whole.frames and self.fps == whole.fps

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height} at {self.fps:g} fps"


class Smaller(Part):
    """A step of the clip shape ladder: clips smaller than `data.shape`, cut out of the same shards."""

    frames: int | None = Field(default=None, ge=1)
    """Frames in the middle of a clip. None: all."""
    shrink: int = Field(default=1, ge=1)
    """Height and width divided by this whole number (mean over areas)."""

    def of(self, shape: ClipShape) -> ClipShape:
        """The smaller shape. Raises UserError if clips of `shape` cannot be made that small."""
        frames = self.frames or shape.frames
        if frames > shape.frames or shape.height % (2 * self.shrink) or shape.width % (2 * self.shrink):
            raise UserError(
                f"schedule.shapes, schedule.table: clips of {shape} cannot be cut to {frames} frames and divided by "
                f"{self.shrink} (height and width must stay even)"
            )
        try:
            return ClipShape(
                frames=frames, height=shape.height // self.shrink, width=shape.width // self.shrink, fps=shape.fps
            )
        except ValidationError:
            raise UserError(
                f"schedule.shapes, schedule.table: {shape} divided by {self.shrink} is under 16 pixels"
            ) from None
