"""VAE and image encoder wait elsewhere while nobody needs them. The other device is torch's lazy one, which a machine
without a GPU has: its tensors are refused beside a CPU's, and hold what was copied to them."""

import numpy as np
import pytest
import torch

from entprog import config, models
from entprog.config import Generate
from entprog.diffusion import beside
from entprog.scoring import cache
from helpers import bases, families, real_clips
from helpers.networks import tiny_experiment
from pipelines.generating import rendering
from pipelines.generating.motions import Motion
from pipelines.stream.batches import all_cached

lazy = pytest.importorskip("torch._lazy.ts_backend")
SHAPE = families.FIVE
MODEL = {"init": {}, "vae": "auto", "conditions": ["reference", "pose"]}


@pytest.fixture(scope="module", autouse=True)
def other_device():
    lazy.init()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    bases.image_to_video(folder, clip=True)
    return {**MODEL, "base": str(folder)}


@pytest.fixture
def denoiser(model):
    return models.family("wan").load(config.build(model, config.Model))


def places(denoiser):
    return {tensor.device.type for module in beside.modules(denoiser) for tensor in module.state_dict().values()}


def weights(denoiser):
    return [tensor.cpu() for module in beside.modules(denoiser) for tensor in module.state_dict().values()]


def test_they_wait_on_the_host_and_come_back_as_they_were(model, denoiser):
    before = weights(denoiser)
    there = models.family("wan").load(config.build(model, config.Model), "lazy")
    assert len(beside.modules(there)) == 2 and places(there) == {"lazy"}
    size = beside.device_bytes(there)
    beside.rest(there)
    assert places(there) == {"cpu"} and beside.device_bytes(there) == 0 < size
    with pytest.raises(ValueError), beside.at_hand(there):
        assert places(there) == {"lazy"} and beside.device_bytes(there) == size
        raise ValueError
    assert places(there) == {"cpu"} and there.network.patch_embedding.weight.device.type == "lazy"
    assert all(torch.equal(a, b) for a, b in zip(weights(there), before, strict=True))
    beside.rest(denoiser)  # on the host they are where the network is
    assert beside.device_bytes(denoiser) == size


def test_who_needs_them_brings_them(model, denoiser, tmp_path):
    """Pictures that are drawn, and clips that blocks are ranked by."""
    experiment = tiny_experiment(model=model, data={"shape": SHAPE.model_dump()}, priority={"conditions": 2})
    rows = [real_clips.row("cam01", "train", 0.1 * i, SHAPE) for i in range(2)]
    dataset = real_clips.write(tmp_path / "shards", {"train": [rows], "held_out": []}, SHAPE)
    random = np.random.default_rng(0)
    size = SHAPE.height, SHAPE.width
    shown = Motion("one", random.integers(0, 255, (*size, 3), np.uint8), random.random((5, 33, 3), np.float32), None)
    made = []
    for away in (False, True):
        if away:
            for module in beside.modules(denoiser):
                module.to("lazy")
            with pytest.raises(RuntimeError, match="lazy"):
                denoiser.encode(families.clips(1))
        where = places(denoiser)
        (record,), _ = rendering.render(lambda: denoiser, [shown], SHAPE, tmp_path / str(away), Generate(steps=1))
        clip = cache.clips(denoiser, dataset, experiment)[0]
        made.append(((tmp_path / record["result"]).read_bytes(), clip))
        assert places(denoiser) == where == {"lazy" if away else "cpu"}
    (drawn, seen), (drawn_again, seen_again) = made
    assert drawn == drawn_again and torch.equal(seen.clean, seen_again.clean)
    assert all(torch.equal(seen.conditions[name], value) for name, value in seen_again.conditions.items())


def test_a_network_that_is_shown_grey_brings_the_vae_once(tmp_path):
    """A training from cached latents, whose first step shows VACE that no video is kept."""
    bases.vace(tmp_path)
    denoiser = models.family("wan_vace").load(config.Model(family="wan_vace", base=str(tmp_path)))
    batch = denoiser.encode(families.clips(1, config.ClipShape(frames=5, height=32, width=32, fps=12)))
    for module in beside.modules(denoiser):
        module.to("lazy")
    with torch.no_grad():
        assert denoiser.predict(batch.clean, torch.ones(1), batch.conditions).isfinite().all()
    assert places(denoiser) == {"lazy"}


@pytest.mark.parametrize(
    ("schedule", "cached", "all_of_them"),
    [
        ({"kind": "full"}, [SHAPE], True),
        ({"kind": "full"}, [], False),
        ({"kind": "linear", "stages": 2, "shapes": [{"frames": 1}]}, [SHAPE], False),
        ({"kind": "entprog", "shapes": [{"frames": 1}]}, None, False),
    ],
)
def test_they_wait_where_every_batch_is_read_as_latents(schedule, cached, all_of_them):
    """Which a search over clip shapes does not do, though all of them are cached."""
    experiment = tiny_experiment(data={"shape": SHAPE.model_dump()}, schedule=schedule)
    every = [SHAPE, SHAPE.model_copy(update={"frames": 1})]
    assert all_cached(experiment, every if cached is None else cached) == all_of_them
