"""What can be known of a sweep before anything starts: it, and every value of its space, can be trained with."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from entprog import config
from entprog.config import Experiment, Sweep, Tune
from entprog.data import shards
from entprog.errors import UserError
from entprog.models import fingerprints
from entprog.schedule import plans
from pipelines.sweeping import spaces
from pipelines.tracking.store import tracking_uri
from pipelines.training import checks

FREE = ("tune.retries",)
"""Settings that a resumed sweep may change."""
MOST_TOGETHER = {"grid": 256, "optuna": 64, "random": 64}
"""Combinations of a space's values, by `tune.search`, up to which each is looked at: one takes 0.04 s, of a network of
14B 0.4 s. A grid trains them all."""


def check(wanted: Sweep, space: spaces.Space) -> tuple[dict[str, Any], shards.Dataset]:
    """All that can be known before anything starts, but for combinations of values. Raises UserError; returns (the
    sweep's identity, its data set)."""
    experiment, settings = wanted.experiment(), wanted.tune
    if experiment.train.seconds is None or experiment.train.steps is not None:
        raise UserError(
            "trials are compared at equal seconds: give --seconds (train.seconds), which takes the place of train.steps"
        )
    workers, least = experiment.train.workers, experiment.train.min_workers
    if least is not None and least < workers:
        raise UserError(
            f"trials are compared at equal seconds, and with train.min_workers={least} some would run on fewer than "
            f"{workers} workers: leave it out, a trial waits for its workers"
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
            _check_trains(one, experiment, dataset)
    of_search = {
        name: value
        for name, value in config.settings(wanted).items()
        if config.is_part_of(name, ["tune"]) and not config.is_part_of(name, FREE)
    }
    drawn = {f"space of {name}": domain for name, domain in spaces.described(space)}
    return checks.deciding(experiment, dataset) | of_search | drawn, dataset


def combinations(space: spaces.Space, settings: Tune) -> list[dict[str, Any]]:
    """The combinations of a space's values that are looked at: all of a grid; else of every choice, and of every range
    what is looked at alone. None where they are too many."""
    if settings.search == "grid":
        values = {name: spaces.spread(domain, settings.grid_points) for name, domain in space.items()}
    else:
        values = {name: spaces.some(domain) for name, domain in space.items()}
    count = math.prod(len(each) for each in values.values())
    return spaces.combined(values) if count <= MOST_TOGETHER[settings.search] else []


def check_together(wanted: Sweep, space: spaces.Space, dataset: shards.Dataset, warn: Callable[[str], None]) -> None:
    """Look at combinations of values, each of which alone can be trained. Raises UserError where a grid holds one that
    cannot, which it would train, or where none can.

    warn: gets a line on those that cannot be trained and may be drawn.
    """
    experiment, settings = wanted.experiment(), wanted.tune
    drawn = combinations(space, settings) if len(space) > 1 else []
    wrong = []
    for values in drawn:
        try:
            with _of(values):
                _check_trains(spaces.applied(experiment, values), experiment, dataset)
        except UserError as error:
            if settings.search == "grid":
                raise
            wrong.append(error)
    if wrong and len(wrong) == len(drawn):
        raise wrong[0]
    if wrong:
        warn(
            f"{len(wrong)} of {len(drawn)} combinations of values cannot be trained, and a trial that draws one is "
            f"marked as failed. The first: {wrong[0]}"
        )


def _check_trains(one: Experiment, experiment: Experiment, dataset: shards.Dataset) -> None:
    checks.check(_looked_at(one, experiment), dataset)
    if one.in_fp8:
        checks.check_room({"": (one, dataset)})


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
