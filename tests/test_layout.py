"""The house rules that a machine can check."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_method_imports_neither_ray_nor_mlflow_and_networks_need_no_more_than_torch_and_diffusers():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "entprog").rglob("*.py")
    )
    program = f"""
import importlib, sys
sys.modules["ray"] = sys.modules["mlflow"] = None
beyond = ["pyarrow", "av", "psutil", "peft", "torchao", "transformers", "accelerate", "matplotlib", "torchmetrics"]
sys.modules |= dict.fromkeys(beyond)
import benchmarks.gpu_check, entprog.models
assert {{"wan", "cogvideox", "svd"}} < set(entprog.models.families())
for name in beyond:
    del sys.modules[name]
for name in {modules!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


FLOORS = (
    ("errors", "files", "records", "masking", "names"),
    ("storage",),
    ("config",),
    ("media",),
    ("data", "blocks"),
    ("preparing", "distributed", "quality"),
    ("diffusion", "optimizers"),
    ("models",),
    ("cost",),
    ("scoring",),
    ("schedule",),
    ("training",),
)
"""The packages of entprog, from the ground up: each imports only from floors below its own."""
SHARED = {"cli", "charts", "terminal"}
"""Modules at the top of pipelines that are not jobs."""


def test_a_package_of_entprog_imports_only_packages_below_it():
    level = {package: number for number, floor in enumerate(FLOORS) for package in floor}
    there = {path.stem for path in (ROOT / "entprog").iterdir() if path.name != "__init__.py" and path.name[0] != "_"}
    assert there == set(level), "a package without a floor, or a floor without its package"
    for path in (ROOT / "entprog").rglob("*.py"):
        own = path.relative_to(ROOT / "entprog").parts[0].removesuffix(".py")
        for module in imported(path):
            if module[:1] == ["entprog"] and len(module) > 1 and module[1] != own:
                assert level[module[1]] < level[own], f"{path.relative_to(ROOT)} imports {'.'.join(module)}"


CALLS = {"tune": {"train"}, "demo": {"prepare", "score", "train", "tune", "generate", "compare"}}
"""Jobs that call others."""
CALLS |= {"sweeping": {"train"}}  # a trial is a training


def test_a_job_never_imports_another_job():
    """What jobs share lies in folders, which know no job either; but a sweep's trials, and the demo, are jobs run."""
    jobs = {path.stem for path in (ROOT / "pipelines").glob("*.py")} - {"__init__", *SHARED}
    found: dict[str, set[str]] = {}
    for path in (ROOT / "pipelines").rglob("*.py"):
        own = path.relative_to(ROOT / "pipelines").parts[0].removesuffix(".py")
        used = {module[1] for module in imported(path) if module[0] == "pipelines" and len(module) > 1}
        found.setdefault(own, set()).update(used & jobs - {own})
    found = {name: used for name, used in found.items() if used}
    assert all(used <= CALLS.get(name, set()) for name, used in found.items()), found


def imported(path: Path) -> list[list[str]]:
    """Every module that a file imports, also inside functions, as parts of its dotted name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [[*node.module.split("."), name.name] for name in node.names]
        elif isinstance(node, ast.Import):
            found += [name.name.split(".") for name in node.names]
    return found


def test_parquet_is_read_without_threads_which_would_abort_a_process_that_ends_meanwhile():
    reads, threaded = {"read_table", "iter_batches", "read_row_group", "read_row_groups", "read_pandas"}, []
    for path in [*(ROOT / "entprog").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            alone = any(word.arg == "use_threads" and ast.unparse(word.value) == "False" for word in call.keywords)
            if ast.unparse(call.func).rpartition(".")[2] in reads and not alone:
                threaded.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not threaded


def test_every_module_at_the_top_of_pipelines_is_a_job():
    for path in (ROOT / "pipelines").glob("*.py"):
        if path.stem not in {"__init__", *SHARED}:
            source = ast.parse(path.read_text())
            made = {ast.unparse(node.targets[0]) for node in source.body if isinstance(node, ast.Assign)}
            assert "app" in made, f"{path.name} is no job: it belongs into one of the folders"


@pytest.mark.parametrize("job", ["prepare", "score", "train", "generate", "evaluate", "compare", "demo", "tune"])
def test_every_job_takes_the_common_options(job, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["job", "-h"])
    monkeypatch.delitem(sys.modules, f"pipelines.{job}", raising=False)  # run as `python -m` does
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"pipelines.{job}", run_name="__main__", alter_sys=True)
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for option in ("--help", "--dry-run", "--set", "--config", "--output"):
        assert option in out, f"{job} lacks {option}"


def test_cluster_file_is_one_that_ray_takes():
    import json

    import jsonschema
    import ray.autoscaler
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    validate_config(prepare_config(cluster))
