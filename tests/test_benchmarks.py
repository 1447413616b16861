"""Benchmarks at their smallest: that they run, and leave what others read."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import checkpointing, common, memory, scaling, step_cost, stream
from entprog import config

TINY = "--device cpu --layers 4 --heads 1 --frames 1 --repeats 1 --no-compile"
RATIOS = ["speedup", "speedup_limit", "flops_ratio", "memory_ratio"]
PREDICTED = ["predicted_over_measured_time", "predicted_over_measured_memory"]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


def run(*options):
    outcome = CliRunner().invoke(step_cost.app, [*TINY.split(), *options], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output


def test_step_cost(results):
    run("--fp8", "--profile")
    record = json.loads((results / "step_cost_cpu.json").read_text())
    assert {"device", "versions", "commit", "command", "repeats", "figures"} <= record.keys()
    rows = record["figures"]
    # 1, 2 and 3 of 4 blocks with both backwards, and full training; without and with checkpointing. Then the residual
    # ones in fp8.
    assert len([row for row in rows if not row["plan"]["fp8"]]) == 14
    low = [row["plan"] for row in rows if row["plan"]["fp8"]]
    assert [(plan["m"], plan["backward"]) for plan in low] == [(m, "residual") for m in (1, 2, 3)] * 2
    profile = (results / "step_cost_cpu_profile.txt").read_text()
    assert profile.count("Self CPU time total") == 6 and "aten::_scaled_mm" in profile
    for row in rows:
        plan = row["plan"]
        assert all(row[name] > 0 for name in RATIOS + PREDICTED) and row["note"] == ""
        assert plan["L"] == 4 and plan.keys() == {"m", "L", "backward", "checkpointing", "compile", "fp8"}
        assert row["predicted_over_counted_flops"] == pytest.approx(1, abs=0.1)
        assert row["predicted_over_measured_memory"] == pytest.approx(1, abs=0.1)
        if plan["m"] == 4:
            assert row["speedup"] == row["flops_ratio"] == row["memory_ratio"] == row["speedup_limit"] == 1
        else:
            assert row["trained"][0] == "blocks.0" and row["flops_ratio"] < 1
    quarter = {
        (row["plan"]["backward"], row["plan"]["checkpointing"]): row["speedup_limit"]
        for row in rows
        if row["plan"]["m"] == 1
    }
    assert quarter["residual", False] == pytest.approx(2.0)
    assert quarter["residual", True] == pytest.approx(16 / 7)
    assert quarter["exact", False] == pytest.approx(4 / 3)


def test_a_plan_out_of_memory_says_so_and_the_others_go_on(results, monkeypatch):
    first = step_cost.Bench.turn

    def turn(self, name, failed):
        with self.guarded(name, failed):
            if name == step_cost.FULL:
                raise MemoryError
        first(self, name, failed)

    monkeypatch.setattr(step_cost.Bench, "turn", turn)
    run("--set-position", "last")
    rows = json.loads((results / "step_cost_cpu.json").read_text())["figures"]
    for row in rows:
        full = row["plan"]["m"] == 4
        assert row["note"] == ("out of memory" if full else "")
        assert row["speedup"] is None and (row["step_s"] is None) == full
        assert full or row["trained"][-1] == "blocks.3"


def test_counted_memory_is_what_the_documents_say():
    """The file is what the command counts today, and the tables are the file."""
    kept = json.loads((common.RESULTS / "memory.json").read_text())["figures"]
    name, sizes = next(iter(memory.NETWORKS.items()))
    counted = [memory.row(name, sizes, way, plan) for way in memory.WAYS for plan in memory.PLANS]
    assert kept[: len(counted)] == counted and {figure["network"] for figure in kept} == memory.NETWORKS.keys()
    root = common.RESULTS.parents[1]
    for file, ways in (("docs/memory.md", ("float32", "auto", "adamw_bf16")), ("README.md", ("auto", "adamw_bf16"))):
        lines = [line for line in (root / file).read_text().splitlines() if line.startswith("| ")]
        said = {float(number) for line in lines for number in re.findall(r"[\d.]*\d", line)}
        for figure in kept:
            size = figure["device_bytes"] / 1e9
            assert figure["stored"] not in ways or round(size, 1 if size < 100 else 0) in said, (file, figure)


def test_scaling(results):
    outcome = CliRunner().invoke(scaling.app, ["--repeats", "1", "--turns", "1"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    record = json.loads((results / "scaling.json").read_text())
    for row in record["figures"]:
        assert {"gpus", "schedule", "samples_per_s", "efficiency", "measured"} <= row.keys() and row["step_s"] > 0
    measured = [row for row in record["figures"] if row["measured"]]
    assert [(row["schedule"], row["gpus"]) for row in measured] == [
        ("full", 1), ("full", 2), ("entprog", 1), ("entprog", 2),
    ]  # fmt: skip
    assert all(row["predicted_over_measured"] == row["predicted_step_s"] / row["step_s"] for row in measured)
    foreseen = {(row["schedule"], row["gpus"]): row for row in record["figures"] if not row["measured"]}
    assert sorted(foreseen) == sorted((s, n) for s in scaling.SCHEDULES for n in scaling.GPUS)
    for schedule in scaling.SCHEDULES:
        efficiencies = [foreseen[schedule, gpus]["efficiency"] for gpus in scaling.GPUS]
        assert efficiencies == sorted(efficiencies, reverse=True) and 0 < efficiencies[-1] < efficiencies[0] < 1
    for constants in record["constants"]:
        assert constants["values"].keys() == constants["from"].keys()
        assert all(re.match("measured|counted|assumed|setting", source) for source in constants["from"].values())


def test_checkpointing(results):
    options = "--device cpu --layers 1 --heads 2 --repeats 2"
    outcome = CliRunner().invoke(checkpointing.app, options.split(), catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    (row,) = json.loads((results / "checkpointing.json").read_text())["figures"]
    for arm in ("step", "copy", "save", "save_and_write", "step_while_writing"):
        assert 0 < row[f"{arm}_s_spread"][0] <= row[f"{arm}_s"] <= row[f"{arm}_s_spread"][1]
    assert row["checkpoint_bytes"] > 0 and row["save_over_copy"][0] > 0


def test_stream_decoders_give_the_same_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CLIPS", 2)
    stream.write_clips(tmp_path, config.ClipShape(frames=6, height=64, width=48, fps=12))
    for i in range(2):
        file = str(tmp_path / "files" / f"{i}.mp4")
        planes = stream.decode_pyav(file.replace(".mp4", ".clip"))
        assert planes.shape == (6, 96, 48)
        assert np.array_equal(planes, stream.decode_shard(f"{tmp_path}:{i}"))
        plain = stream.decode_pyav(file)
        luma = [part[:, :64].astype(float) for part in (planes, plain)]
        assert plain.shape == planes.shape and np.abs(luma[0] - luma[1]).mean() < 8, "the same frames, encoded apart"
        assert stream.decode_pyav_rgb(file).shape == (6, 64, 48, 3)


def test_stream_ratios_are_taken_within_rounds():
    found = {
        "pyav": [100.0, 200.0, 400.0], "pyav_rgb": [50.0, 50.0, 50.0], "dataloader": [80.0, 80.0, 80.0],
        "pyav_shards": [50.0, 50.0, 50.0], "dataloader_rgb": [20.0, 20.0, 20.0],
        "stream": [90.0, 100.0, 360.0], "decord2": [100.0, 100.0, 100.0],
        "torchcodec": "ImportError: no",
    }  # fmt: skip
    rows = {row["arrangement"]: row for row in stream.rows_of("256x256", 2, found)}
    assert rows["stream"] == {
        "size": "256x256", "arrangement": "stream", "cores": 2, "frames_per_s": 100.0, "spread": [90.0, 360.0],
        "over_pyav": 0.9, "over_pyav_shards": 2.0, "over_dataloader": 1.25, "note": "",
    }  # fmt: skip
    assert rows["decord2"]["over_pyav"] == 2.0 and rows["decord2"]["over_dataloader"] == 5.0
    assert rows["torchcodec"]["frames_per_s"] is None and rows["torchcodec"]["note"] == "ImportError: no"
