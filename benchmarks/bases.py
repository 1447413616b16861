"""What fine-tuning each published base takes: counted on its network at its published size, without its weights.

    python -m benchmarks.bases                # half a minute

Bytes that a device holds whatever the clips are (`train --dry-run` counts them for a run), and FLOPs of a step of plain
training on the preset's clips, which seconds are foretold from until a GPU has measured them. Leaves
benchmarks/results/bases.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from benchmarks import common
from entprog import config, models
from entprog.blocks import blocks
from entprog.config import Experiment
from entprog.models import vaes
from entprog.models.denoising import VideoDenoiser, process_of
from pipelines import cli, terminal
from pipelines.command import usage
from pipelines.training import footprint, workload

app = usage.app("What fine-tuning each published base takes.")

PASSES = 4
"""Forward passes that a step costs: one, one recomputed by gradient checkpointing, and two for the backward pass."""
WAYS: dict[str, dict[str, Any]] = {
    "all blocks": {"schedule": {"kind": "full"}, "train": {"lora": None}},
    "a quarter": {"schedule": {"kind": "progressive", "table": [{"until": 1, "share": 0.25}]}, "train": {"lora": None}},
    "LoRA": {"schedule": {"kind": "full"}, "train": {"lora": config.Lora().model_dump()}},
}
"""Settings over a preset's own; adapters as they are by default, of all presets alike."""
SD_VAE = (
    diffusers.AutoencoderKL,
    {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
)  # fmt: skip
WAN, WAN_VAE = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, (diffusers.AutoencoderKLWan, {})
WAN_I2V = {"in_channels": 36}
IMAGE_TOKENS = {"image_dim": 1280, "added_kv_proj_dim": 5120}


@dataclass(frozen=True)
class Base:
    """A published base: what differs from the diffusers classes' defaults."""

    network: Mapping[str, Any]
    vae: tuple[type[torch.nn.Module], Mapping[str, Any]]
    parameters: float
    blocks: int
    index: Mapping[str, Any] = field(default_factory=dict)
    """Entries of its pipeline's index that say how its networks are used."""


PUBLISHED = {
    "wan21_t2v_1_3b": Base(WAN, WAN_VAE, 1.42e9, 30),
    "wan21_i2v_14b": Base(WAN_I2V | IMAGE_TOKENS, WAN_VAE, 16.4e9, 40),
    "wan21_flf2v_14b": Base(WAN_I2V | IMAGE_TOKENS | {"pos_embed_seq_len": 514}, WAN_VAE, 16.4e9, 40),
    "wan22_i2v_14b": Base(WAN_I2V, WAN_VAE, 14.3e9, 40, {"boundary_ratio": 0.9}),
    "wan22_ti2v_5b": Base(
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        (
            diffusers.AutoencoderKLWan,
            {
                "z_dim": 48, "base_dim": 160, "decoder_base_dim": 256, "is_residual": True, "patch_size": 2,
                "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48,
                "latents_std": [1.0] * 48,
            },
        ),
        5.0e9,
        30,
        {"expand_timesteps": True},
    ),
    "wan21_vace_1_3b": Base({**WAN, "vace_layers": list(range(0, 30, 2))}, WAN_VAE, 2.15e9, 45),
    "wan22_vace_fun_14b": Base(
        {"vace_layers": list(range(0, 40, 5))}, WAN_VAE, 17.3e9, 48, {"boundary_ratio": 0.875}
    ),
    "wan21_fun_control_1_3b": Base(
        {**WAN, "in_channels": 48, "image_dim": 1280, "added_kv_proj_dim": 1536}, WAN_VAE, 1.56e9, 30
    ),
    "hunyuan_video": Base({}, (diffusers.AutoencoderKLHunyuanVideo, {}), 12.8e9, 60),
    "wan_animate_14b": Base({"added_kv_proj_dim": 5120}, WAN_VAE, 17.3e9, 48),
    "svd": Base(
        {},
        (
            diffusers.AutoencoderKLTemporalDecoder,
            {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
             "down_block_types": ["DownEncoderBlock2D"] * 4},
        ),
        1.52e9,
        76,
    ),
    "animatediff": Base({"cross_attention_dim": 768}, SD_VAE, 1.31e9, 59),
    "cogvideox_2b": Base({}, (diffusers.AutoencoderKLCogVideoX, {}), 1.7e9, 30),
    "cogvideox_5b": Base(
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        (diffusers.AutoencoderKLCogVideoX, {"scaling_factor": 0.7}),
        5.57e9,
        42,
    ),
    "latte": Base(
        {
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
            "cross_attention_dim": 1152, "attention_bias": True, "sample_size": 64, "patch_size": 2,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 4096, "video_length": 16,
        },
        SD_VAE,
        1.06e9,
        56,
    ),
}  # fmt: skip
"""By preset."""


@app.command()
def main() -> None:
    """Count, print and keep the figures."""
    figures = [row(preset) for preset in PUBLISHED]
    common.show("a step of plain training", figures)
    terminal.console.print(f"kept in {common.write('bases', figures, device='cpu', repeats=1)}")


def row(preset: str) -> dict[str, Any]:
    """What fine-tuning the base of a preset takes."""
    experiment = cli.settings(Experiment, preset, None, None)
    plain = denoiser(preset, experiment)
    flops = PASSES * experiment.data.batch_size * workload.forward_flops(plain, experiment.data.shape)
    return {
        "preset": preset,
        "parameters": sum(parameter.numel() for parameter in plain.network.parameters()),
        "blocks": len(blocks(plain.network)),
        "clips": str(experiment.data.shape),
        **{f"{way} bytes": held_bytes(preset, experiment, way) for way in WAYS},
        "step_flops": flops,
        "forecast_step_s": flops / (workload.FLOPS_PER_S * workload.SHARE),
    }


def denoiser(preset: str, experiment: Experiment) -> VideoDenoiser:
    """A preset's network, widened for its conditions, on the meta device."""
    base, model = PUBLISHED[preset], experiment.model
    cls, (kind, sizes) = models.family(model.family).DENOISER, base.vae
    with torch.device("meta"):
        vae, network = kind(**sizes), cls.NETWORK(**base.network)
    given = network.config, {}, vaes.channels(vae), model, base.index
    conditions, splits = cls.planned_inputs(*given)
    if len(splits) > 1:
        outputs = network.config.out_channels or network.config.in_channels
        with torch.device("meta"):
            network = cls.NETWORK(**{**base.network, "in_channels": sum(splits), "out_channels": outputs})
    tensors = cls.tensors(network.config, model, None)
    return cls(
        network=network.eval().to("meta"),
        vae=vae.to("meta"),
        conditions=conditions,
        process=process_of(cls, None, {}),
        autocast=None,
        shape=None,
        **{name: None if tensor is None else tensor.to("meta") for name, tensor in tensors.items()},
    )


def held_bytes(preset: str, experiment: Experiment, way: str) -> int:
    """Bytes of weights, gradients and moments on a device."""
    settings = config.build(config.merge(experiment.model_dump(), WAYS[way]))
    return footprint.largest(settings, denoiser(preset, settings))


if __name__ == "__main__":
    app()
