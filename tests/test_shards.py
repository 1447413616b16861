"""Shards: written whole, read back as they were, damage found and named, nothing unpickled."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entprog.config import ClipShape
from entprog.data import shards
from entprog.errors import UserError
from entprog.media import limits
from entprog.media.limits import Limits

SHAPE = ClipShape(frames=4, height=32, width=16)


def clip(i: int) -> dict:
    rng = np.random.default_rng(i)
    return {
        "clip_id": f"Übung 'ü'.mp4#{i:06d}",
        "source": "Übung 'ü'.mp4",
        "source_sha256": "0" * 64,
        "split": "train",
        "caption": "",
        "start_s": i / 12,
        "fps": 12.0,
        "frames": 4,
        "height": 32,
        "width": 16,
        "source_height": 320,
        "source_width": 160,
        "crop_left": 1,
        "crop_top": 2,
        "crop_width": 30,
        "crop_height": 60,
        "visibility": 0.9,
        "reference_s": 0.5,
        "reference": rng.bytes(300),
        "pose": rng.random((4, 33, 3), np.float32),
        "video": rng.bytes(2000),
    }


@pytest.fixture
def dataset(tmp_path):
    train = [
        shards.write_shard(tmp_path, f"train/0000{i}.parquet", [clip(k) for k in range(20)], SHAPE) for i in (0, 1)
    ]
    held = shards.write_shard(tmp_path, "held_out/00000.parquet", [clip(99)], SHAPE)
    return shards.write_dataset(tmp_path, SHAPE, {"train": train, "held_out": [held]}, {"prepare": {"seed": 1}})


def test_rows_come_back_in_the_order_asked_for(dataset):
    path = dataset.folder / "train/00000.parquet"
    for row, expected in zip(shards.read_rows(path, [19, 0, 7, 8, 0]), (19, 0, 7, 8, 0), strict=True):
        for name, value in clip(expected).items():
            if name == "visibility":
                assert row[name] == pytest.approx(value)
            else:
                np.testing.assert_array_equal(row[name], value)
        assert row["pose"].dtype == np.float32


def test_only_the_columns_asked_for(dataset):
    (row,) = shards.read_rows(dataset.folder / "held_out/00000.parquet", [0], ["video", "pose"])
    assert set(row) == {"video", "pose"}


def test_layout_is_as_documented(dataset):
    file = pq.ParquetFile(dataset.folder / "train/00000.parquet")
    assert file.schema_arrow.names == shards.SCHEMA.names
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [8, 8, 4]
    columns = {c.path_in_schema: c for c in (file.metadata.row_group(0).column(i) for i in range(21))}
    assert columns["video"].compression == "UNCOMPRESSED" and columns["clip_id"].compression == "ZSTD"


def test_equal_clips_give_equal_bytes_and_fingerprint(dataset, tmp_path):
    again = shards.write_shard(tmp_path / "b", "train/00000.parquet", [clip(k) for k in range(20)], SHAPE)
    assert again == dataset.splits["train"][0]
    other = shards.write_dataset(tmp_path / "b", SHAPE, {"train": [again], "held_out": []}, {})
    assert other.fingerprint != dataset.fingerprint == shards.read_dataset(dataset.folder).fingerprint


def test_index_and_description(dataset):
    read = shards.read_dataset(dataset.folder)
    assert read == dataset and read.shape == SHAPE and read.settings == {"prepare": {"seed": 1}}
    assert read.clips("train") == 40 and len(shards.index(read, "train")) == 40
    assert shards.index(read, "train")[20] == ("train/00001.parquet", 0)
    assert shards.index(read, "no such split") == []
    for how in ("size", "sha256"):
        shards.verify(read, how)


def test_a_clip_of_another_shape_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="has \\(frames, height, width, pose\\)"):
        shards.write_shard(tmp_path, "train/0.parquet", [{**clip(0), "frames": 5}], SHAPE)
    assert not list(tmp_path.rglob("*.parquet"))


def test_no_dataset_is_said_in_one_line(tmp_path, dataset):
    with pytest.raises(UserError, match="no such folder"):
        shards.read_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a finished dataset"):
        shards.read_dataset(tmp_path / "empty")
    description = dataset.folder / "dataset.json"
    good = json.loads(description.read_text())
    for wrong, message in (
        ("{", "cannot read"),
        ("[]", "has format None"),
        (json.dumps({**good, "format": "entprog-shards-9"}), "this version reads"),
        (json.dumps({**good, "shape": {"frames": -1}}), "is damaged"),
        (json.dumps({**good, "splits": {"train": [{"file": "x"}]}}), "is damaged"),
    ):
        description.write_text(wrong)
        with pytest.raises(UserError, match=message) as error:
            shards.read_dataset(dataset.folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({"file": value}, "is damaged") for value in (5, ["a"], None, "a\0b")),
        *(({"clips": value}, "is damaged") for value in (-1, 1.5, "many", {}, None)),
        ({"clips": 10**8}, "claims 100000000 clips"),
        *(({"bytes": value}, "is damaged") for value in (-1, "x")),
        ({"sha256": 5}, "is damaged"),
        ("settings", "is damaged"),
    ],
)
def test_a_description_of_other_types_is_one_line(change, said, dataset):
    path = dataset.folder / "dataset.json"
    values = json.loads(path.read_text())
    if change == "settings":
        values["settings"] = 5
    else:
        values["splits"]["train"][0] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=said) as error:
        shards.read_dataset(dataset.folder)
    assert "\n" not in str(error.value)


def test_a_description_cannot_name_files_outside(dataset):
    description = dataset.folder / "dataset.json"
    good = json.loads(description.read_text())
    good["splits"]["train"][0]["file"] = "../../etc/passwd"
    description.write_text(json.dumps(good))
    with pytest.raises(UserError, match="outside the folder"):
        shards.read_dataset(dataset.folder)


def test_a_damaged_or_missing_shard_is_named(dataset):
    path = dataset.folder / "train/00001.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(UserError, match=r"damaged shard .*train/00001\.parquet: .* bytes where"):
        shards.verify(dataset, "size")
    middle = len(good) // 2
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    shards.verify(dataset, "size")
    with pytest.raises(UserError, match=r"damaged shard .*train/00001\.parquet: sha256"):
        shards.verify(dataset)
    path.unlink()
    with pytest.raises(UserError, match=r"train/00001\.parquet is missing"):
        shards.verify(dataset, "size")


def test_no_flipped_bit_in_the_media_is_read_as_good(dataset):
    path = dataset.folder / "train/00000.parquet"
    good, rng = path.read_bytes(), random.Random(0)
    starts = [good.index(clip(i)["video"]) for i in range(20)]
    for _ in range(40):
        at = rng.choice(starts) + rng.randrange(2000)
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        with pytest.raises(shards.DamagedShardError, match=r"damaged shard .*train/00000\.parquet, row \d+"):
            shards.read_rows(path, range(20))


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_a_row_that_unpacks_to_far_more_than_it_holds_is_not_read(dataset, compression, monkeypatch):
    """Zeros that are compressed, or one value of a dictionary in every row."""
    path = dataset.folder / "train/00000.parquet"
    whole = pq.read_table(path)
    value = bytes(4 << 20) if compression != "none" else bytes(200_000)
    video = pa.array([value] * len(whole), pa.binary())
    table = whole.set_column(whole.schema.get_field_index("video"), "video", video)
    pq.write_table(table, path, compression=compression)
    assert path.stat().st_size < 5 << 20
    monkeypatch.setattr(limits, "LIMITS", Limits(max_decoded_bytes=2 << 20))
    before = pa.default_memory_pool().bytes_allocated()
    with pytest.raises(shards.DamagedShardError, match=r"row 3: .* MiB in memory, more than 2 MiB are not read"):
        shards.read_rows(path, [3], ["video"])
    assert pa.default_memory_pool().bytes_allocated() - before < 8 << 20


def test_cut_short_garbage_and_rows_beyond_the_end(dataset):
    path = dataset.folder / "train/00000.parquet"
    with pytest.raises(shards.DamagedShardError, match="row 20: it has 20 rows"):
        shards.read_rows(path, [20])
    good = path.read_bytes()
    for damaged in (b"", b"garbage", good[: len(good) // 2], good[:-4] + b"PARX"):
        path.write_bytes(damaged)
        with pytest.raises(shards.DamagedShardError, match=r"train/00000\.parquet, row 3"):
            shards.read_rows(path, [3])
