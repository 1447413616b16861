"""evaluate on a real Ray: known answers, agreement with the library, resume, cards, MLflow."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import is_ftfy_available
from torchmetrics.functional.image import structural_similarity_index_measure
from typer.testing import CliRunner

from entprog import config, files
from entprog.config import Evaluation, Model
from entprog.data import shards
from entprog.errors import UserError
from entprog.models.wan import load
from entprog.quality.card import unlike
from entprog.quality.metrics import Meter
from helpers import encoders, stores
from pipelines import cli, evaluate, generate
from pipelines.generating import judgement, judging, motions
from pipelines.outputs import claim
from pipelines.tracking.store import connect, tracking_uri
from pipelines.tracking.tracker import Tracker
from tests.test_generate import SHAPE, row
from tests.test_wan import NETWORK


def evaluated(checkpoint, folder, output, settings, **given):
    return evaluate.run(evaluate.plan(checkpoint, folder, output, settings, **given), output)


FAST = {"evaluate": {"metrics": ["psnr", "ssim", "frechet_transnetv2", "pck"], "frechet_bootstrap": 5}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of a tracked run, and shards with three held-out clips."""
    folder = tmp_path_factory.mktemp("evaluate")
    load(Model(init=NETWORK, vae="none")).save(folder / "run" / "model", shape=SHAPE)
    held_out = shards.write_shard(folder / "shards", "held_out/0.parquet", [row(0), row(1), row(2)], SHAPE)
    shards.write_dataset(folder / "shards", SHAPE, {"train": [], "held_out": [held_out]}, {})
    return folder


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.made(tmp_path))


def how(**generate) -> Evaluation:
    return Evaluation.model_validate({**FAST, "generate": {"steps": 2, "batch_size": 2, **generate}})


def truth_as_generated(made, folder: Path) -> Path:
    folder.mkdir()
    dataset = shards.read_dataset(made / "shards")
    for place in judging.places(dataset, "held_out", None, folder):
        (columns,) = shards.read_rows(Path(place.shard), [place.row], ["video"])
        Path(place.file).write_bytes(columns["video"])
    return folder


def test_shards_of_a_layout_that_the_network_has_not_seen_are_said(made, tmp_path):
    for points in (33, 133):
        denoiser = load(Model(init=NETWORK, vae="none", skeleton="dwpose"))
        denoiser.save(tmp_path / f"{points}" / "model", shape=SHAPE, points=points)
        given = ["--checkpoint", tmp_path / f"{points}", "--shards", made / "shards", "--output", tmp_path / "out"]
        done = CliRunner().invoke(evaluate.app, [*map(str, given), "--dry-run"], env={"COLUMNS": "400"})
        assert done.exit_code == 0, done.output
        assert ("poses of 33 points draw the body alone" in done.output) == (points == 133)


def test_captions_that_are_not_shown_are_said(made, tmp_path):
    held_out = shards.write_shard(tmp_path / "shards", "held_out/0.parquet", [row(0) | {"caption": "a walk"}], SHAPE)
    shards.write_dataset(tmp_path / "shards", SHAPE, {"train": [], "held_out": [held_out]}, {})
    for folder, more in ((made, ()), (tmp_path, ()), (tmp_path, ("--set", "generate.text=it’s"))):
        given = ["--checkpoint", made / "run", "--shards", folder / "shards", "--output", tmp_path / "out", *more]
        encoders.encoder(tmp_path / "encoders", width=NETWORK["text_dim"])
        given += ["--set", f"generate.text_encoder={tmp_path / 'encoders'}", "--dry-run"]
        done = CliRunner().invoke(evaluate.app, [*map(str, given)], env={"COLUMNS": "400"})
        assert done.exit_code == 0, done.output
        assert ("Captions of the clips are not shown" in done.output) == (folder == tmp_path and not more)
        assert ("mended such by ftfy" in done.output) == (bool(more) and not is_ftfy_available())


def test_the_truth_itself_is_perfect_and_says_how_it_was_measured(made, local_ray, tmp_path):
    folder = truth_as_generated(made, tmp_path / "clips")
    chosen = Evaluation.model_validate({**FAST, "evaluate": {**FAST["evaluate"], "metrics": []}})
    result = evaluated(None, made / "shards", tmp_path / "out", chosen, generated=folder)
    figures = result["figures"]
    assert figures["psnr"] == 100 and figures["ssim"] == pytest.approx(1, abs=1e-9) and figures["stlpips"] == 0
    assert figures["frechet_transnetv2"] == pytest.approx(0, abs=1e-6)
    assert figures["frechet_efficientnet_lite0"] == pytest.approx(0, abs=1e-6)
    assert figures["pck"] == 0 and figures["pose_found"] == 0  # squares are nobody
    assert "ms_ssim" in result["left_out"] and result["clips"] == 3
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for name, figure in evaluation["figures"].items():
        assert set(figure) == {"value", "low", "high", "clips", "sources", "card", "interval"} and figure["clips"] == 3
        card = evaluation["cards"][figure["card"]]
        assert card["metric"] == name and card["steps"] is None and card["split"] == "held_out"
        assert card["codec"].startswith("truth h264, result h264") and card["frames"] == SHAPE.frames
    assert Path(result["sheet"]).is_file()
    assert len(json.loads((tmp_path / "out" / "clips.json").read_text())) == 3


def test_generates_what_is_missing_agrees_with_the_library_and_tells_the_training_s_run(
    made, local_ray, tmp_path, store, monkeypatch, capsys
):
    run = shutil.copytree(made / "run", tmp_path / "run")
    tracker = Tracker.start(run, "test", "training", params={}, tags={})
    tracker.end("FINISHED")
    out = tmp_path / "out"
    alone = {"workers": 1}  # of several actors: the test before this one
    some = Evaluation.model_validate({**how().model_dump(), "evaluate": {"metrics": ["psnr"], "clips": 2, **alone}})
    first = evaluated(run / "model", made / "shards", out, some)
    assert (first["clips"], first["generated_now"], first["mlflow_run_id"]) == (2, 2, tracker.run_id)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "generated").glob("*.mp4")}
    assert len(before) == 2

    # All three now: two are there. One was lost on the way, and comes back the same.
    lost = min(before)
    lost.unlink()
    judge, judged = judging.judge, []
    monkeypatch.setattr(judging, "judge", lambda *given: judged.append(judge(*given)) or judged[-1])
    every = Evaluation.model_validate({**how().model_dump(), "evaluate": {**FAST["evaluate"], **alone}})
    result = evaluated(run / "model", made / "shards", out, every)
    assert (result["clips"], result["generated_now"]) == (3, 2)
    for path, (mtime, content) in before.items():
        assert path.read_bytes() == content and (path == lost or path.stat().st_mtime_ns == mtime)

    # What actors measured is what the library says of the same frames, in this process.
    values = {v["clip"]: v for v in json.loads((out / "clips.json").read_text())}
    meter = Meter(FAST["evaluate"]["metrics"], some.evaluate)
    for place in judging.places(shards.read_dataset(made / "shards"), "held_out", None, out / "generated"):
        motion = motions.from_row(Path(place.shard), place.row, SHAPE)
        frames = judging.read_result(Path(place.file), motion.video.shape)
        ours = meter.measure(frames, motion.video, motion.reference, motion.pose).values
        sides = [torch.from_numpy(f).permute(0, 3, 1, 2).double() / 255 for f in (frames, motion.video)]
        direct = structural_similarity_index_measure(*sides, data_range=1.0)
        assert values[place.clip_id]["ssim"] == pytest.approx(float(direct), abs=1e-6)
        assert values[place.clip_id]["psnr"] == pytest.approx(ours["psnr"], abs=1e-5)
    assert result["figures"]["ssim"] == pytest.approx(np.mean([v["ssim"] for v in values.values()]))

    evaluation = json.loads((out / "evaluation.json").read_text())
    cards = {
        evaluation["cards"][f["card"]]["metric"]: evaluation["cards"][f["card"]] for f in evaluation["figures"].values()
    }
    assert cards["psnr"]["sampler"] == "FlowMatchEulerDiscreteScheduler" and cards["psnr"]["steps"] == 2
    assert (
        unlike(cards["psnr"], cards["ssim"]) == "metric"
        and unlike(cards["psnr"], {**cards["psnr"], "seed": 1}) == "seed"
    )
    client = connect(tracking_uri())
    assert "evaluation.json" in {f.path for f in client.list_artifacts(tracker.run_id)}
    assert client.get_run(tracker.run_id).data.metrics["evaluation/ssim"] == pytest.approx(result["figures"]["ssim"])

    # In whatever order clips are judged: the same intervals.
    monkeypatch.setattr(judging, "judge", lambda *given: dict(reversed(judged[-1].items())))
    evaluated(run / "model", made / "shards", out, every)
    assert json.loads((out / "evaluation.json").read_text()) == evaluation

    # One metric alone: what was measured of the same clips stays, of other frames it goes.
    rows = {clip: {k: v for k, v in row.items() if k in ("sha256", "value/psnr")} for clip, row in judged[-1].items()}
    monkeypatch.setattr(judging, "judge", lambda *given: rows)
    only = Evaluation.model_validate(
        {**how().model_dump(), "evaluate": {"metrics": ["psnr"], "confidence": 0.5, **alone}}
    )
    clips = json.loads((out / "clips.json").read_text())
    assert evaluated(run / "model", made / "shards", out, only)["figures"].keys() == evaluation["figures"].keys()
    now = json.loads((out / "evaluation.json").read_text())["figures"]
    assert now == evaluation["figures"] | {"psnr": now["psnr"]} and now["psnr"]["interval"]["confidence"] == 0.5
    assert now["ssim"]["interval"]["confidence"] == 0.95 and "(95 %)" in capsys.readouterr().out
    assert json.loads((out / "clips.json").read_text()) == clips
    rows[min(rows)]["sha256"] = "0"
    assert evaluated(run / "model", made / "shards", out, only)["figures"].keys() == {"psnr"}
    assert "not kept: ssim, frechet_transnetv2, pck" in " ".join(capsys.readouterr().out.split())
    assert [len(row) for row in json.loads((out / "clips.json").read_text())] == [4, 6, 6]

    # Clips made in another way are not mixed with these.
    with pytest.raises(UserError, match=r"\(steps was 2, now 3\): choose another --output"):
        evaluated(run / "model", made / "shards", out, how(steps=3))


def test_clips_of_another_text_are_not_judged_as_these(made, tmp_path):
    encoders.encoder(tmp_path / "encoders", width=NETWORK["text_dim"])
    out, texts = tmp_path / "out", {"text_encoder": str(tmp_path / "encoders")}
    one = evaluate.plan(made / "run", made / "shards", out, how(text="a man walks", **texts))
    claim.take(out, "evaluate", one.identity)
    evaluate.protocol.leave(out / "generated", one.made)
    with pytest.raises(UserError, match=r"\(text was a man walks, now a woman dances\): choose another --output"):
        evaluate.plan(made / "run", made / "shards", out, how(text="a woman dances", **texts))
    (given,) = truth_as_generated(made, tmp_path / "clips").glob("square%202*")
    plain = evaluate.plan(made / "run", made / "shards", tmp_path / "plain", how())
    half = evaluate.plan(made / "run", made / "shards", tmp_path / "half", how(dtype="bfloat16"))
    cards = [
        evaluate.protocol.card("psnr", t.meter, t.settings, t.dataset, 3, t.made, given) for t in (one, plain, half)
    ]
    assert [card.details for card in cards] == ['text "a man walks"', "", "network in bfloat16"]
    windows = Evaluation.model_validate({"evaluate": {"window_frames": 16}})
    said = [evaluate.protocol.judged(name, windows, {}, ()) for name in ("fvd", "fid", "fid_vid")]
    assert said == ["every 16 frames in a row a sample", "", "every 16 frames in a row a sample"]


def test_the_dtype_is_that_of_the_actors_and_not_of_the_machine_that_plans(made, local_ray, tmp_path, monkeypatch):
    load(Model(init=NETWORK, vae="none")).save(tmp_path / "model", shape=SHAPE, dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # here; the Ray that is joined has no GPU
    for gpus, dtype, there in (("auto", "float32", "no"), ("no", "float32", "no"), ("yes", "bfloat16", "yes")):
        chosen = Evaluation.model_validate({"evaluate": {**FAST["evaluate"], "gpus": gpus}})
        task = evaluate.plan(tmp_path, made / "shards", tmp_path / "out", chosen)
        assert [task.made["dtype"], task.identity["dtype"], task.settings.generate.dtype] == [dtype] * 3
        assert task.settings.evaluate.gpus == there
    over = []
    monkeypatch.setattr(judging, "_over", lambda todo, actor, arguments, *_: over.append(arguments) or [])
    judging.generate([], task.maker, task.settings, 1, gpus=False)
    assert over[0]["settings"].gpus == "no", "an actor without a GPU of its own may see the machine's"
    with pytest.raises(UserError, match=r"generate\.gpus=no is of generate alone: give evaluate\.gpus=no"):
        evaluate.plan(tmp_path, made / "shards", tmp_path / "out", how(gpus="no"))


def test_clips_of_generate_are_taken_with_what_is_known_of_them(made, tmp_path):
    dataset = shards.read_dataset(made / "shards")
    named = motions.motions_from_shards(made / "shards", ["square 2.mp4#000000"], "held_out", how(), SHAPE)
    assert named[0].place == judging.places(dataset, "held_out", None, tmp_path)[2].number == 2, "the same noise"

    def work():
        chosen = config.build({"generate": {"steps": 1, "count": 3, "pose_guidance": 2.0}}, config.Generation)
        return generate.run(made / "run", tmp_path / "made", chosen, shards=made / "shards")

    cli.run("generate", tmp_path / "made", work)
    moved = (tmp_path / "made").rename(tmp_path / "elsewhere")
    folder = evaluate.protocol.how_given(moved)
    assert folder["steps"] == 1 and folder["guidance"] == "reference 1, pose 2"
    assert folder["sampler"] == "FlowMatchEulerDiscreteScheduler"
    args = ["--shards", made / "shards", "--generated", moved, "--output", tmp_path / "out", "--dry-run"]
    done = CliRunner().invoke(evaluate.app, [str(a) for a in args])
    assert done.exit_code == 0 and "Would judge 3 clips" in done.output and not (tmp_path / "out").exists()
    assert "made for shards" not in done.output and folder["dataset"] == dataset.fingerprint
    evaluate.protocol.leave(moved, {**folder, "dataset": "others"})
    assert "made for shards of fingerprint others" in CliRunner().invoke(evaluate.app, [str(a) for a in args]).output
    clip = min((moved / "videos").glob("*_result.mp4"))
    said = [judgement.other_rate(clip, SHAPE.model_copy(update={"fps": fps})) for fps in (SHAPE.fps, 24.0)]
    assert said == ["", "has 12 frames a second, its truth 24: they are compared frame by frame"]


def test_clips_of_an_earlier_evaluate_are_taken(made, tmp_path):
    before = evaluate.plan(made / "run", made / "shards", tmp_path / "before", how())
    (tmp_path / "before").mkdir()
    truth_as_generated(made, before.folder)
    files.write_json(tmp_path / "before" / "result.json", {"clips": 3})
    given = tmp_path / "out", how()
    with pytest.raises(UserError, match="has no clip for square 0"):
        evaluate.plan(None, made / "shards", *given, generated=tmp_path / "before")
    evaluate.protocol.leave(before.folder, before.made)
    task = evaluate.plan(None, made / "shards", *given, generated=tmp_path / "before")
    assert task.made == before.made and all(place.clip.parent == before.folder for place in task.places)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one, neither was given"),
        ({"checkpoint": "{}/run", "generated": "{}/run"}, "give one, both were given"),
        ({"checkpoint": "{}/nowhere"}, "--checkpoint: no such folder"),
        ({"generated": "{}/nowhere"}, "--generated: no such folder"),
        ({"generated": "{}/run"}, "has no clip for square 0.mp4#000000: it should be square%200.mp4%23000000.mp4"),
        ({"checkpoint": "{}/run", "split": "train"}, "no clips in split 'train'"),
        ({"checkpoint": "{}/run", "metrics": ["fvd"]}, "fvd needs clips of 10 frames, these have 5"),
        ({"checkpoint": "{}/run", "metrics": ["fid_vid"]}, "evaluate.resnet3d=FILE"),
        ({"checkpoint": "{}/run", "sampler": "DDIMScheduler"}, "generate.sampler: DDIMScheduler does not fit"),
        ({"checkpoint": "{}/run", "run_id": "0" * 32}, "--run: MLflow at .* has no run 000"),
    ],
)
def test_wrong_input_is_one_clear_line(made, tmp_path, store, given, message):
    paths = {k: Path(given[k].format(made)) for k in ("checkpoint", "generated") if k in given}
    parts = {"evaluate": {k: given[k] for k in ("split", "metrics") if k in given}}
    parts["generate"] = {k: given[k] for k in ("sampler",) if k in given}
    chosen, checkpoint = Evaluation.model_validate(parts), paths.pop("checkpoint", None)
    with pytest.raises(UserError, match=message) as error:
        evaluate.plan(checkpoint, made / "shards", tmp_path / "out", chosen, run_id=given.get("run_id"), **paths)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_fewer_clips_than_the_split_has_are_told_how_to_be_judged(made, tmp_path):
    """`generate` makes four by default, `evaluate` judges all."""
    (only,) = truth_as_generated(made, tmp_path / "truth").glob("square%200*")
    listed = {"clips": [{"clip": "square 0.mp4#000000", "result": str(only)}]}
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "result.json").write_text(json.dumps(listed))

    def plan(**chosen):
        return evaluate.plan(
            None, made / "shards", tmp_path / "out", Evaluation.model_validate(chosen), generated=tmp_path / "made"
        )

    with pytest.raises(UserError, match=r"has no clip for square 1.*; --clips 1 judges those that it lists$"):
        plan()
    assert len(plan(evaluate={"clips": 1}).places) == 1


def test_a_damaged_clip_is_one_line_from_the_actor(made, local_ray, tmp_path):
    folder = truth_as_generated(made, tmp_path / "clips")
    victim = sorted(folder.glob("*.mp4"))[1]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"generated clip.*{victim.name}") as error:
        one = Evaluation.model_validate({"evaluate": {"metrics": ["psnr"], "workers": 1}})
        evaluated(None, made / "shards", tmp_path / "out", one, generated=folder)
    assert "\n" not in str(error.value)


def test_no_two_clips_share_a_file():
    ids = ["a b.mp4#0", "a_b.mp4#0", "a/b.mp4#0", "ä.mp4#0", "a%20b.mp4#0"]
    names = {judging.file_name(i) for i in ids}
    assert len(names) == len(ids) and not any("/" in name for name in names)


def test_a_clip_of_a_long_name_has_a_file_too(tmp_path):
    """A character of Chinese is nine of a quoted name, of which a disk takes 255."""
    title = "这是一个非常长的中文视频标题用来测试文件名长度是否超过限制的舞蹈视频"
    ids = [f"{'x' * i}{title}.mp4#{number}" for i in range(9) for number in (0, 10)]
    names = {judging.file_name(i) for i in ids}
    assert len(names) == len(ids)
    for name in names:
        files.write_text(tmp_path / name, "")
        assert re.fullmatch(r"(%[0-9A-F]{2}|[\w.~-])+\.mp4", name), name
    assert judging.file_name("dance/0001.mp4#8") == "dance%2F0001.mp4%238.mp4", "others keep theirs"
