"""Real material: fetched once, checked, never touched. Packages come from a folder of wheels: real pip, no network."""

import hashlib
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from entprog.config import Evaluate, Prepare
from entprog.errors import UserError
from entprog.media import assets, pose, video
from entprog.quality import networks


@pytest.fixture
def cache(tmp_path) -> Path:
    """A copy of the cache."""
    return Path(shutil.copytree(assets.cache_folder(), tmp_path / "cache"))


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path, package: str, files: dict[str, bytes], packed: int = zipfile.ZIP_STORED) -> None:
    name, version = package.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w", packed) as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for member, content in files.items():
            archive.writestr(member, content)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_all_there_is_silent():
    done = subprocess.run([sys.executable, "-m", "entprog.media.assets"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_name_has_a_file():
    assert all(assets.clip(name).is_file() for name in assets.CLIPS)
    assert all(assets.network(name).is_file() for name in assets.NETWORKS)
    with pytest.raises(ValueError, match="no asset 'cam05'"):
        assets.clip("cam05")


def test_a_damaged_file_is_fetched_again(cache, wheels):
    asset = assets.ASSETS["no_face"]
    whole = hashes(cache)
    wheel(wheels, asset.package, {asset.member: (cache / asset.local).read_bytes()})
    (cache / asset.local).write_bytes(b"damaged")
    assert assets.fetch(cache) == ["no_face"]
    assert hashes(cache) == whole
    assert assets.fetch(cache) == []


def test_a_damaged_or_outdated_cut_is_made_again(cache, monkeypatch):
    monkeypatch.setitem(assets.CUTS, "jump", assets.Cut("sports", 5, 15, (400, 0, 350, 240)))
    assert assets.fetch(cache) == ["jump"]
    whole = hashes(cache)
    assert video.probe(cache / "clips" / "jump.mp4").frames == 10
    (cache / "clips" / "jump.mp4").write_bytes(b"damaged")
    assert assets.fetch(cache) == ["jump"]
    assert hashes(cache) == whole
    assert assets.fetch(cache) == []


def run(cache: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "entprog.media.assets", "--cache", str(cache)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_no_registry_names_the_file(cache, wheels):
    (cache / "clips" / "sports.mp4").unlink()
    said = one_line(run(cache))
    assert "cannot download sports2d==0.8.34 for demo.mp4" in said and "index" in said


def test_a_wrong_hash_names_the_file(cache, wheels):
    asset = assets.ASSETS["no_face"]
    wheel(wheels, asset.package, {asset.member: b"something else"})
    (cache / asset.local).unlink()
    said = one_line(run(cache))
    assert asset.member in said and asset.sha256 in said
    assert not (cache / asset.local).exists()
    wheel(wheels, asset.package, {})
    assert f"holds no {asset.member}" in one_line(run(cache))


def test_a_member_that_would_fill_the_memory_is_not_unpacked(cache, wheels):
    asset = assets.ASSETS["no_face"]
    (cache / asset.local).unlink()
    wheel(wheels, asset.package, {asset.member: bytes(assets.LARGEST_BYTES + 1)}, zipfile.ZIP_DEFLATED)
    (bomb,) = wheels.iterdir()
    assert bomb.stat().st_size < 200_000
    assert "would unpack to 64 MiB, more than 64" in one_line(run(cache))
    content = bomb.read_bytes()  # and one that claims to be small
    lying = content.replace((assets.LARGEST_BYTES + 1).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    assert lying != content
    bomb.write_bytes(lying)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"cannot unpack|has sha256"):
        assets._unpack(bomb, [asset], cache)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    assert not (cache / asset.local).exists()


@pytest.mark.parametrize("damage", ["no zip", "cut", "bits"])
def test_a_damaged_wheel_is_one_line(cache, tmp_path, damage):
    asset = assets.ASSETS["no_face"]
    wheel(tmp_path, asset.package, {asset.member: bytes(100_000)}, zipfile.ZIP_DEFLATED)
    (path,) = tmp_path.glob("*.whl")
    content = bytearray(path.read_bytes())
    at = content.index(asset.member.encode()) + len(asset.member)
    if damage == "bits":
        content[at + 4 : at + 40] = bytes(36)
    path.write_bytes(b"<html>404" if damage == "no zip" else content[:-100] if damage == "cut" else content)
    with pytest.raises(UserError, match=r"is no wheel|cannot unpack") as raised:
        assets._unpack(path, [asset], cache)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", assets.NETWORKS)
def test_a_network_that_was_changed_in_the_cache_is_not_loaded(name, cache, monkeypatch):
    monkeypatch.setenv("ENTPROG_CACHE", str(cache))
    path = assets.network(name)
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as one who does not want to be seen
    with pytest.raises(UserError, match="is damaged or is another file: run python -m entprog"):
        assets.network(name)


def test_a_changed_network_ends_what_would_load_it(cache, monkeypatch):
    monkeypatch.setenv("ENTPROG_CACHE", str(cache))
    for name in ("pose_detection", "stlpips"):
        path = cache / assets.ASSETS[name].local
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"pose_detection\.tflite is damaged"):
        pose.estimator(Prepare())
    with pytest.raises(UserError, match=r"stlpips\.pth is damaged"):
        networks.load("stlpips", Evaluate())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write to the cache" in one_line(run(tmp_path / "file" / "cache"))


def test_an_empty_cache_says_how_to_fill_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"clips/cam01.mp4 is not in the cache .*run python -m entprog\.media\.assets"):
        assets.clip("cam01")


def test_demo_videos(tmp_path):
    before = hashes(assets.cache_folder())
    folder = assets.demo_videos(tmp_path / "videos")
    first = hashes(folder)
    assert set(first) == {f"{name}.mp4" for name in (*assets.DEMO, "damaged")}
    assert hashes(assets.demo_videos(folder)) == first
    assert hashes(assets.cache_folder()) == before
    with pytest.raises(video.VideoError) as raised:
        video.probe(folder / "damaged.mp4")
    assert raised.value.reason == "corrupt"
    for name, frames in (("walk", 125), ("jump", 150)):
        assert video.probe(folder / f"{name}.mp4").frames == frames
    (folder / "cam01.mp4").write_bytes(b"changed by a person")  # a copy: the cache is another file
    assert hashes(assets.cache_folder()) == before
