"""diffusers' own pipelines at the families' tiny configurations: what they make of a network, beside what the project
makes of it from the same noise. Every entry of `helpers.families.TINY` has one here.
"""

from dataclasses import dataclass, replace

import diffusers
import torch
from PIL import Image

from entprog import models
from entprog.config import ClipShape, Generate, Model
from entprog.diffusion import sampling
from entprog.diffusion.objectives import noise_like
from entprog.media.skeleton import draw
from entprog.models import loading
from helpers import bases
from helpers.families import TINY, clips, published

STEPS = 4


@dataclass(frozen=True)
class Made:
    """What a clip was made as."""

    latents: torch.Tensor
    """[1, C, F', H', W'], scaled as the network has them."""
    frames: torch.Tensor | None = None
    """What is made of the pipeline's latents: [1, F, 3, H, W] in 0..1; None: that is not compared."""


def opened(name, folder, cls=None, conditions=(), **init):
    """(a denoiser of a pipeline's folder, with some text, its network and VAE as plain diffusers has them)

    cls: the family's denoiser, if not its own. The scheduler is that of the published checkpoints, whatever the family
    says.
    """
    tiny = TINY[name]
    cls = cls or models.family(tiny["family"]).DENOISER
    torch.manual_seed(0)
    kind, sizes = tiny["vae"]
    network = cls.NETWORK(**{**tiny["init"], "in_channels": 4, "out_channels": 4, **init}).eval()
    if name in ("wan", "wan_vace"):
        cls.initialise(network)
    vae = kind(**sizes).eval()
    network.save_pretrained(folder / cls.PART)
    vae.save_pretrained(folder / "vae")
    published(name).save_pretrained(folder / "scheduler")
    own = {"family": tiny["family"], "base": str(folder), "skeleton": "limbs"}
    denoiser = loading.load(cls, Model(conditions=conditions, **own))
    texts = {field: torch.randn_like(getattr(denoiser, field)) for field in ("text", *denoiser.FIXED)}
    return replace(denoiser, **texts), network, vae


@torch.no_grad()
def of(name, folder, cls=None, **init):
    """(what we make, what the pipeline makes) from the same noise and text. name: of an entry; cls: as of `opened`."""
    special = {"svd": svd, "wan_animate": wan_animate, "wan_vace": wan_vace}.get(name)
    if special:
        return special(folder)
    if name == "latte":
        init["out_channels"] = 8
    denoiser, network, vae = opened(name, folder, cls, **init)
    frames, size = 12 if name == "latte" else 9, 64  # plain Latte takes its own number of frames alone
    scheduler, text = published(name), denoiser.text
    settings = Generate(steps=STEPS, seed=5, sampler=type(scheduler).__name__)
    shape = (1, *denoiser.latent_shape(ClipShape(frames=frames, height=size, width=size)))
    noise = noise_like(torch.empty(shape), torch.tensor([0]), 5)
    common = {
        "height": size, "width": size, "num_inference_steps": STEPS, "guidance_scale": 1.0, "prompt_embeds": text,
        "latents": noise,
    }  # fmt: skip
    parts = {"vae": vae, "tokenizer": None, "text_encoder": None, "scheduler": scheduler}
    if name == "wan":
        pipe = diffusers.WanPipeline(transformer=network, **parts)
        theirs = made(pipe, num_frames=frames, **common)
    elif name == "latte":
        pipe = diffusers.LattePipeline(transformer=network, **parts)
        theirs = made(
            pipe, video_length=frames, clean_caption=False, mask_feature=False, negative_prompt=None, **common
        )
    elif name == "motion_unet":
        pipe = diffusers.AnimateDiffPipeline(unet=network, motion_adapter=None, **parts)
        theirs = made(pipe, num_frames=frames, **common)
    elif name == "hunyuan_video":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        pipe = diffusers.HunyuanVideoPipeline(transformer=network, **parts)
        mask = torch.ones(text.shape[:2], dtype=torch.int64)
        own = {"pooled_prompt_embeds": denoiser.pooled, "prompt_attention_mask": mask, "guidance_scale": 6.0}
        theirs = made(pipe, num_frames=frames, **common | own)
    elif name == "cogvideox":
        pipe = diffusers.CogVideoXPipeline(transformer=network, **parts)
        theirs = made(pipe, frames_first=True, num_frames=frames, **common | {"latents": noise.transpose(1, 2)})
    else:
        raise NotImplementedError(f"{__file__}: say here how diffusers' own pipeline makes a clip of {name}")
    return ours(denoiser, {}, shape, settings, theirs), theirs


def made(pipe, *given, frames_first=False, **settings):
    """A pipeline's clip. frames_first: its latents are [1, F', C, H', W']."""
    seen = []

    def note(pipe, step, timestep, values):
        seen.append(values["latents"])
        return {}

    frames = pipe(*given, callback_on_step_end=note, output_type="pt", **settings).frames
    latents = seen[-1].transpose(1, 2) if frames_first else seen[-1]
    return Made(latents.float(), frames.float())


def ours(denoiser, conditions, shape, settings, theirs):
    """What we make of the same noise, and of the pipeline's latents."""
    latents = sampling.sample(denoiser, conditions, shape, settings, [0])
    return Made(latents, denoiser.decode(theirs.latents) / 2 + 0.5)


def svd(folder):
    """Image latents in the VAE's own scale, with their noise, the image's embedding, what the network is told of the
    clip, σ and its steps."""
    pipe = bases.svd(folder)
    denoiser = models.family("svd").load(Model(family="svd", base=str(folder), conditions=("reference",)))
    reference = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shape = (1, *denoiser.latent_shape(ClipShape(frames=4, height=64, width=64)))
    noise = noise_like(torch.empty(shape), torch.tensor([0]), 5)
    of_reference = torch.Generator().manual_seed(int(reference.long().sum()))
    theirs = made(
        pipe, Image.fromarray(reference[0].numpy()), frames_first=True, height=64, width=64, num_frames=4,
        num_inference_steps=STEPS, max_guidance_scale=1.0, latents=noise.transpose(1, 2), generator=of_reference,
    )  # fmt: skip
    conditions = denoiser.condition(reference, torch.zeros(1, 4, 33, 3))
    assert set(conditions) == {"reference", "image"}
    return ours(denoiser, conditions, shape, Generate(steps=STEPS, seed=5), theirs), theirs


def wan_vace(folder):
    """With the pose as its video and without a reference, which has a noise of its own there: `tests/test_wan_vace.py`
    has that."""
    denoiser, network, vae = opened("wan_vace", folder, conditions=("pose",), vace_in_channels=2 * 4 + 64)
    pose = clips(1, ClipShape(frames=9, height=64, width=64)).pose
    conditions = denoiser.condition(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), pose)
    assert list(conditions) == ["pose"]
    shape = (1, *denoiser.latent_shape(ClipShape(frames=9, height=64, width=64)))
    noise = noise_like(torch.empty(shape), torch.tensor([0]), 5)
    scheduler = published("wan_vace")
    settings = Generate(steps=STEPS, seed=5, sampler=type(scheduler).__name__)
    pipe = diffusers.WanVACEPipeline(
        transformer=network, vae=vae, tokenizer=None, text_encoder=None, scheduler=scheduler
    )
    theirs = made(
        pipe, video=draw(pose, 64, 64) / 2 + 0.5, height=64, width=64, num_frames=9, num_inference_steps=STEPS,
        guidance_scale=1.0, latents=noise, prompt_embeds=denoiser.text,
    )  # fmt: skip
    return ours(denoiser, conditions, shape, settings, theirs), theirs


def wan_animate(folder):
    """Not its pipeline, but a prediction from the inputs that it has: the reference's frame noised with the clip,
    marked and given; no earlier segment; a face that is not there."""
    tiny = TINY["wan_animate"]
    denoiser = models.family("wan_animate").load(Model(family="wan_animate", init=tiny["init"], vae="none"))
    generator = torch.Generator().manual_seed(0)
    noisy, reference, pose = (torch.randn(2, 3, 2, 16, 16, generator=generator) for _ in range(3))
    reference = reference[:, :, :1].expand(-1, -1, 2, -1, -1)
    t = torch.tensor([0.3, 0.9])
    got = denoiser.predict(noisy, t, {"reference": reference, "pose": pose})
    noise = noise_like(reference[:1, :, :1], torch.tensor([0]), 0).expand(2, -1, -1, -1, -1)
    first = (1 - t.view(-1, 1, 1, 1, 1)) * reference[:, :, :1] + t.view(-1, 1, 1, 1, 1) * noise
    mask = torch.zeros(2, 4, 3, 16, 16)
    mask[:, :, 0] = 1
    given = torch.cat([reference[:, :, :1], torch.zeros(2, 3, 2, 16, 16)], dim=2)
    (expected,) = denoiser.network(
        torch.cat([torch.cat([first, noisy], dim=2), mask, given], dim=1),
        t * 1000,
        torch.zeros(2, 512, 8),
        torch.zeros(2, 1, 6),
        pose,
        torch.full((2, 3, 5, 8, 8), -1.0),
        return_dict=False,
    )
    return Made(got), Made(expected[:, :, 1:])
