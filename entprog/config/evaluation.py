"""Settings of `evaluate`: which metrics, on which clips, judged by which networks."""

from typing import Literal

from pydantic import Field

from entprog.config.jobs import Generate
from entprog.config.part import Part


class Evaluate(Part):
    """How generated clips are judged (`pipelines.evaluate`)."""

    metrics: tuple[str, ...] = ()
    """Names of metrics. Empty: all whose networks come with the assets and that fit the clips."""
    split: str = "held_out"
    """Split of the shards whose clips are generated and judged."""
    clips: int | None = Field(default=None, ge=1)
    """Clips of the split, spread evenly over it. None: all."""
    bootstrap: int = Field(default=1000, ge=0)
    """Replicates behind the interval of a mean over clips; 0: no interval."""
    frechet_bootstrap: int = Field(default=100, ge=0)
    """Replicates behind the interval of a Fréchet distance, each of which costs one distance; 0: no interval."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Share of replicates inside an interval."""
    bootstrap_seed: int = Field(default=0, ge=0)
    """Seeds which clips a replicate draws."""
    pck_threshold: float = Field(default=0.1, gt=0, le=1)
    """A joint is right within this share of the body's size (metric `pck`)."""
    inception: str | None = None
    """File of FID's Inception weights in torch-fidelity's format. None: the library fetches them (metric `fid`)."""
    i3d: str | None = None
    """File of FVD's I3D: i3d_pretrained_400.pt, or the TorchScript i3d_torchscript.pt. None: cd-fvd fetches it."""
    trust_torchscript: bool = False
    """Run `i3d` if it is TorchScript, which is a program: on the CPU, in a process that can open neither files nor
    connections. Only where you trust who made it all the same."""
    resnet3d: str | None = None
    """File of FID-VID's 3-D ResNet, resnet-50-kinetics.pth (metric `fid_vid`)."""
    window_frames: int | None = Field(default=None, ge=10)
    """Metrics `fid_vid` and `fvd` take every so many frames in a row as a sample of their own; the TikTok protocol: 16.
    None: a clip is one sample. Of a clip of 49 frames, 16 cost 34 samples."""
    lpips_trunk: Literal["alex", "vgg"] = "alex"
    """Trunk of metric `lpips`, which torchvision fetches."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that generate and judge at once, one GPU each where there are any. None: as many as GPUs, or one for
    every four CPUs."""
    gpus: Literal["auto", "yes", "no"] = "auto"
    """`auto`: GPUs if the cluster has them."""


class Evaluation(Part):
    """Everything that an evaluation depends on, beside checkpoint, shards and code."""

    evaluate: Evaluate = Evaluate()
    generate: Generate = Generate()
    """How clips are sampled; not used with `--generated`."""
