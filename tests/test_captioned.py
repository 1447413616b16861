"""Pictures of a network that was trained with captions: clips of shards are drawn with their own, alike everywhere."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from entprog import config, models
from entprog.config import ClipShape, Evaluation, Generate, Model
from entprog.errors import UserError
from entprog.models import captions
from helpers import encoders, real_clips
from helpers.networks import TINY as WAN
from helpers.networks import tiny_experiment
from helpers.recording import calls
from pipelines import evaluate, generate
from pipelines.generating import captioned, checkpoints, judging, motions, protocol, rendering
from pipelines.training import worker
from pipelines.training.setup import Setup
from pipelines.training.startup import Startup

SHAPE = ClipShape(frames=4, height=32, width=16, fps=12)
SAID = ["a person dances", "", "a person walks home"]
ONE_STEP = Generate(steps=1, count=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(shards whose held-out clips have captions, these encoded, a network trained with them, its folder)"""
    root = tmp_path_factory.mktemp("captioned")
    rows = [{**real_clips.row("cam01", "held_out", 0.2 * i, SHAPE), "caption": said} for i, said in enumerate(SAID)]
    train = {**real_clips.row("cam04", "train", 0.0, SHAPE), "caption": "the rain"}
    dataset = real_clips.write(root / "shards", {"train": [[train]], "held_out": [rows]}, SHAPE)
    models.family("wan").load(Model(init=WAN, vae="none")).save(root / "base")
    encoders.encoder(root / "base")
    settings = Model(base=str(root / "base"), vae="none")
    texts = captions.prepared(settings, dataset, "caption")
    denoiser = texts.given_to(models.family("wan").load(settings))
    denoiser.save(root / "model", shape=SHAPE)
    return dataset, texts, denoiser, root / "model"


@pytest.fixture
def elsewhere(made, tmp_path):
    """The same shards without the encoded texts."""
    ignored = shutil.ignore_patterns(captions.FOLDER)
    return shutil.copytree(made[0].folder, tmp_path / "shards", ignore=ignored)


def test_training_generate_and_evaluate_show_the_same(made, tmp_path):
    dataset, texts, denoiser, folder = made
    found = checkpoints.find(str(folder), ONE_STEP)
    shown = captioned.shown(found, ONE_STEP, dataset.folder, SAID)
    chosen = config.Generation(generate=ONE_STEP)
    of_shards = [
        motion.captioned(shown.texts)
        for motion in motions.motions_from_shards(dataset.folder, None, "held_out", chosen, SHAPE)
    ]
    experiment = tiny_experiment(data={"shape": SHAPE.model_dump(), "batch_size": 2})
    setup = Setup(
        experiment, torch.device("cpu"), denoiser, dataset, [], slice(None), None, [], texts, {}, print, Startup()
    )
    expected = torch.cat([texts.of(said)["text"] for said in SAID])
    for drawn in (of_shards, worker._held_out_motions(setup, 3)):
        (told,) = calls(denoiser.network, lambda drawn=drawn: rendering.make(denoiser, drawn, SHAPE, ONE_STEP))
        assert torch.equal(told["encoder_hidden_states"], expected)
    actor = judging.Generator(found, ONE_STEP, shown.texts)
    places = judging.places(dataset, "held_out", None, tmp_path)
    rows = {name: np.array([vars(place)[name] for place in places]) for name in vars(places[0])}
    (told,) = calls(actor._denoiser.network, lambda: actor(rows))
    assert torch.equal(told["encoder_hidden_states"], expected)
    fixed = worker._held_out_motions(replace(setup, texts=None), 1)
    empty = worker._held_out_motions(replace(setup, texts=replace(texts, captions={})), 1)
    assert [motion.text for motion in fixed + empty] == [None, None]


def test_which_texts_are_shown_is_said_alike_and_kept(made, elsewhere, tmp_path):
    dataset, _, _, folder = made
    theirs = "Captions of the clips are not shown to the network: every clip is made with the empty text"
    for shards, words, card in (
        (dataset.folder, "Clips are shown with their own captions.", "shown each clip's caption"),
        (elsewhere, theirs, "shown the empty text"),
    ):
        said = []
        for job, more in ((generate.app, ["--count", "3"]), (evaluate.app, [])):
            given = ["--checkpoint", folder, "--shards", shards, "--output", tmp_path / "out", *more, "--dry-run"]
            done = CliRunner().invoke(job, [*map(str, given)], env={"COLUMNS": "800"})
            assert done.exit_code == 0, done.output
            said += [line for line in done.output.splitlines() if line.startswith(words)]
        assert len(said) == 2 and said[0] == said[1]
        task = evaluate.plan(folder, shards, tmp_path / "out", Evaluation(generate=ONE_STEP))
        assert protocol.shown(task.made) == [card] and task.identity["texts"] == card.removeprefix("shown ")
    other = Evaluation(generate=ONE_STEP.model_copy(update={"text": ""}))
    encoders.encoder(folder)
    assert protocol.shown(evaluate.plan(folder, dataset.folder, tmp_path / "out", other).made) == ['text ""']


def test_guidance_by_captions_needs_them(made, elsewhere, tmp_path):
    dataset, _, _, folder = made
    settings = Evaluation(generate=ONE_STEP.model_copy(update={"text_guidance": 5.0}))
    task = evaluate.plan(folder, dataset.folder, tmp_path / "out", settings)
    assert task.made["guidance"] == "reference 1, pose 1, text 5 over the empty text"
    with pytest.raises(UserError, match="is shown the empty text unless --text gives another one"):
        evaluate.plan(folder, elsewhere, tmp_path / "out", settings)
    with pytest.raises(UserError, match="is shown the empty text unless --text gives another one"):
        generate.run(folder, tmp_path / "out", config.Generation(generate=settings.generate), shards=elsewhere)
    assert not (tmp_path / "out").exists()
