"""What Ray wraps around an error of ours is taken off; every other comes as it is."""

import pytest
import torch
from ray.exceptions import OutOfMemoryError
from ray.train import WorkerGroupError

from entprog.data.latents import DamagedLatentsError
from entprog.data.shards import DamagedShardError
from entprog.errors import UserError
from pipelines.cluster import failures


class TaskError(Exception):
    """As Ray's: the text of the cause's trace, and no cause."""


@pytest.mark.parametrize("kind", [UserError, DamagedShardError, DamagedLatentsError])
@pytest.mark.parametrize("module", ["", "entprog.somewhere."])
def test_an_error_of_ours_comes_out_as_itself(kind, module):
    trace = f"ray::Map()\n  File x, line 1\n{module}{kind.__name__}: damaged shard a, row 1: gone\nmore"
    with pytest.raises(UserError, match=r"^damaged shard a, row 1: gone$") as found, failures.plainly():
        raise TaskError(trace)
    assert type(found.value) is kind and found.value.__cause__ is None


@pytest.mark.parametrize("text", ["", "MyUserErrors happened", "ValueError: x", "NotAUserError: x"])
def test_another_error_is_left_as_it_is(text):
    error = TaskError(text)
    with pytest.raises(TaskError) as found, failures.plainly():
        raise error
    assert found.value is error


def test_the_reason_is_the_line_that_names_the_cause():
    error = TaskError()
    error.worker_failures = {0: "Traceback\n  File x\ntorch.OutOfMemoryError: no memory\n"}
    assert failures.reason(error) == "torch.OutOfMemoryError: no memory"
    assert failures.reason(TaskError("")) == "TaskError"


def test_a_device_without_room_is_seen_whoever_is_named_last():
    peer = RuntimeError("peer closed")
    assert failures.lacks_memory(WorkerGroupError("", {0: torch.OutOfMemoryError("no memory"), 1: peer}))
    for other in (WorkerGroupError("", {1: peer}), WorkerGroupError("", {0: OutOfMemoryError("node")}), peer):
        assert not failures.lacks_memory(other), "who fills a machine may be another"
