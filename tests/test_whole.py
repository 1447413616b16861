"""What is saved is a pipeline that plain diffusers runs, where this project cannot be imported."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from entprog.config import ClipShape, Generate, Model
from entprog.diffusion import sampling
from entprog.diffusion.objectives import noise_like
from entprog.errors import UserError
from entprog.media import drawing
from entprog.models import captions, folders, whole
from helpers import bases, encoders
from helpers.families import FIVE, NAMES, TINY, again, clips, load
from helpers.recording import calls
from pipelines.generating import checkpoints

STEPS = 3
NO_FACE = "face_pixel_values"
"""Wan-Animate's face video, which is not there: the method itself gives its motion encoder one face for all frames."""
IMAGE_TO_VIDEO = {
    "wan_i2v": (lambda folder: bases.image_to_video(folder, True), "whole"),
    "wan_i2v_light": (lambda folder: bases.image_to_video(folder, True), "light"),
    "wan22_i2v": (lambda folder: bases.image_to_video(folder, False), "whole"),
    "wan_flf": (lambda folder: bases.image_to_video(folder, True, last=True), "whole", {"last_frame": False}),
    "wan_flf_last": (lambda folder: bases.image_to_video(folder, True, last=True), "whole"),
    "wan22_i2v_last": (lambda folder: bases.image_to_video(folder, False), "whole", {"last_frame": True}),
    "wan_control": (bases.control, "whole"),
    "wan22_ti2v": (bases.given_frame, "whole"),
    "svd_embedded": (bases.svd, "whole", {"prompt_embeds": None}),
    "cogvideox15_i2v": (lambda folder: bases.cogvideox(folder, of_pairs=True), "whole"),
}
"""Bases with inputs of their own: (what makes one, how they are saved, settings)."""
NINE = ClipShape(frames=9, height=64, width=32, fps=12)
LAST = torch.randint(0, 256, (1, 64, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
ELSEWHERE = """
import json, sys
sys.modules["entprog"] = sys.modules["pipelines"] = None
import torch
from PIL import Image
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

for folder in sys.argv[1:]:
    given = load_file(f"{folder}/given.safetensors")
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    run = dict(reference=given["reference"], pose=given["pose"], latents=given["noise"], num_inference_steps=3)
    run |= {"last": given["last"]} if "last" in given else {}
    calls = []
    hook = pipe.network.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    made = {"latents": pipe(output_type="latent", **run).frames}
    hook.remove()
    inputs = {name: value for name, value in calls[0].items() if isinstance(value, torch.Tensor)}
    made |= {f"input {name}": value.float() for name, value in inputs.items()}
    made["frames"] = pipe(output_type="pt", **run).frames
    made["guided"] = pipe(output_type="latent", reference_guidance=2.0, pose_guidance=3.0, **run).frames
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, f"{folder}/made.safetensors")
    if folder == sys.argv[1]:  # pictures are made of frames alike
        clip = pipe(**run).frames[0]
        assert len(clip) == 9 and clip[0].size == (32, 64), clip
"""


def vae_of(name, folder):
    kind, sizes = TINY[name]["vae"]
    torch.manual_seed(1)
    kind(**sizes).eval().save_pretrained(folder / "vae")
    return str(folder / "vae")


def tuned(name, folder, **save):
    """A base without conditions, widened for both, as it might be after training; saved, and its folder."""
    vae, generator = vae_of(name, folder), torch.Generator().manual_seed(2)
    own = {"conditions": ("reference", "pose")} if name in ("wan_animate", "wan_vace") else {"conditions": ()}
    if name == "latte":  # with channels for a learned variance
        own["init"] = {**TINY[name]["init"], "out_channels": 8}
    base = load(name, vae=vae, **own)
    text = {"prompt_embeds": torch.randn(3, base.text.shape[-1], generator=generator)}
    more = {key: torch.randn(getattr(base, field)[0].shape, generator=generator) for field, key in base.FIXED.items()}
    save_file(text | more, folder / "prompt")
    base.save(folder / "base")
    return perturbed(folder, name, generator, **save)


def perturbed(folder, name, generator, model=None, **save):
    """The base in a folder with a prompt beside it, as it might be after training; saved, and its folder."""
    own = {"conditions": ("reference", "pose"), "prompt_embeds": str(folder / "prompt"), **(model or {})}
    denoiser = again(folder / "base", name, **own)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    denoiser.save(folder / "model", shape=NINE, **save)
    return folder / "model"


def image_to_video(folder, base, parts, model=None):
    """An image-to-video base, as `tuned`."""
    base(folder / "base")
    generator = torch.Generator().manual_seed(2)
    save_file({"prompt_embeds": torch.randn(3, 8, generator=generator)}, folder / "prompt")
    return perturbed(folder, family_of(folder.name), generator, model, parts=parts)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{family: (its folder, what the pipeline made there)}, all in one process that knows diffusers alone."""
    root, out = tmp_path_factory.mktemp("whole"), {}
    for name in NAMES:
        out[name] = tuned(name, root / name, parts="light" if name == "latte" else "whole")
    for name, base in IMAGE_TO_VIDEO.items():
        out[name] = image_to_video(root / name, *base)
    for name in out:
        denoiser, batch = again(out[name], family_of(name)), clips(1, NINE)
        shape = (1, *denoiser.latent_shape(NINE))
        drawn = drawing.draw(batch.pose[0], NINE.height, NINE.width, denoiser.skeleton)
        given = {"reference": batch.reference[0], "pose": drawn} | ({"last": LAST[0]} if denoiser.last else {})
        given["noise"] = noise_like(torch.empty(shape), torch.tensor([0]), 5)
        save_file(given, out[name] / "given.safetensors")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    env["HF_MODULES_CACHE"] = str(root / "modules")
    command = [sys.executable, "-c", ELSEWHERE, *map(str, out.values())]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (folder, load_file(folder / "made.safetensors")) for name, folder in out.items()}


def family_of(name):
    return (
        next(family for family in ("svd", "cogvideox15", "wan") if name.startswith(family))
        if name in IMAGE_TO_VIDEO
        else name
    )


@torch.no_grad()
def test_embeddings_of_two_encoders_are_given_together(tmp_path):
    from diffusers import DiffusionPipeline

    denoiser, batch = load("hunyuan_video"), clips(1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    denoiser.save(tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 3, denoiser.text.shape[-1], generator=generator)
    text[:, 2] = 0  # a token that its encoder's mask leaves out
    pooled = torch.randn(denoiser.pooled.shape, generator=generator)
    size = (1, *denoiser.latent_shape(FIVE))
    run = {"latents": noise_like(torch.empty(size), torch.tensor([0]), 5), "num_inference_steps": 2}
    run |= {"reference": batch.reference[0], "pose": drawing.draw(batch.pose[0], FIVE.height, FIVE.width)}
    made = pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, output_type="latent", **run).frames
    ours = sampling.sample(
        replace(denoiser, text=text, pooled=pooled), denoiser.condition(batch.reference, batch.pose), size,
        Generate(steps=2, seed=5), [0],
    )  # fmt: skip
    torch.testing.assert_close(made, ours, rtol=1e-3, atol=1e-3)
    for alone in ({"prompt_embeds": text}, {"pooled_prompt_embeds": pooled}):
        with pytest.raises(ValueError, match="both prompt_embeds and pooled_prompt_embeds"):
            pipe(**alone, **run)


@torch.no_grad()
@pytest.mark.parametrize("name", encoders.KINDS)
def test_a_prompt_is_encoded_as_generate_does(name, tmp_path):
    from diffusers import DiffusionPipeline

    denoiser = load(name)
    denoiser.save(tmp_path, shape=NINE)
    bare = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"tokenizer and text_encoder( and .*)? are not all there"):
        bare.encoded("a person dances")
    parts = encoders.pipeline(tmp_path, name)
    found = captions.source(Model(family=name, base=str(tmp_path), vae="none"))
    expected = captions.one(found, denoiser.network.config, "a person dances", "cpu")
    bare.register_modules(**parts)
    got = bare.encoded("a person dances")
    assert len(got) == len(expected)
    for field, key in denoiser.text_names().items():
        torch.testing.assert_close(got[key], expected[field])


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, *IMAGE_TO_VIDEO])
def test_plain_diffusers_makes_what_generate_makes(made, name):
    folder, theirs = made[name]
    denoiser, batch = again(folder, family_of(name)), clips(1, NINE)
    conditions = denoiser.condition(batch.reference, batch.pose, LAST)
    shape = (1, *denoiser.latent_shape(NINE))
    sampled = []
    first, *_ = calls(denoiser.network, lambda: sampled.append(
        sampling.sample(denoiser, conditions, shape, Generate(steps=STEPS, seed=5), [0])
    ))  # fmt: skip
    (ours,) = sampled
    torch.testing.assert_close(theirs["latents"], ours, rtol=1e-3, atol=1e-3)
    inputs = {key: value for key, value in first.items() if isinstance(value, torch.Tensor) and key != NO_FACE}
    assert {"input " + key for key in inputs} == {k for k in theirs if k.startswith("input ") and NO_FACE not in k}
    for key, value in inputs.items():
        torch.testing.assert_close(theirs[f"input {key}"], value.float(), rtol=1e-3, atol=1e-4, msg=f"{key} differs")
    frames = denoiser.decode(ours) / 2 + 0.5
    torch.testing.assert_close(theirs["frames"], frames, rtol=1e-3, atol=1e-3)
    both = Generate(steps=STEPS, seed=5, reference_guidance=2.0, pose_guidance=3.0)
    guided = sampling.sample(denoiser, conditions, shape, both, [0])
    assert not torch.allclose(guided, ours, atol=1e-2), "guidance is to make a difference here"
    torch.testing.assert_close(theirs["guided"], guided, rtol=2e-3, atol=2e-3)


def test_a_light_folder_names_its_vae(made, tmp_path):
    folder, _ = made["latte"]
    about = json.loads((folder / "entprog.json").read_text())
    assert not (folder / "vae").exists() and about["elsewhere"]["vae"]["subfolder"] == "vae"
    here = tmp_path / "model"
    shutil.copytree(folder, here)
    about["elsewhere"]["vae"]["name"] = str(tmp_path / "gone")
    (here / "entprog.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"saved light: no such folder: .*gone"):
        again(here, "latte")
    assert again(folder, "latte").vae is not None and whole.missing(folder) == []


def test_a_light_folder_names_its_image_encoder(made, tmp_path):
    folder, _ = made["wan_i2v_light"]
    parts = ("image_encoder", "image_processor")
    about = json.loads((folder / "entprog.json").read_text())
    assert not any((folder / name).exists() for name in parts) and whole.missing(folder) == []
    assert [about["elsewhere"][name]["subfolder"] for name in parts] == list(parts)
    assert again(folder, "wan").image_encoder is not None
    here = tmp_path / "model"
    shutil.copytree(folder, here)
    about["elsewhere"]["image_encoder"]["name"] = str(tmp_path / "gone")
    (here / "entprog.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"the image_encoder of .*, saved light: no such folder: .*gone"):
        again(here, "wan")
    whole_, _ = made["wan_i2v"]
    assert all((whole_ / name).is_dir() for name in parts)


def test_what_a_folder_lacks_is_named(made, tmp_path):
    folder, _ = made["wan"]
    parts = ("model_index.json", "pipeline.py", "vae/", "scheduler/", "prompt_embeds.safetensors", "transformer/")
    for said in parts:
        name = said.rstrip("/")
        here = tmp_path / name / "model"
        shutil.copytree(folder, here)
        (shutil.rmtree if (here / name).is_dir() else os.unlink)(here / name)
        assert whole.missing(here) == [said]
    (tmp_path / "vae" / "result.json").write_text(json.dumps({"command": "entprog train --preset x"}))
    with pytest.raises(UserError, match=r"vae/config.json is missing: .*made by: entprog train --preset x"):
        again(tmp_path / "vae" / "model", "wan")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A base without conditions; copied, never changed."""
    folder = tmp_path_factory.mktemp("bare")
    load("wan", vae=vae_of("wan", folder), conditions=()).save(folder / "base")
    return folder / "base"


@pytest.fixture
def hub(bare, tmp_path, monkeypatch):
    """A hub's cache with a pipeline in it whose text encoder was not fetched: its name."""
    snapshot = tmp_path / "hub" / "models--someone--dancer" / "snapshots" / ("0123456789abcdef" * 3)[:40]
    shutil.copytree(bare, snapshot)
    index = {
        "_class_name": "WanPipeline", "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"],
    }  # fmt: skip
    (snapshot / "model_index.json").write_text(json.dumps(index))
    (snapshot / "entprog.json").unlink()
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "someone/dancer", snapshot.name


@pytest.mark.parametrize("parts", ["whole", "light"])
def test_parts_of_a_base_on_the_hub_are_named_with_their_commit(hub, parts, tmp_path):
    name, commit = hub
    base = again(name, "wan", conditions=("reference", "pose"))
    base.save(tmp_path / "model", shape=NINE, parts=parts)
    about = folders.saved(tmp_path / "model")
    expected = {"name": name, "revision": commit, "subfolder": "text_encoder", "library": "transformers"}
    assert expected.items() <= about["elsewhere"]["text_encoder"].items()
    assert (tmp_path / "model" / "vae").is_dir() == (parts == "whole") == ("vae" not in about["elsewhere"])
    configs = {path: json.loads(path.read_text()) for path in (tmp_path / "model").glob("*/config.json")}
    assert {values["_name_or_path"] for values in configs.values()} == {name}, "not this machine's cache"
    assert again(tmp_path / "model", "wan").vae is not None
    again(tmp_path / "model", "wan").save(tmp_path / "later", parts=parts)  # a phase after it
    assert folders.saved(tmp_path / "later")["elsewhere"] == about["elsewhere"]


def test_a_text_is_encoded_by_the_commit_that_the_base_was_of(hub, tmp_path):
    name, commit = hub
    of_then = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    again(name, "wan", conditions=("reference", "pose")).save(tmp_path / "model", shape=NINE, parts="light")
    newest = of_then.with_name("f" * 40)
    (newest.parents[1] / "refs" / "main").write_text(newest.name)
    for snapshot, width in ((of_then, 8), (newest, 16)):
        (snapshot / "text_encoder").mkdir(parents=True)
        (snapshot / "tokenizer").mkdir()
        about = {"architectures": ["UMT5EncoderModel"], "d_model": width}
        (snapshot / "text_encoder" / "config.json").write_text(json.dumps(about))
    found = checkpoints.Checkpoint(tmp_path / "model", folders.saved(tmp_path / "model"), NINE, None)
    assert checkpoints.text_source(found, Generate(text="a dance")).parts["text_encoder"].parent == of_then
    asked = checkpoints.text_source(found, Generate(text="a dance", text_encoder=name))
    assert asked.parts["text_encoder"].parent == newest, "a name that is given is the newest"


@pytest.mark.parametrize("parts", ["whole", "light"])
def test_a_cached_folder_that_is_given_as_a_folder_is_one(hub, parts, tmp_path):
    name, commit = hub
    snapshot = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    again(snapshot, "wan", conditions=("reference",)).save(tmp_path / "model", shape=NINE, parts=parts)
    about = folders.saved(tmp_path / "model")
    named = {name: (place["name"], place["revision"]) for name, place in about["elsewhere"].items()}
    assert named == ({"vae": (str(snapshot), None)} if parts == "light" else {})
    assert whole.missing(tmp_path / "model") == []


def local(bare, folder, **encoder):
    """A base whose index names a text encoder, with these files in its folder; none: that was never fetched."""
    shutil.copytree(bare, folder / "base")
    index = json.loads((folder / "base" / "model_index.json").read_text())
    index |= {"_class_name": "WanPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"]}
    (folder / "base" / "model_index.json").write_text(json.dumps(index))
    for name, text in encoder.items():
        (folder / "base" / "text_encoder").mkdir(exist_ok=True)
        (folder / "base" / "text_encoder" / name).write_text(text)
    return folder / "base"


CONFIG = json.dumps({"architectures": ["UMT5EncoderModel"]})
SHARDS = json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})


@pytest.mark.parametrize("parts", ["whole", "light"])
@pytest.mark.parametrize(
    ("encoder", "counts"),
    [
        ((), False),
        (("pytorch_model.bin",), False),
        (("model.fp16.safetensors",), False),
        (("model.safetensors.index.json", "model-1.safetensors"), False),
        (("model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"), True),
        (("diffusion_pytorch_model.safetensors",), True),
    ],
)
def test_an_encoder_counts_where_plain_diffusers_loads_it(encoder, counts, parts, bare, tmp_path):
    files = {name: SHARDS if name.endswith("index.json") else "x" for name in encoder}
    root = local(bare, tmp_path, **files, **({"config.json": CONFIG} if encoder else {}))
    again(root, "wan", conditions=("reference",)).save(tmp_path / "tuned", parts=parts)
    there = tmp_path / "tuned"
    index, about = json.loads((there / "model_index.json").read_text()), folders.saved(there)
    copied = counts and parts == "whole"
    assert ("text_encoder" in index) == (there / "text_encoder").is_dir() == copied
    assert ("text_encoder" in about["elsewhere"]) == (counts and parts == "light")
    assert whole.missing(there) == []
    if encoder and not counts:  # as an earlier version left it
        shutil.copytree(root / "text_encoder", there / "text_encoder")
        (there / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "X"]}))
        assert whole.missing(there) == ["text_encoder/"]
    if counts and parts == "light":
        again(there, "wan", conditions=("reference",)).save(tmp_path / "later")
        assert not folders.saved(tmp_path / "later")["elsewhere"] and (tmp_path / "later" / "text_encoder").is_dir()


def test_encoders_that_lie_here_are_copied_without_programs(bare, tmp_path):
    encoder = local(bare, tmp_path) / "text_encoder"
    encoder.mkdir()
    for name in ("model.safetensors", "pytorch_model.bin", "run.py", "credentials.json"):
        (encoder / name).write_bytes(np.random.default_rng(0).bytes(8))
    (encoder / "config.json").write_text(CONFIG)
    again(tmp_path / "base", "wan", conditions=("reference",)).save(tmp_path / "tuned")
    assert {path.name for path in (tmp_path / "tuned" / "text_encoder").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    index = json.loads((tmp_path / "tuned" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"] and index["_class_name"][0] == "pipeline"
    again(tmp_path / "base", "wan", conditions=()).save(tmp_path / "same")
    assert json.loads((tmp_path / "same" / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert not (tmp_path / "same" / "pipeline.py").exists(), "a network that was not widened keeps its base's pipeline"


def test_a_picture_is_taken_without_a_warning_of_torch():
    """Once a process it warned of every picture's own numbers, which nothing can be written to."""
    pixels = runpy.run_path(str(whole.CODE))["pixels"]
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(action="error"):
            seen = pixels(Image.new("RGB", (4, 2), (255, 0, 0)))
    finally:
        torch.set_warn_always(before)
    assert seen.shape == (1, 3, 1, 2, 4) and seen[0, :, 0, 0, 0].tolist() == [1.0, -1.0, -1.0]
