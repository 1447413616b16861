"""Settings of jobs other than training: preparing clips, generating, comparing."""

from typing import Literal

from pydantic import ByteSize, Field, field_validator

from entprog.config.model import Model
from entprog.config.part import Part
from entprog.config.schedule import Row, Schedule
from entprog.config.shapes import ClipShape, Smaller


class Prepare(Part):
    """How videos become clips (`pipelines.prepare`)."""

    frames_fps: float = Field(default=30.0, gt=0, le=1000)
    """Frames per second of a folder of numbered images, where a manifest does not say it."""
    max_bytes: ByteSize = Field(default=ByteSize(20 * 10**9), ge=1)
    """Largest file that is read, also the most that is fetched of a remote one; above: `too_large`."""
    hosts: tuple[str, ...] = ()
    """Hosts on the web that are asked although they are in this machine's own network and stand in a manifest or a
    redirect, and other hosts that redirects may lead to (`*.example.org` names several). That of --input is one."""
    max_pixels: int = Field(default=7680 * 4320, ge=1)
    """Most pixels in a frame, checked before one is decoded; above: `too_large`."""
    max_duration_s: float = Field(default=4 * 3600.0, gt=0)
    """Longest video, by its header and while it is decoded; above: `too_long`."""
    max_gap_s: float = Field(default=10.0, gt=0)
    """Longest time that one frame stands still by its time stamps; above: `corrupt`."""
    max_frames: int = Field(default=4_000_000, ge=1)
    """Most frames decoded of one video; above: `too_long`."""
    max_work_s: float = Field(default=24 * 3600.0, gt=0)
    """Longest time on the clock that one stage takes for one video, fetching included; above: `too_long`."""
    max_decoded_bytes: int = Field(default=256 * 2**20, ge=1)
    """Largest array (a pose file) or table (a manifest) in memory, checked before and while it is unpacked."""
    stall_s: float = Field(default=300.0, gt=0, le=7 * 24 * 3600)
    """Longest wait for one frame or piece of a file; then the process is ended, twice on one machine: `crashed`."""
    shot_change: float | None = Field(default=20.0, gt=0)
    """Mean change between two clip frames, in levels of 0..255, from which there may be a cut (it must also stand out
    from the changes around it). No clip crosses a cut. None: only where time stamps start again."""
    pose: Literal["blazepose", "rtmlib"] = "blazepose"
    """Pose estimator. rtmlib (extra `rtmlib`): RTMW whole-body networks, which it fetches at its first use: 133 points,
    face and hands among them, where blazepose gives 33. Not used for videos with a file of poses beside."""
    track_gpus: float = Field(default=0.0, ge=0)
    """GPUs, or a share of one, for each tracking process; only rtmlib uses them."""
    people: Literal["one", "foremost"] = "one"
    """`one`: clips that show another person, half as large as the foremost or larger, are rejected
    (`several_people`). `foremost`: the foremost is cut out of them."""
    stride: int | None = Field(default=None, ge=1)
    """Clip frames between the starts of neighbouring clips of one video. None: half a clip."""
    margin: float = Field(default=0.15, ge=0, le=2)
    """Room around the body's outermost points on every side, as a fraction of its larger extent."""
    point_visibility: float = Field(default=0.5, ge=0, le=1)
    """A body point counts as visible from this visibility on."""
    min_detected: float = Field(default=0.5, ge=0, le=1)
    """Smallest share of an unbroken track's frames in which the person detector sees somebody; below: `nobody`."""
    min_visibility: float = Field(default=0.7, ge=0, le=1)
    """Smallest share of the 33 points visible, averaged over a clip; below: `low_visibility`."""
    min_inside: float = Field(default=0.95, ge=0, le=1)
    """Smallest share of a clip's visible points inside its crop; below: `does_not_fit`."""
    min_scale: float = Field(default=1.0, gt=0)
    """Fewest source pixels per clip pixel (1: never enlarged); below: `too_small`."""
    min_motion: float = Field(default=0.2, ge=0)
    """Smallest mean change from frame to frame of a clip, in levels of 0..255; below: `too_still`."""
    min_sharpness: float = Field(default=10.0, ge=0)
    """Smallest variance of the Laplacian of a clip's sharpest frame, in levels squared, at the clip's size;
    below: `blurred`."""
    crf: int = Field(default=16, ge=0, le=51)
    """Quality of the encoded clips (x264): lower is better and larger."""
    held_out: tuple[str, ...] = ()
    """Sources held out of training: path inside the input, file name, or file name without its ending."""
    held_out_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the sources held out when none is named; at least one where there are two."""
    seed: int = Field(default=0, ge=0)
    """Decides which sources are held out."""
    clips_per_shard: int = Field(default=256, ge=1)
    """Clips in one shard file."""
    max_rejected: float = Field(default=1.0, ge=0, le=1)
    """Share of the videos found that may be rejected; the job stops as soon as there are more. 1: never. Files whose
    name is no video's do not count."""


class Shape(Part):
    """The part of `Data` that preparing decides."""

    shape: ClipShape = ClipShape()
    """Clip shape."""


class Preparation(Part):
    """Everything that a dataset's clips depend on, beside the videos and the code."""

    data: Shape = Shape()
    prepare: Prepare = Prepare()


class Ladder(Part):
    """The part of `Schedule` that decides at which shapes clips are encoded."""

    kind: str = Schedule().kind
    shapes: tuple[Smaller, ...] = ()
    """Smaller clips that stages may also train on."""
    table: tuple[Row, ...] = Schedule().table
    """Kind `progressive`: rows with their clip shapes."""


class Encoders(Part):
    """What encodes clips."""

    gpus: Literal["auto", "yes", "no"] = "auto"
    """`auto`: the GPUs that the cluster has now, a CPU if it has none; `yes`: a cluster without one is waited for."""


class Encoding(Part):
    """What latents are made with (`pipelines.prepare --latents`), beside the shards and the code."""

    latents: Encoders = Encoders()
    model: Model = Model()
    schedule: Ladder = Ladder()

    @field_validator("model")
    @classmethod
    def _is_one_network(cls, given: Model) -> Model:
        """Both experts of a base see the same latents."""
        return given.model_copy(update={"expert": "high"}) if given.expert == "both" else given


class Generate(Part):
    """How clips are sampled (`pipelines.generate`)."""

    sampler: str | None = None
    """diffusers class that walks from noise to clip, such as UniPCMultistepScheduler. None: the checkpoint's own."""
    steps: int = Field(default=20, ge=1, le=1000)
    """Steps from noise to clip; a served model takes it from whoever asks."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds the noise that a clip starts from."""
    reference_guidance: float = Field(default=1.0, ge=0)
    """Strength of the reference image over a zeroed one (classifier-free guidance); 1: none. Helps networks that were
    trained with conditions dropped (`train.drop`)."""
    pose_guidance: float = Field(default=1.0, ge=0)
    """Strength of the pose over a zeroed one; 1: none. Equal to `reference_guidance`: ordinary guidance by both."""
    text_guidance: float = Field(default=1.0, ge=0)
    """Strength of the text over none (the encoder's empty text, or zeros of networks that were trained with
    `data.text=fixed`), reference and pose being shown in both; 1: none. What diffusers' pipelines call
    `guidance_scale`."""
    shift: float | None = Field(default=None, gt=0)
    """Timestep shift: >1 spends more steps on noise. None: the checkpoint's own."""
    text: str | None = None
    """Text that the network is shown, as training shows captions (`data.text=caption`; extra `text`). None: the one
    that lies with the checkpoint."""
    text_encoder: str | None = None
    """Folder (or hub name) with `text_encoder/` and `tokenizer/`, which encode `text`. None: the checkpoint's own."""
    count: int = Field(default=4, ge=1)
    """Clips of a split, spread evenly over it."""
    start_s: float = Field(default=0.0, ge=0)
    """Where the clip starts in a driving video or pose sequence, in seconds."""
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=True)
    """Length of the result. None: that of the clips the network was trained on. Longer ones are made of overlapping
    windows, up to the end of a group of frames that the VAE takes together; where the motion is shorter it decides, so
    that .inf is all of it."""
    overlap: float = Field(default=0.25, ge=0, lt=1)
    """Share of a window that the next one overlaps, in results of several windows."""
    batch_size: int = Field(default=4, ge=1)
    """Clips sampled at once."""
    max_bytes: ByteSize = Field(default=ByteSize(2**30), ge=1)
    """Most memory for frames, at 3 bytes a pixel: of all driving videos or clips of a command together, and of the
    results that are sampled at once (which take some 20 times as much while they are made). `seconds=.inf` is cut to
    it; what else is larger is refused."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of the forward pass; `auto`: on a GPU the one that it was trained under, else float32. Under
    bfloat16 blocks hold what it rounds in half the memory."""
    gpus: Literal["auto", "yes", "no"] = "auto"
    """`auto`: a GPU if there is one. Of `generate` alone: `evaluate` has `evaluate.gpus`."""


class Generation(Part):
    """Everything that a generated clip depends on, beside checkpoint, reference, pose and code."""

    generate: Generate = Generate()
    prepare: Prepare = Prepare()
    """`margin` and `point_visibility` are used, for the crop around the person in a driving video or reference image,
    and `pose`, for the motion of a driving video, of which a warning says that less than `min_visibility` is seen."""


class Compare(Part):
    """How runs are compared (`pipelines.compare`)."""

    target_loss: float | None = Field(default=None, gt=0)
    """Held-out loss whose reaching is timed. None: the baseline's final loss, the highest of its seeds'."""
    baseline: str | None = None
    """What the others are compared with: a group's label, else a run's name, else its id (6 characters or more).
    None: plain training, else the oldest group, of those with a held-out loss."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence of intervals over seeds; raised where several groups are compared with the baseline (Bonferroni)."""
    samples: int = Field(default=2, ge=0)
    """Sample clips of each group in the page."""
    sample_bytes: ByteSize = Field(default=ByteSize(250_000), ge=1000)
    """Largest sample clip taken as it is; a larger one is encoded anew, smaller."""


class Comparison(Part):
    """Everything that a comparison depends on, beside the runs."""

    compare: Compare = Compare()
