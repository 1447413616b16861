"""The house rules that a machine can check."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_method_imports_neither_ray_nor_mlflow():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "entprog").rglob("*.py")
    )
    program = f"""
import importlib, sys
sys.modules["ray"] = sys.modules["mlflow"] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_readme_names_every_file():
    readme = (ROOT / "README.md").read_text()
    for folder in ("entprog", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py":
                name = path.relative_to(ROOT / folder)
                assert re.search(rf"^\s+{re.escape(str(name))}\s", readme, re.M), f"README's file tree lacks {name}"


@pytest.mark.parametrize("job", ["prepare", "score", "train", "generate", "evaluate", "compare", "demo", "tune"])
def test_every_job_takes_the_common_options(job):
    out = subprocess.run(
        [sys.executable, "-m", f"pipelines.{job}", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
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
