"""Clips that a network of the study generates, against the truth."""

from functools import cache
from typing import Any

from benchmarks.study_material import Material
from benchmarks.study_units import Bench
from entprog import config
from entprog.diffusion.denoiser import Denoiser
from entprog.quality import figures as quality_figures
from entprog.quality.card import ProtocolCard
from entprog.quality.metrics import METRICS, Meter
from pipelines.generating import rendering


@cache
def _meter(names: tuple[str, ...], device: str) -> Meter:
    return Meter(names, config.Evaluate(), device)


def quality(bench: Bench, denoiser: Denoiser, goods: Material) -> list[dict[str, Any]]:
    """Figures of generated clips against the truth, each with its card."""
    scale, shape = bench.scale, bench.scale.shape
    meter = _meter(scale.metrics, str(bench.device))
    settings = config.Generate(steps=scale.quality_steps, batch_size=len(goods.motions))
    made = rendering.make(denoiser, goods.motions, shape, settings)
    found = [
        meter.measure(result, motion.video, motion.reference, motion.pose)
        for result, motion in zip(made, goods.motions, strict=True)
    ]
    out = []
    for name in scale.metrics:
        if METRICS[name].of == "set":
            real, results = zip(*(each.features[name] for each in found), strict=True)
            figure = quality_figures.frechet_figure(real, results, 200, 0.95, 0)
        else:
            figure = quality_figures.mean_figure([each.values[name] for each in found], 200, 0.95, 0)
        network, sha256, resize = meter.judge(name)
        card = ProtocolCard(
            metric=name, better=METRICS[name].better, network=network, weights_sha256=sha256, resize=resize,
            frames=shape.frames, height=shape.height, width=shape.width, fps=shape.fps,
            codec="truth h264 4:2:0, result none", clips=len(found), split="held_out",
            dataset=goods.dataset.fingerprint, sampler=type(denoiser.scheduler()).__name__, steps=settings.steps,
            guidance="none", seed=settings.seed,
        )  # fmt: skip
        out.append({"metric": name, **vars(figure), "card": {**vars(card), "id": card.id}})
    return out
