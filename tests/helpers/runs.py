"""A training by `fit` alone, to look at and to interrupt."""

import torch

from entprog.blocks import blocks
from entprog.diffusion import losses
from entprog.distributed import fsdp
from entprog.scoring import cei
from entprog.training import averages, checkpoint
from entprog.training.fit import fit, start
from helpers.networks import TINY, batches, latents, tiny_denoiser, tiny_experiment


class Run:
    """A tiny run that can be stopped and resumed."""

    def __init__(self, experiment, folder=None):
        self.experiment = experiment
        self.denoiser = tiny_denoiser(experiment)
        self.found = blocks(self.denoiser.network)
        conditions = experiment.model.conditions
        table = cei.cei(self.denoiser, self.found, [latents(range(2), conditions)], experiment.priority)
        # Scoring is timed; what is compared to the bit must not be.
        self.table = cei.ScoreTable(**{**vars(table), "seconds": 0.5})
        self.state = start(self.denoiser.network, experiment)
        if folder:
            checkpoint.load(folder, checkpoint.newest(folder), self.denoiser.network, self.state, "id")
        self.held_out = [latents(range(4), conditions)]

    def steps(self):
        experiment, source, sample = self.experiment, batches(self.experiment), latents([0, 1])
        given = source, self.held_out, sample, self.table, experiment, self.state
        return fit(self.denoiser, self.found, *given, [sample] if experiment.priority.rescore else [])

    def trained(self):
        return [parameter for parameter in self.denoiser.network.parameters() if parameter.grad is not None]

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.denoiser.network.state_dict().items()}


def differing(expected, got):
    """Names of the tensors that are not the same to the bit."""
    return [name for name, tensor in expected.items() if not torch.equal(tensor, got[name])]


TIMED = ("seconds", "wait_s", "charged_s", "search_s", "score_s", "pace")


def comparable(step):
    return {k: v for k, v in vars(step).items() if k not in TIMED}


def course(run, stops):
    """A run's steps as they may be compared, with a checkpoint saved after some of them: number of the step → folder.
    Whoever goes on from one of them saves none, and so sees whether saving changes a run."""
    steps = []
    for step in run.steps():
        steps.append(comparable(step))
        if step.step in stops:
            checkpoint.save(stops[step.step], run.denoiser.network, run.state, "id", keep=1)
    return steps


class Trained:
    """A tiny network after a few updates, with moments of some blocks alone and an average."""

    def __init__(self, steps=2, sharded=False, layers=6):
        self.experiment = tiny_experiment(data={"batch_size": 2}, model={"init": {**TINY, "num_layers": layers}})
        self.denoiser = tiny_denoiser(self.experiment, seed=3)
        self.network = self.denoiser.network
        found = blocks(self.network)
        if sharded:
            fsdp.shard(self.network, found)
        self.state = start(self.network, self.experiment)
        for block in found[3:]:
            block.module.requires_grad_(False)
        for _ in range(steps):
            self.update()

    def update(self):
        losses.training_loss(self.denoiser, latents([0, 1]), self.experiment.train).backward()
        averages.start(self.state.ema, self.network)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        averages.update(self.state.ema, self.network, 0.9)
        self.state.step += 1

    def tensors(self):
        """Everything that a checkpoint has to bring back, whole."""
        return {name: fsdp.whole(t).clone() for name, t in checkpoint.contents(self.network, self.state).items()}
