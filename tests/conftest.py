"""Shared material: tiny real networks and latents; one local Ray and shards of real people for all files of a process.

Files that ask for the shared Ray come first. It ends with the last of them: what follows has no Ray, and may start one
of its own. Of both kinds the longest come before the others, so that both of two processes have enough to do until the
end.
"""

import contextlib
import gc
import os
from pathlib import Path

os.environ.setdefault("ENTPROG_OBJECT_STORE_BYTES", str(500 * 2**20))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # commands that tests start: threads of tiny networks wait for each other

import pytest
import torch

from entprog.blocks import blocks
from helpers import servers
from helpers.networks import tiny_denoiser, tiny_experiment

torch.set_num_threads(1)
gc.disable()  # while test files are imported: a third of it is a search for garbage that is not there
LONGEST = (
    *("test_train.py", "test_phases.py", "test_tune.py", "test_family_commands.py", "test_deployment.py"),
    *("test_bucket_runs.py", "test_benchmarks.py", "test_clips.py", "test_buckets.py"),
    *("test_evaluate.py", "test_prepare_more.py", "test_prepare.py", "test_latents.py"),
    *("test_faults.py", "test_secrets.py", "test_hostile.py"),
    *("test_sharded.py", "test_distributed.py", "test_families.py", "test_search.py", "test_whole.py"),
    *("test_family_forms.py", "test_packed.py", "test_quality.py", "test_training.py", "test_compare.py"),
    *("test_generate.py", "test_wheel.py"),
)
"""The longest of those with the shared Ray, then of those with one of their own or none. The second does not wait for
the clips that the first prepares."""
SHARED_RAY = contextlib.ExitStack()
USERS = pytest.StashKey[set[Path]]()
"""Files that ask for the shared Ray."""


@pytest.hookimpl(trylast=True)  # after those that are left out have gone
def pytest_collection_modifyitems(config, items):
    users = config.stash[USERS] = {item.path for item in items if "local_ray" in item.fixturenames}
    place = {name: number for number, name in enumerate(LONGEST)}
    gc.freeze()  # modules stay: nobody looks for garbage among them again and again
    gc.enable()
    gc.set_threshold(20_000, 10, 10)  # objects, not 700: else a tenth of the time of the tests goes there
    items.sort(key=lambda item: (item.path not in users, place.get(item.path.name, len(place))))


def pytest_runtest_setup(item):
    if item.path not in item.config.stash[USERS]:
        SHARED_RAY.close()


def pytest_sessionfinish():
    SHARED_RAY.close()


@pytest.fixture(scope="module")
def local_ray():
    """A local Ray with a dashboard, started by the first file that asks for it: `session.ray_cluster` joins it."""
    import ray

    from pipelines.cluster import capacity, session

    def ended() -> None:
        assert not ray.is_initialized()

    if not ray.is_initialized():
        SHARED_RAY.callback(ended)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_metrics_report_interval_ms", "500")  # tests read Ray's own metrics
            for name, value in servers.CREDENTIALS.items():  # its workers take their environment from here
                patch.setenv(name, value)
            SHARED_RAY.enter_context(session.ray_cluster(capacity.LOCAL_CPUS, dashboard=True))
    return ray


@pytest.fixture
def experiment():
    return tiny_experiment()


@pytest.fixture
def denoiser(experiment):
    return tiny_denoiser(experiment)


@pytest.fixture
def found(denoiser):
    return blocks(denoiser.network)
