"""Every preset builds; those of published checkpoints fit them, at their published sizes, on the meta device."""

import diffusers
import pytest
import torch

from entprog import config, models
from entprog.blocks import blocks
from entprog.schedule import plans
from pipelines import cli

SD_VAE = (
    diffusers.AutoencoderKL,
    {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
)  # fmt: skip
WAN = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
PUBLISHED = {
    "wan21_t2v_1_3b": (WAN, (diffusers.AutoencoderKLWan, {}), 1.42e9, 30),
    "wan22_ti2v_5b": (
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
    ),
    "wan_animate_14b": ({"added_kv_proj_dim": 5120}, (diffusers.AutoencoderKLWan, {}), 17.3e9, 48),
    "wan21_vace_1_3b": (
        {**WAN, "vace_layers": list(range(0, 30, 2))}, (diffusers.AutoencoderKLWan, {}), 2.15e9, 45,
    ),
    "svd": (
        {},
        (
            diffusers.AutoencoderKLTemporalDecoder,
            {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
             "down_block_types": ["DownEncoderBlock2D"] * 4},
        ),
        1.52e9,
        76,
    ),
    "animatediff": ({"cross_attention_dim": 768}, SD_VAE, 1.31e9, 59),
    "cogvideox_2b": ({}, (diffusers.AutoencoderKLCogVideoX, {}), 1.7e9, 30),
    "cogvideox_5b": (
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        (diffusers.AutoencoderKLCogVideoX, {"scaling_factor": 0.7}),
        5.57e9,
        42,
    ),
    "latte": (
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
"""Preset → (network, VAE: what differs from the diffusers class's defaults; parameters; blocks)."""


def test_every_preset_of_a_published_checkpoint_is_tested():
    experiments = {name: config.read_preset(name, cli.PRESETS) for name in config.presets(cli.PRESETS)}
    assert {name for name, values in experiments.items() if values.get("model", {}).get("base")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_fits_the_published_network(name):
    experiment = cli.settings(config.Experiment, name, None, None)
    cls = models.family(experiment.model.family).load.args[0]
    values, (kind, sizes), parameters, count = PUBLISHED[name]
    with torch.device("meta"):
        network, vae = cls.NETWORK(**values), kind(**sizes)
    assert type(vae) in cls.VAES
    cls.check_network(network.config)
    assert models.vaes.channels(vae) in cls.predicted(network.config)
    index = {"expand_timesteps": name == "wan22_ti2v_5b"}
    conditions, splits = cls.planned_inputs(network.config, {}, models.vaes.channels(vae), experiment.model, index)
    assert set(conditions) == {"reference", "pose"} and sum(splits) >= network.config.in_channels
    for shape in plans.ladder(experiment.schedule, experiment.data.shape, last=False):
        cls.geometry(network.config, vae).check(shape)
    assert len(blocks(network)) == count
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.02)
