"""What --input takes: folders, globs, manifests, lists, images; here and elsewhere; and what it refuses."""

import errno
import functools
import hashlib
import http.server
import json
import os
import shutil
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from entprog import config
from entprog.errors import UserError
from entprog.media import assets, footage, frames, h264, video
from entprog.preparing import inputs, manifest, probing, rows
from entprog.preparing.rows import is_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A real video, numbered images of it in TikTok's layout, and files that are neither."""
    folder = tmp_path_factory.mktemp("in put")
    size = (240, 134)
    few = [f for _, f in video.iter_frames(assets.clip("cam01"), fps=10, end_s=1, size=size)]
    h264.write(folder / "a" / "cam01.mp4", few, fps=10)
    images = folder / "00001" / "images"
    images.mkdir(parents=True)
    for i, frame in enumerate(few):
        Image.fromarray(frame).save(images / f"{i:04d}.png")
    (folder / "00001" / "poster.png").write_bytes((images / "0000.png").read_bytes())
    (folder / "notes.md").write_text("about")
    return folder


TV = config.Prepare(frames_fps=24)
HERE = config.Prepare(hosts=("127.0.0.1",))
"""Of a person who says that this machine may be asked."""


def names(found: inputs.Inputs) -> list[str]:
    return [row["file"] for row in found.rows]


def test_a_folder_has_videos_folders_of_images_and_the_rest(folder):
    found = inputs.find(folder, TV)
    assert found.kind == "folder"
    assert names(found) == ["00001/images", "00001/poster.png", "a/cam01.mp4", "notes.md"]
    assert [row["frames_fps"] for row in found.rows] == [24, 0, 0, 0]
    assert [is_video(row) for row in found.rows] == [True, False, True, False]
    assert names(inputs.find(f"file://{str(folder).replace(' ', '%20')}", TV)) == names(found)
    alone = inputs.find(folder / "00001" / "images", TV)
    assert alone.kind == "frame folder" and names(alone) == ["images"]
    assert names(inputs.find(folder / "a" / "cam01.mp4", TV)) == ["cam01.mp4"]
    assert names(inputs.find(folder, TV, leave_out=folder / "a")) == ["00001/images", "00001/poster.png", "notes.md"]


def test_what_cannot_be_meant_is_one_line(folder):
    with pytest.raises(UserError, match=r"notes.md is no video by its name"):
        inputs.find(folder / "notes.md")
    with pytest.raises(UserError, match="input and output are the same folder"):
        inputs.find(folder, leave_out=folder / "a" / "..")


def test_two_sources_of_one_name_are_refused(folder, tmp_path):
    """They would share a part, and one would be gone without a line in the ledger."""
    dance = tmp_path / "dance"
    shutil.copytree(folder / "00001" / "images", dance)
    assert names(inputs.find(dance, TV)) == ["dance"]
    shutil.copytree(folder / "00001" / "images", dance / "dance")
    with pytest.raises(
        UserError, match=rf"{dance} and {dance}/dance would both be called 'dance': rename one"
    ) as error:
        inputs.find(dance, TV)
    assert "\n" not in str(error.value)
    assert names(inputs.find(tmp_path, TV)) == ["dance", "dance/dance"]


def test_a_glob(folder):
    assert names(inputs.find(f"{folder}/*/*.mp4")) == ["a/cam01.mp4"]
    found = inputs.find(f"{folder}/**/i*")
    assert found.kind == "glob" and names(found) == ["00001/images"]
    with pytest.raises(UserError, match="has no files"):
        inputs.find(f"{folder}/*.webm")


def test_a_glob_takes_what_links_lead_to_once(tmp_path):
    """As a folder does that is searched; a link to a file is a file of its own."""
    (tmp_path / "day1" / "images").mkdir(parents=True)
    for name in ("a.mp4", "images/1.png", "images/2.png"):
        (tmp_path / "day1" / name).write_bytes(b"x")
    (tmp_path / "day1" / "b.mp4").symlink_to("a.mp4")
    (tmp_path / "latest").symlink_to("day1")
    (tmp_path / "all").symlink_to(".")
    videos = ["day1/a.mp4", "day1/b.mp4"]
    assert names(inputs.find(f"{tmp_path}/**/*.mp4")) == videos
    assert names(inputs.find(f"{tmp_path}/**/i*")) == ["day1/images"]
    assert names(inputs.find(tmp_path)) == [*videos, "day1/images"]


def failing(call, *names: str):
    """The function of `os`, on a network disk that is away for what has one of these names."""

    def fails(path=".", *args, **options):
        if Path(os.fsdecode(path)).name in names:
            raise OSError(errno.ESTALE, "Stale file handle", os.fspath(path))
        return call(path, *args, **options)

    return fails


@pytest.mark.parametrize("pattern", ["", "/**/*.mp4", "/*/*.mp4", "/*/**"])
def test_a_folder_that_cannot_be_listed_makes_no_smaller_dataset(pattern, tmp_path, monkeypatch):
    for name in ("a/1.mp4", "b/2.mp4", "3.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(os, "scandir", failing(os.scandir, "b"))
    with pytest.raises(UserError, match=rf"cannot list {tmp_path}/b \(Stale file handle\)"):
        inputs.find(f"{tmp_path}{pattern}")
    assert names(inputs.find(f"{tmp_path}/a/*.mp4")) == ["1.mp4"], "a pattern may leave it out"


@pytest.mark.parametrize("name", ["a.pose.npz", "a.mask.mp4", "a.txt"])
def test_what_lies_beside_a_video_is_not_passed_over_where_a_disk_fails(name, tmp_path, monkeypatch):
    for file in ("a.mp4", name):
        (tmp_path / file).write_bytes(b"x")
    monkeypatch.setattr(os, "stat", failing(os.stat, name))
    with pytest.raises(UserError, match=rf"cannot list {tmp_path}/{name} \(Stale file handle\)"):
        inputs.find(tmp_path)


def test_a_caption_that_fails_as_it_is_read_is_named(tmp_path, monkeypatch):
    """Such an error names no file itself."""

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    for file in ("a.mp4", "a.txt"):
        (tmp_path / file).write_bytes(b"x")
    monkeypatch.setattr(Path, "read_text", fails)
    with pytest.raises(UserError, match=rf"cannot list {tmp_path}/a.txt \(Input/output error\)"):
        inputs.find(tmp_path)


def test_a_link_to_a_folder_on_a_disk_that_is_away_is_no_file_without_ending(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a.mp4")
    monkeypatch.setattr(os, "stat", failing(os.stat, "b"))
    for where in (tmp_path, tmp_path / "b", f"{tmp_path}/*"):
        with pytest.raises(UserError, match=rf"cannot list {tmp_path}/b "):
            inputs.find(where)


ENTRIES = [
    {"path": "a/cam01.mp4", "caption": 'a man, "balancing"', "split": "held_out", "crop": [0, 0, 134, 120]},
    {"path": "a/cam01.mp4", "caption": "line one\nline two", "split": "train", "crop": [0, 100, 134, 140]},
    {"path": "00001/images", "caption": "", "split": "", "crop": None, "fps": 10},
    {"path": "gone.mp4", "caption": "", "split": "", "crop": None},
]


def write_manifest(path: Path, entries: list[dict]) -> Path:
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(entry) for entry in entries))
    elif path.suffix == ".json":
        path.write_text(json.dumps(entries))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{n: e.get(n) for n in columns} for e in entries]), path)
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        message = [comma.join(columns)]
        for entry in entries:
            cells = ("" if entry.get(n) is None else str(entry[n]).strip("[]") for n in columns)
            message.append(comma.join('"' + cell.replace('"', '""') + '"' for cell in cells))
        path.write_text("\n".join(message) + "\n")
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_a_manifest_says_caption_split_crop_and_rate(kind, folder):
    found = inputs.find(write_manifest(folder.parent / folder.name / f".m{kind}", ENTRIES))
    assert found.kind == "manifest" and not found.notes
    message = {row["file"]: (row["caption"], row["split"], row["crop"], row["frames_fps"]) for row in found.rows}
    assert message == {
        "a/cam01.mp4@0,0,134,120": ('a man, "balancing"', "held_out", "0,0,134,120", 0),
        "a/cam01.mp4@0,100,134,140": ("line one\nline two", "train", "0,100,134,140", 0),
        "00001/images": ("", "", "", 10),
        "gone.mp4": ("", "", "", 0),
    }
    assert Path(os.fsdecode(found.rows[1]["path"])).is_file(), "relative paths are meant from the manifest's folder"


def test_a_rate_of_a_video_makes_it_no_folder(folder, tmp_path):
    """A column that tables of videos often have."""
    shutil.copytree(folder / "00001" / "images", tmp_path / "7.mp4")
    far = "path,fps\nhttps://host/b.mp4,25\ns3://bucket/c.mov,25\ns3://bucket/images,12\nhttps://host/images,12\n"
    (tmp_path / "m.csv").write_text(f"{far}{folder}/a/cam01.mp4,29.97\ngone.mp4,24\n7.mp4,12\ngone,12\n")
    found = inputs.find(tmp_path / "m.csv")
    rates = {row["file"].rpartition("/")[2]: row["frames_fps"] for row in found.rows if row["frames_fps"]}
    assert rates == {"images": 12, "7.mp4": 12, "gone": 12} and len(found.rows) == 8
    assert found.notes == (f"fps of 4 videos of {tmp_path}/m.csv is not used: it is the rate of folders of images",)
    (row,) = (row for row in found.rows if row["file"].endswith("cam01.mp4"))
    assert probing.probe(row, config.Preparation())["reason"] == ""


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        ("s3://bucket/dance #3.MP4", ".mp4"),
        ("gs://bucket/sub?/what?.mov", ".mov"),
        ("s3://bucket/a.mp4?X-Amz-Signature=1.5", ".mp4"),
        ("s3://bucket/notes#1.md?token=a.secret", ""),
        ("https://host/a.mp4?of=b.txt#c.mov", ".mp4"),
        ("https://host/a?b.mp4", ""),
        ("/here/what?.mp4", ".mp4"),
    ],
)
def test_in_a_bucket_no_query_begins(path, ending):
    """But no signature is shown that somebody has put there."""
    assert rows.ending(path) == ending


def test_a_list_of_videos(folder, tmp_path):
    (tmp_path / "train.txt").write_text(f"# UBC\n{folder}/a/cam01.mp4\n\nhttps://u:secret@host/x/91.mp4?token=secret\n")
    found = inputs.find(tmp_path / "train.txt")
    assert found.kind == "video list" and len(found.rows) == 2
    assert "secret" not in "".join(names(found)), "names go into ledgers, shards and logs"
    assert any("https://host/x/91.mp4" in name for name in names(found))


@pytest.mark.parametrize(
    "content",
    [
        "path, caption, Split\na.mp4, a man, held_out\n",
        ' Path ,\tCAPTION , split\na.mp4,  "a man",held_out \n',
        "\ufeffpath,caption,split,\na.mp4,a man,held_out,\n",
        "split,caption,path\r\n\r\nheld_out,a man,a.mp4\r\n",
    ],
)
def test_spaces_and_capitals_in_a_header_lose_nothing(content, tmp_path):
    (tmp_path / "m.csv").write_bytes(content.encode())
    (row,) = inputs.find(tmp_path / "m.csv").rows
    assert (row["file"], row["caption"], row["split"]) == ("a.mp4", "a man", "held_out")


def test_columns_that_are_not_read_are_named_with_what_was_meant(tmp_path):
    (tmp_path / "m.csv").write_text("path,captions,id\na.mp4,x,1\n")
    (note,) = inputs.find(tmp_path / "m.csv").notes
    assert "captions (did you mean caption?), id" in note


def test_texts_beside_videos_are_their_captions(tmp_path):
    texts = {"a.mp4": " a man\n", "b/b.MOV": "\ufeffa woman", "c.mp4": None, "gone.mp4": "", "images.mp4": "x" * 70_000}
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"video")
        if text is not None:
            path.with_suffix(".txt").write_text(text, "utf-8")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "notes.txt").write_text("no caption")
    (tmp_path / "a.mask.mp4").touch()
    (tmp_path / "images.v1").mkdir()
    for number in (1, 2):
        (tmp_path / "images.v1" / f"{number}.png").touch()
    (tmp_path / "images.v1.txt").write_text("a dance")
    (tmp_path / "images.caption").touch()
    (tmp_path / "metadata.jsonl").write_text("{}")
    found = inputs.find(tmp_path)
    message = {row["file"]: row["caption"] for row in found.rows}
    assert message == {
        "a.mp4": "a man", "b/b.MOV": "a woman", "c.mp4": "", "c.txt": "", "gone.mp4": "", "images.caption": "",
        "images.mp4": "", "images.txt": "", "images.v1": "a dance", "metadata.jsonl": "", "notes.txt": "",
    }  # fmt: skip
    notes = " | ".join(found.notes)
    assert "captions of 3 of 6 videos" in notes and "1 video with an empty .txt file beside (gone.mp4)" in notes
    assert "2 .txt files beside videos cannot be read" in notes
    assert "2 files of text (images.caption) not read: a caption is NAME.txt" in notes
    assert "metadata.jsonl: not read; if that is the manifest, give it as --input" in notes
    for one in (tmp_path / "a.mp4", f"{tmp_path}/a.*"):
        (row,) = inputs.find(one).rows
        assert row["caption"] == "a man"


@pytest.mark.parametrize(("text", "message"), [('{"path": "a.mp4"}', "no list"), ("[1]", "no list"), ("[" * 9999, "")])
def test_json_that_is_no_manifest(text, message, tmp_path):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match=f"cannot read manifest .*{message}"):
        inputs.find(tmp_path / "m.json")


BOMBS = {
    "plain": pa.array(["x" * 1000] * 300_000),
    "dictionary": pa.array(["x" * 1000] * 300_000).dictionary_encode(),
    "lists": pa.array([["x" * 1000]] * 300_000, pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    "structs": pa.array([{"x": ["x" * 100_000]}]),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("column", ["path", "caption"])
def test_a_small_manifest_that_unpacks_to_much_is_refused(kind, column, tmp_path):
    values = BOMBS[kind]
    other = "caption" if column == "path" else "path"
    pq.write_table(pa.table({column: values, other: ["x"] * len(values)}), tmp_path / "m.parquet", compression="ZSTD")
    assert (tmp_path / "m.parquet").stat().st_size < 50_000
    small = config.Prepare(max_decoded_bytes=10 * 2**20)
    with pytest.raises(UserError, match=r"max_decoded_bytes|of type") as error:
        inputs.find(tmp_path / "m.parquet", small)
    assert str(error.value).count(str(tmp_path)) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet", ".json", ".tsv", ".txt", ".lst"])
def test_a_manifest_of_too_much_is_refused(kind, tmp_path, monkeypatch):
    path = tmp_path / f"m{kind}"
    if kind in manifest.LISTS:
        path.write_text("".join(f"{i}.mp4\n" for i in range(9)))
    else:
        write_manifest(path, [{"path": f"{i}.mp4"} for i in range(9)])
    with pytest.raises(UserError, match="max_decoded_bytes"):
        inputs.find(path, config.Prepare(max_decoded_bytes=20))
    monkeypatch.setattr(manifest, "MAX_ROWS", 8)
    with pytest.raises(UserError, match="more than 8 rows"):
        inputs.find(path)


def test_a_row_of_any_length_is_a_row_of_the_ledger(tmp_path):
    (tmp_path / "m.txt").write_text(f"{'x' * 1000}.mp4\n{'y/' * 5000}.mp4\n")
    rows = inputs.find(tmp_path / "m.txt").rows
    assert {probing.probe(row, config.Preparation())["reason"] for row in rows} == {"unreadable"} and len(rows) == 2


@pytest.mark.parametrize("fps", ["inf", ".inf", "nan", "0", "1e9"])
def test_a_rate_that_never_ends_is_refused(fps):
    for name in ("data.shape.fps", "prepare.frames_fps"):
        with pytest.raises(UserError, match=name):
            config.build(config.parse_overrides([f"{name}={fps}"]), config.Preparation)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,caption\na.mp4,x\n", "no column 'path'; columns found: caption, file"),
        (
            "paths,text,caption\na.mp4,x,y\n",
            "no column 'path' (did you mean paths?); columns found: caption, paths, text",
        ),
        ("path,split\na.mp4,test\n", "split is 'test', give train or held_out"),
        ("path,crop\na.mp4,1 2 3\n", "crop is '1 2 3', give left,top,width,height"),
        ("path,crop\na.mp4,0 0 0 5\n", "crop is '0 0 0 5'"),
        ("path,fps\na,fast\n", "row 1: fps is 'fast'"),
        ("path\na.mp4\nb.mp4\na.mp4\n", "rows 1 and 3 are both 'a.mp4'"),
        ("path\n", "has no files"),
        ("path,caption\na.mp4\n", "cannot read manifest"),
        ("", "cannot read manifest"),
        ("path,caption, Caption\na.mp4,x,y\n", "two columns of one name"),
        ("path,caption,path\na.mp4,x,b.mp4\n", "two columns of one name"),
        ('path,caption\na.mp4,"x\n', "cannot read manifest"),
    ],
)
def test_a_wrong_manifest_is_one_line(content, message, tmp_path):
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(UserError) as error:
        inputs.find(tmp_path / "m.csv")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"caption": ["a man dances", "someone moves"]', "caption is ['a man dances', 'someone moves'], give text"),
        ('"caption": {"en": "a man"}', "caption is {'en': 'a man'}, give text"),
        ('"caption": true', "caption is True, give text"),
        ('"crop": [10.9, 0, 100, 100]', "crop is [10.9, 0, 100, 100], give left,top,width,height in pixels"),
        ('"crop": [0, 0, Infinity, 100]', "crop is [0, 0, inf, 100], give left,top,width,height in pixels"),
    ],
)
def test_what_is_no_caption_and_no_crop_is_one_line(row, message, tmp_path):
    (tmp_path / "m.json").write_text(f'[{{"path": "a.mp4"}}, {{"path": "b.mp4", {row}}}]')
    with pytest.raises(UserError) as error:
        inputs.find(tmp_path / "m.json")
    assert f"row 2: {message}" in str(error.value) and "\n" not in str(error.value)


def test_a_caption_that_is_not_there_and_a_crop_of_whole_numbers(tmp_path):
    (tmp_path / "m.json").write_text('[{"path": "a.mp4", "caption": NaN, "crop": [1.0, 2, 30, 40]}]')
    (row,) = inputs.find(tmp_path / "m.json").rows
    assert row["caption"] == "" and row["crop"] == "1,2,30,40"


def test_a_folder_that_cannot_be_listed_ends_it(tmp_path):
    """A deep one, whose path is longer than the system takes: permissions would not keep root out."""
    (tmp_path / "a.mp4").write_text("no video")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(17):
        os.mkdir("d" * 250, dir_fd=here)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(UserError, match=rf"cannot list {tmp_path}/d+/.* \(File name too long\)") as error:
        inputs.find(tmp_path)
    assert "\n" not in str(error.value)


def test_half_a_character_and_a_byte_order_mark(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "a.mp4"}\n{"path": "b\\ud800.mp4"}\n')
    with pytest.raises(UserError, match="row 2: half a character"):
        inputs.find(tmp_path / "m.jsonl")
    for name, content in {"m.csv": "path\na.mp4\n", "m.txt": "a.mp4\n", "m.jsonl": '{"path": "a.mp4"}'}.items():
        (tmp_path / name).write_text("\ufeff" + content)
        assert names(inputs.find(tmp_path / name)) == ["a.mp4"], name


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"path": st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=20)},
            optional={"caption": st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20)},
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda entry: entry["path"],
    ),
    st.sampled_from([".jsonl", ".parquet"]),
)
def test_any_text_survives_a_manifest(tmp_path_factory, entries, kind):
    path = write_manifest(tmp_path_factory.mktemp("m") / f"m{kind}", entries)
    read, _ = manifest.read(path, "m")
    assert [(e.path, e.caption) for e in read] == [(e["path"], e.get("caption", "")) for e in entries]


def test_images_are_hashed_piece_by_piece(tmp_path):
    contents = {"1.png": b"", "2.png": bytes(3 << 20), "3.png": b"x"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    seen = []
    whole = frames.sha256(tmp_path, lambda pieces: (seen.append(len(piece[1])) or piece for piece in pieces))
    of_each = (name.encode() + b"\0" + hashlib.sha256(content).digest() for name, content in contents.items())
    assert whole == hashlib.sha256(b"".join(of_each)).hexdigest()
    assert seen == [0, 1 << 20, 1 << 20, 1 << 20, 1], "a heartbeat for each piece"


def test_numbered_images():
    assert frames.numbered(["10.png", "9.png", "1.png"]) == ["1.png", "9.png", "10.png"]
    assert frames.numbered(["a1.jpg", "a2.jpg", "cover.jpg", "a.txt"]) == ["a1.jpg", "a2.jpg"]
    assert frames.numbered(["a1.jpg", "b1.jpg", "a2.jpg", "b2.jpg"]) == []
    assert frames.numbered(["2.JPG", "1.jpg"]) == ["1.jpg", "2.JPG"], "as some cameras and programs write them"
    assert frames.numbered(["1.png", "2.png", "._1.png", "._2.png"]) == ["1.png", "2.png"]
    assert frames.numbered(["1.png"]) == frames.numbered(["1.mp4", "2.mp4"]) == []


def test_several_sequences_in_one_folder_are_said(tmp_path):
    for name in ("frame_0.png", "frame_1.png", "mask_0.png", "mask_1.png", "cover.jpg"):
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / name).touch()
    assert inputs.find(tmp_path).notes == (
        "one/{frame_*.png, mask_*.png}: several sequences of images in one folder, of which none is read: give each "
        "its own",
    )
    shutil.copytree(tmp_path / "one", tmp_path / "take2")
    (note,) = inputs.find(tmp_path).notes
    assert "one/{frame_*.png, mask_*.png} (and 1 more): " in note
    for path in tmp_path.rglob("mask_*"):
        path.unlink()
    assert not inputs.find(tmp_path).notes


def test_images_masks_and_poses_of_one_scene_are_said(tmp_path):
    for name in ("1/images", "1/masks", "2/images", "2/masks", "3/images", "3/masks", "4/cam1", "4/cam2"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(3 if name == "3/masks" else 4):
            (tmp_path / name / f"{number}.png").touch()
    (note,) = inputs.find(tmp_path).notes
    assert note.startswith("1/{images, masks} (and 1 more): beside each other") and "--input 'FOLDER/*/NAME'" in note
    assert names(inputs.find(f"{tmp_path}/*/images")) == ["1/images", "2/images", "3/images"]


@pytest.mark.parametrize(
    ("numbers", "cuts", "step"),
    [
        ([1, 2, 3, 4, 7, 8, 9, 40, 41], [4, 7], 1),
        ([1, 2, 3, 5, 6, 8, 9], [], 1),  # single ones are missing
        ([0, 10, 20, 30, 60, 70, 80], [4], 10),
        ([0, 3, 6, 10, 13, 16, 20], [], 3),
        ([7, 7 + 10**40], [], 10**40),
    ],
)
def test_a_gap_in_the_numbers_of_images_is_a_cut_and_said(numbers, cuts, step, tmp_path):
    for number in numbers:
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number:04d}.png")
    found = inputs.find(tmp_path, config.Prepare(frames_fps=8))
    settings = config.build({"data": {"shape": {"fps": 8}}}, config.Preparation)
    row = probing.cut_shots(probing.probe(found.rows[0], settings), settings)
    assert np.frombuffer(row["cuts"], np.int32).tolist() == cuts and row["length"] == len(numbers)
    gap, thinned = (
        "a new shot begins after each such gap",
        f"numbers of images go up by {step} in {tmp_path.name}: prep",
    )
    assert [text in " ".join(found.notes) for text in (gap, thinned)] == [bool(cuts), step > 1]


def test_images_are_the_video_they_were_cut_from(folder):
    prepare = config.Prepare()
    of_images = footage.footage(folder / "00001" / "images", 10, "", prepare)
    of_video = footage.footage(folder / "a" / "cam01.mp4", 0, "", prepare)
    assert footage.probe(of_images).width == footage.probe(of_video).width == 134
    for fps in (5, 10, 20):
        one, two = list(footage.pictures(of_images, fps)), list(footage.pictures(of_video, fps))
        assert len(one) == len(two) == fps
        assert np.abs(np.stack(one).astype(int) - np.stack(two)).mean() < 4  # one of them is compressed
    cropped = footage.footage(folder / "00001" / "images", 10, "20,40,60,80", prepare)
    assert np.array_equal(next(footage.pictures(cropped, 10)), next(footage.pictures(of_images, 10))[40:120, 20:80])
    with pytest.raises(video.VideoError, match="not inside the 134x240") as error:
        footage.probe(footage.footage(folder / "a" / "cam01.mp4", 0, "100,0,60,60", prepare))
    assert error.value.reason == "bad_crop"


def test_limits_are_reasons(folder, tmp_path):
    row = inputs.find(folder / "a" / "cam01.mp4").rows[0]
    images = inputs.find(folder / "00001" / "images").rows[0]

    def reason(of, **limits):
        return probing.probe(of, config.Preparation(prepare=config.Prepare(**limits)))["reason"]

    assert reason(row) == reason(images) == ""
    assert reason(row, max_pixels=134 * 240 - 1) == reason(images, max_pixels=134 * 240 - 1) == "too_large"
    assert reason(row, max_duration_s=0.5) == reason(images, max_duration_s=0.3) == "too_long"
    assert reason(row, max_bytes=1000) == reason(images, max_bytes=1000) == "too_large"
    assert reason(row, max_work_s=1e-9) == reason(images, max_work_s=1e-9) == "too_long"
    broken = tmp_path / "broken"
    broken.mkdir()
    for i in range(3):
        (broken / f"{i}.jpg").write_bytes(b"no picture")
    assert reason(inputs.find(broken).rows[0]) == "corrupt"


@pytest.fixture(scope="module")
def server(folder):
    """The folder over HTTP on this machine alone: its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_remote_sources_are_fetched_for_a_stage_and_gone(server, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "m.txt").write_text(f"{server}/a/cam01.mp4\n{server}/none.mp4\n{server}/notes.md\n")
    rows = inputs.find(tmp_path / "m.txt").rows
    (tmp_path / "m.txt").unlink()
    probed = {row["file"].rpartition("/")[2]: probing.probe(row, config.Preparation(prepare=HERE)) for row in rows}
    assert {name: row["reason"] for name, row in probed.items()} == {
        "cam01.mp4": "",
        "none.mp4": "unreadable",
        "notes.md": "not_a_video",
    }
    local = probing.probe(inputs.find(folder / "a" / "cam01.mp4").rows[0], config.Preparation())
    assert probed["cam01.mp4"]["sha256"] == local["sha256"] and probed["cam01.mp4"]["bytes"] == local["bytes"]
    small = config.Preparation(prepare=HERE.model_copy(update={"max_bytes": 2000}))
    assert probing.probe(rows[0], small)["reason"] == "too_large"
    assert not list(tmp_path.iterdir()), "scratch files are left"


def test_a_remote_folder_and_a_remote_manifest(server, folder):
    found = inputs.find(f"{server}/", HERE)
    assert {"a/cam01.mp4", "00001/images"} <= set(names(found)) and found.kind == "folder on http"
    write_manifest(folder / "m.csv", ENTRIES[:1] + ENTRIES[2:3])
    try:
        rows = inputs.find(f"{server}/m.csv", HERE).rows
    finally:
        (folder / "m.csv").unlink()
    probed = {row["file"]: probing.probe(row, config.Preparation(prepare=HERE)) for row in rows}
    assert {file: row["reason"] for file, row in probed.items()} == {"a/cam01.mp4@0,0,134,120": "", "00001/images": ""}
    with pytest.raises(UserError, match="cannot read input http"):
        inputs.find("http://127.0.0.1:9/", HERE)


def test_columns_that_are_not_read_take_no_memory(tmp_path):
    """Tables of video sets have dozens."""
    path = tmp_path / "list.csv"
    path.write_text("path," + ",".join(f"c{i}" for i in range(300)) + "\n" + ("a.mp4" + "," * 300 + "\n") * 2000)
    tracemalloc.start()
    entries, unread = manifest.read(path, path.name)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(entries) == 2000 and len(unread) == 300 and taken < 8 << 20
