"""compare: real tiny trainings in a real MLflow store → verdict and page; what it refuses; that it tells the truth."""

import base64
import csv
import dataclasses
import hashlib
import html.parser
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from entprog import config
from entprog.errors import UserError
from entprog.media import h264
from entprog.training import curves
from helpers import stores
from helpers.networks import tiny_experiment
from helpers.runs import Run
from pipelines import charts, compare
from pipelines.comparison import drawings, groups, tables, verdict, words
from pipelines.comparison.runs import Point, Training
from pipelines.tracking import store as store_of_runs
from pipelines.tracking.tracker import Tracker
from pipelines.training import figures

LIKE = {
    "entprog.data": "d1", "entprog.held_out": "h1", "entprog.base": "b1", "entprog.device": "cpu",
    "entprog.latents": "cached",
}  # fmt: skip
CARDS = {"c1": {"metric": "psnr", "better": "higher", "network": None, "frames": 2}}


PREVIEWED = (2, 4, 6, 8, 10, 12, 14)
"""Runs have 12 steps at most: the last one is of an attempt that was lost."""
TRAINED: dict[str, tuple[Run, list]] = {}
"""What was trained already: equal settings are told to MLflow again under another name."""


def train(output, name, experiment="like", tags=(), status="FINISHED", quality=None, last_loss=None, **parts):
    """A real tiny run of fit(), told to MLflow as pipelines.train tells it."""
    settings = tiny_experiment(**config.merge({"train": {"steps": 12, "held_out_every": 3}}, parts))
    key = settings.model_dump_json()
    if key not in TRAINED:
        run = Run(settings)
        TRAINED[key] = run, list(run.steps())
    run, steps = TRAINED[key]
    kind = {"entprog.kind": "training", "entprog.identity": name}
    tracker = Tracker.start(
        output, experiment, name, params=config.settings(settings), tags={**LIKE, **kind, **dict(tags)},
        warn=pytest.fail,
    )  # fmt: skip
    records = []
    for step in steps:
        records.append(figures.as_record(step))
        values = figures.metrics(step)
        if step.last and last_loss is not None:
            values["held_out_loss"] = last_loss
        tracker.metrics(step.step, values)
    (output / "steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = [output / "steps.jsonl"]
    if run.experiment.schedule.kind != "full":
        (output / "cei.json").write_text(json.dumps(run.table.as_json()))
        files += [output / "cei.json", charts.cei_chart(run.table.as_json(), output / "cei.png")]
    clip = np.random.default_rng(run.experiment.train.seed).integers(0, 255, (4, 32, 32, 3), np.uint8)
    for part in ("pose", "truth", "result"):  # as rendering leaves them
        files.append(h264.write(output / f"000_held-out_clip_0_{part}.mp4", clip, 8))
    for step in PREVIEWED:
        tracker.artifact(output / "000_held-out_clip_0_result.mp4", f"previews/step-{step:08d}")
    if quality is not None:
        figure = {"value": 20.0 + run.experiment.train.seed, "low": 19.0, "high": 22.0, "clips": 4, "card": "c1"}
        (output / "evaluation.json").write_text(json.dumps({"figures": {"psnr": figure}, "cards": quality}))
        files.append(output / "evaluation.json")
    for file in files:
        tracker.artifact(file)
    final = run.state.seconds
    tracker.summary({"seconds": final.total, "search_seconds": final.search, "score_seconds": final.score})
    tracker.end(status) if status != "RUNNING" else tracker.close()
    return tracker.run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two groups of two seeds that can be compared, in a store of their own: {name: run id}."""
    folder = tmp_path_factory.mktemp("compare")
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = stores.made(folder)
    ids = {}
    for kind in ("full", "entprog"):
        for seed in (0, 1):
            name = f"{kind}-{seed}"
            parts = {"schedule": {"kind": kind}, "train": {"seed": seed}}
            ids[name] = train(folder / name, name, quality=CARDS, **parts)
    yield ids
    os.environ.pop("MLFLOW_TRACKING_URI")
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


def invoke(*arguments) -> tuple[int, str]:
    """(exit status, what the command said)."""
    result = CliRunner().invoke(compare.app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = [], []
        self.source = Path(path).read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def compared(store, tmp_path_factory):
    """(result.json, page) of the real command on all four runs."""
    output = tmp_path_factory.mktemp("compared")
    status, said = invoke("--experiment", "like", "--output", output)
    assert status == 0, said
    result = json.loads((output / "result.json").read_text())
    assert "Net speed-up" in said and result["headline"] in said
    return result, Page(result["page"])


def test_seeds_are_one_group_and_the_figures_are_the_runs_own(compared, store):
    result, _ = compared
    assert [group["label"] for group in result["groups"]] == ["full", "entprog"], "plain training is the baseline"
    assert [sorted(group["run_ids"]) for group in result["groups"]] == [
        sorted(store[f"{kind}-{seed}"] for seed in (0, 1)) for kind in ("full", "entprog")
    ]
    client = store_of_runs.connect(store_of_runs.tracking_uri())
    finals = {run["run_id"]: run["held_out_loss"] for run in result["runs"]}
    for run_id in store.values():
        history = client.get_metric_history(run_id, "held_out_loss")
        assert finals[run_id] == max(history, key=lambda m: m.step).value
    base = [finals[store[f"full-{seed}"]] for seed in (0, 1)]
    assert result["target_loss"] == max(base), "every seed of the baseline has reached it"
    ratio = result["time_to_target_ratio"]
    assert {"low", "high", "value", "group"} <= set(ratio) and ratio["group"] == "entprog"
    assert (ratio["value"] is None) == (ratio["low"] is None), "two seeds have an interval, or none of them a value"
    assert all(run["counts"] and run["status"] == "finished" for run in result["runs"])
    ours = [run for run in result["runs"] if run["group"] == "entprog"]
    shares = [(run["search_seconds"] + run["score_seconds"]) / run["seconds"] for run in ours]
    assert result["groups"][1]["overhead"] == pytest.approx(np.mean(shares)) and min(shares) > 0


def test_the_page_needs_nothing_from_anywhere(compared):
    _, page = compared
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "poster", "action", "data", "srcset"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (tag, name, value[:80])
    addresses = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert not re.search(r"https?://|@import|url\((?!#)", addresses)
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert "unsafe-inline'" not in policy.split("script-src")[1]


def test_the_page_shows_what_there_is_to_show(compared):
    result, page = compared
    for heading in ("Held-out loss", "Trained blocks over time", "Block scores", "Quality", "Samples", "Runs"):
        assert heading in page.text
    assert " ".join(result["headline"].split()) in page.text
    assert "psnr higher is better" in page.text and "20.5" in page.text, "mean over seeds"
    charts = [a["aria-label"] for _, a in page.tags if a.get("role") == "img"]
    assert len(charts) == len(set(charts)) >= 5, "every chart says what it shows"
    clips = [a for t, a in page.tags if t == "video" and ": step " not in a["aria-label"]]
    assert len(clips) == 4 and all(a["aria-label"] for a in clips), "pose, truth and a result of each group"
    mp4 = base64.b64decode(clips[0]["src"].partition(",")[2])
    assert h264.decode_rgb(mp4).shape == (4, 32, 32, 3)
    assert not re.search("#fe[0-9a-f]{2}ab", page.source), "every colour is the page's own"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    hovers = [json.loads(a["data-hover"]) for _, a in page.tags if "data-hover" in a]
    assert [hover["unit"] for hover in hovers][:2] == ["charged seconds", "steps"]
    assert any(chart.startswith("Held-out loss against seconds on the clock: ") for chart in charts)
    for said in ("Cost and held-out loss (lower is better)", "Cost and psnr (higher is better)"):
        assert any(chart.startswith(f"{said}; on the Pareto front: ") for chart in charts)
    for line in hovers[1]["lines"]:
        mean = next(g for g in result["groups"] if g["label"] == line["name"])["loss"]["value"]
        assert line["points"][-1] == [12, pytest.approx(mean, rel=1e-4)]


def test_the_page_shows_what_was_drawn_while_it_trained(compared):
    """Some steps of each group, from the first preview to the last."""
    _, page = compared
    videos = [a for tag, a in page.tags if tag == "video" and ": step " in a["aria-label"]]
    assert [a["aria-label"] for a in videos] == [
        f"{group}, held-out clip 0: step {step}" for group in ("full", "entprog") for step in (2, 6, 8, 12)
    ]
    assert all(a["src"].startswith("data:video/mp4;base64,") for a in videos)


def test_the_page_gives_its_table_for_a_paper(compared):
    result, page = compared
    links = {a["download"]: a["href"] for t, a in page.tags if t == "a" and "download" in a}
    content = {name: base64.b64decode(href.partition(",")[2]).decode() for name, href in links.items()}
    assert list(content) == ["comparison.csv", "comparison.tex"]
    first, second = csv.DictReader(content["comparison.csv"].splitlines())
    assert (first["group"], second["group"], first["runs"]) == ("full", "entprog", "2")
    for row, group in zip((first, second), result["groups"], strict=True):
        assert float(row["held-out loss"]) == pytest.approx(group["loss"]["value"], rel=1e-5)
        assert float(row["held-out loss low"]) < float(row["held-out loss high"])
        assert float(row["psnr"]) == 20.5
    head = content["comparison.tex"].splitlines()[3]
    assert head.startswith("Group & held-out loss & ") and head.endswith(r"psnr \\")
    assert r"$20.5 \pm " in content["comparison.tex"]
    for group, line in zip(result["groups"], content["comparison.tex"].splitlines()[5:], strict=False):
        time = group["seconds_to_target"]
        if time and time["low"] is not None:
            said = re.search(r"\[\$([^$]+)\$, \$([^$]+)\$\]", line.split("&")[2])
            ends = [float(end.replace(r" \times 10^{", "e").rstrip("}")) for end in said.groups()]
            assert ends == pytest.approx([time["low"], time["high"]], rel=0.01), "both ends of a lopsided interval"


# ---- what is refused ----


UNLIKE = {
    "data": {"entprog.data": "d2"},
    "held-out set": {"entprog.held_out": "h2"},
    "base": {"entprog.base": "b2"},
    "device": {"entprog.device": "another"},
    "latents": {"entprog.latents": "encoded at every step"},
}


@pytest.fixture(scope="module")
def unlike(store, tmp_path_factory):
    """{field: run that is unlike full-0 in it alone}, all in the experiment `like`'s store under names of their own."""
    short, folder = {"train": {"steps": 3, "held_out_every": 1}}, tmp_path_factory.mktemp("unlike")
    kind = {"schedule": {"kind": "full"}}
    ids = {field: train(folder / field, field, "unlike", tags, **short, **kind) for field, tags in UNLIKE.items()} | {
        "like": train(folder / "like", "like", "unlike", quality=CARDS, **short, **kind)
    }
    other = {"c1": CARDS["c1"] | {"frames": 9}}
    return ids | {"card": train(folder / "card", "card", "unlike", quality=other, **short, **kind)}


@pytest.mark.parametrize("field", [*UNLIKE, "card"])
def test_unlike_runs_are_refused_field_by_field(unlike, field, tmp_path):
    pair = f"{unlike['like']},{unlike[field][:12]}"
    status, said = invoke("--experiment", "unlike", "--runs", pair, "--output", tmp_path)
    assert status == 2 and said.count("\n") == 1, said
    if field == "card":
        assert "metric card of psnr, frames" in said and " 2 in like" in said and " 9 in card" in said
    else:
        (tag, value), *_ = UNLIKE[field].items()
        assert f"{field} differs" in said and LIKE[tag] in said and value in said and field in said
    assert not (tmp_path / "comparison.html").exists()


def test_more_workers_are_no_method_s_gain(store, tmp_path):
    """The same clips a step, in less time."""
    for name, workers in (("alone", 1), ("eight", 8)):
        train(tmp_path / name, name, "workers", train={"steps": 3, "workers": workers, "accumulate": 8 // workers})
    status, said = invoke("--experiment", "workers", "--output", tmp_path / "out")
    assert status == 2 and "train.workers 8 in eight" in said and "train.accumulate 8 in alone" in said, said


@pytest.mark.parametrize(
    ("tag", "had", "field"),
    [
        ("entprog.way", "model.swap_blocks 4; then as by default", "way of running"),
        ("entprog.device", "A100, H100", "device"),
        ("entprog.latents", "encoded at every step, cached", "latents"),
    ],
)
def test_a_run_that_changed_its_machine_is_none_of_the_last_one(tag, had, field):
    throughout = {"entprog.device": "H100", "entprog.latents": "cached"}
    before, always, mixed = (
        dataclasses.replace(training(name, 0, straight(10)), tags=throughout | more)
        for name, more in (("before", {}), ("always", {"entprog.way": "as by default"}), ("mixed", {tag: had}))
    )
    assert groups.differences([before, always], {}) == [], "an earlier version had no such tag"
    (difference,) = groups.differences([always, mixed], {})
    assert (difference.field, difference.b) == (field, had)


def test_an_elastic_run_is_none_with_all_its_workers():
    always, elastic = (
        dataclasses.replace(training(name, 0, straight(10)), tags={"entprog.workers": had})
        for name, had in (("always", "4"), ("elastic", "4, 1, 4"))
    )
    (difference,) = groups.differences([always, elastic], {})
    assert (difference.field, difference.a, difference.b) == (
        "way of running",
        "train.workers 4",
        "train.workers 4, 1, 4",
    )


def test_force_goes_on_and_says_so(unlike, tmp_path):
    status, said = invoke(
        "--experiment", "unlike", "--runs", "like,base", "--force", "--baseline", "like", "--output", tmp_path
    )
    assert status == 0 and "forced" in said, said
    result = json.loads((tmp_path / "result.json").read_text())
    assert [d["field"] for d in result["forced"]] == ["base"]
    assert [g["label"] for g in result["groups"]] == ["b1", "b2"], "unlike runs are no seeds of one thing"
    page = Page(result["page"])
    assert ("aside", {"class": "banner", "role": "alert"}) in page.tags
    assert "These runs are not alike" in page.text and "b2" in page.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experiment", "lik"], "did you mean like?"),
        (["--experiment", "like", "--runs", "full-9"], "no training run 'full-9' (did you mean full-"),
        (["--experiment", "like", "--baseline", "ful"], "did you mean full?"),
        (["--experiment", "like", "--set", "compare.confidence=2"], "compare.confidence"),
        (["--experiment", "like", "--set", "compare.target=1"], "did you mean compare.target_loss?"),
    ],
)
def test_mistakes_are_one_line(store, tmp_path, arguments, said):
    status, output = invoke(*arguments, "--output", tmp_path)
    assert status == 2 and said in output and output.count("\n") == 1, output


def test_a_store_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    status, said = invoke("--output", tmp_path / "out")
    assert status == 2 and "no MLflow store" in said and not (tmp_path / "none.db").exists()


def test_dry_run_writes_nothing(store, tmp_path):
    status, said = invoke("--experiment", "like", "--output", tmp_path / "out", "--dry-run")
    assert status == 0 and "entprog" in said and "seed 1" in said and not (tmp_path / "out").exists()


# ---- what is shown and does not count ----


def test_what_a_resume_went_back_behind_is_no_part_of_the_run(store, tmp_path):
    """A first attempt came to step 20, and was resumed from an earlier one on a slower machine."""
    run_id = train(tmp_path / "run", "run", "resumed", schedule={"kind": "full"})
    for name in ("charged_s", "held_out_loss"):
        for step, when in ((11, 1), (20, 2)):
            store_of_runs.connect(store_of_runs.tracking_uri()).log_metric(
                run_id, name, 1e-3, timestamp=when, step=step
            )
    status, said = invoke("--experiment", "resumed", "--output", tmp_path / "out")
    assert status == 0, said
    (group,) = json.loads((tmp_path / "out" / "result.json").read_text())["groups"]
    assert group["steps"] == 12 and group["loss"]["value"] > 1e-3


def test_runs_without_an_end_are_shown_and_do_not_count(store, tmp_path):
    short = {"train": {"steps": 3, "held_out_every": 1}, "schedule": {"kind": "full"}}
    hostile = '<img src=x onerror="alert(1)"></script><b>$x^2$ [red] [/x] :bomb:'
    steering = "odd\x1b[2J\x9b31m\u202e"  # clears the screen, colours it, turns the direction of writing
    for name, options in {
        "whole": {},
        hostile: {"status": "FAILED"},
        steering: {"status": "FAILED"},
        "stopped": {"status": "KILLED"},
        "alive": {"status": "RUNNING"},
        "broken": {"last_loss": math.nan},
    }.items():
        train(tmp_path / name[:3], name, "odd", **options, **short)
    status, said = invoke("--experiment", "odd", "--output", tmp_path / "out")
    assert status == 0, said
    result = json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=pytest.fail)
    statuses = {run["name"]: (run["status"], run["counts"]) for run in result["runs"]}
    assert statuses == {
        "whole": ("finished", True), hostile: ("failed", False), steering: ("failed", False),
        "stopped": ("killed", False), "alive": ("running", False), "broken": ("diverged", False),
    }  # fmt: skip
    page = Page(result["page"])
    assert "held_out_loss: nan at step 3" in page.text and "last sign of life" in page.text
    assert hostile in page.text and hostile in said, "names are shown as they are"
    for shown in (page.source, said):
        assert r"odd\x1b[2J\x9b31m\u202e" in shown and not set("\x1b\x9b\u202e") & set(shown)
    assert not [t for t, _ in page.tags if t in ("img", "b")] and len([t for t, _ in page.tags if t == "script"]) == 1
    assert "Only one group has finished" in result["headline"]


def test_what_failed_before_its_first_step_is_shown_and_blocks_nothing(store, tmp_path):
    """The oldest run, of plain training on other data, without a loss: it is no baseline and no reason to refuse."""
    tags = {"entprog.kind": "training", "entprog.identity": "i", **dict.fromkeys(LIKE, "another")}
    for name, params in {
        "early": {"schedule.kind": "full"}, "late": {"schedule.kind": "entprog", "train.seed": 3},
    }.items():  # fmt: skip
        lost = Tracker.start(tmp_path / name, "early", name, params=params, tags=tags)
        lost.end("FAILED")
    short = {"train": {"steps": 3, "held_out_every": 1}}
    train(tmp_path / "full", "full-0", "early", **short, schedule={"kind": "full"})
    train(tmp_path / "entprog", "entprog-0", "early", **short)
    status, said = invoke("--experiment", "early", "--output", tmp_path / "out")
    assert status == 0, said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    counted = {run["name"]: run["counts"] for run in result["runs"]}
    assert counted == {"early": False, "late": False, "full-0": True, "entprog-0": True}
    groups_of = {run["name"]: run["group"] for run in result["runs"]}
    assert result["baseline"] == groups_of["full-0"]
    assert {"early", "late"} <= set(re.findall(r"early|late", said)), "they are named"


DAMAGES = {
    "evaluation.json": [lambda data: b"{", lambda data: b"[]", lambda data: data.replace(b'"c1"', b'"c2"', 1)],
    "cei.json": [lambda data: data[:-9], lambda data: b'{"key": "x", "kind": "cei", "blocks": [{"score": 1}]}'],
    "steps.jsonl": [lambda data: data + b'{"step": ', lambda data: data.replace(b'"trained"', b'"t"'),
                    lambda data: b"\xff\xfe"],
    "000_held-out_clip_0_result.mp4": [lambda data: b"no clip", lambda data: data[:40]],
}  # fmt: skip


@pytest.mark.parametrize(("file", "number"), [(file, i) for file in DAMAGES for i in range(len(DAMAGES[file]))])
def test_a_damaged_file_is_left_out_with_a_note_and_the_rest_compared(store, tmp_path, file, number):
    experiment = f"damaged-{file[:4]}-{number}"
    short = {"train": {"steps": 3, "held_out_every": 1}}
    ids = [
        train(tmp_path / name, name, experiment, quality=CARDS, **short, schedule={"kind": name})
        for name in ("full", "entprog")
    ]
    client = store_of_runs.connect(store_of_runs.tracking_uri())
    damaged = Path(client.get_run(ids[1]).info.artifact_uri.removeprefix("file://")) / file
    damaged.write_bytes(DAMAGES[file][number](damaged.read_bytes()))
    status, said = invoke("--experiment", experiment, "--output", tmp_path / "out")
    assert status == 0 and f"its {file} cannot be read" in said and "Traceback" not in said, said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [run["counts"] for run in result["runs"]] == [True, True]
    assert f"its {file} cannot be read" in Page(result["page"]).text


def test_a_run_whose_record_is_damaged_is_left_out_with_a_note(store, tmp_path):
    short = {"train": {"steps": 3, "held_out_every": 1}, "schedule": {"kind": "full"}}
    train(tmp_path / "whole", "whole", "broken", **short)
    other = train(tmp_path / "other", "other", "broken", **short)
    store_of_runs.connect(store_of_runs.tracking_uri()).set_tag(other, "changed.train.seed", "no seed")
    status, said = invoke("--experiment", "broken", "--output", tmp_path / "out")
    assert status == 0 and "other" in said and "is left out" in said, said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [run["name"] for run in result["runs"]] == ["whole"]
    status, said = invoke("--experiment", "broken", "--runs", "other", "--output", tmp_path / "none")
    assert status == 2 and "no run can be compared" in said and not (tmp_path / "none").exists()


def test_a_sweep_stands_for_its_trials(store, tmp_path):
    short = {"train": {"steps": 3, "held_out_every": 1}, "schedule": {"kind": "full"}}
    sweep = Tracker.start(tmp_path / "sweep", "swept", "sweep-a", params={}, tags={"entprog.kind": "sweep"})
    sweep.end("FINISHED")
    trials = [
        train(tmp_path / name, name, "swept", {"entprog.sweep": sweep.run_id, "entprog.ended": "stopped early"},
              status, **short)
        for name, status in (("trial-1", "FINISHED"), ("trial-2", "KILLED"))
    ]  # fmt: skip
    train(tmp_path / "other", "other", "swept", **short)
    status, said = invoke("--experiment", "swept", "--runs", tmp_path / "sweep", "--output", tmp_path / "out")
    assert status == 0, said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [run["run_id"] for run in result["runs"]] == trials
    assert "stopped early" in Page(result["page"]).text


# ---- the verdict ----


def training(name: str, seed: int, curve, kind="entprog", status="finished", **figures) -> Training:
    points = tuple(Point(*point) for point in curve)
    return Training(
        run_id=f"{name}{seed}", name=name, status=status, started_s=seed, last_sign_s=seed, tags={},
        settings={"train.seed": seed, "schedule.kind": kind}, curve=points, figures=figures, files=lambda _: None,
        artifacts=(),
    )  # fmt: skip


def straight(seconds: float, to: float = 1.0, start: float = 2.0):
    """Falls evenly to a loss within so many seconds."""
    return [(seconds * i / 10, i, start + (to - start) * i / 10) for i in range(1, 11)]


def judged(pairs, target=None, confidence=0.95):
    """Baseline and group whose seeds take (a, b) seconds for the same course."""
    plain = [training("full", seed, straight(a), "full") for seed, (a, _) in enumerate(pairs)]
    ours = [training("ours", seed, straight(b)) for seed, (_, b) in enumerate(pairs)]
    return verdict.judge(groups.grouped([*plain, *ours]), target, confidence)


def test_a_ratio_is_the_baselines_time_over_the_groups_with_its_interval():
    pairs = [(10, 5), (12, 6.5), (9, 4), (11, 5.2)]
    best = judged(pairs).best
    logs = np.log([a / b for a, b in pairs])
    expected = stats.t.interval(0.95, len(pairs) - 1, logs.mean(), stats.sem(logs))
    assert best.ratio.value == pytest.approx(np.exp(logs.mean()))
    assert (best.ratio.low, best.ratio.high) == pytest.approx(tuple(np.exp(expected)))
    assert best.break_even_s is not None
    assert best.seconds_to_target.value == pytest.approx(stats.gmean([b for _, b in pairs]))
    assert 0 < best.seconds_to_target.low < best.seconds_to_target.high


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(10, 5), (12, 6), (9, 4.4)], r"entprog reached the final loss of full 2\.02× sooner"),
        ([(5, 10), (6, 12), (4.4, 9)], r"entprog took 2\.02× as long as full to reach the latter's final loss"),
        ([(10, 9), (9, 10), (11, 10.5)], r"No difference beyond seed noise between entprog and full"),
        ([(10, 5)], r"2\.00× sooner – in one seed, which tells nothing about chance"),
    ],
)
def test_the_headline_is_true(pairs, said):
    found = judged(pairs)
    assert re.search(said, words.headline(found)), words.headline(found)
    if len(pairs) == 1:
        assert found.best.ratio.low is None and any("One seed has no interval" in line for line in words.remarks(found))


def test_losses_are_held_against_each_other_at_equal_seconds():
    """Both end at one loss; when the group is there, the baseline is half way."""
    best = judged([(10, 5)]).best
    assert best.equal_seconds_loss_difference.value == pytest.approx(-0.5) and best.loss.value == pytest.approx(1.0)


def test_a_seed_that_was_run_again_counts_once():
    pairs = [(10, 5), (12, 6.5), (9, 4)]
    plain, ours = [training("full", 0, straight(a), "full") for a, _ in pairs], [(0, b) for _, b in pairs]
    again = verdict.judge(groups.grouped([*plain, *(training("ours", s, straight(b)) for s, b in ours)]), None, 0.95)
    assert again.best.ratio.seeds == 1 and again.best.ratio.low is None and again.best.loss.seeds == 1
    assert "in one seed, which tells nothing about chance" in words.headline(again)
    more = judged([*pairs, (11, 5.2)])
    twice = [training("full", 0, straight(10), "full"), training("ours", 0, straight(5))]
    runs = [run for each in (more.baseline, more.best) for run in each.group.runs] + twice
    assert verdict.judge(groups.grouped(runs), None, 0.95).best.ratio == more.best.ratio


def test_a_group_that_does_not_get_there_is_not_called_sooner():
    plain = [training("full", seed, straight(10), "full") for seed in (0, 1)]
    ours = [training("ours", 0, straight(5)), training("ours", 1, straight(5, to=1.5))]
    found = verdict.judge(groups.grouped([*plain, *ours]), None, 0.95)
    assert found.best.ratio is None and found.best.reached == 1
    assert found.best.ratio_at_most == pytest.approx(2.0) and "in 1 of 2 runs" in words.headline(found)
    none = verdict.judge(groups.grouped([*plain, training("ours", 0, straight(5, to=1.5))]), None, 0.95)
    assert "did not reach the final loss of full" in words.headline(none)


def test_several_groups_need_more_to_be_beyond_noise():
    plain = [training("full", seed, straight(s), "full") for seed, s in enumerate((10, 12, 9))]
    one = [training("cei", seed, straight(s)) for seed, s in enumerate((5, 6.5, 4))]
    other = [training("linear", seed, straight(s), "linear") for seed, s in enumerate((9, 11, 9))]
    alone, both = (verdict.judge(groups.grouped([*plain, *more]), None, 0.95) for more in (one, [*one, *other]))
    assert alone.level == pytest.approx(0.95) and both.level == pytest.approx(0.975)
    assert both.judged[1].ratio.low < alone.judged[1].ratio.low
    assert "Best of 2: entprog" in words.headline(both)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        pairs = np.exp(rng.normal([0.5, 0.0], 0.2, (3, 2)))
        ratio = verdict.ratio_of(list(enumerate(pairs[:, 0])), list(enumerate(pairs[:, 1])), 0.95)
        held += ratio.low <= math.exp(0.5) <= ratio.high
    assert 0.92 <= held / 400 <= 0.98


def test_unpaired_seeds_are_compared_too():
    a, b = [(0, 1.0), (1, 2.0), (2, 3.0)], [(7, 2.0), (8, 2.5)]
    found = verdict.difference_of(a, b, 0.95)
    expected = stats.ttest_ind([1, 2, 3], [2, 2.5], equal_var=False).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((-0.25, expected.low, expected.high))


losses = st.lists(st.floats(0.01, 10, allow_nan=False) | st.just(math.nan), min_size=1, max_size=20)


@given(losses, st.floats(0.01, 10))
def test_a_crossing_lies_where_the_curve_meets_the_target(values, target):
    curve = [Point(2.0 * i + 1, i, loss) for i, loss in enumerate(values)]
    found = curves.crossing(verdict.on(curve, "charged_s"), target)
    finite = [p for p in curve if math.isfinite(p.loss)]
    if found is None:
        assert all(p.loss > target for p in finite)
    else:
        assert all(p.loss > target for p in finite if p.charged_s < found * (1 - 1e-9))
        assert curves.at(verdict.on(curve, "charged_s"), found) <= target + 1e-6
        sooner = curves.crossing(verdict.on(curve, "charged_s"), target * 1.5)
        assert sooner is not None and sooner <= found + 1e-9


def test_break_even_is_where_the_curves_cross_for_good():
    base = [training("full", 0, [(1, 1, 2.0), (11, 11, 1.0)], "full")]
    late = [training("ours", 0, [(3, 1, 2.0), (9, 2, 0.8), (11, 3, 0.8)])]  # pays for its search first
    seconds = verdict.break_even(late, base)
    here, there = (curves.at(verdict.on(runs[0].curve, "charged_s"), seconds) for runs in (late, base))
    assert here == pytest.approx(there)
    assert 3 < seconds < 9
    assert verdict.break_even(base, late) is None, "behind at the end"
    assert verdict.break_even([training("ours", 0, [(1, 1, 1.5), (9, 9, 0.5)])], base) == 1


def test_labels_say_what_differs_and_are_never_alike():
    def one(seed, **settings):
        run = training("name", seed, straight(5))
        return Training(**{**vars(run), "run_id": f"{seed}{settings}", "settings": {**run.settings, **settings}})

    found = groups.grouped(
        [one(0, **{"schedule.stages": 2}), one(1, **{"schedule.stages": 2}), one(0, **{"schedule.stages": 4})]
    )
    assert [(g.label, len(g.runs)) for g in found] == [("stages 2", 2), ("stages 4", 1)]
    elsewhere = {"data.shards": "/b", "train.max_failures": 9}
    known = config.settings(config.Experiment(train=config.Train(steps=1)))
    free = {name: f"other {name}" for name in known if config.is_part_of(name, config.FREE)}
    assert {"data.decode", "data.decode_cpus", "tracking.run_name"} <= free.keys()
    paths = [one(0, **{"data.shards": "/a"}), one(1, **elsewhere), one(2, **free)]
    assert len(groups.grouped(paths)) == 1, "where shards lie changes nothing, nor what a run's identity ignores"
    knowing = one(1, **{"schedule.monotone": known["schedule.monotone"]})
    assert len(groups.grouped([one(0), knowing])) == 1, "a setting that a run did not know had its default"
    many = [one(i, **{f"model.init.{n}": i * 1000 + n for n in range(9)}) for i in range(3)]
    assert len({g.label for g in groups.grouped(many)}) == 3


def test_a_baseline_is_a_label_else_a_name_else_the_beginning_of_an_id():
    def first(wanted):
        plain = Training(**{**vars(training("plain", 0, straight(9), "full")), "run_id": "abcdef" + "0" * 26})
        named = [training(name, seed, straight(5), "lisa") for seed, name in enumerate(("a", "full", "abcdef"))]
        return groups.grouped(
            [plain, training("twin", 0, straight(7)), training("twin", 1, straight(5), "lisa"), *named], wanted
        )[0].label

    assert (first("a"), first("full"), first("abcdef"), first("abcdef0")) == ("lisa", "full", "lisa", "full")
    with pytest.raises(UserError, match="no run or group 'ab'"):
        first("ab")
    with pytest.raises(UserError, match=r"'twin' to be the baseline fits .* 'entprog', 'lisa'"):
        first("twin")


def test_low_rank_training_is_not_plain_training():
    """Nor does a name say what it is: the settings are shown beside it."""
    named = {f"model.init.a_name_that_is_long_{n}": n for n in range(4)}
    low = dataclasses.replace(training("lora", 0, straight(5), "full"), run_id="low")
    low = dataclasses.replace(low, settings={**low.settings, "train.lora.rank": 4, **named})
    ours, plain = training("ours", 1, straight(5)), training("plain", 2, straight(5), "full")
    known = dict.fromkeys(["train.lora"])
    plain = dataclasses.replace(plain, settings={**plain.settings, **known})
    first, *others = groups.grouped([low, ours, plain])
    assert first.runs == (plain,) and groups.grouped([ours, low])[0].runs == (ours,)
    assert all(group.is_named for group in (first, *others))
    assert not any(group.is_named for group in groups.grouped([plain, ours]))


def test_code_in_which_groups_are_unlike_is_named():
    old, new = (
        {"entprog.commit": "a" * 40, "version.torch": "2.5"},
        {"entprog.commit": "b" * 40, "version.torch": "2.5"},
    )

    def said(*tags):
        kinds = ("full", "full", "ours")
        each = enumerate(zip(kinds, tags, strict=True))
        runs = [dataclasses.replace(training(kind, n, straight(5), kind), tags=of) for n, (kind, of) in each]
        return "\n".join(words.warnings(verdict.judge(groups.grouped(runs), None, 0.95)))

    assert "unlike code or versions (commit aaaaaaaaaaaa, bbbbbbbbbbbb)" in said(old, old, new)
    changed = {"entprog.commit": "a" * 40 + "+", "version.torch": "2.5"}
    assert "unlike code or versions (commit aaaaaaaaaaaa, aaaaaaaaaaaa+)" in said(old, old, changed)
    assert "unlike code" not in said(old, old, old) and "unlike code" not in said(old, old, {})


def test_no_finished_baseline_is_told():
    plain = [training("full", 0, straight(10), "full", status="failed")]
    with pytest.raises(UserError, match="baseline 'full'"):
        verdict.judge(groups.grouped([*plain, training("ours", 0, straight(5))]), None, 0.95)


def test_many_groups_keep_their_colours_apart_and_the_rest_grey():
    assert len({drawings.series(place) for place in range(drawings.COLOURS)}) == drawings.COLOURS
    assert drawings.series(drawings.COLOURS) == drawings.series(99) == "other"


def test_latex_and_spreadsheets_take_names_as_they_are():
    plain = [training("full", seed, straight(10), "full", seconds=10.0, flops=1.5e12) for seed in (0, 1)]
    odd = [training("odd", seed, straight(5), "=1+1_%&#{}~^\\", seconds=5.0) for seed in (0, 1)]
    found = verdict.judge(groups.grouped([*plain, *odd]), None, 0.95)
    body = tables.as_latex(found, {})
    assert r"=1+1\_\%\&\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{} & " in body
    assert r"$1.5 \times 10^{12}$" in body and "95 \\%" in body
    assert body.count(r"\\") == 3 and all(line.count(" & ") == body.splitlines()[3].count(" & ")
                                          for line in body.splitlines()[3:7] if " & " in line)  # fmt: skip
    rows = list(csv.reader(tables.as_csv(found, {}).splitlines()))
    assert rows[2][0].startswith("'=1+1") and len({len(row) for row in rows}) == 1


@pytest.mark.parametrize(
    ("points", "higher", "named"),
    [
        ([(1, 5), (2, 3), (3, 4), (4, 1)], False, [0, 1, 3]),
        ([(1, 5), (1, 3)], False, [1]),
        ([(1, 5), (2, 5)], False, [0]),
        ([(1, 5), (2, 3), (3, 7)], True, [0, 2]),
        ([(140.14, 3), (140.02, 5)], False, [0]),  # one budget: they ended a fraction of a step apart
        ([(140.02, 5), (140.14, 7)], True, [1]),
        ([(140.02, 5), (140.14, 5)], False, [0, 1]),
        ([(140, 5), (150, 3)], False, [0, 1]),
    ],
)
def test_the_pareto_front_is_what_nothing_cheaper_matches(points, higher, named):
    arms = [drawings.Arm(str(i), i, cost, value, None, None) for i, (cost, value) in enumerate(points)]
    assert [arm.place for arm in drawings.front(arms, higher)] == named
    drawn = drawings.pareto(arms, "loss", higher)
    assert drawn.alt.endswith(f": {', '.join(map(str, named))}.") and "<svg" in drawn.svg
    assert drawings.pareto(arms[:1], "loss") is None
