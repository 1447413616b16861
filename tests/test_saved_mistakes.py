"""What a person may get wrong with a saved pipeline is one line; pictures are taken as training takes them."""

import runpy

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from entprog.config import ClipShape
from entprog.media import pictures
from entprog.models import whole
from entprog.models.reference_frame import _fixed_noise
from helpers.families import TINY, load
from pipelines.training import model_card

SHAPE = ClipShape(frames=5, height=64, width=32, fps=12)
SHIPPED = runpy.run_path(str(whole.CODE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    kind, sizes = TINY["wan"]["vae"]
    kind(**sizes).save_pretrained(folder / "vae")
    save_file({"prompt_embeds": torch.ones(3, 8)}, folder / "prompt")
    own = {"vae": str(folder / "vae"), "prompt_embeds": str(folder / "prompt")}
    load("wan", conditions=("reference", "pose"), **own).save(folder / "model", shape=SHAPE)
    return folder / "model"


def opened(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(count, height=64, width=32):
    return [Image.new("RGB", (width, height))] * count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"reference": Image.new("RGB", (90, 160))},
            r"reference is 90x160, pose frames 32x64: give both of the clip's size \(32x64 in training\)",
        ),
        ({"num_frames": 9}, "num_frames is 9, pose frames are 5: leave num_frames out"),
        ({"height": 128}, "height and width say 32x128, the pictures 32x64"),
        ({"pose": frames(7)}, r"a clip of 7 frames of 32x64: its frames must be 1 more than a multiple of 4"),
        (
            {"reference": Image.new("RGB", (30, 64)), "pose": frames(5, 64, 30)},
            r"a clip of 5 frames of 30x64: .* sides multiples of 8",
        ),
    ],
)
def test_what_is_no_clip_is_said(given, message, folder):
    pipe = opened(folder)
    with pytest.raises(ValueError, match=message) as error:
        pipe(**{"reference": Image.new("RGB", (32, 64)), "pose": frames(5)} | given)
    assert "\n" not in str(error.value)


def test_the_card_s_example_takes_a_picture_of_any_size(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 160)).save("person.png")
    model_card.write(folder, "Dancer")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace('folder = "."', f"folder = {str(folder)!r}").replace("inference_steps=20", "inference_steps=1")
    there = {"frames": frames(5)}
    exec(code.partition("export_to_video(clip")[0], there)  # which needs a package that is not there
    assert [picture.size for picture in there["clip"]] == [(32, 64)] * 5


def test_the_prompt_of_a_folder_is_found_from_anywhere_and_never_asked_of_a_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    file = folder / "prompt_embeds.safetensors"
    for name, at in ((folder, tmp_path), ("./model", folder.parent), (".", folder)):
        monkeypatch.chdir(at)
        pipe = opened(name)
        monkeypatch.chdir(tmp_path)
        assert pipe.text(None, None)["prompt_embeds"].sum() == 3 * 8
        file.rename(tmp_path / file.name)
        with pytest.raises(ValueError, match=rf"prompt_embeds.safetensors is not in {folder}: give prompt_embeds"):
            pipe.text(None, None)
        (tmp_path / file.name).rename(file)


def test_the_reference_s_noise_is_training_s_on_every_device():
    """Generators of CPUs and GPUs differ; a meta device has none."""
    frame = torch.zeros(1, 3, 1, 4, 4)
    assert torch.equal(SHIPPED["fixed_noise"](frame), _fixed_noise(frame))
    assert SHIPPED["fixed_noise"](frame.to("meta")).shape == frame.shape


def test_what_is_transparent_is_laid_over_white_and_of_a_mask_over_black(tmp_path):
    picture = np.full((4, 4, 4), (10, 20, 30, 0), np.uint8)
    picture[1, 1] = 200, 100, 50, 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    expected = torch.from_numpy(pictures.read(tmp_path / "a.png")).permute(2, 0, 1) / 127.5 - 1
    for given in (Image.fromarray(picture), [Image.fromarray(picture)]):
        torch.testing.assert_close(SHIPPED["pixels"](given)[0, :, 0], expected)
    mask = np.full((4, 4, 4), (255, 255, 255, 0), np.uint8)
    mask[1, 1, 3] = 255
    found = SHIPPED["where"]([Image.fromarray(mask), Image.fromarray(mask[..., 3])])
    assert torch.equal(found[0], found[1]) and found[0].sum() == 1
