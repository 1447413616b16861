"""The law of timesteps as a setting: what it says, what is refused, what older runs keep."""

import pytest
import torch

from entprog import config
from entprog.config import ClipShape, Timesteps
from entprog.diffusion import losses
from entprog.errors import UserError
from entprog.models import fingerprints
from helpers.families import load as family
from helpers.networks import latents, tiny_denoiser, tiny_experiment
from helpers.runs import Run
from pipelines.training import checks, outline

WRONG = [
    ({"timesteps": "beta"}, "setting train.timesteps: .*uniform.*given 'beta'"),
    ({"timesteps": "mode", "timesteps_spread": 1.8}, "train.timesteps_spread of mode is at most 1.75, given 1.8"),
    ({"timesteps": "mode", "timesteps_mean": 0.5}, "train.timesteps_mean is of logit_normal"),
    ({"timesteps_mean": 0.5}, "train.timesteps_mean is of logit_normal, given train.timesteps=uniform"),
    ({"timesteps_spread": 0.5}, "train.timesteps_spread is of logit_normal and mode"),
    ({"timesteps": "logit_normal", "timesteps_spread": 0}, "setting train.timesteps_spread: .*more than 0"),
    ({"min_snr": 0}, "setting train.min_snr: .*more than 0"),
    ({"timestep_shift": -1}, "setting train.timestep_shift: .*more than 0 or 'auto', given -1"),
    ({"timestep_shift": "often"}, "setting train.timestep_shift: .*given 'often'"),
]


@pytest.mark.parametrize(("train", "message"), WRONG)
def test_wrong_laws_are_one_line(train, message):
    with pytest.raises(UserError, match=message) as error:
        tiny_experiment(train=train)
    assert "\n" not in str(error.value)


def test_spreads_are_the_laws_own():
    law = lambda **train: tiny_experiment(train=train).timesteps  # noqa: E731
    assert law() == Timesteps()
    assert law(timesteps="logit_normal") == Timesteps("logit_normal", 0.0, 1.0)
    assert law(timesteps="mode") == Timesteps("mode", 0.0, 1.29)
    assert law(timesteps="mode", timesteps_spread=0.5, min_snr=5) == Timesteps("mode", 0.0, 0.5, min_snr=5.0)


def test_an_automatic_shift_is_one_law_for_all_shapes():
    at_480p = ClipShape(frames=81, height=480, width=832, fps=16)
    follows = tiny_experiment(train={"timestep_shift": "auto"})
    assert follows.timestep_shift_at(at_480p) == 3.0
    assert follows.timestep_shift_at(ClipShape(frames=81, height=720, width=1280, fps=16)) == pytest.approx(
        4.557, abs=0.001
    )
    assert follows.timestep_shift_at(ClipShape(frames=81, height=240, width=416, fps=16)) == 1.5
    assert follows.timesteps.shift == follows.timestep_shift_at(follows.data.shape)
    fixed = config.merge(
        follows.model_dump(), {"train": {"timestep_shift": 3.0}, "schedule": {"timestep_shift": "auto"}}
    )
    whole = config.build(config.merge(fixed, {"data": {"shape": at_480p.model_dump()}}))
    for shape in (at_480p, ClipShape(frames=21, height=240, width=416, fps=16)):
        assert whole.timestep_shift_at(shape) == pytest.approx(follows.timestep_shift_at(shape)), (
            "one law, two spellings"
        )


def test_training_and_the_record_follow_the_law():
    def first(**train):
        step = next(Run(tiny_experiment(train={"steps": 1, **train}, schedule={"kind": "full"})).steps())
        return step.loss, step.held_out_loss

    plain, middle = first(timesteps="uniform"), first(timesteps="logit_normal")
    assert plain[0] != middle[0] and plain[1] != middle[1]


def test_min_snr_weights_losses_of_every_family_that_predicts_noise():
    law = Timesteps(min_snr=5.0)
    for name in ("latte", "svd", "motion_unet", "cogvideox"):
        denoiser, batch = family(name), latents(range(2))
        with torch.no_grad():
            plain, weighted = (losses.held_out_loss(denoiser, [batch], 4, 0, one) for one in (Timesteps(), law))
        assert 0 < weighted < plain
        t = torch.full((2,), 0.6)
        with torch.no_grad():
            one, other = (losses.clip_losses(denoiser, batch, batch.position, t, 0, x) for x in (Timesteps(), law))
        torch.testing.assert_close(other, one * denoiser.process.min_snr(t, 5.0).float())


def check(monkeypatch, **parts):
    """`checks.check` of settings alone: without shards."""
    dataset = type("Dataset", (), {"shape": tiny_experiment().data.shape, "clips": lambda self, split: 1})()
    monkeypatch.setattr(checks.shards, "read_dataset", lambda folder: dataset)
    monkeypatch.setattr(checks.shards, "verify", lambda dataset, how: None)
    checks.check(tiny_experiment(data={"shards": "x"}, **parts))


def test_what_a_base_cannot_do_is_one_line(monkeypatch):
    from helpers.families import TINY

    latte = {"family": "latte", "init": TINY["latte"]["init"]}
    check(monkeypatch, train={"timestep_shift": "auto"})
    check(monkeypatch, model=latte, train={"min_snr": 5})
    with pytest.raises(
        UserError, match=r"train\.min_snr=5 weights losses of ε or v: this network predicts a flow's velocity"
    ):
        check(monkeypatch, train={"min_snr": 5})
    with pytest.raises(UserError, match=r"train\.timestep_shift=auto is of flow-matching networks"):
        check(monkeypatch, model=latte, train={"timestep_shift": "auto"})


def test_conditions_that_could_never_be_seen_are_refused(monkeypatch, tmp_path):
    for conditions in ([], ["reference"], ["reference", "pose"]):
        one = tiny_experiment(model={"conditions": conditions})
        tiny_denoiser(one).save(tmp_path / str(len(conditions)), shape=one.data.shape)

    def base(conditions):
        return {"base": str(tmp_path / str(conditions)), "init": {}}

    for conditions in (0, 1):
        check(monkeypatch, model=base(conditions))
        with pytest.raises(
            UserError, match=r"outside=never: .* no input yet for all of reference, pose.* conditions or"
        ):
            check(monkeypatch, model=base(conditions), schedule={"outside": "never"})
    check(monkeypatch, model=base(2), schedule={"outside": "never"})
    check(monkeypatch, schedule={"outside": "never"})


def test_held_out_losses_of_different_laws_are_kept_apart():
    shards = type("Shards", (), {"splits": {"held_out": []}, "clips": lambda self, split: 4})()
    marks = [
        fingerprints.held_out(tiny_experiment(train=train), shards)
        for train in ({}, {"timesteps": "mode"}, {"timesteps": "logit_normal"}, {"min_snr": 5}, {"timestep_shift": 3.0})
    ]
    assert len(set(marks)) == len(marks)


def test_a_dry_run_says_the_law():
    assert outline.timesteps(tiny_experiment()) is None
    said = outline.timesteps(tiny_experiment(train={"timesteps": "logit_normal", "timestep_shift": 3.0, "min_snr": 5}))
    assert said == (
        "Timesteps: logit_normal of mean 0, spread 1, shift 3 on whole clips, losses weighted by min-SNR 5."
    )
    assert (
        outline.timesteps(tiny_experiment(train={"timesteps": "mode"}))
        == "Timesteps: mode of 1.29, shift 1 on whole clips."
    )
