"""Residual units of diffusers that several families are built of, and what is seen where they are skipped."""

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

from entprog.blocks import bypass, bypass_layers


@bypass.register(BasicTransformerBlock)
@bypass.register(TemporalBasicTransformerBlock)
@bypass.register(AnimateDiffTransformer3D)
def _(module, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return hidden_states


@bypass.register
def _(module: Transformer2DModel, hidden_states: torch.Tensor, *args, return_dict: bool = True, **kwargs):
    return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


@bypass.register
def _(module: ResnetBlock2D, input_tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    resample = module.upsample or module.downsample
    shortcut = input_tensor if resample is None else resample(input_tensor)
    if module.conv_shortcut is not None:
        shortcut = module.conv_shortcut(shortcut)
    return shortcut / module.output_scale_factor


@bypass.register
def _(module: TemporalResnetBlock, input_tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return input_tensor if module.conv_shortcut is None else module.conv_shortcut(input_tensor)


@bypass_layers.register(ResnetBlock2D)
@bypass_layers.register(TemporalResnetBlock)
def _(module) -> tuple[nn.Module | None, ...]:
    return (module.conv_shortcut,)
