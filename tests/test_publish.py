"""A trained pipeline in a folder, a bucket and on a hub; its card; what cannot be published."""

import base64
import contextlib
import http.server
import json
import re
import shutil
import socket
import threading

import pytest
import torch
import yaml
from PIL import Image, ImageOps
from pyarrow import fs
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from entprog import config
from entprog.blocks import blocks
from entprog.models import adapters, folders, lora, whole
from entprog.training import checkpoint
from helpers import servers
from helpers.networks import SHAPE, tiny_denoiser, tiny_experiment
from helpers.runs import Trained
from pipelines import publish
from pipelines.outputs import claim
from pipelines.training import model_card


def published(*options):
    return CliRunner().invoke(publish.app, list(map(str, options)))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A training's output, without its training."""
    folder = tmp_path_factory.mktemp("run")
    tiny_denoiser(tiny_experiment()).save(folder / "model", shape=SHAPE)
    return folder


RESULT = {
    "held_out_loss": 0.25, "steps": 24, "seconds": 3.0, "flops": 1e9, "data": "abc123",
    "decisions": [{"plan": {"trainable": ["blocks.1", "blocks.2"]}}],
}  # fmt: skip


def test_a_folder(output, tmp_path):
    there = tmp_path / "there"
    dry = published("--checkpoint", output, "--to", there, "--dry-run")
    assert dry.exit_code == 0 and dry.output.startswith("Would publish") and not there.exists(), dry.output
    assert published("--checkpoint", output, "--to", there).exit_code == 0
    assert whole.missing(there) == [] and (there / "README.md").is_file() and folders.saved(there)["family"] == "wan"
    assert published("--checkpoint", output / "model", "--to", there).exit_code == 0, "again, over what it left"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path, weights: path.write_bytes(path.read_bytes()[:-1000]), "cannot read"),
        (lambda path, weights: save_file(weights | {"patch_embedding.bias": weights["patch_embedding.bias"] / 0}, path),
         "patch_embedding.bias is not finite"),
        (lambda path, weights: save_file(weights | {"patch_embedding.bias": torch.ones(3)}, path),
         "patch_embedding.bias in .* has shape"),
    ],
)  # fmt: skip
def test_a_broken_network_replaces_no_good_publication(change, said, output, tmp_path):
    there, broken = tmp_path / "there", tmp_path / "run"
    shutil.copytree(output / "model", there)
    shutil.copytree(output, broken)
    weights = broken / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    change(weights, load_file(weights))
    before = contents(there)
    for last in ([], ["--dry-run"]):
        done = published("--checkpoint", broken, "--to", there, *last)
        assert done.exit_code == 2 and len(done.output.splitlines()) == 1, done.output
        assert re.search(f"--checkpoint: .*{said}", done.output) and contents(there) == before, done.output


def test_a_folder_that_could_be_a_repository_is_noted(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for to, noted in (("me/dancer", True), ("dancer", False), ("here/dancer", False)):
        (tmp_path / "here").mkdir(exist_ok=True)
        done = published("--checkpoint", output, "--to", to, "--dry-run")
        assert done.exit_code == 0 and ("on the hub it is hf://me/dancer" in done.output) == noted, done.output


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    ["LICENSE", ".git/config", "samples/dance.mp4", "vae/notes.md", "transformer/old/config.json", "link", "adapter"],
)
def test_a_folder_that_holds_files_of_others_is_refused_and_left_as_it_was(name, output, tmp_path):
    there = tmp_path / "there"
    if name == "adapter":
        pair = adapters.Pair(torch.ones(2, 4), torch.ones(4, 2), 2.0)
        adapters.write(there, adapters.Adapter({"blocks.0.attn1.to_q": pair}, about={"family": "wan"}), "transformer")
    else:
        assert published("--checkpoint", output, "--to", there).exit_code == 0
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).symlink_to(output) if name == "link" else (there / name).write_text("mine")
    before = contents(there)
    done = published("--checkpoint", output, "--to", there)
    assert done.exit_code == 2 and len(done.output.splitlines()) == 1, done.output
    assert ("adapter_config.json" if name == "adapter" else name) in done.output and contents(there) == before


def test_file_links_and_the_home_folder_name_the_folders_that_they_do(output, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    for to in (f"file://{tmp_path}/there", link, "~/mine"):
        done = published("--checkpoint", output, f"--to={to}")
        assert done.exit_code == 0, done.output
    for folder in ("there", "real", "mine"):
        assert whole.missing(tmp_path / folder) == []
    assert link.is_symlink() and link.resolve() == real
    (real / "LICENSE").write_text("mine")
    before = contents(real)
    done = published("--checkpoint", output, "--to", f"file://{link}")
    assert done.exit_code == 2 and "(LICENSE)" in done.output and contents(real) == before, done.output
    itself = published("--checkpoint", tmp_path / "there", "--to", f"file://{tmp_path}/there")
    assert itself.exit_code == 2 and "is the checkpoint itself" in itself.output


@pytest.mark.parametrize("step", [[], ["--step", "2"]])
@pytest.mark.parametrize("to", ["run/model", "other/model", "other/adapter", "other/trials/3/model"])
def test_no_training_s_own_model_is_replaced(to, step, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("run", "other"):
        shutil.copytree(output / "model", tmp_path / run / "model")
    (tmp_path / "other" / claim.MARK).write_text('{"job": "train", "identity": {}}')
    before = contents(tmp_path)
    done = published("--checkpoint", "run", "--to", to, *step)
    assert done.exit_code == 2 and "choose another folder" in done.output, done.output
    assert len(done.output.splitlines()) == 1 and contents(tmp_path) == before


@pytest.mark.parametrize("made", [False, True])
def test_what_a_person_put_beside_the_weights_goes_with_them(made, output, tmp_path):
    root, there = tmp_path / "run" / "model", tmp_path / "there"
    shutil.copytree(output / "model", root)
    own = {"LICENSE": "mine", "samples/a.txt": "dances", "README.md": "# My words"}
    (root / "samples").mkdir()
    for name, text in own.items():
        (root / name).write_text(text)
    if made:
        (root / "pipeline.py").unlink()
    for _ in range(2):  # the second time over the first
        done = published("--checkpoint", root, "--to", there)
        assert done.exit_code == 0, done.output
    assert {name: (there / name).read_text() for name in own} == own and whole.missing(there) == []


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_no_link_out_of_the_folder_is_published(dry, made, output, tmp_path):
    root, there = tmp_path / "run" / "model", tmp_path / "there"
    shutil.copytree(output / "model", root)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key.json").write_text("secret")
    (root / "notes").symlink_to(tmp_path / "home")
    (root / "x.txt").symlink_to(tmp_path / "home" / "key.json")
    (root / "LICENSE").write_text("mine")
    (root / "COPYING").symlink_to("LICENSE")
    if made:
        (root / "pipeline.py").unlink()
    done = published("--checkpoint", root, "--to", there, *dry)
    assert done.exit_code == 2 and "(notes, x.txt)" in done.output and not there.exists(), done.output
    for name in ("notes", "x.txt"):
        (root / name).unlink()
    done = published("--checkpoint", root, "--to", there)
    assert done.exit_code == 0 and (there / "COPYING").read_text() == "mine", done.output


@pytest.mark.parametrize(
    ("there", "stale"),
    [
        (["entprog.json", "prompt_embeds.safetensors", "vae/old.safetensors", "README.md"], 2),
        (["entprog.json", "samples/a.mp4", "vae/notes.md", "vae/deep/config.json", "LICENSE", ".gitattributes"], 0),
        (["prompt_embeds.safetensors", "vae/old.safetensors"], 0),
    ],
)
def test_only_what_an_earlier_publication_left_is_stale(there, stale):
    found = whole.stale(there, ["entprog.json", "README.md", "vae/config.json"])
    assert found == sorted(there[1 : 1 + stale])


def test_what_a_folder_of_an_older_version_lacks_is_made(output, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(output / "model", old)
    for name in ("model_index.json", "pipeline.py", "skeleton.py"):
        (old / name).unlink()
    assert published("--checkpoint", old, "--to", tmp_path / "there").exit_code == 0
    assert whole.missing(tmp_path / "there") == [] and whole.missing(old) == ["model_index.json"]
    card = (tmp_path / "there" / "README.md").read_text()
    assert "# old\n" in card and "Base: new weights" in card, card
    assert folders.saved(tmp_path / "there") == folders.saved(old)


def test_the_weights_of_an_earlier_step_are_a_whole_pipeline_too(tmp_path):
    run = Trained()
    run.denoiser.save(tmp_path / "model", shape=SHAPE)
    averages = {name: tensor.clone() for name, tensor in run.state.ema.items()}
    before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    checkpoint.save(tmp_path / "checkpoints", run.network, run.state, "id", keep=2)
    run.update()
    done = published("--checkpoint", tmp_path, "--to", tmp_path / "there", "--step", 2)
    assert done.exit_code == 0 and whole.missing(tmp_path / "there") == [], done.output
    weights = load_file(tmp_path / "there" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = before | averages
    assert averages and weights.keys() == before.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    about, card = folders.saved(tmp_path / "there"), (tmp_path / "there" / "README.md").read_text()
    assert about["provenance"] == folders.saved(tmp_path / "model")["provenance"] | {"step": 2}
    assert f"# {tmp_path.name}\n" in card and "Base: new weights" in card, card
    for name, content in contents(tmp_path / "there").items():
        assert str(tmp_path).encode() not in content, f"{name} names this machine"
    gone = published("--checkpoint", tmp_path, "--to", tmp_path / "other", "--step", 7)
    assert gone.exit_code == 2 and "no whole checkpoint step-00000007" in gone.output and "step-00000002" in gone.output
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")  # train.checkpoints
    step = ("--checkpoint", tmp_path, "--to", tmp_path / "other", "--step", 2)
    assert published(*step).exit_code == 2
    assert published(*step, "--checkpoints", f"file://{tmp_path}/elsewhere").exit_code == 0
    other = load_file(tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    odd = published("--checkpoint", tmp_path, "--to", tmp_path / "other", "--checkpoints", tmp_path / "elsewhere")
    assert odd.exit_code == 2 and "give that too" in odd.output


def test_an_earlier_step_of_adapters_is_refused_before_anything_is_fetched(tmp_path):
    run = Trained()
    lora.add(run.network, blocks(run.network), config.Lora(rank=2), seed=0)
    checkpoint.save(tmp_path / "checkpoints", run.network, run.state, "id", keep=2)
    step = run.state.step
    done = published(
        "--checkpoint",
        "s3://nowhere/run",
        "--to",
        tmp_path / "x",
        "--step",
        step,
        "--checkpoints",
        tmp_path / "checkpoints",
    )
    assert done.exit_code == 2 and "is of adapters (train.lora)" in done.output, done.output
    assert not (tmp_path / "x").exists()


def test_a_bucket(output):
    with servers.s3() as endpoint:
        address = endpoint.removeprefix("http://")
        system = fs.S3FileSystem(
            endpoint_override=address, scheme="http", region="us-east-1", allow_bucket_creation=True
        )
        system.create_dir("shop")
        query = f"?scheme=http&endpoint_override={address}&region=us-east-1"
        done = published("--checkpoint", output, "--to", f"s3://shop/dancer{query}")
        assert done.exit_code == 0, done.output
        for name in ("prompt_embeds.safetensors", "vae/config.json", "samples/a.mp4"):
            with system.open_output_stream(f"shop/dancer/{name}") as stream:
                stream.write(b"of an earlier one, or a person's")
        done = published("--checkpoint", output, "--to", f"s3://shop/dancer{query}")
        assert done.exit_code == 0, done.output
        listed = system.get_file_info(fs.FileSelector("shop/dancer", recursive=True))
        names = {info.path.removeprefix("shop/dancer/") for info in listed if info.is_file}
    assert names >= {"model_index.json", "pipeline.py", "README.md", "transformer/config.json", "samples/a.mp4"}
    assert not names & {"prompt_embeds.safetensors", "vae/config.json"}, "they would act in the new one"


class Hub(http.server.BaseHTTPRequestHandler):
    """What of the hub's interface an upload of small files uses, and a download."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/api/repos/create"):
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/dancer"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            return self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
            return self._answer(
                {
                    "commitUrl": f"http://127.0.0.1:{self.server.server_port}/me/dancer/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "pullRequestUrl": None,
                }
            )
        if self.path.endswith("/api/validate-yaml"):
            return self._answer({"errors": [], "warnings": []})
        return self._answer({"error": f"unknown: {self.path}"}, 404)

    def do_GET(self):
        if "/tree/" in self.path:
            found = {name: len(content) for name, content in self.server.files.items()}
            return self._answer([{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in found.items()])
        if "/resolve/" in self.path:
            return self._file(self.path.partition(f"/resolve/{'0' * 40}/")[2])
        return self._answer({"id": "me/dancer", "sha": "0" * 40, "siblings": []})

    def do_HEAD(self):
        self.do_GET()

    def _file(self, name):
        if self.command == "GET":
            self.server.fetched.append(name)
        content = self.server.files[name]
        self.send_response(200)
        for header, value in (("X-Repo-Commit", "0" * 40), ("ETag", f'"{name}"'), ("Content-Length", len(content))):
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    def _answer(self, value, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback, empty; this machine's cache of it is too."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.created, server.files, server.fetched = [], {}, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
        yield server
        server.shutdown()


def test_a_hub(output, hub):
    server, of_earlier = hub, {"prompt_embeds.safetensors": b"old", "vae/a[1].json": b"{}"}
    server.files |= {"entprog.json": b"{}", **of_earlier, "LICENSE": b"me"}
    done = published("--checkpoint", output, "--to", "hf://me/dancer")
    assert done.exit_code == 0, done.output
    assert not server.files.keys() & of_earlier.keys(), "they would act in the new one"
    assert server.files["LICENSE"] == b"me"
    created = server.created[0]  # older and newer versions of the library say it differently
    assert created.get("visibility") == "private" or created.get("private") is True
    assert created["name"] == "dancer"
    index = json.loads(server.files["model_index.json"])
    assert index["family"] == "wan" and "secret" not in done.output
    assert server.files["transformer/diffusion_pytorch_model.safetensors"]


def test_a_hub_that_does_not_answer_is_one_line(output, monkeypatch):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    done = published("--checkpoint", output, "--to", "hf://me/dancer")
    assert done.exit_code == 2 and len(done.output.splitlines()) == 1, done.output
    assert "--to: hf://me/dancer does not take it: " in done.output


def test_the_licence_of_a_base_is_read_without_its_weights(hub):
    hub.files |= {"model_index.json": b"{}", "transformer/config.json": b"{}"}
    hub.files |= {f"{name}/diffusion_pytorch_model.safetensors": b"tens of GB" for name in ("transformer", "vae")}
    hub.files["README.md"] = b"---\nlicense: apache-2.0\n---\n"
    assert model_card.licence_of("someone/base") == {"license": "apache-2.0"}
    assert "README.md" in hub.fetched and not [name for name in hub.fetched if name.endswith("safetensors")]


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("hf://dancer", "named hf://OWNER/NAME"),
        ("s3://me:secret@bucket/x", "holds a user or password"),
        ("ftp://somewhere/x", "no place"),
        ("there", "no published pipeline"),
        ("there/mine.txt", "is a file"),
    ],
)
def test_a_place_that_is_none_is_refused_in_one_line(to, said, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    done = published("--checkpoint", output, "--to", to)
    assert done.exit_code == 2 and len(done.output.splitlines()) == 1, done.output
    assert said in done.output and "secret" not in done.output


def test_a_folder_that_is_not_whole_names_what_it_lacks_and_the_command(output, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(output, broken)
    shutil.rmtree(broken / "model" / "scheduler")
    (broken / "result.json").write_text(json.dumps({"command": "entprog train --preset x"}))
    done = published("--checkpoint", broken, "--to", tmp_path / "there")
    assert done.exit_code == 2 and "lacks scheduler/" in done.output and "entprog train --preset x" in done.output
    assert not (tmp_path / "there").exists()
    nothing = published("--checkpoint", tmp_path, "--to", tmp_path / "there")
    assert nothing.exit_code == 2 and "was not written by pipelines.train" in nothing.output


def test_a_light_folder_that_names_this_machine_goes_nowhere_else(output, tmp_path):
    light = tmp_path / "light"
    shutil.copytree(output / "model", light)
    about = json.loads((light / "entprog.json").read_text())
    place = {"name": "/data/base", "revision": None, "subfolder": "vae", "library": "diffusers", "kind": "X"}
    (light / "entprog.json").write_text(json.dumps(about | {"elsewhere": {"vae": place}}))
    done = published("--checkpoint", light, "--to", "hf://me/dancer")
    assert done.exit_code == 2 and "vae (/data/base) lies on this machine alone" in done.output


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: stable-video\n---\n",
            {"license": "other", "license_name": "stable-video"},
        ),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("no card\n", {}),
        ("---\n: - {\n---\n", {}),
    ],
)
def test_the_card_has_figures_data_base_and_its_licence(front, licence, output, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "model"
    shutil.copytree(output / "model", base)
    shutil.copytree(output / "model", folder)
    (base / "README.md").write_text(front)
    experiment = config.build(config.merge(tiny_experiment().model_dump(), {"model": {"base": str(base), "init": {}}}))
    model_card.write(folder, experiment.name, experiment, RESULT)
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])
    assert {k: v for k, v in head.items() if k.startswith("license")} == licence
    assert licence.get("license_name", licence.get("license", "not stated")) in text
    for said in ("| held-out loss | 0.25 |", "`abc123`", "entprog, blocks trained by stage: 2", "2 frames of 16x16"):
        assert said in text
    assert str(tmp_path) not in text, "a machine's folders are nobody's business"
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    compile(code, "card", "exec")
    phone = Image.new("RGB", (16, 16), "red")
    phone.paste("blue", (0, 0, 8, 16))  # stored on its side: blue is below
    phone.getexif()[0x0112] = 8
    phone.save(tmp_path / "person.png", exif=phone.getexif())
    example = re.search(r"reference=(.*?), (?:pose=|num_inference)", code)[1].replace(
        "person.png", f"{tmp_path}/person.png"
    )
    upright = eval(example, {"Image": Image, "ImageOps": ImageOps})
    assert [upright.getpixel((8, y)) for y in (2, 13)] == [(255, 0, 0), (0, 0, 255)]
