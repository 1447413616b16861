"""Contact sheets and videos side by side."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from entprog.data import shards
from entprog.errors import UserError
from entprog.media import assets, h264, sheet, video
from pipelines.preparing import contact_sheet


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return video.read_frames(assets.clip("jump"), video.clip_times(0, 5, 5), size=(96, 64))[0]


def test_contact_sheet_has_a_row_a_clip(clip, tmp_path):
    path = sheet.contact_sheet(
        [("tiny", clip[:, :12, :8]), ("many", np.repeat(clip, 9, 0)), ("one", clip[:1])], tmp_path / "a" / "sheet.png"
    )
    image = np.asarray(Image.open(path))
    row = image.shape[0] // 3
    assert image.shape[1] >= 8 * 128 and 192 < row < 240
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]
    first = image[2 * row : 3 * row, sheet.GAP : sheet.GAP + 128]
    expected = np.asarray(Image.fromarray(clip[0]).resize((128, 192), Image.Resampling.BICUBIC))
    assert any(np.array_equal(first[y : y + 192], expected) for y in range(row - 192))  # the frame, enlarged
    with pytest.raises(ValueError, match="at least one row"):
        sheet.contact_sheet([], path)


def test_a_long_label_fits(clip, tmp_path):
    path = sheet.contact_sheet([("a long label, " * 20, clip[:1])], tmp_path / "sheet.png")
    assert Image.open(path).width > 1000


def test_labels_in_any_letters_can_be_told_apart(clip, tmp_path):
    names = ["день", "дань", "ダンス", "グンス", "舞蹈", "舞踊", "💃", "🕺"]
    rows = [np.asarray(Image.open(sheet.contact_sheet([(n, clip[:1])], tmp_path / "a.png")))[:26] for n in names]
    assert len({row[:, :100].tobytes() for row in rows}) == len(names)


def test_side_by_side_can_be_encoded(clip, tmp_path):
    joined = sheet.side_by_side(
        [("reference", clip), ("pose", clip[:, :95, :31]), ("a title wider than that", clip[:, :, :9])]
    )
    assert joined.dtype == np.uint8 and joined.shape[0] == 5
    assert joined.shape[1] % 2 == joined.shape[2] % 2 == 0 and joined.shape[1] > 384
    assert not np.array_equal(joined[0], joined[4])
    assert video.probe(h264.write(tmp_path / "a.mp4", joined, 5)).frames == 5
    with pytest.raises(ValueError, match=r"one length, given \[4, 5\]"):
        sheet.side_by_side([("a", clip), ("b", clip[:4])])


def test_overlay_draws_only_limbs(clip):
    points = np.full((5, 33, 3), (0.1, 0.1, 0.0), np.float32)
    points[:, :, :2][2] = np.nan
    np.testing.assert_array_equal(sheet.overlay(clip, points), clip)
    points[1, [11, 12]] = (0.25, 0.5, 1), (0.75, 0.5, 1)
    changed = (sheet.overlay(clip, points) != clip).any(-1)
    assert changed[1].any() and not changed[[0, 2, 3, 4]].any()
    assert not changed[1, :40].any() and not changed[1, 56:].any()


@pytest.mark.parametrize("kind", ["PNG", "EPS"])
def test_a_picture_in_others_shards_is_read_with_care(kind, tmp_path):
    """Not larger than a clip, and none for which Pillow starts a program."""
    person = Path(contact_sheet.__file__).parents[1] / "demo_person"
    dataset = shards.read_dataset(person)
    rows = shards.read_rows(person / dataset.splits["held_out"][0].file, range(1))
    picture = io.BytesIO()
    Image.new("RGB", (4000, 4000) if kind == "PNG" else (8, 8)).save(picture, kind)
    rows[0]["reference"] = picture.getvalue()
    written = {
        split: [shards.write_shard(tmp_path, f"{split}/0.parquet", rows, dataset.shape, dataset.points)]
        for split in shards.SPLITS
    }
    foreign = shards.write_dataset(tmp_path, dataset.shape, written, {}, dataset.points)
    with pytest.raises(UserError, match=r"clip 0 is damaged: .* (more than|no picture)"):
        contact_sheet.of_dataset(tmp_path, foreign)
