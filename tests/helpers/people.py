"""Shards of real people, prepared once for all test files."""

import shutil

from entprog import config

CLIPS = config.ClipShape(frames=8, height=48, width=32, fps=12)
"""Of `two_people`."""


def two_people(tmp_path_factory):
    """Shards of two real videos, one of them held out; prepared once for all modules, in the Ray of the first."""
    from entprog.media import assets
    from pipelines import prepare

    folder = tmp_path_factory.getbasetemp() / "two-people"
    if not (folder / "dataset.json").exists():
        videos = tmp_path_factory.mktemp("videos")
        for name in ("cam01", "cam04"):
            shutil.copy(assets.clip(name), videos / f"{name}.mp4")
        settings = {"data": {"shape": CLIPS.model_dump()}, "prepare": {"held_out": ["cam04"], "stride": 3}}
        prepare.run(videos, folder, config.build(settings, config.Preparation))
    return folder
