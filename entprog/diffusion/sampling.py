"""From noise to a clip: one of diffusers' schedulers around a denoiser, with guidance, in windows where it is long."""

import inspect
from collections.abc import Sequence

import torch

from entprog.config import ClipShape, Generate
from entprog.diffusion.denoiser import Denoiser
from entprog.diffusion.dropping import named, textless, without
from entprog.diffusion.longclips import blended
from entprog.diffusion.objectives import noise_like
from entprog.diffusion.samplers import sampler, set_steps


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    conditions: dict[str, torch.Tensor],
    shape: Sequence[int],
    settings: Generate,
    places: Sequence[int],
    window: int | None = None,
) -> torch.Tensor:
    """Latents float32 [B, C, F', H', W'] that follow the conditions (as `denoiser.condition` gives them, on the
    network's device).

    shape: B, C, F', H', W'. A clip's noise depends on (settings.seed, its place) alone, one a clip: many clips can be
    sampled in batches of any size. window: latent frames that the network takes at once, None: all; longer clips are
    sampled in windows that overlap by settings.overlap. Raises UserError for a sampler that does not fit.
    """
    device = next(denoiser.network.parameters()).device
    scheduler = sampler(denoiser.process, settings.sampler, settings.shift)
    set_steps(scheduler, settings.steps, device)
    window = window or shape[2]
    overlap = min(max(round(settings.overlap * window), 1), window - 1)
    strengths = settings.reference_guidance, settings.pose_guidance, settings.text_guidance
    passes = guidance(named(conditions), *strengths)
    latents = noise_like(torch.empty(tuple(shape), device=device), torch.tensor(places), settings.seed)
    latents = latents * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else latents
    extra = {}
    if "generator" in inspect.signature(scheduler.step).parameters:  # samplers that add noise on the way
        extra["generator"] = [torch.Generator().manual_seed(settings.seed + (place << 20)) for place in places]
    given = denoiser.given(conditions)
    with denoiser.sampling() as expert_at:
        for timestep in scheduler.timesteps:
            t = denoiser.process.t(timestep).expand(shape[0])
            seen = latents
            if hasattr(scheduler, "scale_model_input"):  # flow matching has none
                seen = scheduler.scale_model_input(latents, timestep)
            expert = expert_at(timestep)
            predict = blended(lambda noisy, c, t=t, expert=expert: expert.predict(noisy, t, c), window, overlap)
            prediction = torch.zeros_like(latents)
            for kept, share in passes.items():
                shown = without(conditions, kept)
                prediction += share * predict(seen, shown if "text" in kept else textless(denoiser, shown))
            if given is not None:  # from its noise straight to what is given
                prediction = _instead(prediction, given[0], denoiser.process.towards(seen, given[1], t))
            latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
    return latents if given is None else _instead(latents, *given)


def _instead(values: torch.Tensor, mask: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Others where a mask is 1, values where it is 0."""
    return torch.where(mask.bool(), others, values)


def guidance(
    conditions: tuple[str, ...], reference: float, pose: float, text: float = 1.0
) -> dict[tuple[str, ...], float]:
    """{what is shown, other conditions being zeroed, and a text being none: what that prediction counts}; the shares
    sum to 1.

    ε̂ = ε̂(∅, ∅, text) + r·(ε̂(reference, ∅, text) - ε̂(∅, ∅, text))
        + p·(ε̂(reference, pose, text) - ε̂(reference, ∅, text))
        + (t - 1)·(ε̂(reference, pose, text) - ε̂(reference, pose, ∅))
    with r, p, t the strengths. Of reference and pose it is what InstructPix2Pix (arXiv 2211.09800, equation 3) has for
    image and text: equal strengths are ordinary classifier-free guidance and cost two predictions, 1 and 1 cost one.
    Of the text alone (r = p = 1) it is ordinary guidance as diffusers' pipelines have it, which show the picture in
    both predictions; t = 1 leaves it out, another one costs one prediction more.
    """
    strengths = {"reference": reference, "pose": pose}
    steps = [(name, strengths.get(name, 1.0)) for name in sorted(conditions, key=lambda n: n != "reference")]
    shares: dict[tuple[str, ...], float] = {}
    shown: tuple[str, ...] = ("text",)
    left = 1.0
    for name, strength in steps:
        shares[shown] = left - strength
        shown, left = (*shown, name), strength
    shares[shown] = left + (text - 1)
    shares[shown[1:]] = 1 - text
    return {names: share for names, share in shares.items() if share}


def window_of(denoiser: Denoiser, trained: ClipShape) -> int:
    """Latent frames that a network takes at once: those of the clips that it was trained on."""
    return denoiser.latent_shape(trained)[1]
