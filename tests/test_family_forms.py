"""Adapters, fp8 and compiled blocks together, in every family's own blocks."""

import functools

import pytest
import torch

from entprog import blocks
from entprog.diffusion import losses
from entprog.models import lora
from entprog.schedule.freezing import Freeze
from entprog.schedule.plans import Plan
from helpers.families import NAMES, again, load, ordered, predict, settings
from helpers.networks import SHAPE, latents, tiny_experiment

FP8 = [name for name in NAMES if name != "svd"]
"""fp8 wants bfloat16, which SVD's temporal convolutions do not take."""


def trained(name, compiled):
    """(denoiser, its blocks, weights before, losses, names of trained blocks) of three steps of a narrow plan."""
    wanted = tiny_experiment(
        model=settings(name, dtype="bfloat16" if name in FP8 else "float32", compile_blocks=compiled).model_dump(),
        train={"lora": {"rank": 16, "alpha": 16}},
        schedule={
            "outside": "conditions",
            "backward": "residual",
            "frozen_precision": "fp8" if name in FP8 else "full",
        },
    )
    denoiser, batch = load(name, dtype=wanted.model.dtype), latents([0, 1])
    lora.add(denoiser.network, blocks.blocks(denoiser.network), wanted.train.lora, wanted.train.seed)
    found = ordered(denoiser, batch)
    before = {n: tensor.clone() for n, tensor in denoiser.network.state_dict().items()}
    adapted = [block.name for block in found if any(blocks.ADAPTER in n for n, _ in block.module.named_parameters())]
    freeze = Freeze(denoiser, found, wanted)
    freeze.put(Plan(trainable=tuple(adapted[::3]), backward="residual", shape=SHAPE))
    optimizer, seen = torch.optim.AdamW(freeze.trained, lr=1e-2), []
    for _ in range(3):
        loss = losses.training_loss(denoiser, batch, wanted.train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return denoiser, found, before, seen, adapted[::3]


def some(found, chosen):
    """Of every kind of block one that trains and one that is frozen: each takes half a second to compile."""
    return list({(type(block.module), block.name in chosen): block for block in found}.values())


@pytest.mark.parametrize("name", NAMES)
def test_adapters_train_beside_frozen_blocks_in_fp8_compiled_or_not(name, tmp_path, monkeypatch):
    denoiser, found, before, plain, chosen = trained(name, compiled=False)
    after = denoiser.network.state_dict()
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    of_blocks = {n for n in moved if n.startswith(tuple(f"{block.name}." for block in found))}
    assert of_blocks and len(chosen) < len(found) and moved > of_blocks, "what sees the conditions trains too"
    assert all(n.startswith(tuple(f"{block}." for block in chosen)) and blocks.ADAPTER in n for n in of_blocks)
    twins = {block.name for block in found if blocks.variants(block.module).twin}
    assert twins == ({block.name for block in found} - set(chosen) if name in FP8 else set())

    if name not in ("wan", "cogvideox15"):  # tested elsewhere, or alike
        compile_blocks = functools.partial(blocks.compile_blocks, backend="eager")
        monkeypatch.setattr(blocks, "compile_blocks", lambda found: compile_blocks(some(found, chosen)))
        compiled = trained(name, compiled=True)
        assert all(blocks.variants(block.module).compiled for block in some(compiled[1], chosen))
        assert compiled[3] == pytest.approx(plain, rel=0.03)

    blocks.unfreeze(denoiser.network, found, [], [])
    lora.merge(denoiser.network)
    denoiser.save(tmp_path, shape=SHAPE)
    with torch.no_grad():
        expected = predict(denoiser, latents([0, 1]))
        saved = predict(again(tmp_path, name, dtype="bfloat16" if name in FP8 else "float32"), latents([0, 1]))
    torch.testing.assert_close(saved, expected, rtol=1e-3, atol=1e-3)
