"""What `pip install entprog` gives: a wheel that works away from this checkout."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel's contents and its command, as pip lays them."""
    scratch = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = scratch / "source"  # a build leaves files beside what it builds
    for name in ("entprog", "pipelines", "tune_spaces", "pyproject.toml", "README.md"):
        source.mkdir(exist_ok=True)
        (source / name).symlink_to(ROOT / name)
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", scratch, source]
    subprocess.run(built, check=True, timeout=300, cwd=scratch)
    (wheel,) = scratch.glob("*.whl")
    assert zipfile.ZipFile(wheel).testzip() is None
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-compile", "--target", scratch / "site", wheel], check=True, timeout=300
    )
    return scratch / "site"


def said(installed: Path, *command: str) -> str:
    """Standard output of a command that sees the installed wheel and not this checkout."""
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(installed)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=installed.parent, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_that_is_read_at_run_time_is_in_it(installed):
    kept = subprocess.run(["git", "ls-files", "pipelines"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    data = [name for name in kept if not name.endswith(".py")]
    assert {Path(name).suffix for name in data} >= {".yaml", ".html"}
    data.append("entprog/models/shipped/pipeline.py")  # copied into what is saved
    assert [name for name in data if not (installed / name).is_file()] == []


def test_its_command_and_its_presets_work(installed):
    script = installed / "bin" / "entprog"
    assert "train" in said(installed, str(script), "--help")
    program = """
import json, pathlib, entprog, pipelines.cli as cli
from entprog import config
preset = config.read_preset("demo", cli.PRESETS)
print(json.dumps([entprog.__file__, preset["model"]["family"]]))
"""
    where, family = json.loads(said(installed, "-c", program).splitlines()[-1])
    assert Path(where).is_relative_to(installed) and family == "wan"
