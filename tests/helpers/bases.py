"""Tiny pipelines of diffusers as bases that have conditions of their own."""

import diffusers
import torch

from entprog.models.wan import WanDenoiser
from entprog.models.wan_animate import WanAnimateDenoiser
from entprog.models.wan_vace import WanVaceDenoiser
from helpers.families import TINY, published

IMAGE_TOKENS = {"image_dim": 8, "added_kv_proj_dim": 24}


def image_to_video(folder, clip: bool, last=False, channels=4):
    """An image-to-video pipeline of Wan, of 2.1 (with CLIP's image tokens) or 2.2, saved to a folder. last: of first
    and last frame; channels: of the latents, a multiple of 4."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    tiny = {**TINY["wan"]["init"], "patch_size": [1, 2, 2]}
    tiny |= {"in_channels": 2 * channels + 4, "out_channels": channels}
    more = (IMAGE_TOKENS if clip else {}) | ({"pos_embed_seq_len": 2 * 10} if last else {})
    network = diffusers.WanTransformer3DModel(**tiny, **more).eval()
    WanDenoiser.initialise(network)
    if last:
        torch.nn.init.normal_(network.condition_embedder.image_embedder.pos_embed)
    kind, sizes = TINY["wan"]["vae"]
    scale = {name: sizes[name] * (channels // 4) for name in ("latents_mean", "latents_std")}
    sizes = {**sizes, "z_dim": channels, **scale}
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    )
    sees = {}
    if clip:
        size = {"shortest_edge": 24}
        processor = CLIPImageProcessor(size=size, crop_size={"height": 24, "width": 24})
        sees = {"image_encoder": CLIPVisionModel(vision).eval(), "image_processor": processor}
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=kind(**sizes).eval(), transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **sees,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return pipe


def control(folder):
    """A folder of Fun-Control's network, as diffusers has it, with the parts of an image-to-video pipeline."""
    pipe = image_to_video(folder, clip=True, channels=8)  # with 4, as with no published VAE, it would look like one
    network = diffusers.WanTransformer3DModel.from_config({**pipe.transformer.config, "in_channels": 3 * 8}).eval()
    WanDenoiser.initialise(network)
    network.save_pretrained(folder / "transformer")
    return pipe, network


def given_frame(folder):
    """A pipeline of Wan 2.2 TI2V, whose first latent frame can be given, saved to a folder."""
    torch.manual_seed(0)
    kind, sizes = TINY["wan"]["vae"]
    channels = {"in_channels": 4, "out_channels": 4, "patch_size": [1, 2, 2]}
    network = diffusers.WanTransformer3DModel(**{**TINY["wan"]["init"], **channels}).eval()
    WanDenoiser.initialise(network)
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=kind(**sizes).eval(), transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), expand_timesteps=True,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return pipe


def two_experts(folder, first_frame: bool, boundary=0.9):
    """A pipeline of Wan 2.2 with two networks, image-to-video or text-to-video, saved to a folder."""
    torch.manual_seed(0)
    kind, sizes = TINY["wan"]["vae"]
    channels = {"in_channels": 2 * 4 + 4 if first_frame else 4, "out_channels": 4, "patch_size": [1, 2, 2]}
    networks = [diffusers.WanTransformer3DModel(**{**TINY["wan"]["init"], **channels}).eval() for _ in range(2)]
    for network in networks:
        WanDenoiser.initialise(network)
    cls = diffusers.WanImageToVideoPipeline if first_frame else diffusers.WanPipeline
    pipe = cls(
        tokenizer=None, text_encoder=None, vae=kind(**sizes).eval(), transformer=networks[0],
        transformer_2=networks[1], scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        boundary_ratio=boundary,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return pipe


def animate(folder):
    """A pipeline of Wan-Animate, saved to a folder."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {**TINY["wan_animate"]["init"], **IMAGE_TOKENS, "patch_size": [1, 2, 2], "motion_encoder_size": 16}
    channels = {"in_channels": 2 * 4 + 4, "latent_channels": 4, "out_channels": 4}
    faces = {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}}
    network = diffusers.WanAnimateTransformer3DModel(**sizes | channels | faces).eval()
    WanAnimateDenoiser.initialise(network)
    with torch.no_grad():  # so that faces matter
        for block in network.face_adapter:
            for parameter in block.parameters():
                parameter.copy_(torch.randn(parameter.shape))
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    )
    kind, sizes = TINY["wan_animate"]["vae"]
    pipe = diffusers.WanAnimatePipeline(
        tokenizer=None, text_encoder=None, vae=kind(**sizes).eval(), transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return pipe


def vace(folder, boundary=None):
    """A VACE pipeline of Wan, saved to a folder. boundary: of one with two networks."""
    torch.manual_seed(0)
    tiny = {**TINY["wan_vace"]["init"], "in_channels": 4, "out_channels": 4, "patch_size": [1, 2, 2]}
    parts = ["transformer", *(["transformer_2"] if boundary else [])]
    networks = {part: diffusers.WanVACETransformer3DModel(**tiny, vace_in_channels=2 * 4 + 64).eval() for part in parts}
    for network in networks.values():
        WanVaceDenoiser.initialise(network)
    kind, sizes = TINY["wan_vace"]["vae"]
    pipe = diffusers.WanVACEPipeline(
        tokenizer=None, text_encoder=None, vae=kind(**sizes).eval(), boundary_ratio=boundary, **networks,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return pipe


def svd(folder):
    """A pipeline of Stable Video Diffusion, saved to a folder."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    tiny = {**TINY["svd"]["init"], "in_channels": 2 * 4, "out_channels": 4}
    kind, sizes = TINY["svd"]["vae"]
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=112,
        projection_dim=8,
    )  # fmt: skip
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=kind(**sizes).eval(), image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=diffusers.UNetSpatioTemporalConditionModel(**tiny).eval(), feature_extractor=CLIPImageProcessor(),
        scheduler=published("svd"),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return pipe


def cogvideox(folder, of_pairs=False):
    """A CogVideoX image-to-video pipeline, saved to a folder. of_pairs: as 1.5 has it, else as 5B."""
    torch.manual_seed(0)
    name = "cogvideox15" if of_pairs else "cogvideox"
    own = {} if of_pairs else {
        "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True, "sample_width": 8,
        "sample_height": 8, "sample_frames": 9,
    }  # fmt: skip
    sizes = {**TINY[name]["init"], "in_channels": 2 * 4, "out_channels": 4, **own}
    kind, of_vae = TINY[name]["vae"]
    vae = kind(**of_vae, invert_scale_latents=of_pairs, scaling_factor=0.7).eval()
    last = vae.encoder.conv_out.conv  # its pipeline draws from the posterior: make that as narrow as published ones are
    torch.nn.init.zeros_(last.weight.data[4:])
    torch.nn.init.constant_(last.bias.data[4:], -30.0)
    pipe = diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae,
        transformer=diffusers.CogVideoXTransformer3DModel(**sizes).eval(),
        scheduler=published(name),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return pipe
