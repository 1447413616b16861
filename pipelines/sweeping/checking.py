"""What can be known of a sweep before anything starts: it, and every value of its space, can be trained with."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from entprog import config
from entprog.config import Experiment, Sweep
from entprog.errors import UserError
from entprog.models import fingerprints
from entprog.schedule import plans
from pipelines.sweeping import spaces
from pipelines.tracking.store import tracking_uri
from pipelines.training import checks

FREE = ("tune.retries",)
"""Settings that a resumed sweep may change."""


def check(wanted: Sweep, space: spaces.Space) -> dict[str, Any]:
    """All that can be known before anything starts. Raises UserError; returns the sweep's identity."""
    experiment, settings = wanted.experiment(), wanted.tune
    if experiment.train.seconds is None or experiment.train.steps is not None:
        raise UserError(
            "trials are compared at equal seconds: give --seconds (train.seconds), which takes the place of train.steps"
        )
    _check_is_one(experiment)
    tracking_uri()
    dataset = checks.check(experiment)
    judged_by, latents = fingerprints.held_out(experiment, dataset), fingerprints.vae(experiment.model)
    tried = spaces.check(space, experiment)
    if settings.search == "grid":
        count = len(spaces.grid(space, settings.grid_points))
        if count > settings.trials:
            raise UserError(
                f"the grid has {count} trials, tune.trials allows {settings.trials}: raise --trials, lower "
                "tune.grid_points or take fewer settings"
            )
    for values, one in tried:
        with _of(values):
            _check_is_one(one)
        if one.model != experiment.model and fingerprints.vae(one.model) != latents:
            raise UserError(
                "--space: trials are ranked by their held-out loss, and values of this space change the VAE, whose "
                "latents it is of (model.vae, model.base): a sweep each"
            )
        if one.data.shards != experiment.data.shards or fingerprints.held_out(one, dataset) != judged_by:
            raise UserError(
                "--space: trials are ranked by their held-out loss, and values of this space change what that is "
                "measured on or by (data.*, train.timesteps, train.timestep_shift, train.min_snr): set them by --set"
            )
        with _of(values):
            checks.check(_looked_at(one, experiment), dataset)
            if one.in_fp8:
                checks.check_room({"": (one, dataset)})
    of_search = {
        name: value
        for name, value in config.settings(wanted).items()
        if config.is_part_of(name, ["tune"]) and not config.is_part_of(name, FREE)
    }
    drawn = {f"space of {name}": domain for name, domain in spaces.described(space)}
    return checks.deciding(experiment, dataset) | of_search | drawn


def _check_is_one(experiment: Experiment) -> None:
    if experiment.parts:
        raise UserError(
            "a sweep is of one training, these settings have several one after another "
            f"({', '.join(experiment.parts)}): leave out phases, or take one of a base's two experts"
        )


@contextlib.contextmanager
def _of(values: Mapping[str, Any]) -> Iterator[None]:
    """What is wrong inside is wrong with these values of the space."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"--space: {spaces.told(values)}: {error}") from None


def _looked_at(one: Experiment, experiment: Experiment) -> Experiment:
    """A trial's experiment as it is to be checked. Whether required latents are there takes the VAE's weights to know:
    of the sweep's own network and clip shapes it is known already."""
    shapes = [plans.ladder(each.schedule, each.data.shape, last=False) for each in (one, experiment)]
    if shapes[0] != shapes[1] or one.model != experiment.model:
        return one
    return one.model_copy(update={"data": one.data.model_copy(update={"latents": "auto"})})
