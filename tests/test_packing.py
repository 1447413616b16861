"""Splits that stay, shards that are not written twice."""

import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entprog.config import ClipShape
from entprog.data import shards
from entprog.errors import UserError
from pipelines.preparing import packing

names = st.integers(0, 60).map("{}.mp4".format)
splits = st.sampled_from(shards.SPLITS)


@given(
    st.sets(names, min_size=1),
    st.dictionaries(names, splits),
    st.dictionaries(names, splits),
    st.floats(0, 0.99),
    st.integers(0, 3),
)
def test_what_has_a_split_keeps_it_and_a_manifest_is_obeyed(kept, before, asked, ratio, seed):
    new = sorted(kept - before.keys())
    everything = {*new, *before}
    try:
        out = packing.split(new, set(), ratio, seed, asked, before)
    except UserError:
        fixed = [before.get(file) or asked.get(file) for file in everything]
        assert fixed.count("train") == 0, "refused although something is left to train on"
        return
    assert out.keys() == set(new)
    assert all(out[file] == asked[file] for file in new if file in asked)
    assert out == packing.split(new[::-1], set(), ratio, seed, asked, before)
    held = [file for file in everything if {**out, **before}[file] == "held_out"]
    assert len(held) < len(everything)
    free = [file for file in new if file not in asked]
    due = min(len(everything) - 1, max(1, round(ratio * len(everything)))) if ratio > 0 and len(everything) > 1 else 0
    fixed_held = len(held) - sum(out[file] == "held_out" for file in free)
    assert sum(out[file] == "held_out" for file in free) == min(len(free), max(0, due - fixed_held))


@given(
    st.lists(names, unique=True, min_size=3, max_size=20), st.integers(1, 19), st.floats(0.01, 0.9), st.integers(0, 3)
)
def test_adding_moves_no_source(files, first, ratio, seed):
    first = min(first, len(files) - 1)
    one = packing.split(files[:first], set(), ratio, seed)
    with suppress(UserError):
        more = packing.split(files[first:], set(), ratio, seed, {}, one)
        assert not more.keys() & one.keys() and "train" in {**one, **more}.values()


@given(
    st.lists(names, unique=True, min_size=1, max_size=20),
    st.lists(st.integers(0, 4), min_size=20, max_size=20),
    st.dictionaries(names, splits, max_size=3),
    st.sets(names, max_size=2),
    st.floats(0, 0.9),
    st.integers(0, 3),
)
def test_sources_of_one_content_are_on_one_side(files, contents, before, held, ratio, seed):
    content = dict(zip(files, map(str, contents), strict=False))
    before = {file: side for file, side in before.items() if file not in files}
    with suppress(UserError):
        out = packing.split(files, held, ratio, seed, {}, before, content)
        sides = {content[file]: side for file, side in out.items()}
        assert all(sides[content[file]] == side for file, side in out.items())
        assert "train" in {**before, **out}.values()


def test_a_copy_goes_where_its_original_is_and_a_manifest_is_obeyed():
    content = {"a.mp4": "1", "copy.mp4": "1", "b.mp4": "2"}
    assert packing.split(["copy.mp4"], set(), 0.1, 0, {}, {"a.mp4": "held_out", "b.mp4": "train"}, content) == {
        "copy.mp4": "held_out"
    }
    assert packing.split(["a.mp4", "b.mp4", "copy.mp4"], {"a.mp4"}, 0.1, 0, {}, {}, content) == {
        "a.mp4": "held_out",
        "b.mp4": "train",
        "copy.mp4": "held_out",
    }
    asked = {"a.mp4": "train", "copy.mp4": "held_out"}
    out = packing.split(["a.mp4", "b.mp4", "copy.mp4"], set(), 0.1, 0, asked, {}, content)
    assert (out["a.mp4"], out["copy.mp4"]) == ("train", "held_out")
    line = {"kind": "input", "kept": True, "message": "", "sha256": "1"}
    lines = [{**line, "file": file, "split": out[file]} for file in ("a.mp4", "copy.mp4")]
    one, other = packing.with_twins(lines)
    assert one["message"] == "the same content as copy.mp4, which is on the other side of the split"
    assert other["message"].startswith("the same content as a.mp4")
    assert packing.with_twins(lines[:1]) == lines[:1]
    (copy,) = packing.with_twins([{**lines[1], "split": "train"}], lines[:1])
    assert copy["message"] == "the same content as a.mp4"


def clip(i: int, shape: ClipShape) -> dict:
    blank = {"source": "a.mp4", "source_sha256": "", "split": "", "caption": "", "start_s": 0.0, "fps": shape.fps}
    sizes = ("source_height", "source_width", "crop_left", "crop_top", "crop_width", "crop_height")
    blank |= dict.fromkeys(sizes, 0) | {"visibility": 1.0, "reference_s": 0.0, "reference": b"png", "video": bytes([i])}
    pose = np.zeros((shape.frames, 33, 3), np.float32)
    shaped = {"frames": shape.frames, "height": shape.height, "width": shape.width, "pose": pose}
    return blank | shaped | {"clip_id": f"a.mp4#{i}"}


def test_a_finished_shard_is_not_written_again_and_a_damaged_one_is(tmp_path):
    shape = ClipShape(frames=2, height=16, width=16, fps=8)
    (tmp_path / "parts").mkdir()
    shards.write_shard(tmp_path / "parts", "k.parquet", (clip(i, shape) for i in range(20)), shape)
    clips = [(f"a.mp4#{i}", "a.mp4", "k", i) for i in range(3, 17)]
    row = {"plan": json.dumps({"file": "train/00000.parquet", "split": "train", "points": 33, "clips": clips})}
    first = packing.pack(row, tmp_path, shape)
    shard = tmp_path / "train" / "00000.parquet"
    written, whole = shard.stat().st_mtime_ns, shard.read_bytes()
    assert packing.pack(row, tmp_path, shape) == first and shard.stat().st_mtime_ns == written
    shard.write_bytes(whole[:-50])
    assert packing.pack(row, tmp_path, shape) == first and shard.read_bytes() == whole
    fewer = {"plan": json.dumps({"file": "train/00000.parquet", "split": "train", "points": 33, "clips": clips[:5]})}
    assert packing.pack(fewer, tmp_path, shape)["clips"] == 5
    assert [row["video"] for row in shards.read_rows(shard, range(5))] == [bytes([i]) for i in range(3, 8)]
    with pytest.raises(shards.DamagedShardError):
        (tmp_path / "parts" / "k.parquet").write_bytes(b"")
        packing.pack(row, tmp_path, shape)


def test_clips_without_face_and_hands_are_counted():
    parts = [{"clips": 3, "points": 133}, {"clips": 2, "points": 33}, {"clips": 1}, None, {"clips": 0, "points": 33}]
    assert packing.without_parts(parts, packing.points_of(parts)) == "3 of 6 clips have no face and hands"
    assert packing.without_parts(parts[:1], 133) == packing.without_parts(parts[1:], 33) == ""
