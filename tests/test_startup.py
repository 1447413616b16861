"""What a person waits for before the first step."""

import gc
import importlib
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

import pipelines
from pipelines import cli, status
from pipelines.training import startup
from pipelines.training.startup import Startup


def test_parts_add_up_to_the_wait():
    marks = [("imports", 3.0), ("ray", 5.0), ("workers", 9.0), ("first_step", 12.0)]
    parts = startup.seconds(1.0, marks, 1.25)
    assert parts == {
        "imports": 2.0, "ray": 2.0, "workers": 4.0, "first_step": 1.75, "first_batch": 1.25, "total": 11.0
    }  # fmt: skip
    assert startup.line(parts).startswith("First step after 11.0 s (workers 4.0, ")


def test_a_machine_whose_clock_is_behind_makes_no_negative_part():
    parts = startup.seconds(0.0, [("ray", 5.0), ("workers", 4.0), ("first_step", 7.0)], 9.0)
    assert parts["workers"] == 0.0 and parts["total"] == 7.0
    assert (parts["first_batch"], parts["first_step"]) == (2.0, 0.0), "no longer than the step with its wait"


def test_a_process_began_before_it_asked():
    clock = Startup.of_process()
    clock.over("imports")
    ((_, at),) = clock.marks
    assert 0 < at - clock.begun < 86400


@pytest.fixture
def as_by_python_m(monkeypatch):
    """As `python -m pipelines.VERB` imports this project's package."""
    monkeypatch.setattr(sys, "argv", ["-m"])
    try:
        importlib.reload(pipelines)
        yield
    finally:
        gc.enable()


def test_garbage_is_looked_for_once_the_work_begins_and_not_before(as_by_python_m):
    assert not gc.isenabled()
    seen = []
    cli.run("train", None, lambda: {"seen": seen.append(gc.isenabled())})
    assert seen == [True] and gc.isenabled()


def test_garbage_is_looked_for_by_what_only_looks(as_by_python_m, tmp_path):
    assert CliRunner().invoke(status.app, [str(tmp_path / "nowhere")]).exit_code == 2
    assert gc.isenabled()


def test_garbage_is_looked_for_again_after_imports_that_fail():
    with pytest.raises(ImportError), pipelines.importing():
        assert not gc.isenabled()
        importlib.import_module("pipelines.nothing_of_this_name")
    assert gc.isenabled()


def test_garbage_is_not_looked_for_when_a_process_ends():
    program = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count())); import pipelines"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1000


def test_a_package_imported_by_others_leaves_garbage_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-m"])
    importlib.reload(pipelines)
    assert gc.isenabled()


def test_what_fails_beside_is_left_to_who_needs_it():
    done = []

    def fail():
        done.append(threading.current_thread())
        raise OSError("no disk")

    thread = startup.beside(fail)
    thread.join(60)
    assert done == [thread] != [threading.current_thread()]
