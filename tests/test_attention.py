"""`model.attention`: which of torch's kernels a network's attention runs."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.utils._python_dispatch import TorchDispatchMode

from entprog import config, models
from entprog.blocks import blocks, unfreeze
from entprog.errors import UserError
from entprog.models import attention
from entprog.models.wan import load as load_wan
from helpers import bases
from helpers.families import NAMES, clips, load, predict, settings
from helpers.networks import tiny_experiment

FUSED = "_scaled_dot_product_flash_attention_for_cpu"
CHOOSE = ("wan", "wan_animate", "wan_vace", "hunyuan_video")
"""Families whose kernels can be chosen."""


class Ran(TorchDispatchMode):
    """Names of torch's operations that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def run(denoiser) -> tuple[torch.Tensor, set[str]]:
    """(prediction, names of the operations that it took)."""
    batch = denoiser.encode(clips())
    with torch.no_grad(), Ran() as ran:
        return predict(denoiser, batch), ran.names


def plainly(ran: set[str]) -> bool:
    """Whether attention was computed by plain products."""
    return any(name.endswith("softmax") for name in ran)


@pytest.mark.parametrize("name", CHOOSE)
def test_each_kernel_gives_what_torchs_choice_gives(name):
    plain, ran = run(load(name))
    assert FUSED in ran and not plainly(ran)
    for kernels in ("_native_math", *(["_native_flash"] if name != "hunyuan_video" else [])):
        out, ran = run(load(name, attention=kernels))
        assert plainly(ran) == (kernels == "_native_math"), "those that are named, not others"
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_the_environment_decides_nothing_and_a_network_decides_for_itself_alone():
    untouched = load("wan")
    untouched.network.reset_attention_backend()
    before, _ = run(untouched)
    with attention_backend("_native_math"):  # what DIFFUSERS_ATTN_BACKEND sets
        out, ran = run(load("wan"))
        assert FUSED in ran and FUSED not in run(untouched)[1]
    assert torch.equal(out, before), "equal to the bit"
    load("wan", attention="_native_math")
    assert FUSED in run(untouched)[1], "others in the process go on as they were"


@pytest.mark.parametrize("checkpointing", [True, "keep_attention"])
def test_attention_that_is_kept_or_computed_again_is_of_the_same_kernels(checkpointing):
    denoiser, gradients = load("wan", attention="_native_flash"), []
    found, batch = blocks(denoiser.network), denoiser.encode(clips())
    for how in (False, checkpointing):
        unfreeze(denoiser.network, found, [block.name for block in found], [], "exact", how)
        predict(denoiser, batch).square().mean().backward()
        gradients.append([p.grad.clone() for p in denoiser.network.parameters() if p.grad is not None])
        denoiser.network.zero_grad(set_to_none=True)
    assert gradients[0] and all(map(torch.equal, *gradients))


def test_the_other_expert_runs_the_same(tmp_path):
    bases.two_experts(tmp_path, first_frame=False)
    denoiser = load_wan(config.Model(base=str(tmp_path), expert="high", attention="_native_math"))
    other = denoiser.expert.other(denoiser)
    assert {m.processor._attention_backend.value for m in other.network.modules() if hasattr(m, "processor")} == {
        "_native_math"
    }


@pytest.mark.parametrize("name", sorted({*NAMES} - {*CHOOSE}))
def test_families_without_a_choice_refuse_one(name):
    with pytest.raises(UserError, match=r"model\.attention=_native_cudnn: diffusers has one kind"):
        models.family(settings(name).family).inspect(settings(name, attention="_native_cudnn"))
    load(name)


def test_kernels_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="takes no mask, which attention of family hunyuan_video is given"):
        models.family("hunyuan_video").inspect(settings("hunyuan_video", attention="_native_flash"))
    with pytest.raises(UserError, match=r"setting model\.attention: must be 'native', '_native_cudnn'.*given 'sage'"):
        config.build({"train": {"steps": 1}, "model": {"attention": "sage"}})
    cudnn = settings("wan", attention="_native_cudnn")
    with pytest.raises(
        UserError, match=r"model\.attention=_native_cudnn does not run in float32 on a CPU here"
    ) as told:
        attention.check_device(cudnn, torch.device("cpu"))
    assert "\n" not in str(told.value)
    attention.check_device(settings("wan", attention="_native_flash"), torch.device("cpu"))


def test_kernels_are_part_of_what_decides():
    """At its default the setting is no part of it, as in runs that are older than it."""
    plain = tiny_experiment()
    other = plain.model_copy(update={"model": plain.model.model_copy(update={"attention": "_native_math"})})
    assert "model.attention" not in config.deciding(plain)
    assert config.deciding(other)["model.attention"] == "_native_math"
