"""The command `entprog`: every job by its verb, quick to help, close to what was meant; and joining a cluster."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.text import Text
from typer.main import get_command

from pipelines import cli
from pipelines.command import verbs
from pipelines.command.verbs import VERBS
from test_layout import SHARED

ROOT = Path(__file__).parents[1]


def entprog(*arguments, and_then="", **environment):
    """Run the command as its installed script does."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["entprog"]
    module, function = script.split(":")
    program = f"import sys\nsys.argv[0] = '/bin/entprog'\nfrom {module} import {function} as main\ntry:\n    main()\n"
    program += f"finally:\n    pass\n    {and_then or 'pass'}\n"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_no_word_of_an_option_s_help_is_taken_for_markup(verb):
    app = get_command(importlib.import_module(f"pipelines.{verb}").app)
    for command in (app, *getattr(app, "commands", {}).values()):
        for option in command.params:
            said = getattr(option, "help", None) or ""
            assert Text.from_markup(said).plain == said, option.name


def test_every_job_has_its_verb():
    assert set(VERBS) == {path.stem for path in (ROOT / "pipelines").glob("[!_]*.py")} - SHARED


@pytest.mark.parametrize("asked", [["--help"], ["-h"], []])
def test_help_names_the_verbs_and_loads_nothing(asked):
    done = entprog(*asked, and_then="print([m for m in ('torch', 'ray', 'mlflow', 'pydantic') if m in sys.modules])")
    assert done.returncode == 0 and done.stderr == ""
    *lines, loaded = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(VERBS) and loaded == "[]"


def test_the_command_says_its_version_and_which_verbs_check_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["entprog", "--version"])
    verbs.main()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out == f"entprog {version}\n"
    commands = {verb: get_command(importlib.import_module(f"pipelines.{verb}").app) for verb in VERBS}
    each = {v: [*getattr(c, "commands", {"": c}).values()] for v, c in commands.items()}
    dry = {v for v, all_ in each.items() if all(any("--dry-run" in p.opts for p in one.params) for one in all_)}
    assert set(VERBS) - dry == {"status"} and "All but\nstatus take --dry-run" in verbs.usage()


@pytest.mark.parametrize(("given", "meant"), [("trian", "train"), ("generat", "generate"), ("eval", "evaluate")])
def test_an_unknown_verb_is_a_line_with_the_close_one(given, meant):
    done = entprog(given, "--help", and_then="print('torch' in sys.modules)")
    assert done.returncode == 2 and done.stdout == "False\n"
    assert f"did you mean {meant}" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_verb_is_its_job(tmp_path):
    asked = [
        "--set",
        "train.steps=3",
        "--shards",
        str(tmp_path / "none"),
        "--preset",
        "demo",
        "--output",
        str(tmp_path),
    ]
    done = entprog("train", *asked)
    assert done.returncode == 2 and str(tmp_path / "none") in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_generate_tells_wrong_arguments_without_loading_torch(tmp_path):
    asked = ("--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"))
    done = entprog("generate", *asked, and_then="print('torch' in sys.modules)")
    assert done.returncode == 2 and done.stdout == "False\n", done.stderr
    assert done.stderr.startswith("error: ")


def test_a_command_is_recorded_as_it_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/bin/entprog", "train", "--set", "tracking.run_name=a b"])
    assert cli.command() == "entprog train --set 'tracking.run_name=a b'"


@pytest.mark.parametrize("given", [None, "", "1"])
def test_make_has_bytecode_written(given):
    """Otherwise each of a run's processes compiles all that it imports."""
    outer = ("PYTHONDONTWRITEBYTECODE", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the make that runs the tests
    said = {name: value for name, value in os.environ.items() if name not in outer}
    said |= {} if given is None else {"PYTHONDONTWRITEBYTECODE": given}
    show = "show: ; @python3 -c 'import sys; print(sys.dont_write_bytecode)'"
    done = subprocess.run(
        ["make", "--eval", show, "show"], cwd=ROOT, env=said, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n", done.stderr
