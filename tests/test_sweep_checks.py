"""What `tune` refuses before anything starts: every value of a space that `train` would refuse."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import pipelines.tune

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
        ("schedule.memory_budget_bytes: {choice: [null, 1]}", "schedule.memory_budget_bytes=1: schedule.memory_budget"),
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
    assert "Checked: 5 values of the space, each alone" in result.output and "Would run 6 trials" in result.output
