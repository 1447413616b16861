"""Shards of real people, prepared once for all test files."""

import os
import shutil

from filelock import FileLock

from entprog import config

CLIPS = config.ClipShape(frames=8, height=48, width=32, fps=12)
"""Of `two_people`."""


def two_people(tmp_path_factory):
    """Shards of two real videos, one of them held out; prepared once for all files of all processes, in the Ray of the
    first."""
    from entprog.media import assets
    from pipelines import prepare

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "two-people"
    with FileLock(f"{folder}.lock"):
        if not (folder / "dataset.json").exists():
            videos = tmp_path_factory.mktemp("videos")
            for name in ("cam01", "cam04"):
                shutil.copy(assets.clip(name), videos / f"{name}.mp4")
            settings = {"data": {"shape": CLIPS.model_dump()}, "prepare": {"held_out": ["cam04"], "stride": 3}}
            prepare.run(videos, folder, config.build(settings, config.Preparation))
    return folder
