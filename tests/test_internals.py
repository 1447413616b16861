"""Private names of libraries have their files, and still do what they did; what needs a cluster: test_faults."""

import ast
import base64
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from ray import cloudpickle
from ray._private.node import Node
from ray.train import ControllerError, WorkerGroupError
from ray.train._internal.storage import StorageContext
from ray.train.torch import config as torch_backend
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.tune.execution.tune_controller import TuneController

from entprog.blocks import fp8
from helpers import stores
from pipelines.cluster import launch, ray_internals, stopping
from pipelines.tracking import mlflow_internals, store
from pipelines.tracking.mlflow_internals import Machine

ROOT = Path(__file__).parents[1]
HOMES = {
    "ray": ("pipelines/cluster/ray_internals.py",),
    "mlflow": ("pipelines/tracking/mlflow_internals.py",),
    "torchao": ("entprog/blocks/fp8.py", "entprog/optimizers/eight_bit.py"),
}
"""Where private names may stand, and all of torchao's: its own are no public API yet."""
KNOWN = {
    "_replace",  # of named tuples, and public
    "_modules", "_dynamo", "_name_or_path",  # torch's and diffusers', which their own documents use
    "_to_copy", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_client_made",
}  # fmt: skip
"""Private names of values anywhere: torch's operations; and one of the tracker's own, made in another function."""
PRIVATE = ("_", "system_metrics_monitor", "SCRIPT_MODE")


def dotted(path: Path):
    """(line, dotted name) of every import and attribute chain in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def test_private_names_lie_in_their_files():
    found = set()
    for folder in ("entprog", "pipelines", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for line, name in dotted(path):
                library, *rest = name.split(".")
                if library == "torchao" or (
                    library in HOMES and any(part.startswith(PRIVATE) and part[:2] != "__" for part in rest)
                ):
                    place = path.relative_to(ROOT).as_posix()
                    assert place in HOMES[library], f"{place}:{line}: {name}"
                    found.add(library)
    assert found == set(HOMES)


def test_private_names_of_values_lie_there_too():
    """Of what a library gives, whatever it is called here: those that are not of the same file."""
    homes = {place for places in HOMES.values() for place in places}
    for folder in ("entprog", "pipelines", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            place, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())
            own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            for node in ast.walk(tree):
                if place in homes or not isinstance(node, ast.Attribute) or not re.match("_[^_]", node.attr):
                    continue
                mine = ast.unparse(node.value) in ("self", "cls", "super()") or node.attr in own
                assert mine or node.attr in KNOWN, f"{place}:{node.lineno}: {ast.unparse(node)}"


def test_a_run_s_last_metric_is_known(tmp_path):
    client = store.connect(stores.made(tmp_path))
    run = client.create_run(client.create_experiment("x")).info.run_id
    assert mlflow_internals.latest_ms(client.get_run(run).data) is None
    client.log_metric(run, "a", 1.0, timestamp=5000)
    client.log_metric(run, "b", 1.0, timestamp=7000)
    assert mlflow_internals.latest_ms(client.get_run(run).data) == 7000


def test_ray_train_calls_a_backends_start_on_its_workers():
    """By the names that its own has, which the workers still use; that they are joined so is seen in test_distributed
    and test_train, that they are prepared in test_faults."""
    backend = ray_internals.torch_config("gloo", prepare=print).backend_cls
    (parent,) = backend.__bases__
    named = {"on_start", "on_shutdown", "share_cuda_visible_devices"}
    assert named <= vars(parent).keys() and named <= vars(backend).keys()
    assert named <= vars(torch_backend._TorchBackend).keys() and torch_backend._TorchBackend.share_cuda_visible_devices
    joins = inspect.signature(torch_backend._setup_torch_process_group).parameters
    assert list(joins)[:4] == ["backend", "world_rank", "world_size", "init_method"]
    assert list(inspect.signature(torch_backend._shutdown_torch).parameters) == ["destroy_process_group"]
    assert not inspect.signature(torch_backend._set_torch_distributed_env_vars).parameters
    with ray_internals._on_its_device():
        pass


def test_ray_trains_controller_reads_what_workers_do_without_torch():
    """Its import takes seconds, in which no worker begins."""
    config = ray_internals.torch_config("gloo", prepare=stopping.listen)
    given = base64.b64encode(cloudpickle.dumps((config, launch.training))).decode()
    program = f"""
import base64, pickle, sys
config, loop = pickle.loads(base64.b64decode("{given}"))
assert config.backend_cls.has_replica_groups is False
print(*sorted({{"torch", "diffusers", "mlflow"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_a_ray_that_nobody_looks_at_starts_without_what_is_to_be_looked_at():
    head = inspect.getsource(Node.start_head_processes) + inspect.getsource(Node.start_ray_processes)
    assert all(f"self.{name}(" in head for name in ray_internals.UNHEARD)
    before = dict(vars(Node))
    with ray_internals.quietly():
        changed = {name for name, value in vars(Node).items() if value is not before[name]}
        assert changed == set(ray_internals.UNHEARD)
        assert Node.start_api_server(None, include_dashboard=False, raise_on_failure=False) is None
    assert dict(vars(Node)) == before


def test_ray_train_says_that_its_workers_found_no_room():
    late = WorkerGroupStartupTimeoutError(2)
    assert ray_internals.found_no_room(ControllerError(late))
    for other in (late, ControllerError(ValueError("x")), WorkerGroupError("x", {0: late}), RuntimeError("x")):
        assert not ray_internals.found_no_room(other)


def test_ray_tune_writes_its_state_between_callbacks_where_it_is_looked_for():
    """Whole, before a thread copies it: `pipelines.sweeping.keeping`; in a sweep: test_tune."""
    assert isinstance(StorageContext.experiment_driver_staging_path, property)
    written = inspect.getsource(TuneController.save_to_dir)
    assert "experiment_driver_staging_path" in written and "self._search_alg.save_to_dir" in written
    assert inspect.getsource(TuneController.step).count("self.checkpoint()") == 1
    assert ray_internals.state_of_tune(SimpleNamespace(storage=None)) is None


def test_mlflow_measures_this_machine(tmp_path):
    values = Machine("a run", f"sqlite:///{tmp_path}/mlflow.db").look()
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes"} <= set(values)
    assert all(math.isfinite(value) for value in values.values())


def test_torchao_computes_a_linear_layer_in_8_bits():
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 16)
    x = torch.randn(4, 32)
    low = fp8.Fp8Linear(linear)
    torch.testing.assert_close(low(x).float(), linear(x), rtol=0.1, atol=0.1)
    assert low.nbytes < linear.weight.nbytes / 2
