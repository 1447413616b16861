"""What every family must pass beside `tests/test_families.py`, as functions, so that planted mistakes can be put before
them too (`tests/test_family_mistakes.py`). Each raises where something is wrong.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

from entprog import blocks
from entprog.data.clips import Latents
from entprog.diffusion.processes import Flow
from entprog.models import vaes
from helpers import parity
from helpers.families import TINY, T, ordered, predict


@dataclass(frozen=True)
class Case:
    """A family's denoiser and the entry that it is to keep to."""

    name: str
    """Of an entry of `TINY`."""
    denoiser: object
    batch: Latents
    folder: Path
    """An empty one."""

    @property
    def entry(self):
        return TINY[self.name]


def all_blocks_are_found(case):
    found = ordered(case.denoiser, case.batch)
    assert len(found) == case.entry["blocks"], f"{len(found)} blocks, {case.entry['blocks']} expected"
    assert overlooked(case.denoiser, case.batch) == {}


def overlooked(denoiser, batch):
    """Classes of blocks without a bypass."""
    other = Latents(batch.clean.roll(1, -1), batch.conditions, batch.position)
    runs = [lambda part=part: predict(denoiser, part) for part in (batch, other)]
    return blocks.overlooked(denoiser.network, *runs)


def bypasses_give_what_is_left_without_the_block(case):
    """A block whose weights are all zero adds nothing: what it gives then is its bypass, every stream of it."""
    first = {}
    for block in blocks.blocks(case.denoiser.network):
        first.setdefault(type(block.module), block.module)
    seen = {}

    def note(module, args, kwargs):
        seen.setdefault(type(module), (args, kwargs))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in first.values()]
    with torch.no_grad():
        predict(case.denoiser, case.batch)
    for hook in hooks:
        hook.remove()
    for kind, module in first.items():
        bare = copy.deepcopy(module).eval()
        with torch.no_grad():
            for parameter in bare.parameters():
                parameter.zero_()
            args, kwargs = seen[kind]
            got, expected = _streams(blocks.bypass(bare, *args, **kwargs)), _streams(bare(*args, **kwargs))
        assert len(got) == len(expected), kind
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda m, k=kind: f"{k.__name__}: {m}")


def _streams(out):
    return [out] if isinstance(out, torch.Tensor) else list(out.values() if hasattr(out, "values") else out)


@torch.no_grad()
def clips_that_fit_are_those_that_run(case):
    """Whole patches run, in any number; half a patch does not."""
    geometry = case.denoiser._geometry
    if geometry.only:
        return
    patch = torch.tensor(geometry.patch)
    for times in ((1, 1, 2), (1, 3, 1), (2, 2, 3)):
        assert _runs(case.denoiser, (patch * torch.tensor(times)).tolist()), f"{times} patches"
    for axis in range(3):
        half = patch.clone()
        half[axis] //= 2
        if half[axis] and case.denoiser.PART != "unet":  # UNets take what they cannot halve
            assert not _runs(case.denoiser, half.tolist()), f"half a patch runs along axis {axis}"


def _runs(denoiser, size):
    clean = torch.randn(1, denoiser.latent_channels, *size, generator=torch.Generator().manual_seed(0))
    try:
        out = denoiser.predict(clean, T[:1], dict.fromkeys(denoiser.conditions, clean))
    except (RuntimeError, ValueError):
        return False
    return out.shape == clean.shape


@torch.no_grad()
def a_clip_s_own_text_is_what_it_sees(case):
    denoiser, batch = case.denoiser, case.batch
    text = torch.randn(2, *denoiser.text.shape[1:], generator=torch.Generator().manual_seed(0))
    both = denoiser.predict(batch.clean, T, {**batch.conditions, "text": text})
    assert not torch.equal(both, predict(denoiser, batch))
    for i in range(2):
        one = batch.part(slice(i, i + 1))
        alone = denoiser.predict(one.clean, T[i : i + 1], {**one.conditions, "text": text[i : i + 1]})
        torch.testing.assert_close(alone, both[i : i + 1], rtol=1e-3, atol=1e-4)


def the_scheduler_is_that_of_the_published_checkpoints(case):
    process = case.denoiser.PROCESS
    assert "scheduler" in case.entry, f"benchmarks/tiny_families.py: {case.name} names no published scheduler"
    own, published = process.of(case.denoiser.SCHEDULER), process.of(case.entry["scheduler"])
    # What has no scheduler of its own is sampled by Euler; whichever walks it back, a flow is its shift.
    assert (own == Flow(published.shift)) if isinstance(published, Flow) else (own == published)


@torch.no_grad()
def what_is_encoded_is_scaled_as_what_is_decoded(case):
    """A clip through the VAE and back comes out as of the VAE alone, whatever the scale between; that itself shows in
    `clips_are_those_of_the_pipeline`."""
    kind, sizes = case.entry["vae"]
    torch.manual_seed(0)
    vae, video = kind(**sizes).eval(), torch.rand(1, 3, 9, 32, 32) * 2 - 1
    torch.testing.assert_close(vaes.decode(vae, vaes.encode(vae, video)), unscaled(vae, video), rtol=1e-3, atol=1e-4)


def unscaled(vae, video):
    """Clips [B, 3, F, H, W] through a VAE and back."""
    if not isinstance(vae, AutoencoderKL | AutoencoderKLTemporalDecoder):
        return vae.decode(vae.encode(video).latent_dist.mode()).sample
    out = []
    for clip in video.transpose(1, 2):
        mode = vae.encode(clip).latent_dist.mode()
        frames = {"num_frames": len(clip)} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}
        out.append(vae.decode(mode, **frames).sample)
    return torch.stack(out).transpose(1, 2)


def clips_are_those_of_the_pipeline(case):
    same_clips(*parity.of(case.name, case.folder, type(case.denoiser)))


def same_clips(ours, theirs):
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-3, atol=1e-3)
    if theirs.frames is not None:
        torch.testing.assert_close(ours.frames, theirs.frames, rtol=1e-3, atol=1e-3, msg=lambda m: f"decoded: {m}")


OF_A_NETWORK = (
    all_blocks_are_found,
    bypasses_give_what_is_left_without_the_block,
    clips_that_fit_are_those_that_run,
    a_clip_s_own_text_is_what_it_sees,
    the_scheduler_is_that_of_the_published_checkpoints,
    what_is_encoded_is_scaled_as_what_is_decoded,
)
CHECKS = (*OF_A_NETWORK, clips_are_those_of_the_pipeline)
