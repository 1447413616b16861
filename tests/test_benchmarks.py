"""Benchmarks at their smallest: that they run, and leave what others read."""

import importlib.util
import json
import multiprocessing
import re
import threading
import time
from contextlib import contextmanager
from multiprocessing import resource_tracker, spawn
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import (
    bases,
    checkpointing,
    common,
    demo_result,
    gpu_check,
    gpu_parts,
    gpu_train,
    guidance,
    memory,
    scaling,
    scaling_forecast,
    scaling_search,
    step_cost,
    stream,
)
from entprog import config, models
from entprog.blocks import blocks, swap
from entprog.config import Priority
from entprog.data import shards
from entprog.scoring import split
from pipelines import demo

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


@pytest.mark.parametrize("moment", [1, 2, 5])
def test_no_moments_are_left_in_part_where_memory_ends_within_the_optimizer(results, monkeypatch, moment):
    """A later step of the same plan, a profile's among them, would miss the other half."""
    experiment = gpu_parts.step_experiment(step_cost.network_of(4, 1, False), 3_200, "cpu")
    bench, failed, made = step_cost.Bench(experiment, "scattered", "cpu", fractions=(0.25,)), {}, 0
    before = torch.zeros_like

    def zeros_like(*arguments, **options):
        nonlocal made
        made += 1
        if made == moment:
            raise MemoryError
        return before(*arguments, **options)

    setting = step_cost.Setting(checkpointing=False, compile=False, fp8=False)
    freeze = step_cost.Freeze(bench.denoiser, bench.found, setting.of(experiment))
    plan = bench.plans(("residual",))[step_cost.FULL]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros_like", zeros_like)
        bench.prepare("full", plan, freeze, failed)
    assert failed == {"full": "out of memory"} and made == moment
    bench.turn("again", {})
    for state in bench.optimizer.state.values():
        assert {"exp_avg", "exp_avg_sq"} <= state.keys()


def test_step_cost_keeps_what_it_measured_before_it_died(results, monkeypatch):
    first, calls = step_cost.Bench.figures, []

    def figures(self, setting, repeats):
        calls.append(setting)
        if len(calls) == 2:
            raise KeyError("exp_avg_sq")
        return first(self, setting, repeats)

    monkeypatch.setattr(step_cost.Bench, "figures", figures)
    with pytest.raises(KeyError):
        CliRunner().invoke(step_cost.app, TINY.split(), catch_exceptions=False)
    rows = json.loads((results / "step_cost_cpu.json").read_text())["figures"]
    assert len(rows) == 7 and all(row["step_s"] > 0 and row["tflops_per_s"] > 0 for row in rows)


def test_gpu_check_a_part_that_crashes_is_a_result_and_the_next_goes_on():
    """In processes of their own: one that is killed within a part, and the one after it."""
    rows, ends = [], {}
    for name, row, end in gpu_check.events(["numbers", "card"], True, time.monotonic() + 400):
        if row is not None:
            rows.append(name)
            if name == "numbers":
                for process in multiprocessing.active_children():
                    process.kill()
        if end is not None:
            ends[name] = end
    assert rows[0] == "numbers" and rows[-1] == "card"
    assert ends["numbers"]["status"] == "crashed" and "-9" in ends["numbers"]["note"]
    assert ends["card"]["status"] == "done"
    assert not multiprocessing.active_children()


def test_gpu_check_goes_on_where_it_stopped(results, monkeypatch):
    kept = gpu_check.Kept(tiny=True, again=())
    kept.add("card", {"matmul_tflops_per_s": 2.0})
    kept.end("card", {"status": "done", "note": "", "seconds": 1.0})
    kept.add("train", {"command": "prepare"})
    kept.end("train", {"status": "skipped", "note": "ray is not installed", "seconds": 0.1})
    kept.add("a step", {"tflops_per_s": 0.5})  # and no end: killed there
    record = json.loads((results / "gpu_check_tiny.json").read_text())
    assert {"device", "versions", "commit", "command", "source"} <= record.keys()
    assert [row["part"] for row in record["figures"]] == ["card", "train", "a step"]
    assert record["figures"][-1]["share_of_matmul"] == 0.25

    again = gpu_check.Kept(tiny=True, again=())
    assert again.settled == {"card"} and list(again.parts) == ["card", "train"]
    again.add("train", {"command": "train"})  # Ray is there now
    again.end("train", {"status": "too slow", "note": "more than 120 s", "seconds": 120.0})
    again = gpu_check.Kept(tiny=True, again=())
    assert again.settled == {"card"} and rows_of(again, "train") == [{"command": "train"}]
    assert gpu_check.Kept(tiny=True, again=["card"]).settled == set(), "asked for by name: measured anew"


def rows_of(kept, part):
    return [{name: value for name, value in row.items() if name != "part"} for row in kept.rows.get(part, ())]


def tried(results, part, rows, status, again=()):
    """A call that gets so many rows of a part, each with the status as its figure; the file after it."""
    kept = gpu_check.Kept(tiny=True, again=again)
    for _ in range(rows):
        kept.add(part, {"figure": status})
    if status != "killed":
        kept.end(part, {"status": status, "note": "", "seconds": 1.0})
    record = json.loads((results / "gpu_check_tiny.json").read_text())
    return [row["figure"] for row in record["figures"] if row["part"] == part], record["parts"].get(part)


@pytest.mark.parametrize("worse", ["failed", "crashed", "too slow", "skipped", "out of memory", "killed"])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_gpu_check_what_was_measured_stays_until_a_later_try_is_done(results, worse, rows):
    tried(results, "other", 1, "done")
    tried(results, "step", 2, "done")
    figures, end = tried(results, "step", rows, worse, again=["step"])
    assert figures == ["done"] * 2 and end["status"] == "done", "a try that is not done takes nothing away"
    assert ("again" in end) == (worse != "killed") and ("again" not in end or end["again"]["status"] == worse)
    assert gpu_check.Kept(tiny=True, again=()).settled == {"other", "step"}
    figures, end = tried(results, "step", 1, "done", again=["step"])
    assert figures == ["done"] and "again" not in end
    assert tried(results, "other", 0, "failed")[0] == ["done"]


@pytest.mark.parametrize("before", ["too slow", "failed", "killed"])
@pytest.mark.parametrize("after", ["skipped", "crashed", "killed"])
def test_gpu_check_of_two_tries_that_are_not_done_the_longer_one_stays(results, before, after):
    tried(results, "step", 2, before)
    figures, end = tried(results, "step", 1, after)
    assert figures == [before] * 2
    assert (end or {}).get("status") == (after if after != "killed" else before if before != "killed" else None)
    assert tried(results, "step", 2, after)[0] == [after] * 2
    assert tried(results, "step", 1, "done")[0] == ["done"]


@pytest.mark.parametrize("other", ["source", "device", "versions", "unreadable", "no object"])
def test_gpu_check_results_of_something_else_are_kept_beside_its_own(results, monkeypatch, other, capsys):
    tried(results, "card", 1, "done")
    file = results / "gpu_check_tiny.json"
    if other == "source":
        monkeypatch.setattr(common, "source", lambda: "another")
    elif other in ("unreadable", "no object"):
        file.write_text("<<<<<<< HEAD" if other == "unreadable" else "[]")
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {other: "another"}))
    (results / "gpu_check_tiny.1.json").write_text("an earlier one")
    first = file.read_text()
    assert gpu_check.Kept(tiny=True, again=()).rows == {}, "figures of other code stay out of this file"
    assert file.read_text() == first, "a call that measures nothing changes nothing"
    assert tried(results, "card", 1, "failed")[0] == ["failed"]
    assert tried(results, "card", 1, "done", again=["card"])[0] == ["done"]
    assert (results / "gpu_check_tiny.2.json").read_text() == first and len(list(results.iterdir())) == 3
    assert (results / "gpu_check_tiny.1.json").read_text() == "an earlier one"
    assert "kept as gpu_check_tiny.2.json" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("way", ["ends", "hangs", "is not there", "hangs until the time is over"])
def test_gpu_check_without_a_process_to_measure_in_marks_nothing(results, monkeypatch, tmp_path_factory, way):
    resource_tracker.ensure_running()  # by the real Python
    program = tmp_path_factory.mktemp("bin") / "python"
    if way != "is not there":
        program.write_text("#!/bin/sh\n" + ("exit 3" if way == "ends" else "exec sleep 60"))
        program.chmod(0o755)
    monkeypatch.setattr(spawn, "_python_exe", str(program).encode())
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.5)
    monkeypatch.setattr(gpu_check, "START_S", 60.0 if "time" in way else 0.5)
    seconds = "1" if "time" in way else "100"
    outcome = CliRunner().invoke(gpu_check.app, ["--tiny", "--seconds", seconds, "--part", "card", "--part", "train"])
    assert not isinstance(outcome.exception, Exception) and not list(results.iterdir())
    if "time" in way:
        assert outcome.exit_code == 0 and "parts are left (card" in outcome.output
    else:
        assert outcome.exit_code == 1 and len(outcome.output.splitlines()) == 2, outcome.output
        said = {"ends": "it ended with 3", "hangs": "not ready after", "is not there": "it ended with 255"}[way]
        assert f"does not start: {said}" in outcome.output
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("fault", ["cannot clean up", "fails", "ends within"])
def test_gpu_check_a_process_that_is_lost_between_parts_costs_no_part(monkeypatch, fault):
    """The process is played by a thread: what it says is what `measure` says."""
    begun = []

    def play(pipe):
        pipe.send("ready")
        while True:
            name = pipe.recv()
            begun.append(name)
            if name == "second" and fault == "ends within":
                return pipe.close()
            pipe.send(("row", {"part_of": name}))
            pipe.send(("failed" if name == "second" and fault == "fails" else "done", ""))
            if name in ("second", "last"):
                return pipe.close()
            pipe.send("ready")

    @contextmanager
    def beside(tiny):
        ours, theirs = multiprocessing.Pipe()
        thread = threading.Thread(target=play, args=(theirs,), daemon=True)
        thread.start()
        yield SimpleNamespace(exitcode=7, join=lambda seconds: None), ours
        ours.close()
        thread.join(10)

    monkeypatch.setattr(gpu_check, "beside", beside)
    todo = ["first", "second", "third", "last"]
    ends = {name: end for name, _, end in gpu_check.events(todo, True, time.monotonic() + 100) if end is not None}
    second = {"cannot clean up": "done", "fails": "failed", "ends within": "crashed"}[fault]
    assert {name: end["status"] for name, end in ends.items()} == dict.fromkeys(todo, "done") | {"second": second}
    assert begun == todo


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModuleNotFoundError("No module named 'av'", name="av"), "skipped"),
        (ModuleNotFoundError("No module named 'torchao.float8'", name="torchao.float8"), "skipped"),
        (RuntimeError("pipelines.train failed: failed: ModuleNotFoundError: No module named 'optuna' (…)"), "skipped"),
        (gpu_parts.SkippedError("the card has 80 GB"), "skipped"),
        (ModuleNotFoundError("No module named 'entprog.blocs'", name="entprog.blocs"), "failed"),
        (ImportError("cannot import name 'PerRow' from 'torchao.quantization'"), "failed"),
        (MemoryError("none"), "out of memory"),
        (KeyError("exp_avg"), "failed"),
    ],
)
def test_gpu_check_what_is_not_installed_is_tried_again(results, error, status):
    end, note = gpu_check.end_of(error)
    assert end == status and note and "\n" not in note
    kept = gpu_check.Kept(tiny=True, again=())
    kept.end("train", {"status": end, "note": note, "seconds": 1.0})
    assert ("train" in kept.settled) == (status != "skipped")


@pytest.mark.parametrize("lacking", ["ray", "mlflow", "pyarrow", "av", "torchao"])
def test_gpu_check_parts_name_the_package_that_they_lack(monkeypatch, lacking):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == lacking else found(name))
    known = {part.name: part for part in gpu_parts.parts(tiny=True)}
    fp8 = [name for name in known if "fp8" in name and "base in" not in name]
    assert {"numbers in fp8", "numbers in fp8, compiled"} < set(fp8)
    trainings = [name for name in known if name.startswith("train")]
    assert len(trainings) == 3
    for name in fp8 if lacking == "torchao" else trainings:
        with pytest.raises(gpu_parts.SkippedError, match=f"{lacking} is not installed"):
            next(iter(known[name].rows()))


def test_gpu_check_draws_a_base_as_training_leaves_it(tmp_path):
    gpu_train.base_of(step_cost.network_of(4, 1, False), tmp_path / "base", "cpu")
    denoiser = models.family("wan").load(config.build({"base": str(tmp_path / "base")}, config.Model))
    network = denoiser.network
    assert len(blocks(network)) == 4 and denoiser.vae is not None
    assert denoiser.conditions == ("reference", "pose") and network.patch_embedding.in_channels == 3 * 4
    assert torch.equal(network.proj_out.weight, network.proj_out.weight.bfloat16().float())


def test_gpu_check_draws_blocks_anew():
    (row,) = gpu_parts.redraw_rows("cpu")
    assert row["redraw_s"] > 0 and row["blocks"] == 1 and row["parameters"] > 0


def test_gpu_check_lets_blocks_be_copied_ahead_and_compares_bits(monkeypatch):
    swaps = []

    class Noted(swap.Swap):
        def wait(self, some):
            swaps.append(self)
            return super().wait(some)

    monkeypatch.setattr("entprog.blocks.block.Swap", Noted)
    rows = [gpu_parts.overlapped(how, "cpu") for how in gpu_parts.ELSEWHERE if "blocks wait" in how]
    assert len(rows) == 2 and all(row["equal"] and row["gradient_difference"] == 0 for row in rows)
    copies = [each.fetched_bytes / each.waiting[0].host.nbytes for each in swaps]
    assert swaps and all(0 < each.late <= copied / 2 for each, copied in zip(swaps, copies, strict=True))
    monkeypatch.setattr(torch, "equal", lambda *given: False)
    assert not gpu_parts.overlapped("nf4, blocks wait", "cpu")["equal"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: illegal access"), NotImplementedError("no kernel")])
@pytest.mark.parametrize("usable", [True, False])
def test_gpu_check_numbers_end_with_an_error_that_the_gpu_does_not_survive(monkeypatch, error, usable):
    """An error of one family is its row, and the others go on, as long as they can."""
    families = list(gpu_parts.TINY)

    def loss_and_gradient(name, dtype, backward, device, compiled, in_fp8=False):
        if name == families[1] and device == "cuda":
            raise error
        return 1.0, torch.ones(2)

    def synchronize():
        if not usable:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(gpu_parts, "loss_and_gradient", loss_and_gradient)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    rows, raised = [], None
    try:
        rows.extend(gpu_parts.number_rows("cuda", compiled=False))
    except RuntimeError as reason:
        raised = str(reason)
    assert all(row["equal"] != (row["family"] == families[1]) for row in rows)
    assert {row["family"] for row in rows} == set(families if usable else families[:1])
    assert raised is None if usable else families[1] in raised and str(error) in raised


def test_gpu_check_says_what_is_wrong_before_it_begins(results):
    for options, said in ((["--tiny", "--part", "nothing"], "there are: card"), ([], "torch sees no GPU here")):
        if not options and torch.cuda.is_available():
            continue
        outcome = CliRunner().invoke(gpu_check.app, options)
        assert outcome.exit_code == 2 and said in " ".join(outcome.output.replace("│", " ").split())
    assert not list(results.iterdir())


def test_parts_of_gpu_check_that_need_no_process(results):
    """The tiny parts give the rows that a card's do."""
    known = {part.name: part for part in gpu_parts.parts(tiny=True)}
    assert known.keys() == {part.name for part in gpu_parts.parts(tiny=False)} and len(known) == 39
    with torch.compiler.set_stance("force_eager"):
        steps = list(known["step of 20000 tokens, compiled"].rows())
        (large,) = known["14B, LoRA, 24 GB"].rows()
        (packed,) = known["14B, LoRA, base in nf4, 24 GB"].rows()
        (waiting,) = known["14B, LoRA, 24 blocks wait, 24 GB"].rows()
    plans = [(row["plan"]["m"], row["plan"]["backward"], row["plan"]["compile"]) for row in steps]
    assert plans == [(1, "exact", True), (1, "residual", True), (4, "exact", True)]
    sizes = [row["held_foreseen_whole_bytes"] for row in (packed, waiting, large)]
    assert sizes == sorted(sizes) and len({*sizes}) == 3
    for row in (*steps, large, packed, waiting):
        assert row["step_s"] > 0 and row["predicted_over_measured_memory"] == pytest.approx(1, abs=0.1)
    assert (
        large["blocks"] == 4
        and large["held_foreseen_bytes"] < large["memory_bytes"] < 40 * large["held_foreseen_bytes"]
    )
    assert large["held_foreseen_whole_bytes"] > 8 * large["held_foreseen_bytes"] / 4


def test_counted_memory_is_what_the_documents_say():
    """The file is what the command counts today, and the tables are the file."""
    kept = json.loads((common.RESULTS / "memory.json").read_text())["figures"]
    name, sizes = next(iter(memory.NETWORKS.items()))
    counted = [memory.row(name, sizes, way, plan) for way in memory.WAYS for plan in memory.PLANS]
    assert kept[: len(counted)] == counted and {figure["network"] for figure in kept} == memory.NETWORKS.keys()
    root = common.RESULTS.parents[1]
    for file, ways in (
        ("docs/memory.md", [way for way in memory.WAYS if way != "adamw_8bit"]),
        ("README.md", ("auto", "adamw_bf16")),
    ):
        lines = [line for line in (root / file).read_text().splitlines() if line.startswith("| ")]
        said = {float(number) for line in lines for number in re.findall(r"[\d.]*\d", line)}
        for figure in kept:
            size = figure["device_bytes"] / 1e9
            assert figure["stored"] not in ways or round(size, 1 if size < 100 else 0) in said, (file, figure)


def test_counted_bases_are_what_the_documents_say():
    kept = {figure["preset"]: figure for figure in json.loads((common.RESULTS / "bases.json").read_text())["figures"]}
    assert kept.keys() == bases.PUBLISHED.keys()
    for preset in ("wan21_t2v_1_3b", "animatediff"):
        assert bases.row(preset) == kept[preset]
    lines = (common.RESULTS.parents[1] / "docs" / "bases.md").read_text().splitlines()
    for preset, figure in kept.items():
        (line,) = [line for line in lines if line.startswith(f"| `{preset}`")]
        parameters, _, *numbers = [cell.strip() for cell in line.split("|")[2:-1]]
        assert parameters == f"{figure['parameters'] / 1e9:.2f} B"
        sizes = [figure[f"{way} bytes"] / 1e9 for way in bases.WAYS]
        seconds = figure["forecast_step_s"]
        expected = [*(round(size, 1 if size < 100 else 0) for size in sizes), round(seconds, 1 if seconds < 10 else 0)]
        assert list(map(float, numbers)) == expected, preset


def test_scoring_on_many_gpus_keeps_none_of_them_waiting_long():
    """As large as Wan 14B; every pass of the code's own split is somebody's."""
    network = scaling_search.Network("made up", split.Costs((100,) * 40, 60), forward_s=8.0, elements=2_096_640)
    for name, priority in scaling_search.PRIORITIES.items():
        rows = scaling_search.scoring(network, name, priority, scaling_search.forecast.GPUS)
        walls = [row["wall_s"] for row in rows]
        assert walls == sorted(walls, reverse=True) and walls[0] > 10 * walls[-1]
        for row in rows:
            assert row["longest_wait_over_timeout"] < 0.1 and row["idle_share"] < 0.2, row
            assert row["wall_s"] <= 1.01 * row["by_conditions_s"] + 2 * 8, row
        at_256 = next(row for row in rows if row["gpus"] == 256)
        assert at_256["efficiency"] > 0.7 and at_256["by_conditions_idle_share"] > 0.5
    alone = scaling_search.busy(network, Priority(), 1, 1)
    assert alone == [8.0 + 8 * 8 * network.costs.of(range(41)) / network.whole * 8.0], "and one to count costs"


def test_the_simulated_scoring_is_what_the_document_says():
    kept = json.loads((common.RESULTS / "scaling.json").read_text())["scoring"]
    (row,) = [r for r in kept if (r["gpus"], r["scoring"]) == (256, "1,000 draws of 8 clips") and "14B" in r["network"]]
    said = " ".join((common.RESULTS.parents[1] / "docs" / "cluster.md").read_text().split())
    assert f"in {row['wall_s'] / 60:.0f} minutes, and wait for each other less than 2;" in said
    assert row["longest_wait_s"] < 120 and f"would take {row['by_conditions_s'] / 3600:.1f} hours" in said


@pytest.mark.parametrize("schedule", scaling_forecast.SCHEDULES)
def test_what_overlaps_is_hidden_as_far_as_there_is_computing_beside_it(schedule):
    constants = scaling_forecast.Constants(
        compute_s={"full": 3.0, "entprog": 1.5}, forward_s=1.0, parts=10, bandwidth=20.0,
        forward_bytes={8: 40, 16: 48}, backward_bytes={"full": {8: 120, 16: 128}, "entprog": {8: 32, 16: 36}},
        reduced_bytes={"full": 80, "entprog": 20}, latency_s=0.0, inside_bandwidth=400.0, decode_rate=99.0, clips=1,
        bucket_bytes=8, blocked_s=8.0, steps_between_checkpoints=100, spread=0.0,
    )  # fmt: skip
    overlapped, before, sharded, replicated = (
        scaling_forecast.predicted(constants, schedule, 16, each) for each in scaling_forecast.ARRANGEMENTS
    )
    trained = constants.reduced_bytes[schedule]
    reduced = 2 * 15 / 16 * trained / 20
    assert before["exposed_s"] == pytest.approx(reduced)
    backward = constants.compute_s[schedule] - 1.0
    assert overlapped["exposed_s"] == pytest.approx(max(reduced - backward, reduced / -(-trained // 8)))
    gathered, back = (15 / 16 * size / 20 for size in (48, constants.backward_bytes[schedule][16]))
    assert sharded["exposed_s"] == pytest.approx(gathered - 1 + max(back - backward, (gathered + back) / 10))
    inside, back = (7 / 8 * size / 400 for size in (40, constants.backward_bytes[schedule][8]))
    between = back + 2 * 1 / 2 * trained / 8 / 20
    assert replicated["exposed_s"] == pytest.approx(max(between - backward, (inside + between) / 10))
    assert 16 * sharded["checkpoint_s"] == 8 * replicated["checkpoint_s"] == before["checkpoint_s"]
    assert scaling_forecast.predicted(constants, schedule, 1)["exposed_s"] == 0


@pytest.mark.slow
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
    ways = ("machine", "parallel", "overlaps", "schedule")
    foreseen = {(*(row[way] for way in ways), row["gpus"]): row for row in record["figures"] if not row["measured"]}
    assert len(foreseen) == 2 * 4 * len(scaling.SCHEDULES) * len(scaling.GPUS)
    for of in {key[:-1] for key in foreseen}:
        efficiencies = [foreseen[*of, gpus]["efficiency"] for gpus in scaling.GPUS]
        assert efficiencies == sorted(efficiencies, reverse=True) and 0 < efficiencies[-1] < efficiencies[0] < 1, of
    assert {(row["parallel"], row["overlaps"], row["in_code"]) for row in foreseen.values()} == {
        ("ddp", True, True), ("ddp", False, False), ("fsdp", True, True), ("hsdp", True, True),
    }  # fmt: skip
    assert [row["gpus"] for row in record["scoring"] if row.get("measured")] == [1, 2]
    assert all(row["wall_s"] > 0 for row in (*record["scoring"], *record["search"]))
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
        assert np.array_equal(planes, stream.decode_whole(file.replace(".mp4", ".clip")))
        plain = stream.decode_pyav(file)
        luma = [part[:, :64].astype(float) for part in (planes, plain)]
        assert plain.shape == planes.shape and np.abs(luma[0] - luma[1]).mean() < 8, "the same frames, encoded apart"
        assert stream.decode_pyav_rgb(file).shape == (6, 64, 48, 3)


def test_stream_ratios_are_taken_within_rounds():
    rates = {
        "pyav": [100.0, 200.0, 400.0], "pyav_rgb": [50.0, 50.0, 50.0], "dataloader": [80.0, 80.0, 80.0],
        "pyav_shards": [50.0, 50.0, 50.0], "dataloader_rgb": [20.0, 20.0, 20.0],
        "stream": [90.0, 100.0, 360.0], "decord2": [100.0, 100.0, 100.0],
    }  # fmt: skip
    cpu_s = {"stream": 4e-5, "pyav_shards": 1e-5}
    turns = {name: [(rate, cpu_s.get(name, 2e-5)) for rate in each] for name, each in rates.items()}
    found = turns | {"torchcodec": "ImportError: no"}
    rows = {row["arrangement"]: row for row in stream.rows_of("256x256", 2, found)}
    assert rows["stream"] == {
        "size": "256x256", "arrangement": "stream", "cores": 2, "frames_per_s": 100.0, "spread": [90.0, 360.0],
        "over_pyav": 0.9, "over_pyav_shards": 2.0, "over_pyav_whole": None, "over_dataloader": 1.25,
        "cpu_us_per_frame": 40.0, "by_cpu_over_pyav": 0.5, "by_cpu_over_pyav_shards": 0.25,
        "by_cpu_over_pyav_whole": None, "note": "",
    }  # fmt: skip
    assert rows["decord2"]["over_pyav"] == 2.0 and rows["decord2"]["over_dataloader"] == 5.0
    assert rows["torchcodec"]["frames_per_s"] is None and rows["torchcodec"]["note"] == "ImportError: no"


# ---- guidance


def test_arms_of_guidance_differ_in_what_is_dropped_alone_and_means_are_over_their_seeds(tmp_path):
    cells = guidance.cells(2)
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 2 * 7
    settings = {cell.arm: config.settings(guidance.experiment(cell, 30, tmp_path)) for cell in cells}
    first, other = settings["drop-0.1-seed-0"], settings["drop-0-seed-0"]
    apart = {"train.drop.pose", "train.drop.reference", "tracking.run_name"}
    assert {name for name, value in first.items() if value != other[name]} == apart
    assert first["train.steps"] == 30 and first["train.seconds"] is None and first["train.drop.pose"] == 0.1
    numbers = dict.fromkeys(guidance.JUDGED, 0.0)
    rows = [
        {"drop": cell.drop, "seed": cell.seed, **cell.how, **numbers, "psnr": 10.0 * cell.pose + cell.seed}
        for cell in cells
    ]
    means = guidance.means(rows)
    assert len(means) == 2 * 7 and all(row["seeds"] == 2 for row in means)
    assert all(row["psnr"] == 10 * row["pose_guidance"] + 0.5 for row in means)


def few_of(dataset: shards.Dataset, folder: Path) -> Path:
    """A dataset of the held-out clips and the first eight others."""
    splits = {}
    for name, (info,) in dataset.splits.items():
        rows = shards.read_rows(dataset.folder / info.file, range(min(8, info.clips)))
        splits[name] = [shards.write_shard(folder, info.file, rows, dataset.shape)]
    shards.write_dataset(folder, dataset.shape, splits, {})
    return folder


@pytest.mark.slow
def test_guidance(results, tmp_path, local_ray, monkeypatch):
    person = few_of(shards.read_dataset(guidance.demo.PERSON), tmp_path / "person")
    fewer = {guidance: {"STRENGTHS": (1.0, 2.0), "CLIPS": 2}, guidance.demo: {"STEPS": 2, "PERSON": person}}
    for module, values in fewer.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    given = ["--steps", "2", "--seeds", "1", "--work", str(tmp_path / "work")]
    outcome = CliRunner().invoke(guidance.app, given, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    record = json.loads((results / "guidance.json").read_text())
    assert len(record["figures"]) == len(record["means"]) == 2 * 3
    assert len({row["psnr"] for row in record["figures"]}) == 2 * 3 and "commit" in record
    assert all(row["steps"] == 2 and 0 <= row["pose_distance"] <= 1 for row in record["figures"])
    monkeypatch.setattr(guidance, "row", None)  # all of them are there
    assert CliRunner().invoke(guidance.app, given, catch_exceptions=False).exit_code == 0


def test_a_demos_result_is_of_the_machine_and_the_versions_that_it_ran_on(results, tmp_path):
    arm = {"seeds": [{"held_out_loss": 0.2}], "pose": 0.01, **dict.fromkeys(demo_result.FIGURES, 1)}
    came = {"before": 0.3, "arms": {"full": arm}, "pose": {demo.BEFORE: 0.2, "truth": 0.0}, "compared": {}}
    result = {"job": "demo", "status": "done", "prepared": {}, "wall_s": 9.0, **came, "real": came}
    there = demo.where_it_ran() | {"device": "another CPU", "commit": "0123", "command": "make demo"}
    there["versions"]["torch"] = "1.0"
    of, words = tmp_path / "demo", ["--of", str(tmp_path / "demo"), "--name", "a_demo"]
    of.mkdir()
    (of / "result.json").write_text(json.dumps(result))
    refused = CliRunner().invoke(demo_result.app, words)
    assert refused.exit_code == 2 and "run make demo again" in refused.stderr
    (of / "result.json").write_text(json.dumps(result | there))
    assert CliRunner().invoke(demo_result.app, words).exit_code == 0
    kept = json.loads((common.RESULTS / "a_demo.json").read_text())
    assert {name: kept[name] for name in there} == there and kept["versions"]["torch"] == "1.0"
