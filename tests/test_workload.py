"""What is told of a run's size before it begins: clips seen, FLOPs, GPUs that are left over."""

import pytest
import torch

from entprog import models
from entprog.cost import counting
from entprog.data import latents
from helpers import families
from helpers.networks import tiny_experiment
from pipelines.cluster import capacity
from pipelines.training import expectation, workload

SHAPE = families.FIVE.model_copy(update={"width": 32})
STAGES = {"kind": "progressive", "table": [{"until": 0.25, "shrink": 2}, {"until": 1}]}


def of(name, **parts):
    """(an experiment on a family's tiny network, what is known of that before its weights)."""
    experiment = tiny_experiment(
        **{"data": {"shape": SHAPE.model_dump(), "batch_size": 2}, "schedule": STAGES, **parts}
    )
    experiment = experiment.model_copy(update={"model": families.settings(name)})
    return experiment, models.family(experiment.model.family).inspect(experiment.model, experiment.data.shape)


@pytest.mark.parametrize("name", ["wan", "wan_vace", "svd"])
def test_a_forward_pass_is_counted_without_weights(name):
    experiment, source = of(name)
    foretold = workload.forward_flops(workload.denoiser(experiment, source), families.FIVE)
    denoiser = families.load(name)
    batch = latents.encode(denoiser, families.clips(1))
    with counting.flop_counter() as counter:
        denoiser.predict(batch.clean, torch.tensor([0.5]), batch.conditions)
    assert foretold == counter.get_total_flops() > 0


def test_a_runs_clips_and_flops_are_those_of_its_stages(capsys):
    train = {"steps": 2000, "workers": 2, "accumulate": 3}
    experiment, source = of("wan", train=train, schedule={**STAGES, "tokens": "constant"})
    assert [(steps, clips) for steps, _, clips in workload.stages(experiment)] == [(500, 2 * 4 * 6), (1500, 2 * 6)]
    assert "2000 steps see 42000 clips, so each of the 100 there are 420 times" in workload.epochs(experiment, 100)
    assert "encodes its clips, 420 times each" in expectation.encoding(experiment, 100, 1.0, 1.0)
    plain = workload.denoiser(experiment, source)
    small, whole = (workload.forward_flops(plain, shape) for _, shape, _ in workload.stages(experiment))
    by_stage = [3 * 500 * 48 * small, 3 * 1500 * 12 * whole]
    counted = sum(by_stage)
    assert workload.stage_flops(experiment, source) == by_stage and small < whole
    adapters, _ = of("wan", train=train | {"lora": {"rank": 1}}, schedule={**STAGES, "tokens": "constant"})
    assert sum(workload.stage_flops(adapters, source)) == counted * 2 / 3
    expectation.tell(experiment)
    shares = f"{by_stage[0] / counted:.0%}, {by_stage[1] / counted:.0%} of it in the table's rows"
    told = f"up to {counted / 1e15:.3g} PFLOP ({shares})"
    assert told in (said := " ".join(capsys.readouterr().out.split())) and " on 2 of them" in said
    in_seconds, _ = of("wan", train={"steps": None, "seconds": 9}, schedule={"clock": "seconds"})
    assert workload.epochs(in_seconds, 100) is workload.line(in_seconds, source) is None


def test_gpus_that_are_left_over_are_told():
    node = {"Alive": True, "Resources": {"GPU": 4.0, "CPU": 8.0}}
    nodes = [node, node, node | {"Alive": False}, {"Alive": True, "Resources": {}}]
    line = capacity.unused_gpus(tiny_experiment(), nodes)
    assert line.startswith("1 of 8 GPUs is used: --set train.workers=8") and "16 clips instead of 2" in line
    assert capacity.unused_gpus(tiny_experiment(train={"workers": 8}), nodes) is None
    assert capacity.unused_gpus(tiny_experiment(train={"gpus": "no"}), nodes) is None
