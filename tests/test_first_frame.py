"""`model.first_frame`: networks that take the reference for what a clip begins with are shown its own first frame."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from entprog import config, models
from entprog.config import ClipShape, Generate, Model
from entprog.data import latents as cache
from entprog.errors import UserError
from entprog.media.color import yuv420_to_rgb
from entprog.models import adapters, fingerprints, folders
from entprog.models.svd import SvdDenoiser
from entprog.models.wan import WanDenoiser, inspect, load
from helpers import bases, real_clips
from helpers.families import TINY, clips
from helpers.networks import tiny_experiment
from helpers.recording import calls
from pipelines import generate
from pipelines.generating import checkpoints, judging, motions, protocol, rendering
from pipelines.training import checks, model_card, networks, outline, worker

SHAPE = ClipShape(frames=5, height=32, width=32, fps=12)
USUAL = {"i2v": False, "ti2v": True, "control": True}
"""Bases, and whether they are shown the clip's own where nothing is said."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with bases in it."""
    folder = tmp_path_factory.mktemp("bases")
    bases.image_to_video(folder / "i2v", clip=False)
    bases.given_frame(folder / "ti2v")
    bases.control(folder / "control")
    return folder


@pytest.mark.parametrize("name", USUAL)
def test_the_reference_is_the_clip_s_own_first_frame_or_another(place, name, tmp_path):
    """As the base is trained by its makers, or as it is asked for; what is saved keeps it."""
    base, batch, keys = str(place / name), clips(2, SHAPE), set()
    first = ((yuv420_to_rgb(batch.video)[:, 0] + 1) * 127.5).round().byte().movedim(1, -1)
    for asked in (None, not USUAL[name]):
        denoiser = load(Model(base=base, first_frame=asked))
        assert denoiser.first is (USUAL[name] if asked is None else asked)
        shown = denoiser.condition(first if denoiser.first else batch.reference, batch.pose)
        encoded = denoiser.encode(batch)
        assert all(torch.equal(encoded.conditions[part], shown[part]) for part in shown) and len(shown) >= 2
        keys.add(cache.key(denoiser, "wan", SHAPE))
        if (given := denoiser.given(encoded.conditions)) is not None:
            apart = (given[1] - encoded.clean)[:, :, 0].abs().max()
            assert apart < 0.01 if denoiser.first else apart > 0.1
        folder = tmp_path / str(denoiser.first)
        denoiser.save(folder, shape=SHAPE)
        assert folders.saved(folder).get("first_frame", False) is inspect(Model(base=str(folder))).first
        assert inspect(Model(base=str(folder))).first is denoiser.first
        assert inspect(Model(base=str(folder), first_frame=not denoiser.first)).first is not denoiser.first
    assert len(keys) == 2, "cached latents are of one"


def test_what_was_trained_before_keeps_another_frame_and_what_is_new_does_not(place, tmp_path):
    load(Model(base=str(place / "ti2v"), conditions=("pose",))).save(tmp_path / "pose", shape=SHAPE)
    assert inspect(Model(base=str(tmp_path / "pose"))).first, "its reference is new"
    load(Model(base=str(place / "ti2v"))).save(tmp_path / "old", shape=SHAPE)
    about = json.loads((tmp_path / "old" / "entprog.json").read_text())
    assert about.pop("first_frame") is True
    (tmp_path / "old" / "entprog.json").write_text(json.dumps(about))
    assert not inspect(Model(base=str(tmp_path / "old"))).first
    assert SvdDenoiser.begins("", True, False) is False and SvdDenoiser.begins("", False, False) is None
    assert WanDenoiser.begins("first frame", False, True) is True, "beside the last frame"


def test_others_are_refused_in_one_line(place, tmp_path):
    bases.vace(tmp_path / "vace")
    cases = [
        Model(family="wan_vace", base=str(tmp_path / "vace"), first_frame=True),
        Model(base=str(place / "ti2v"), conditions=("pose",), first_frame=True),
        Model(init=TINY["wan"]["init"], vae="none", first_frame=True),
    ]
    for model in cases:
        with pytest.raises(UserError, match=r"^model\.first_frame: .* does not take the reference for what") as error:
            models.family(model.family).inspect(model)
        assert "\n" not in str(error.value)
        assert not models.family(model.family).inspect(model.model_copy(update={"first_frame": False})).first


def test_runs_are_told_apart(place, tmp_path):
    """A run of before, which says nothing of it, goes on with `model.first_frame=false` alone."""
    shards = SimpleNamespace(splits={"held_out": []}, clips=lambda split: 4, fingerprint="")

    def of(name="ti2v", **model):
        return tiny_experiment(model={"init": {}, "base": str(place / name), "vae": "auto", **model})

    assert checks.deciding(of(), shards)["model.first_frame"] is True
    for other in (of(first_frame=False), of("i2v"), tiny_experiment()):
        assert "model.first_frame" not in checks.deciding(other, shards)
    assert fingerprints.held_out(of(), shards) != fingerprints.held_out(of(first_frame=False), shards)
    phases = of(first_frame=False).model_copy(update={"phases": {"a": {}, "b": {"model": {"first_frame": True}}}})
    parts = {name: (phase, shards) for name, phase in config.phases(phases, tmp_path).items()}
    said = {name: value for name, value in checks.whole_identity(parts).items() if name.endswith("first_frame")}
    assert said == {"b: model.first_frame": True}
    told = [outline.begins(of(name), inspect(of(name).model)) for name in ("ti2v", "i2v")]
    assert "each clip's own first frame (model.first_frame=true)" in told[0] and "=false" in told[1]
    assert outline.begins(tiny_experiment(), inspect(tiny_experiment().model)) is None


def test_an_adapter_says_what_it_was_shown_and_goes_on_so(place, tmp_path):
    def of(**model):
        model = {"init": {}, "base": str(place / "ti2v"), "vae": "auto", **model}
        return tiny_experiment(model=model, train={"steps": 1, "lora": {"rank": 2, "alpha": 2}})

    networks.leave_adapter(networks.load(of(), torch.device("cpu")), of(), tmp_path / "adapter", 33)
    path = tmp_path / "adapter" / adapters.ABOUT
    about = json.loads(path.read_text())
    assert about["first_frame"] is True
    for own in (True, False):
        path.write_text(json.dumps({name: value for name, value in about.items() if own or name != "first_frame"}))
        goes_on = of(adapter=str(tmp_path / "adapter"))
        assert inspect(goes_on.model).first is networks.load(goes_on, torch.device("cpu")).first is own


def test_previews_generate_and_evaluate_show_what_training_showed(place, tmp_path, capsys):
    denoiser, one = load(Model(base=str(place / "i2v"), first_frame=True)), Generate(steps=1)
    denoiser.save(tmp_path / "model", shape=SHAPE)
    white = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(white, "PNG")
    row = {**real_clips.row("cam01", "held_out", 0.0, SHAPE), "reference": white.getvalue()}
    splits = {"train": [[{**row, "split": "train"}]], "held_out": [[row]]}
    dataset = real_clips.write(tmp_path / "shards", splits, SHAPE)
    found = checkpoints.find(str(tmp_path / "model"), one)
    (motion,) = motions.motions_from_shards(dataset.folder, None, "held_out", config.Generation(generate=one), SHAPE)
    expected = denoiser.condition(torch.from_numpy(motion.video[:1]), torch.from_numpy(motion.pose)[None])["reference"]
    experiment = tiny_experiment(data={"shape": SHAPE.model_dump(), "batch_size": 1})
    setup = SimpleNamespace(experiment=experiment, dataset=dataset, texts=None)
    actor, (drawn,) = judging.Generator(found, one, None), worker._held_out_motions(setup, 1)
    (at,) = judging.places(dataset, "held_out", None, tmp_path)
    rows = {name: np.array([value]) for name, value in vars(at).items()}
    for network, work in (
        (denoiser.network, lambda: rendering.make(denoiser, [motion], SHAPE, one)),
        (denoiser.network, lambda: rendering.make(denoiser, [drawn], SHAPE, one)),
        (actor._denoiser.network, lambda: actor(rows)),
    ):
        (told,) = calls(network, work)
        torch.testing.assert_close(told["hidden_states"][:, 4:12], expected, rtol=0, atol=0.01)
    made = protocol.how_made(found, config.Evaluation(generate=one), dataset)
    assert "shown the first frame of the truth" in protocol.shown(made)
    (tmp_path / "white.png").write_bytes(white.getvalue())
    np.save(tmp_path / "pose.npy", motion.pose)
    given = {"reference": tmp_path / "white.png", "pose": tmp_path / "pose.npy"}
    settings = config.Generation(generate=one)
    generate.run(tmp_path / "model", tmp_path / "own", settings, shards=dataset.folder)
    assert "should begin" not in capsys.readouterr().out
    assert protocol.how_given(tmp_path / "own")["of the truth"] == "the first frame"
    generate.run(tmp_path / "model", tmp_path / "other", settings, **given, dry_run=True)
    assert "motions should begin in the picture's pose" in " ".join(capsys.readouterr().out.split())
    model_card.write(tmp_path / "model", "Dancer")
    assert "begin the motion in the picture's pose" in (tmp_path / "model" / "README.md").read_text()
