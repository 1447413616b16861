"""What `tune` refuses before anything starts: every value of a space that `train` would refuse."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pipelines.tune
from entprog.config import Sweep
from entprog.errors import UserError
from pipelines import cli
from pipelines.outputs import claim
from pipelines.sweeping import alike, checking, spaces, state

DEMO = Path(pipelines.tune.__file__).parent
SWEEP = ["--preset", "demo", "--seconds", "20", "--shards", DEMO / "demo_person", "--base", DEMO / "demo_base"]


def dry(folder: Path, space: str, *more):
    (folder / "mine.yaml").write_text(space)
    words = [*SWEEP, "--space", folder / "mine.yaml", "--output", folder / "sweep", "--dry-run", *more]
    return CliRunner().invoke(pipelines.tune.app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("schedule.blocks: {choice: [all, control]}", "schedule.blocks=control: schedule.blocks=control: this network"),
        ("model.swap_blocks: {choice: [0, 99]}", "model.swap_blocks cannot be searched"),
        (
            "schedule.memory_budget_bytes: {choice: [null, 1]}",
            "schedule.memory_budget_bytes=1: schedule.memory_budget_bytes is 1 b",
        ),
        ("train.lora: {choice: [null, {targets: [no]}]}", "train.lora={targets: ['no']}: train.lora"),
        ("train.timesteps_mean: {choice: [0, 1]}", "train.timesteps_mean=1: train.timesteps_mean is of logit_normal"),
        ("model.expert: {choice: [null, both]}", "model.expert=both: a sweep is of one training"),
        ("data.shards: {choice: [a, b]}", "trials are ranked by their held-out loss"),
    ],
)
def test_a_value_that_train_refuses_is_refused_with_its_name(tmp_path, space, said):
    result = dry(tmp_path, space + "\n")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: --space: {said}") and not (tmp_path / "sweep").exists()


def test_how_many_values_were_looked_at_is_said(tmp_path):
    space = "train.learning_rate: {loguniform: [1e-5, 1e-3]}\nschedule.outside: {choice: [always, conditions]}\n"
    result = dry(tmp_path, space, "--search", "grid")
    assert result.exit_code == 0, result.output
    assert "Checked: 5 values of the space, each alone; 6 combinations of them." in result.output
    assert "Would run 6 trials" in result.output
    space += "train.weight_decay: {loguniform: [1e-5, 1e-3]}\ntrain.warmup_steps: {choice: [0, 1, 2, 3]}\n"
    assert "each alone; a trial whose values do not go together will fail." in dry(tmp_path, space).output


def test_a_dry_run_asks_who_must_answer_and_notes_a_gpu_that_is_not_here(tmp_path, monkeypatch):
    """As that of `train` does: the sweep would begin to fail, a trial after another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    space = "train.learning_rate: {loguniform: [1e-5, 1e-3]}\n"
    result = dry(tmp_path, space, "--set", "train.gpus=yes", "--set", f"train.checkpoints={tmp_path / 'kept'}")
    said = " ".join(result.output.split())
    assert result.exit_code == 0 and "Note: train.gpus=yes, and neither this machine has a GPU" in said, said
    assert "Not looked at: whether MLflow's store and train.checkpoints can be written" in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    result = dry(tmp_path, space)
    assert result.exit_code == 2 and "MLflow at http://127.0.0.1:1 cannot be used" in result.stderr, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


PAIR = "schedule.efficiency: {choice: [paired, paper]}\nschedule.search_steps: {choice: [1, 2]}\n"
TOGETHER = "--space: schedule.efficiency=paper, schedule.search_steps=1: schedule.efficiency=paper compares steps of"


def test_values_that_do_not_go_together_are_told_before_anything_starts(tmp_path):
    """A grid trains every combination; another search may draw it, or not."""
    result = dry(tmp_path, PAIR, "--search", "grid")
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {TOGETHER}"), result.output
    assert len(result.stderr.splitlines()) == 1
    result = dry(tmp_path, PAIR)
    assert result.exit_code == 0, result.output
    told = (
        "1 of 4 combinations of values cannot be trained, and a trial that draws one is marked as failed. The first: "
    )
    assert told + TOGETHER in " ".join(result.output.split())


def settings(*pairs: str) -> Sweep:
    parts = {"data": {"shards": str(DEMO / "demo_person")}, "model": {"base": str(DEMO / "demo_base")}}
    return cli.settings(Sweep, "demo", None, ["train.seconds=20", "train.steps=null", *pairs], **parts)


def test_trials_to_come_run_as_those_before():
    """A training that goes on may run otherwise; trials of which some do cannot be ranked at equal seconds."""
    known = alike.kept(settings().experiment(), "no", "c1")
    for same in ((), ("train.gpus=no", "data.verify=size")):
        alike.check(settings(*same).experiment(), known)
    for other, said in {
        "data.decode=cluster": "data.decode was auto, now cluster",
        "train.workers=3": "train.workers was 2, now 3",
        "train.gpus=yes": "train.gpus was no, now yes",
    }.items():
        with pytest.raises(UserError, match=said):
            alike.check(settings(other).experiment(), known)
    assert alike.other_code(known, "c1") == "" == alike.other_code({}, "c1")
    assert "other code than those to come (commit was c1, now c2)" in alike.other_code(known, "c2")
    with pytest.raises(UserError, match="some would run on fewer than 2 workers"):
        checking.check(settings("train.workers=2", "train.min_workers=1"), {})


def test_a_grid_that_an_earlier_version_began_goes_on(tmp_path, monkeypatch):
    """Its trials that cannot be trained are marked as failed, as they were."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    wanted, output = settings("tune.search=grid"), tmp_path / "sweep"
    (tmp_path / "mine.yaml").write_text(PAIR)
    space = spaces.read(str(tmp_path / "mine.yaml"))
    with pytest.raises(UserError, match=TOGETHER):
        pipelines.tune.claimed(wanted, space, output)
    identity, _ = checking.check(wanted, space)
    claim.take(output, "tune", identity)
    state.begin(output, {})
    pipelines.tune.claimed(wanted, space, output)
    state.begin(output, alike.kept(wanted.experiment(), "no", "c1"))
    with pytest.raises(UserError, match="trials of this sweep have run otherwise"):
        pipelines.tune.claimed(settings("tune.search=grid", "data.decode=cluster"), space, output)
