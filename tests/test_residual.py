"""Residual backward where networks are compiled, in half precision, or shaped like a UNet with skips."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.utils._pytree import tree_map

from entprog.blocks import Block, blocks, bypass, compile_blocks, execution_order, unfreeze, variants
from entprog.cost import counting, measuring
from helpers.networks import latents, tiny_denoiser, tiny_experiment

TRAINED = ["blocks.1", "blocks.4"]


def gradients(denoiser):
    """Of every trained parameter, for one fixed loss."""
    batch = latents(range(2))
    denoiser.network.zero_grad(set_to_none=True)
    denoiser.predict(batch.clean, torch.tensor([0.2, 0.8]), batch.conditions).square().mean().backward()
    return {n: p.grad.clone() for n, p in denoiser.network.named_parameters() if p.grad is not None}


def by_hand(block: Block):
    """y = bypass(x) + (f(x) - bypass(x)).detach(), written out."""
    own = type(block.module).forward.__get__(block.module)

    def forward(*args, **kwargs):
        shortcut = bypass(block.module, *args, **kwargs)
        with torch.no_grad():
            branch = tree_map(torch.sub, own(*args, **kwargs), shortcut)
        return tree_map(torch.add, shortcut, branch)

    return forward


@pytest.mark.parametrize("backward", ["exact", "residual"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_gradients(denoiser, found, backward, checkpointing):
    outside = denoiser.outside()["conditions"]
    unfreeze(denoiser.network, found, TRAINED, outside, backward, checkpointing)
    expected = gradients(denoiser)
    compile_blocks(found, backend="aot_eager")
    for trainable in (["blocks.0"], TRAINED):  # what is trained changes under way
        unfreeze(denoiser.network, found, trainable, outside, backward, checkpointing)
        got = gradients(denoiser)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    assert set(denoiser.network.state_dict()) == set(tiny_denoiser(tiny_experiment()).network.state_dict())
    assert all(variants(block.module).compiled for block in found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_follows_the_formula(checkpointing):
    denoiser = tiny_denoiser(tiny_experiment(model={"dtype": "bfloat16"}))
    found, outside = blocks(denoiser.network), denoiser.outside()["conditions"]
    unfreeze(denoiser.network, found, TRAINED, outside, "residual", checkpointing)
    got = gradients(denoiser)
    unfreeze(denoiser.network, found, TRAINED, outside, "exact")
    for block in found:
        if block.name not in TRAINED:
            block.module.forward = by_hand(block)
    expected = gradients(denoiser)
    assert got.keys() == expected.keys()
    for name in got:
        assert (got[name] - expected[name]).norm() <= 0.05 * expected[name].norm() + 1e-7, name


class Resnet(ResnetBlock2D):
    """A class of its own, so that what is registered here is of no concern to other tests."""


class Attention(BasicTransformerBlock):
    """As Resnet."""


@bypass.register
def _(module: Resnet, x, *args, **kwargs):
    return (x if module.conv_shortcut is None else module.conv_shortcut(x)) / module.output_scale_factor


@bypass.register
def _(module: Attention, hidden_states, *args, **kwargs):
    return hidden_states


@pytest.fixture
def unet():
    """A tiny UNet, its blocks in order of execution, and a function that gives a loss."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    for module in network.modules():
        module.__class__ = {ResnetBlock2D: Resnet, BasicTransformerBlock: Attention}.get(type(module), type(module))
    x, text = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8)

    def loss():
        return network(x, torch.tensor([3, 500]), text).sample.square().mean()

    return network, execution_order(blocks(network), loss), loss


def unet_gradients(network, loss):
    network.zero_grad(set_to_none=True)
    loss().backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_unet_with_skips_follows_the_formula(unet, checkpointing):
    network, found, loss = unet
    plain = loss().detach()
    trained = [found[0].name, found[len(found) // 2].name, found[-1].name]
    outside = list(network.conv_in.parameters())
    unfreeze(network, found, trained, outside, "residual", checkpointing)
    assert torch.equal(loss().detach(), plain)
    got = unet_gradients(network, loss)
    unfreeze(network, found, trained, outside, "exact")
    for block in found:
        if block.name not in trained:
            block.module.forward = by_hand(block)
    expected = unet_gradients(network, loss)
    assert got.keys() == expected.keys() and any(name.startswith("conv_in") for name in got)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backward", ["exact", "residual"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_unets_cost_is_foreseen(unet, backward, checkpointing):
    network, found, loss = unet
    outside = list(network.conv_in.parameters())
    model = measuring.measure(network, found, outside, loss, clips=2, seconds=False, checkpointing=checkpointing)
    names = [block.name for block in found]
    for trainable in (names, names[::3], names[-2:], names[:1]):
        trained = unfreeze(network, found, trainable, outside, backward, checkpointing)
        counted = counting.count(network, trained, loss)
        assert model.step(trainable, backward) == pytest.approx(counted.flops, rel=0.1), trainable
        assert model.memory(trainable, backward) == pytest.approx(counted.memory_bytes(1), rel=0.1), trainable
