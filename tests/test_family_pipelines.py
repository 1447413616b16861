"""Families against diffusers' own pipelines: from the same noise both make the same latents."""

from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image

from entprog import models
from entprog.config import ClipShape, Generate, Model
from entprog.diffusion import sampling
from entprog.diffusion.objectives import noise_like
from entprog.diffusion.samplers import sampler
from helpers.families import TINY

STEPS = 4


def opened(name, tmp_path, conditions=(), **init):
    """(a denoiser of a pipeline's folder without conditions, its network and VAE as plain diffusers has them)"""
    tiny = TINY[name]
    cls = models.family(tiny["family"]).load.args[0]
    torch.manual_seed(0)
    kind, sizes = tiny["vae"]
    network = cls.NETWORK(**{**tiny["init"], "in_channels": 4, "out_channels": 4, **init}).eval()
    if name == "wan":
        cls.initialise(network)
    vae = kind(**sizes).eval()
    network.save_pretrained(tmp_path / cls.PART)
    vae.save_pretrained(tmp_path / "vae")
    cls.PROCESS.of(cls.SCHEDULER).scheduler().save_pretrained(tmp_path / "scheduler")
    denoiser = models.family(tiny["family"]).load(
        Model(family=tiny["family"], base=str(tmp_path), conditions=conditions)
    )
    return denoiser, network, vae


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "latte", "motion_unet", "cogvideox", "cogvideox_rotary"])
def test_latents_are_those_of_the_pipeline(name, tmp_path):
    init = {"use_rotary_positional_embeddings": True} if name == "cogvideox_rotary" else {}
    if name == "latte":
        init = {"out_channels": 8}
    denoiser, network, vae = opened(name.removesuffix("_rotary"), tmp_path, **init)
    frames, size = 12 if name == "latte" else 9, 64  # plain Latte takes its own number of frames alone
    settings = Generate(steps=STEPS, seed=5, sampler="UniPCMultistepScheduler" if name == "wan" else None)
    shape = (1, *denoiser.latent_shape(ClipShape(frames=frames, height=size, width=size)))
    noise = noise_like(torch.empty(shape), torch.tensor([0]), 5)
    scheduler, text = sampler(denoiser.process, settings.sampler), denoiser.text
    common = {
        "height": size, "width": size, "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent",
        "prompt_embeds": text,
    }  # fmt: skip
    if name == "wan":
        pipe = diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, vae=vae, transformer=network, scheduler=scheduler
        )
        theirs = pipe(num_frames=frames, latents=noise, **common).frames
    elif name == "latte":
        pipe = diffusers.LattePipeline(
            tokenizer=None, text_encoder=None, vae=vae, transformer=network, scheduler=scheduler
        )
        theirs = pipe(
            video_length=frames, latents=noise, clean_caption=False, mask_feature=False, negative_prompt=None, **common
        ).frames
    elif name == "motion_unet":
        pipe = diffusers.AnimateDiffPipeline(
            vae=vae, text_encoder=None, tokenizer=None, unet=network, motion_adapter=None, scheduler=scheduler
        )
        theirs = pipe(num_frames=frames, latents=noise, **common).frames
    else:
        pipe = diffusers.CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=vae, transformer=network, scheduler=scheduler
        )
        theirs = pipe(num_frames=frames, latents=noise.transpose(1, 2), **common).frames.transpose(1, 2)
    ours = sampling.sample(denoiser, {}, shape, settings, [0])
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_svd_is_the_pipeline_s_own(tmp_path):
    """Image latents in the VAE's own scale, image embedding, what the network is told of the clip, σ and its steps."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    denoiser, network, vae = opened("svd", tmp_path, ("reference",), in_channels=8)
    sizes = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=112,
        projection_dim=8,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(sizes).eval()
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae, image_encoder=encoder, unet=network, scheduler=denoiser.scheduler(),
        feature_extractor=CLIPImageProcessor(),
    )  # fmt: skip
    reference = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    picture = Image.fromarray(reference[0].numpy())
    shape = (1, *denoiser.latent_shape(ClipShape(frames=4, height=64, width=64)))
    noise = noise_like(torch.empty(shape), torch.tensor([0]), 5)
    theirs = pipe(
        picture, height=64, width=64, num_frames=4, num_inference_steps=STEPS, min_guidance_scale=1.0,
        max_guidance_scale=1.0, fps=7, noise_aug_strength=0.0, latents=noise.transpose(1, 2), output_type="latent",
    ).frames.transpose(1, 2)  # fmt: skip
    embedding = pipe._encode_image(picture, torch.device("cpu"), 1, False)
    denoiser = replace(denoiser, text=embedding)
    conditions = denoiser.condition(reference, torch.zeros(1, 4, 33, 3))
    assert list(conditions) == ["reference"]
    ours = sampling.sample(denoiser, conditions, shape, Generate(steps=STEPS, seed=5), [0])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_wan_animate_sees_what_its_pipeline_shows_it(tmp_path):
    """The reference's frame noised with the clip, marked and given; no earlier segment; a face that is not there."""
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
    torch.testing.assert_close(got, expected[:, :, 1:], rtol=1e-4, atol=1e-5)
