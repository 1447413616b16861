"""Arrays and tables from outside: never larger in memory than allowed, whatever their files claim."""

import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entprog.config import Prepare
from entprog.errors import UserError
from entprog.media import limits
from entprog.media.limits import Limits

SMALL = Limits(max_decoded_bytes=1 << 20)


def test_the_settings_decide():
    assert limits.of(Prepare()) == Limits()
    assert limits.of(Prepare(max_pixels=5, max_frames=7)) == Limits(max_pixels=5, max_frames=7)


def test_arrays_are_what_was_saved(tmp_path):
    numbers = np.arange(12, dtype=np.float64).reshape(3, 4)
    for value in (numbers, np.asfortranarray(numbers), numbers[:0], np.float32(3)):
        np.save(tmp_path / "a.npy", value)
        np.savez_compressed(tmp_path / "a.npz", pose=value, other=[1])
        for got in (limits.array(tmp_path / "a.npy"), limits.array(tmp_path / "a.npz", "pose")):
            np.testing.assert_array_equal(got, value)
            assert got.dtype == value.dtype


def lying_npz(path, shape):
    """A member that claims a shape and holds a hundred bytes."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("pose.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": shape})
        member.write(bytes(100))


def test_arrays_that_are_too_much_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, pose=np.zeros(1 << 22))
    assert path.stat().st_size < 50_000
    with pytest.raises(UserError, match=r"a\.npz: 32 MiB in memory, more than 1 MiB"):
        limits.array(path, "pose", SMALL)
    for shape in ((1 << 40,), (1 << 30, 1 << 30), (1 << 62, 8)):
        lying_npz(path, shape)
        with pytest.raises(UserError, match=r"a\.npz: .* MiB in memory, more than 256 MiB"):
            limits.array(path, "pose")
    lying_npz(path, (20,))
    with pytest.raises(UserError, match="it ends after 100 of 160 bytes"):
        limits.array(path, "pose")
    np.save(tmp_path / "a.npy", np.zeros(1 << 22))
    with pytest.raises(UserError, match=r"a\.npy: 32 MiB"):
        limits.array(tmp_path / "a.npy", None, SMALL)


def test_arrays_that_are_none_are_one_line(tmp_path):
    np.savez(tmp_path / "a.npz", pose=np.array([1, None], object))
    with pytest.raises(UserError, match="never unpickled"):
        limits.array(tmp_path / "a.npz", "pose")
    with pytest.raises(UserError, match="no array named x, only pose"):
        limits.array(tmp_path / "a.npz", "x")
    with pytest.raises(UserError, match="no such file"):
        limits.array(tmp_path / "b.npz", "x")
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (b"", b"PK", whole[:50], whole[:-30], b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{"):
        for name in ("pose", None):
            (tmp_path / "c").write_bytes(content)
            with pytest.raises(UserError, match="cannot read") as raised:
                limits.array(tmp_path / "c", name)
            assert "\n" not in str(raised.value)


def test_tables_are_what_was_written(tmp_path):
    table = pa.table({"path": [f"{i}.mp4" for i in range(10_000)], "fps": [1.0] * 10_000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3000)
    assert limits.table(tmp_path / "a.parquet").equals(table)
    assert limits.table(tmp_path / "a.parquet", ["fps"]).equals(table.select(["fps"]))
    pq.write_table(table[:0], tmp_path / "a.parquet")
    assert limits.table(tmp_path / "a.parquet").equals(table[:0])


@pytest.mark.parametrize(
    ("value", "times", "options"),
    [
        (b"\0" * (8 << 20), 1, {"compression": "zstd", "use_dictionary": False}),
        (b"\0" * 1000, 100_000, {"compression": "zstd"}),
        (b"\0" * 1000, 100_000, {"compression": "none"}),
        (b"\0" * 1000, 100_000, {"use_dictionary": False, "compression": "gzip"}),
        (b"\0" * 500_000, 200, {"compression": "zstd"}),
    ],
)
def test_tables_that_are_too_much_are_refused(value, times, options, tmp_path):
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("path", pa.binary())]), **options) as writer:
        writer.write_table(pa.table({"path": [value] * times}))
    assert path.stat().st_size < 600_000
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(UserError, match=r"a\.parquet: .*more than 1 MiB are not read"):
        limits.table(path, limits=SMALL)
    assert pa.default_memory_pool().max_memory() - before < 16 << 20


def test_tables_that_are_none_are_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(UserError, match="no such file"):
        limits.table(path)
    pq.write_table(pa.table({"path": ["a"]}), path)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:50], whole[:10] + bytes(30) + whole[40:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot read") as raised:
            limits.table(path)
        assert "\n" not in str(raised.value)
