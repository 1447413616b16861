"""Every model family at a tiny configuration, which CPUs run in milliseconds.

family, init    as `model.family` and `model.init` name them
vae             diffusers class of its VAE, and a tiny configuration of it
blocks          how many blocks that network has: counted by hand, so that a kind that was forgotten shows
scheduler       configuration of the published checkpoints' scheduler, out of their scheduler/ and not of the family's
                file; where those differ (Wan's shift, CogVideoX' snr_shift_scale), what a base without one has
"""

from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
)

WAN = {
    "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip

COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 16, "text_embed_dim": 8, "num_layers": 3,
    "sample_width": 32, "sample_height": 32, "sample_frames": 5, "patch_size": 4, "max_text_seq_length": 3,
}  # fmt: skip

FRAMES_VAE = {
    "block_out_channels": [8, 16], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip

WAN_VAE = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.1, -0.2, 0.3, 0.0]}

COGVIDEOX_VAE = {
    "block_out_channels": [8, 8, 8, 8], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip

WAN_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
}  # fmt: skip

COGVIDEOX_SCHEDULER = {
    "_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing", "clip_sample": False,
}  # fmt: skip

TINY = {
    "wan": {
        "family": "wan",
        "init": WAN,
        "vae": (AutoencoderKLWan, {**WAN_VAE, "latents_std": [1.5, 0.5, 2.0, 1.0]}),
        "blocks": 3,
        "scheduler": WAN_SCHEDULER,
    },
    "wan_animate": {
        "family": "wan_animate",
        "init": {
            **WAN, "num_layers": 4, "inject_face_latents_blocks": 2, "motion_encoder_size": 8, "motion_style_dim": 8,
            "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8}, "image_dim": 6, "added_kv_proj_dim": 24,
        },
        "vae": (AutoencoderKLWan, {**WAN_VAE, "latents_std": [1.5, 0.5, 2.0, 1.0]}),
        "blocks": 6,
        "scheduler": WAN_SCHEDULER,
    },
    "wan_vace": {
        "family": "wan_vace",
        "init": {**WAN, "vace_layers": [0, 2]},
        "vae": (AutoencoderKLWan, {**WAN_VAE, "latents_std": [1.5, 0.5, 2.0, 1.0]}),
        "blocks": 5,
        "scheduler": WAN_SCHEDULER,
    },
    "latte": {
        "family": "latte",
        "init": {
            "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24,
            "sample_size": 8, "patch_size": 4, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "caption_channels": 8, "video_length": 12, "attention_bias": True,
            "num_embeds_ada_norm": 1000, "out_channels": 6,
        },
        "vae": (AutoencoderKL, FRAMES_VAE),
        "blocks": 4,
        "scheduler": {
            "_class_name": "DDIMScheduler", "prediction_type": "epsilon", "beta_schedule": "linear",
            "beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False,
        },
    },
    "svd": {
        "family": "svd",
        "init": {
            "block_out_channels": [32, 32], "layers_per_block": 1, "num_attention_heads": [2, 2],
            "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
            "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
            "cross_attention_dim": 8, "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12,
        },
        "vae": (AutoencoderKLTemporalDecoder, {
            "block_out_channels": [32, 32], "latent_channels": 4, "layers_per_block": 1,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
        }),
        "blocks": 24,
        "scheduler": {
            "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_type": "continuous",
            "timestep_spacing": "leading", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0, "steps_offset": 1,
        },
    },
    "motion_unet": {
        "family": "motion_unet",
        "init": {
            "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
            "down_block_types": ["CrossAttnDownBlockMotion", "DownBlockMotion"],
            "up_block_types": ["UpBlockMotion", "CrossAttnUpBlockMotion"],
            "num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 12,
        },
        "vae": (AutoencoderKL, FRAMES_VAE),
        "blocks": 19,
        "scheduler": {
            "_class_name": "DDIMScheduler", "prediction_type": "epsilon", "beta_schedule": "linear",
            "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "timestep_spacing": "linspace",
            "steps_offset": 1,
        },
    },
    "cogvideox": {
        "family": "cogvideox",
        "init": COGVIDEOX,
        "vae": (AutoencoderKLCogVideoX, COGVIDEOX_VAE),
        "blocks": 3,
        "scheduler": COGVIDEOX_SCHEDULER,
    },
    "cogvideox15": {
        "family": "cogvideox",
        "init": {
            **COGVIDEOX, "patch_size_t": 2, "use_rotary_positional_embeddings": True, "ofs_embed_dim": 16,
            "patch_bias": False,
        },
        "vae": (AutoencoderKLCogVideoX, COGVIDEOX_VAE),
        "blocks": 3,
        "scheduler": COGVIDEOX_SCHEDULER,
    },
    "hunyuan_video": {
        "family": "hunyuan_video",
        "init": {
            "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "num_single_layers": 2,
            "num_refiner_layers": 1, "patch_size": 4, "text_embed_dim": 8, "pooled_projection_dim": 6,
            "rope_axes_dim": [4, 4, 4],
        },
        "vae": (AutoencoderKLHunyuanVideo, {
            "block_out_channels": [8, 8, 8, 8], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
        }),
        "blocks": 4,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0},
    },
}  # fmt: skip
