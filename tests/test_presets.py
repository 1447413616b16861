"""Every preset builds; those of published checkpoints fit them, at their published sizes, on the meta device."""

import pytest
import torch

from benchmarks.bases import PUBLISHED
from entprog import config, models
from entprog.blocks import blocks
from entprog.schedule import plans
from pipelines import cli


def test_every_preset_of_a_published_checkpoint_is_tested():
    experiments = {name: config.read_preset(name, cli.PRESETS) for name in config.presets(cli.PRESETS)}
    assert {name for name, values in experiments.items() if values.get("model", {}).get("base")} == PUBLISHED.keys()


def test_a_tenth_of_the_clips_is_shown_without_a_condition_where_one_fine_tunes():
    shares = {
        name: cli.settings(config.Experiment, name, None, None).train.drop for name in config.presets(cli.PRESETS)
    }
    fine_tuning = {*PUBLISHED, "finetune", "paper"}
    assert all(set(vars(shares[name]).values()) == {0.1} for name in fine_tuning)
    assert shares["demo"] == config.Drop(pose=0.1), "it has no text, and its reference is not guided"
    assert all(set(vars(drop).values()) == {0} for name, drop in shares.items() if name not in {*fine_tuning, "demo"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_fits_the_published_network(name):
    experiment = cli.settings(config.Experiment, name, None, None)
    cls = models.family(experiment.model.family).DENOISER
    base = PUBLISHED[name]
    kind, sizes = base.vae
    with torch.device("meta"):
        network, vae = cls.NETWORK(**base.network), kind(**sizes)
    assert type(vae) in cls.VAES
    cls.check_network(network.config)
    assert models.vaes.channels(vae) in cls.predicted(network.config)
    given = network.config, {}, models.vaes.channels(vae), experiment.model, base.index
    conditions, splits = cls.planned_inputs(*given)
    assert set(conditions) == {"reference", "pose"} and sum(splits) >= network.config.in_channels
    for shape in plans.ladder(experiment.schedule, experiment.data.shape, last=False):
        cls.geometry(network.config, vae).check(shape)
    assert len(blocks(network)) == base.blocks
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(base.parameters, rel=0.02)


def test_what_nothing_is_said_of_is_trained_as_the_presets_train():
    """No search by default: it was no better than chance."""
    experiment = config.build({"train": {"steps": 1}})
    preset = config.build(config.merge(config.read_preset("finetune", cli.PRESETS), {"train": {"steps": 1}}))
    assert experiment.schedule.kind == preset.schedule.kind == "progressive"
    assert experiment.schedule.table == preset.schedule.table
