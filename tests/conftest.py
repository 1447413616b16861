"""Shared material: tiny real networks and latents."""

import os

os.environ.setdefault("ENTPROG_OBJECT_STORE_BYTES", str(500 * 2**20))

import pytest
import torch

from entprog.blocks import blocks
from helpers.networks import tiny_denoiser, tiny_experiment

torch.set_num_threads(1)  # tiny networks: more threads only wait for each other


@pytest.fixture
def experiment():
    return tiny_experiment()


@pytest.fixture
def denoiser(experiment):
    return tiny_denoiser(experiment)


@pytest.fixture
def found(denoiser):
    return blocks(denoiser.network)
