"""Settings of the network: which one, from what, with which conditions, and how it is run."""

import json
from typing import Any, Literal

from pydantic import Field, field_validator

from entprog.config.part import Part

Skeleton = Literal["limbs", "dwpose", "wan_animate"]
Attention = Literal["native", "_native_cudnn", "_native_flash", "_native_efficient", "_native_math"]
"""Kernels of attention, by diffusers' names."""


class Model(Part):
    """Which network is trained, from what, with which conditions."""

    family: str = "wan"
    """Model family: a file of `entprog/models/`."""
    base: str | None = None
    """Folder (or hub name) of the pre-trained checkpoint in diffusers format. None: a new network from `init`. This and
    the other files of a model may lie in a bucket (`s3://`, `gs://`) too."""
    init: dict[str, Any] = {}
    """Configuration of a new network, the diffusers class's own argument names. Only when `base` is None."""
    weights: str | None = None
    """Single safetensors file of the network in its original format or ComfyUI's (families `wan`, `wan_animate`,
    `wan_vace`): `base` then says the network's configuration, VAE and scheduler, its own weights are not read."""
    adapter: str | None = None
    """Low-rank adapter to start from: a folder that `train.lora` or `entprog adapter` left, or a file in diffusers',
    peft's or ComfyUI's keys. With `train.lora`, whose rank and alpha must be its own, it is trained on; otherwise it is
    merged into the weights."""
    trust_pickle: bool = False
    """Read weights of base and VAE that are no safetensors (`.bin`). They are pickles, which may run what their maker
    wanted; torch reads them with `weights_only`, which allows tensors alone. Only where you trust who made them."""
    expert: Literal["high", "low", "both"] | None = None
    """Of a base with two networks (Wan 2.2 A14B) the one that is trained: `high`, for timesteps from its boundary up;
    `low`, for those below; `both`: two trainings one after the other, each with the whole budget. None: bases with one
    network, or the one that a saved folder was trained for."""
    conditions: tuple[Literal["reference", "pose"], ...] = ("reference", "pose")
    """What the network sees beside the noisy clip, as extra input channels. Channels the base lacks start at zero."""
    skeleton: Skeleton | None = None
    """How the network is shown poses: `limbs`, the body's in this project's colours; `dwpose`, body, hands and face as
    DWPose draws them; `wan_animate`, body, toes and hands as Wan-Animate's makers do. None: as the adapter was trained
    here, else the base; of a published base of VACE, Wan-Animate or Fun-Control as that has seen them, otherwise
    `limbs`."""
    last_frame: bool | None = None
    """Whether a network that sees the reference as the first frame sees the last one too (Wan FLF2V, Wan 2.2 I2V): in
    training the clip's own. None: as it was trained here; of a published FLF2V base yes."""
    first_frame: bool | None = None
    """Whether the reference is in training each clip's own first frame, of networks that take it for how a clip begins
    (Wan I2V, FLF2V, TI2V, Fun-Control, CogVideoX I2V, SVD); otherwise it is another frame of the video. None: as it was
    trained here; of a published FLF2V, TI2V or Fun-Control base, or with a last frame, yes."""
    vae: str = "auto"
    """`auto`: the base's own VAE if it has one; `none`: pixels; otherwise a folder or hub name."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the VAE encodes clips and conditions. `bfloat16` is quicker; latents are rounded to it and cached
    in half the space. Decoding stays in float32."""
    prompt_embeds: str | None = None
    """safetensors file with `prompt_embeds` [tokens, dim] shown to cross-attention: text, for an SVD without an image
    encoder an image's embedding. None: zeros."""
    text_encoder: str | None = None
    """Folder (or hub name) with `text_encoder/` and `tokenizer/`, which encode captions (`data.text`). None: the base's
    own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the forward pass; trained weights stay in float32."""
    gradient_checkpointing: bool | Literal["on_host", "keep_attention"] = False
    """Recompute trained blocks' activations in the backward pass. `on_host`: and what each block was given waits in
    host memory meanwhile: the same bits, in less memory on the device, for two copies a block. `keep_attention`: but
    self-attention's output is kept, of long clips most of what would be computed again: the same bits, in less time,
    for as much memory as blocks' inputs take."""
    attention: Attention = "native"
    """Kernels of self- and cross-attention, by diffusers' names, of Wan and HunyuanVideo: `native`, torch's choice;
    cuDNN's, FlashAttention 2, the memory-efficient ones, or plain products, which need memory for tokens x tokens. They
    round otherwise. Of `DIFFUSERS_ATTN_BACKEND` in the environment nothing is taken."""
    compile_blocks: bool = False
    """Compile each block with torch.compile: the first step under every plan compiles, later ones are quicker."""
    swap_blocks: int = Field(default=0, ge=0)
    """Blocks whose frozen weights wait in host memory and are on the device while their block runs, two blocks' at a
    time (so 0: none, or 3 and more): the same bits, in less memory and more time. Needs model.dtype=bfloat16."""

    @field_validator("swap_blocks")
    @classmethod
    def _swaps_to_some_avail(cls, given: int) -> int:
        if given in (1, 2):
            raise ValueError("two of the blocks that wait are on the device at any time: give 0, or 3 and more")
        return given

    @field_validator("init")
    @classmethod
    def _is_finite(cls, given: dict[str, Any]) -> dict[str, Any]:
        if "NaN" in (text := json.dumps(given, default=str)) or "Infinity" in text:
            raise ValueError("needs finite numbers")
        return given
