"""What one rank alone meets while it opens a run, on a machine that lacks something, is told on all of them."""

import datetime
import json
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
import ray.train.torch
import torch

import pipelines
from entprog import models
from entprog.config import Experiment, Model
from entprog.data import shards
from entprog.distributed import agree
from entprog.errors import UserError
from entprog.models import fingerprints
from helpers import bases
from helpers.networks import SHAPE, tiny_denoiser, tiny_experiment
from helpers.processes import join, leave, run_ranks
from pipelines.training import setup, worker

SHARDS = Path(pipelines.__file__).parent / "demo_person"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class BegunError(Exception):
    """All is open."""


def begun(opened, _):
    raise BegunError([*map(str, opened.caches)])


def told(experiment: Experiment, base: Model) -> list[dict]:
    """What this rank tells the driver of a run that must not begin; with which caches one does. base: that the driver
    found."""
    posted = []
    board = SimpleNamespace(post=SimpleNamespace(remote=posted.append))
    settings = {"experiment": experiment.model_dump(mode="json"), "data": shards.read_dataset(SHARDS).fingerprint}
    settings |= {"weights": fingerprints.base(base), "board": board}
    try:
        worker._reporting_mistakes(settings, begun)
    except BegunError as error:
        posted += error.args
    return posted


def _mistaken_rank(rank, world, folder):
    """Rank 1 has a machine of its own. Whoever waits in vain fails."""
    agree.PATIENCE = datetime.timedelta(seconds=60)
    join(rank, world, folder, timeout_s=60)
    platform.node = lambda: f"machine {rank}"
    ray.train.torch.get_device = lambda: torch.device("cpu")  # which a worker of Ray Train asks
    ray.train.get_context = lambda: SimpleNamespace(get_local_world_size=lambda: 1, get_local_rank=lambda: 0)
    out = {}
    for part in ("transformer", "vae"):
        base = folder / (f"damaged {part}" if rank == 1 else "whole")
        with pytest.raises(UserError) as met:
            models.family("wan_animate").load(Model(family="wan_animate", base=str(base)), sharded=1)
        out[part] = str(met.value)
    here = {"model": {"init": {}, "base": str(folder / ("other" if rank == 1 else "first"))}}
    lacking = {"shards": str(folder / "not mounted" if rank == 1 else SHARDS)}
    ways = {
        "not mounted, sharded": {"data": lacking, "train": {"parallel": "fsdp", "workers": 2}},
        "not mounted, with texts": {"data": {**lacking, "text": "empty"}},
        "other": {"data": {"shards": str(SHARDS)}},
    }
    found = tiny_experiment(model={"init": {}, "base": str(folder / "first")}).model
    for lack, parts in ways.items():
        out[lack] = told(tiny_experiment(**here, **parts), found)
    late = SHAPE.model_copy(update={"frames": 3})
    setup.caches = lambda *_: dict.fromkeys([SHAPE] if rank == 1 else [SHAPE, late])
    out["late"] = told(tiny_experiment(model={"init": {}, "base": found.base}, **ways["other"]), found)
    (folder / f"{rank}.json").write_text(json.dumps(out))
    leave()


def test_a_mistake_that_one_rank_alone_meets_is_told_on_all_of_them(tmp_path):
    """Wherever it lies between what ranks do together: Wan-Animate's bring its motion encoder together while they load,
    all encode texts each its share, and load a sharded network in step."""
    for seed, name in enumerate(("first", "other")):
        tiny_denoiser(tiny_experiment(), seed).save(tmp_path / name)
    bases.animate(tmp_path / "whole")
    for part in ("transformer", "vae"):
        shutil.copytree(tmp_path / "whole", tmp_path / f"damaged {part}")
        weights = tmp_path / f"damaged {part}" / part / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1000])
    run_ranks(_mistaken_rank, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for part in ("transformer", "vae"):
        line = first.pop(part)
        assert line == second.pop(part) and line.endswith(" (on machine 1)") and "\n" not in line
        assert line.startswith("model.") and str(tmp_path / f"damaged {part}") in line
    warned, *late = first.pop("late")
    assert "are not seen by every machine" in warned["warning"], "a cache that rank 1 does not see yet is not used"
    assert late == second.pop("late") == [[str(SHAPE)]]
    assert len(first) == 3
    for lack, (posted,) in first.items():
        assert not second[lack] and str(tmp_path / lack.partition(",")[0]) in posted["user_error"]
        assert posted["user_error"].endswith(" (on machine 1)")
