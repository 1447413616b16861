"""Mistakes that a newcomer makes in a family of their own: each is planted in a two-stream family, or in Latte, and the
suite that a new family goes through has to see it."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers import transformer_hunyuan_video as diffusers_blocks

from entprog import blocks
from entprog.models import hunyuan_video, loading, vaes
from entprog.models.geometry import Geometry
from entprog.models.hunyuan_video import HunyuanVideoDenoiser
from entprog.models.latte import LatteDenoiser
from helpers import suite
from helpers.families import predict, settings
from helpers.networks import latents

NAME = "hunyuan_video"


class TimestepsTooSmall(HunyuanVideoDenoiser):
    def run(self, inputs, timestep, text):
        return super().run(inputs, timestep / 1000, text)


class Negated(HunyuanVideoDenoiser):
    def run(self, inputs, timestep, text):
        return -super().run(inputs, timestep, text)


class OtherPatch(HunyuanVideoDenoiser):
    @classmethod
    def geometry(cls, network, vae):
        return Geometry.of(vae, (1, 1, 1))


class LargePatch(HunyuanVideoDenoiser):
    @classmethod
    def geometry(cls, network, vae):
        return Geometry.of(vae, (1, 8, 8))


class NoShift(HunyuanVideoDenoiser):
    SCHEDULER = {"shift": 1.0}  # noqa: RUF012


class OtherPrediction(LatteDenoiser):
    SCHEDULER = {**LatteDenoiser.SCHEDULER, "prediction_type": "v_prediction"}  # noqa: RUF012


class OneTextForAll(HunyuanVideoDenoiser):
    def run(self, inputs, timestep, text):
        return super().run(inputs, timestep, self.text)


class NoPooledText(HunyuanVideoDenoiser):
    def run(self, inputs, timestep, text):
        nothing = torch.zeros_like(self.pooled)
        return HunyuanVideoDenoiser.run(
            SimpleNamespace(network=self.network, pooled=nothing, text=self.text), inputs, timestep, text
        )


SEEN_BY = {
    "none": (HunyuanVideoDenoiser, []),
    "one kind of block is not registered": (HunyuanVideoDenoiser, ["all_blocks_are_found"]),
    "the first kind of block is not registered": (HunyuanVideoDenoiser, ["all_blocks_are_found"]),
    "a bypass zeroes the text": (HunyuanVideoDenoiser, ["bypasses_give_what_is_left_without_the_block"]),
    "guidance a thousand times too small": (HunyuanVideoDenoiser, ["clips_are_those_of_the_pipeline"]),
    "timesteps in 0..1": (TimestepsTooSmall, ["clips_are_those_of_the_pipeline"]),
    "negated output": (Negated, ["clips_are_those_of_the_pipeline"]),
    "no pooled text": (NoPooledText, ["clips_are_those_of_the_pipeline"]),
    "a patch that is too small": (OtherPatch, ["clips_that_fit_are_those_that_run"]),
    "a patch that is too large": (LargePatch, ["clips_that_fit_are_those_that_run"]),
    "no shift": (NoShift, ["the_scheduler_is_that_of_the_published_checkpoints"]),
    "another prediction": (OtherPrediction, ["the_scheduler_is_that_of_the_published_checkpoints"]),
    "a VAE whose latents are not scaled": (HunyuanVideoDenoiser, ["clips_are_those_of_the_pipeline"]),
    "a VAE scaled in decode alone": (HunyuanVideoDenoiser, ["what_is_encoded_is_scaled_as_what_is_decoded"]),
    "every clip has the same text": (OneTextForAll, ["a_clip_s_own_text_is_what_it_sees"]),
}


@pytest.fixture
def planted(request, monkeypatch):
    """The mistakes that lie in no class of a denoiser."""
    registered = {"one kind": "Single", "the first kind": "", "a bypass": ""}
    begins = next((words for words in registered if request.param.startswith(words)), None)
    if request.param.startswith("guidance"):
        monkeypatch.setattr(hunyuan_video, "GUIDANCE_STEPS", 1)
    if request.param.startswith("a VAE"):
        monkeypatch.setattr(vaes, "encode", lambda vae, video: vae.encode(video, return_dict=False)[0].mode())
    if request.param == "a VAE whose latents are not scaled":
        monkeypatch.setattr(vaes, "decode", lambda vae, latents: vae.decode(latents, return_dict=False)[0])
    if begins is None:
        yield request.param
        return
    kind = getattr(diffusers_blocks, f"HunyuanVideo{registered[begins]}TransformerBlock")
    own = blocks.bypass.dispatch(kind)
    wrong = lambda module, video, text, *args, **kwargs: (video, torch.zeros_like(text))  # noqa: E731
    blocks.bypass.register(kind, wrong if begins == "a bypass" else blocks.bypass.dispatch(object))
    yield request.param
    blocks.bypass.register(kind, own)


@pytest.mark.parametrize("planted", SEEN_BY, indirect=True)
def test_the_suite_sees_a_planted_mistake(planted, tmp_path):
    cls, expected = SEEN_BY[planted]
    denoiser = loading.load(cls, settings(cls.FAMILY))
    case = suite.Case(cls.FAMILY, denoiser, latents(range(2)), tmp_path)
    slow = suite.clips_are_those_of_the_pipeline.__name__
    checks = suite.CHECKS if slow in expected or not expected else suite.OF_A_NETWORK
    assert [check.__name__ for check in checks if fails(check, case)] == expected


def fails(check, case):
    try:
        check(case)
    except AssertionError:
        return True
    return False


def test_a_forgotten_block_is_named():
    denoiser, batch = loading.load(HunyuanVideoDenoiser, settings(NAME)), latents(range(2))
    kind = diffusers_blocks.HunyuanVideoSingleTransformerBlock
    own, before = blocks.bypass.dispatch(kind), predict(denoiser, batch).detach()
    try:
        blocks.bypass.register(kind, blocks.bypass.dispatch(object))
        assert suite.overlooked(denoiser, batch) == {kind.__name__: "single_transformer_blocks.0"}
    finally:
        blocks.bypass.register(kind, own)
    assert suite.overlooked(denoiser, batch) == {}
    assert torch.equal(predict(denoiser, batch).detach(), before), "looking changes nothing"
