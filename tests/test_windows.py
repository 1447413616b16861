"""Clip windows, person crop and quality decisions: what must hold for every input."""

import itertools
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entprog import config
from entprog.media import h264
from entprog.media.pictures import png
from entprog.media.pose import found
from entprog.preparing import cutting, extracting, windows
from entprog.preparing.attempts import MachineError

SEEN = 0.5
SHAPE = {"frames": 8, "height": 64, "width": 48, "fps": 16}


def person(frames: int, box=(0.4, 0.3, 0.6, 0.8), seed: int = 0) -> np.ndarray:
    """A track of points spread over a box (left, top, right, bottom), all visible."""
    left, top, right, bottom = box
    points = np.random.default_rng(seed).uniform((left, top, 0.9), (right, bottom, 1.0), (frames, 33, 3))
    points[:, 0, :2], points[:, 1, :2] = (left, top), (right, bottom)
    return points.astype(np.float32)


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 50))
def test_windows_lie_inside_and_none_is_missed(total, frames, stride):
    starts = windows.window_starts(total, frames, stride)
    assert all(start >= 0 and start + frames <= total for start in starts)
    assert bool(starts) == (total >= frames)
    if starts:
        assert starts[0] == 0 and starts[-1] + stride + frames > total


boxes = st.tuples(*[st.floats(-0.2, 1.2)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), *map(max, b[:2], b[2:]))
)


@given(boxes, st.integers(1, 3000), st.integers(1, 3000), st.floats(0.3, 3), st.floats(0, 1))
def test_crop_lies_inside_the_frame_with_the_aspect_of_the_clip(body, height, width, aspect, margin):
    box = windows.person_box(person(3, body), height, width, aspect, margin, SEEN)
    left, top, box_width, box_height = box
    assert left >= 0 and top >= 0 and box_width >= 1 and box_height >= 1
    assert left + box_width <= width and top + box_height <= height
    if box_height > 50 and box_width > 50:
        assert box_width / box_height == pytest.approx(aspect, rel=0.03)


@given(st.floats(0.2, 0.7), st.floats(0.2, 0.7), st.floats(0.05, 0.25))
def test_crop_holds_a_person_who_fits_with_room_around(x, y, size):
    body = (x, y, x + size, y + size)
    points = person(8, body)
    box = windows.person_box(points, 2000, 1000, 0.5, 0.1, SEEN)
    assert windows.share_inside(windows.to_crop(points, box, 2000, 1000), SEEN) == 1


def test_a_person_wider_than_any_crop_does_not_fit():
    points = person(8, (0.0, 0.4, 1.0, 0.6))
    box = windows.person_box(points, 360, 640, 64 / 96, 0.1, SEEN)
    in_crop = windows.to_crop(points, box, 360, 640)
    assert windows.crop_verdict(in_crop, box, 96, SEEN, 0.95, 1.0) == "does_not_fit"


def test_a_person_with_few_pixels_is_too_small():
    points = person(8)
    box = windows.person_box(points, 100, 100, 64 / 96, 0.1, SEEN)
    in_crop = windows.to_crop(points, box, 100, 100)
    assert windows.crop_verdict(in_crop, box, 96, SEEN, 0.95, 1.0) == "too_small"
    assert windows.crop_verdict(in_crop, box, 96, SEEN, 0.95, 0.1) is None


def test_points_keep_their_place_in_the_picture():
    points = person(4)
    box = (100, 50, 200, 300)
    in_crop = windows.to_crop(points, box, 720, 640)
    back = in_crop[..., :2] * (200, 300) + (100, 50)
    np.testing.assert_allclose(back, points[..., :2] * (640, 720), atol=1e-3)
    np.testing.assert_array_equal(in_crop[..., 2], points[..., 2])


def lost(track: np.ndarray, frames) -> np.ndarray:
    track = track.copy()
    track[frames] = np.nan, np.nan, 0
    return track


def test_pose_verdicts():
    good = person(8)
    hidden = good.copy()
    hidden[:, 12:, 2] = 0.1
    assert windows.pose_verdict(good, SEEN, 0.7) is None
    assert windows.pose_verdict(lost(good, slice(None)), SEEN, 0.7) == "nobody"
    assert windows.pose_verdict(lost(good, [3]), SEEN, 0.7) == "pose_lost"
    assert windows.pose_verdict(hidden, SEEN, 0.7) == "low_visibility"


def test_a_track_that_the_detector_does_not_confirm_is_nobody():
    track = lost(person(20), [9])  # frames 0-8 and 10-19
    detected = np.array([True] * 7 + [False] * 9 + [True] * 4)
    out = windows.without_phantoms(track, detected, 0.5)
    assert found(out).tolist() == [True] * 9 + [False] * 11
    np.testing.assert_array_equal(out[:9], track[:9])
    assert (out[10:, :, 2] == 0).all()


@given(st.integers(8, 60), st.integers(0, 52), st.integers(0, 9))
def test_reference_is_a_frame_with_the_person_outside_the_clip_where_there_is_one(total, start, seed):
    start = min(start, total - 8)
    window = range(start, start + 8)
    gone = np.random.default_rng(seed).random(total) < 0.5
    gone[start : start + 8] = False  # a kept clip has its person in every frame
    track = lost(person(total, seed=seed), gone)
    at = windows.References(track, SEEN).frame(window)
    assert found(track)[at]
    assert (at not in window) == bool((~gone).sum() > 8)


def test_reference_shows_more_of_the_person_than_other_frames():
    track = person(20)
    track[:, 20:, 2] = 0.1
    track[15, :, 2] = 0.9
    assert windows.References(track, SEEN).frame(range(8)) == 15


@given(st.lists(st.sampled_from([0.0, 0.3, 0.35, 0.9, 0.95]), min_size=1, max_size=20), st.data())
def test_references_of_many_windows_are_those_of_one_look_at_each(shown, data):
    track = person(len(shown))
    track[..., 2] = np.linspace(0, 1, 33) < np.array(shown)[:, None]
    others = np.array(data.draw(st.lists(st.booleans(), min_size=len(shown), max_size=len(shown))))
    start = data.draw(st.integers(0, len(shown) - 1))
    window = range(start, data.draw(st.integers(start + 1, len(shown))))
    good = found(track) & ~others
    score = np.where(good, windows.share_visible(track, SEEN), -1.0) + 1e-3 * np.round(track[..., 2].mean(-1), 3)
    outside = [i for i in range(len(shown)) if i not in window]
    best, best_outside = (
        max(range(len(shown)), key=score.__getitem__),
        max(outside, key=score.__getitem__, default=None),
    )
    expected = best_outside if outside and score[best_outside] >= score[best] - 0.1 else best
    assert windows.References(track, SEEN, others).frame(window) == expected


def test_a_reference_shows_one_person_where_only_clips_of_one_are_taken():
    """Of windows in which a second person stands beside, which are rejected, no picture becomes a reference."""
    track = person(64, seed=1)
    track[:32, :2, 2] = 0.4  # alone, with two points hidden
    row = {
        "file": "x.mp4",
        "others": (np.arange(64) >= 32).tobytes(),
        "cuts": b"",
        "view_height": 832,
        "view_width": 480,
    }
    references = {}
    for people in ("one", "foremost"):
        settings = config.build({"data": {"shape": SHAPE}, "prepare": {"people": people}}, config.Preparation)
        kept, _ = cutting._choose(row, track, settings)
        references[people] = [at for window in kept for at, _ in window.candidates]
    assert references["one"] and max(references["one"]) < 32
    assert max(references["foremost"]) >= 32


def test_main_reason_is_the_most_frequent():
    assert windows.main_reason(["nobody", "pose_lost", "pose_lost"]) == "pose_lost"
    assert windows.main_reason(["pose_lost", "nobody"]) == "nobody"


@pytest.mark.parametrize("best", [0, 99])
def test_a_video_of_one_shot_is_not_held_while_its_clips_wait_for_the_best_frame(best):
    """Clips of one shot have one reference, which is its last frame, or its first."""
    track = person(100, seed=1)
    track[:, :2, 2] = 0.4
    track[best, :, 2] = 1
    row = {"file": "x.mp4", "cuts": b"", "others": bytes(100), "view_height": 96, "view_width": 72}
    settings = {"data": {"shape": SHAPE}, "prepare": {"min_motion": 0, "min_scale": 0.1}}
    settings = config.build(settings, config.Preparation)
    kept, _ = cutting._choose(row, track, settings)
    pictures = np.random.default_rng(0).integers(0, 256, (100, 96, 72, 3), np.uint8)
    given = []
    for window in extracting.extract(row, kept, iter(pictures), itertools.repeat(None), settings):
        held = [w for w in kept if w is not window and (w.video or w.reference)]
        assert len(held) <= 1 and sum(len(w.frames) > 0 for w in kept) <= 2
        size = 64, 48
        cut_out = [extracting.crop(frame, window.box, size) for frame in pictures[window.start : window.start + 8]]
        assert window.video == h264.encode(np.stack(cut_out), 16, crf=settings.prepare.crf)
        at, box = window.candidates[0]
        assert window.reference_at == at and window.reference == png(extracting.crop(pictures[at], box, size))
        given.append(window.start)
        window.video = window.reference = b""  # as it is when the clip has been written
    assert given == [window.start for window in kept] and len(given) > 20


@pytest.mark.parametrize(
    ("blurred", "taken"), [((), 90), ((90,), 30), ((30, 90), 60), ((10, 30, 60, 90), 90), ((30,), 90)]
)
def test_a_reference_is_sharp_where_frames_about_as_good_are(blurred, taken):
    track = person(100, seed=1)
    track[..., 2] = 0.9
    best = {90: 0.99, 30: 0.98, 60: 0.97, 10: 0.96}
    for at, visibility in best.items():
        track[at, :, 2] = visibility
    row = {"file": "x.mp4", "cuts": b"", "others": bytes(100), "view_height": 96, "view_width": 72}
    settings = {"data": {"shape": SHAPE}, "prepare": {"min_motion": 0, "min_scale": 0.1}}
    settings = config.build(settings, config.Preparation)
    kept, _ = cutting._choose(row, track, settings)
    pictures = np.random.default_rng(0).integers(0, 256, (100, 96, 72, 3), np.uint8)
    pictures[list(blurred)] = 128
    given = [*extracting.extract(row, kept, iter(pictures), itertools.repeat(None), settings)]
    elsewhere = [window for window in given if not best.keys() & {*range(window.start, window.start + 8)}]
    assert elsewhere and {window.reference_at for window in elsewhere} == {taken}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
@pytest.mark.parametrize("video", [b"short", bytes(1 << 20)], ids=["in the buffer", "beyond it"])
def test_a_full_disk_ends_the_job_and_is_no_verdict_on_a_video(video):
    window = extracting.Window(0, (0, 0, 8, 8), [], video=video)
    full = r"cannot write to the scratch folder .*: No space left on device"
    with (
        suppress(OSError),  # closing it fails again
        Path("/dev/full").open("r+b", buffering=1 << 16) as scratch,
        pytest.raises(MachineError, match=full),
    ):
        window.put_aside(scratch)
