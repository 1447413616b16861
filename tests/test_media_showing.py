"""Frames as a player shows them: turned, squared, woven, in ordinary colours; and time stamps that start again."""

import io
import time
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from PIL import Image, ImageFilter

from entprog.media import assets, containers, fields, h264, showing, video
from entprog.media.limits import Limits
from entprog.media.video import VideoError
from entprog.preparing import shots
from helpers import hostile

X264 = {"crf": "12", "preset": "veryfast"}


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """24 frames of a real clip, small: uint8 [96, 56, 3] each."""
    return list(video.read_frames(assets.clip("cam01"), video.clip_times(0, 24, 30), size=(96, 56))[0])


def all_of(source) -> np.ndarray:
    return np.stack([image for _, image in video.iter_frames(source)])


def unlike(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference in levels."""
    return float(np.abs(one.astype(int) - other).mean())


# ---- turned ----

FILTERS = {  # what FFmpeg's own player asks of libavfilter
    "upright": [],
    "mirrored": [("hflip", "")],
    "half-turn": [("hflip", ""), ("vflip", "")],
    "upside-down": [("vflip", "")],
    "transposed": [("transpose", "cclock_flip")],
    "quarter-turn": [("transpose", "clock")],
    "transversed": [("transpose", "clock_flip")],
    "three-quarters": [("transpose", "cclock")],
}


def filtered(content: bytes, filters) -> np.ndarray:
    """The first frame through libavfilter."""
    with av.open(io.BytesIO(content)) as container:
        frame = av.VideoFrame.from_ndarray(showing.pixels(next(container.decode(video=0))), format="rgb24")
    graph = av.filter.Graph()
    buffer = graph.add("buffer", f"video_size={frame.width}x{frame.height}:pix_fmt=rgb24:time_base=1/10")
    graph.link_nodes(buffer, *(graph.add(*each) for each in filters), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull().to_ndarray()


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mjpeg"])
@pytest.mark.parametrize("turn", hostile.TURNS)
def test_all_eight_turns_are_those_of_libavfilter(turn, codec, frames):
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    for container in ("mp4", "mov"):
        content = hostile.encoded([hostile.laid(f, turn) for f in frames[:2]], codec, container, pixels)
        content = hostile.turned(content, turn)
        got, _ = video.read_frames(content, [0.0])
        assert got.shape == (1, 96, 56, 3)
        np.testing.assert_array_equal(got[0], filtered(content, FILTERS[turn]))
        assert unlike(got[0], frames[0]) < 20 and unlike(got[0], frames[0]) < unlike(got[0][::-1], frames[0]) / 2
        info = video.probe(content)
        assert (info.height, info.width) == (96, 56)
        crop = video.read_frames(content, [0.0], crop=(5, 11, 40, 30))[0]
        np.testing.assert_array_equal(crop, got[:, 11:41, 5:45])


def test_a_slanted_picture_is_refused(frames):
    content = hostile.turned(hostile.encoded(frames[:2], "libx264", "mp4"), "slanted")
    for read in (video.probe, all_of):
        with pytest.raises(VideoError, match="other than quarter turns") as raised:
            read(content)
        assert raised.value.reason == "unsupported" and "bytes: " in str(raised.value)


# ---- squared ----


@pytest.mark.parametrize(
    ("codec", "container"), [("libx264", "mp4"), ("libx264", "mpegts"), ("mpeg4", "mpegts"), ("mpeg4", "matroska")]
)
@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(3, 4), Fraction(2)])
def test_pixels_become_square(codec, container, aspect, frames):
    wide, high = (round(56 * 3 / 4 / 2) * 2, 96) if aspect == Fraction(4, 3) else (56, 72) if aspect < 1 else (28, 96)
    squeezed = [video.scale(frame, (high, wide)) for frame in frames[:3]]
    content = hostile.encoded(squeezed, codec, container, aspect=aspect, options={"b": "2M"}, fps=25)
    info, got = video.probe(content), all_of(content)
    assert (info.height, info.width) == got.shape[1:3] == (96, 56)
    assert unlike(got[0], frames[0]) < 12


def test_a_picture_of_a_known_width_on_the_screen_gets_it(frames):
    """MPEG-2 notes the aspect of the whole picture: 16:9 of 48 by 36 stored pixels."""
    squeezed = [video.scale(frame[:36, :56], (36, 48)) for frame in frames[:2]]
    content = hostile.encoded(squeezed, "mpeg2video", "mpegts", aspect=Fraction(4, 3), options={"b": "2M"}, fps=25)
    assert all_of(content).shape[1:3] == (36, 64)


def test_squared_pixels_are_turned_too(frames):
    squeezed = [hostile.laid(video.scale(f, (48, 56)), "quarter-turn") for f in frames[:2]]
    content = hostile.encoded(squeezed, "libx264", "mp4", aspect=Fraction(2), options=X264)
    got = all_of(hostile.turned(content, "quarter-turn"))
    assert got.shape[1:3] == (96, 56) and unlike(got[0], frames[0]) < 12


def test_pixels_that_are_nearly_square_stay_as_they_are(frames):
    content = hostile.encoded(frames[:2], "libx264", "mp4", aspect=Fraction(200, 199))
    plain = hostile.encoded(frames[:2], "libx264", "mp4")
    np.testing.assert_array_equal(all_of(content), all_of(plain))


def test_pixels_are_counted_after_they_are_squared(frames):
    content = hostile.encoded(frames[:2], "libx264", "mp4", aspect=Fraction(20))
    with pytest.raises(VideoError, match="1120x96") as raised:
        video.probe(content, Limits(max_pixels=50_000))
    assert raised.value.reason == "too_large"


# ---- woven ----


def combed(images: np.ndarray) -> float:
    """How much lines differ from both neighbours, against how much from the next but one."""
    grey = images.astype(float).mean(-1)
    return np.abs(2 * grey[:, 1:-1] - grey[:, :-2] - grey[:, 2:]).mean() / np.abs(grey[:, :-2] - grey[:, 2:]).mean()


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "mp4", {"crf": "12", "x264-params": "tff=1"}),
        ("libx264", "mpegts", {"crf": "12", "x264-params": "bff=1"}),
        ("mpeg2video", "mpegts", {"b": "4M"}),
        ("mpeg2video", "matroska", {"b": "4M"}),
    ],
)
def test_fields_become_whole_frames(codec, container, options):
    moving = []
    for at in range(16):
        image = np.full((96, 64, 3), 40, np.uint8)
        image[20:80, 4 + 3 * at : 14 + 3 * at] = 220
        moving.append(image)
    top_first = options.get("x264-params") != "bff=1"
    content = hostile.encoded(
        hostile.woven(moving, top_first), codec, container, options=options, interlaced=True, fps=25
    )
    with av.open(io.BytesIO(content)) as container:
        stored = list(container.decode(video=0))
    assert all(frame.interlaced_frame for frame in stored)
    given = list(video.iter_frames(content))
    got = np.stack([image for _, image in given])
    assert len(got) == len(stored) == 8 and [t for t, _ in given] == pytest.approx([i / 25 for i in range(8)])
    was = np.stack([frame.to_ndarray(format="rgb24") for frame in stored])
    assert combed(got[1:-1]) < 0.4 * combed(was[1:-1])
    for i in range(1, 7):  # frame i shows its first field's moment
        assert unlike(got[i], moving[2 * i]) < min(unlike(got[i], moving[2 * i - 2]), unlike(got[i], moving[2 * i + 2]))


def test_nothing_is_filtered_where_nothing_is_interlaced(frames):
    content = hostile.encoded(frames, "libx264", "mp4", options=X264)
    with video.opened(content) as (container, stream):
        decoded = list(video.decoded_frames(content, container, stream))
    assert [id(shown) for shown in fields.deinterlaced(iter(decoded))] == [id(shown) for shown in decoded]


CODERS = [
    ("libx264", "mp4", "yuv420p", {"crf": "18", "preset": "veryfast"}),
    ("libx264", "matroska", "yuv422p10le", {"crf": "20", "preset": "veryfast"}),
    ("mpeg4", "avi", "yuv420p", {"b": "3M"}),
    ("libvpx", "webm", "yuv420p", {"deadline": "good", "cpu-used": "5", "b": "2M"}),
    ("mjpeg", "avi", "yuvj420p", {"b": "4M"}),
]


@pytest.fixture(scope="module")
def moments():
    """48 pictures of a real person who moves, taken 30 times a second: uint8 RGB [240, 352, 3] each."""
    return [frame for _, frame in video.iter_frames(assets.clip("jump"), end_s=1.6, size=(240, 352))][:48]


@pytest.mark.parametrize("top_first", [True, False], ids=["top", "bottom"])
@pytest.mark.parametrize(("codec", "container", "pixels", "options"), CODERS)
def test_fields_of_which_a_video_does_not_say_are_found_out(codec, container, pixels, options, top_first, moments):
    woven = hostile.woven(moments, top_first)
    content = hostile.encoded(woven, codec, container, pixels, options, fps=15)
    with av.open(io.BytesIO(content)) as file:
        assert not any(frame.interlaced_frame for frame in file.decode(video=0))
    order = video.field_order(content)
    assert order == ("tff" if top_first else "bff")
    was = [image for _, image in video.iter_frames(content)]
    got = [image for _, image in video.iter_frames(content, order=order)]
    assert len(got) == len(was) == len(woven)
    assert combed(np.stack(got)[1:-1]) < 0.8 * combed(np.stack(was)[1:-1])


@pytest.mark.parametrize(("codec", "container", "pixels", "options"), CODERS)
def test_progressive_video_is_not_taken_for_fields(codec, container, pixels, options, moments):
    for frames, fps in ((moments, 30), (moments[::2], 15), ([f for f in moments for _ in range(2)], 60)):
        content = hostile.encoded(frames, codec, container, pixels, options, fps=fps)
        assert video.field_order(content) == ""
    uneven = [frame for i, frame in enumerate(moments) for _ in range(1 + (i % 4 == 0))]  # 24 frames a second at 30
    assert video.field_order(hostile.encoded(uneven, codec, container, pixels, options, fps=30)) == ""


@pytest.mark.parametrize("change", ["focus", "blur", "light"])
def test_what_changes_with_time_is_not_taken_for_fields(change, moments):
    """The camera finds its focus, or loses it, or opens its aperture, in the first second."""
    changed = []
    for i, frame in enumerate(moments):
        share = min(1.0, i / 30)
        if change == "light":
            changed.append((frame * (0.7 + 0.3 * share)).astype(np.uint8))
        else:
            radius = 6 * (share if change == "blur" else 1 - share)
            changed.append(np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(radius))))
    for frames, order in ((changed, ""), (hostile.woven(changed), "tff"), (hostile.woven(changed, False), "bff")):
        assert video.field_order(hostile.encoded(frames, "libx264", "mp4", options=X264, fps=30)) == order


@pytest.mark.parametrize("name", assets.CLIPS)
def test_real_clips_are_progressive(name):
    assert video.field_order(assets.clip(name)) == ""


def test_film_spread_over_fields_is_found_out(moments):
    spread = []
    for a, b, c, d in zip(*(moments[i::4] for i in range(4)), strict=True):
        spread += [a, b, *(hostile.woven([first, second])[0] for first, second in ((b, c), (c, d))), d]
    content = hostile.encoded(spread, "libx264", "mp4", options=X264, fps=30)
    assert video.field_order(content) == "tff"


@pytest.mark.parametrize("preset", ["ultrafast", "veryfast"])
def test_a_still_video_that_its_coder_refines_has_no_fields(preset, moments):
    content = hostile.encoded(moments[:1] * 60, "libx264", "mp4", options={"crf": "8", "preset": preset})
    assert video.field_order(content) == ""


def test_a_short_or_broken_video_has_no_fields(moments):
    assert video.field_order(hostile.encoded(moments[:4], "libx264", "mp4", options=X264)) == ""
    content = hostile.encoded(moments, "mpeg4", "mpegts", options={"b": "2M"})
    assert video.field_order(content[: len(content) // 4]) == ""


# ---- colours ----


def patches() -> np.ndarray:
    """16 colours, each 8 by 8: grey from black to white, skin, and primaries of half saturation."""
    grey = [(v, v, v) for v in (0, 20, 60, 110, 160, 210, 240, 255)]
    colours = [(222, 171, 127), (141, 85, 36), (255, 219, 172), (90, 56, 37)]
    colours += [(190, 90, 90), (90, 190, 90), (90, 90, 190), (60, 120, 160)]
    rows = np.array([grey, colours], np.uint8)
    return rows.repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize(
    ("transfer", "codec", "container"),
    [("pq", "libx264", "mp4"), ("hlg", "libx264", "mov"), ("bt2020", "ffv1", "matroska")],
)
def test_wide_colours_become_ordinary_ones(transfer, codec, container):
    image = patches()
    options = {"crf": "4"} if codec == "libx264" else {}
    content = hostile.encoded([hostile.wide(image, transfer)] * 2, codec, container, "yuv420p10le", options)
    got = all_of(content)[0].astype(int)
    inner = np.s_[3::8, 3::8]
    assert np.abs(got[inner] - image[inner]).max() <= 8, (got[inner] - image[inner]).tolist()
    raw = hostile.wide(image, transfer).to_ndarray(format="rgb24").astype(int)
    assert np.abs(raw[inner] - image[inner]).max() > 12  # as it is stored it looks wrong
    if transfer == "pq":  # its shots are looked for in the same colours
        (_, small), *_ = video.thumbnails(content, 10, (8, 32))
        assert unlike(small, video.scale(image, (8, 32))) < 6


@pytest.mark.parametrize(
    ("size", "matrix"),
    [
        ((1920, 800), "ITU709"),
        ((1280, 534), "ITU709"),
        ((544, 1280), "ITU709"),
        ((960, 640), "ITU709"),
        ((1024, 576), "ITU601"),
        ((480, 854), "ITU601"),
    ],
)
def test_untagged_video_has_the_matrix_that_players_take(size, matrix):
    """720p that was cut to a film's format is HD too."""
    width, height = size
    picture = np.full((height, width, 3), (200, 40, 60), np.uint8)
    frame = av.VideoFrame.from_ndarray(picture).reformat(format="yuv420p", dst_colorspace=matrix)
    frame.colorspace = showing.UNSPECIFIED
    assert np.abs(showing.pixels(frame).astype(int) - picture).max() <= 3


def test_colours_that_cannot_be_converted_are_refused(frames):
    odd = hostile.wide(frames[0], "bt2020")
    odd.colorspace = 14  # ICtCp
    content = hostile.encoded([odd] * 2, "libx264", "matroska", "yuv420p10le")
    with pytest.raises(VideoError, match="matrix 14") as raised:
        all_of(content)
    assert raised.value.reason == "unsupported"


@pytest.mark.parametrize(
    ("codec", "container", "pixels"),
    [("qtrle", "mov", "argb"), ("libvpx", "webm", "yuva420p"), ("libvpx-vp9", "matroska", "yuva420p")],
)
def test_what_is_transparent_lies_over_the_background(codec, container, pixels):
    image = np.zeros((16, 32, 4), np.uint8)
    image[:, :16], image[:, 16:] = (200, 10, 10, 255), (10, 200, 10, 0)
    still = [av.VideoFrame.from_ndarray(image, format="rgba").reformat(format=pixels) for _ in range(4)]
    content = hostile.encoded(still, codec, container, pixels, {"auto-alt-ref": "0"} if "vpx" in codec else None)
    for frames in (all_of(content), video.read_frames(content, [0.3])[0]):
        assert unlike(frames[:, :, :14], np.array((200, 10, 10))) < 4 and (frames[:, :, 18:] >= 252).all()
    assert len(all_of(content)) == 4 and video.probe(content).width == 32
    (_, black), *_ = video.iter_frames(content, background=(0, 0, 0))
    assert (black[:, 18:] <= 3).all()


def test_transparency_without_its_decoder_is_unsupported(frames, monkeypatch):
    content = hostile.encoded(frames[:2], "libvpx-vp9", "webm", "yuva420p", {"auto-alt-ref": "0"})
    monkeypatch.setitem(containers._WITH_ALPHA, "vp9", "none-of-this-name")
    with pytest.raises(VideoError, match="bytes: it is transparent") as raised:
        video.probe(content)
    assert raised.value.reason == "unsupported"


# ---- time ----


@pytest.mark.parametrize(
    ("codec", "container"), [("libx264", "mpegts"), ("mpeg2video", "mpegts"), ("mpeg2video", "vob")]
)
def test_time_stamps_that_start_again_begin_another_part(codec, container, frames):
    options = {"bf": "0", "g": "6", "b": "2M"}
    halves = [hostile.encoded(some, codec, container, options=options, fps=25) for some in (frames[:20], frames[::-1])]
    content = hostile.joined(*halves) if container == "mpegts" else b"".join(halves)
    times = [time_s for time_s, _ in video.iter_frames(content)]
    assert len(times) == 44 and all(
        later - time_s == pytest.approx(0.04, abs=1e-3) for time_s, later in pairwise(times)
    )
    parts = [part for part, _ in video.thumbnails(content, 25, (36, 64))]
    assert parts == [0] * 20 + [1] * 24
    late, _ = video.read_frames(content, [times[30]])
    assert unlike(late[0], frames[::-1][10]) < 12


@pytest.mark.parametrize("container", ["avi", "asf", "mxf", "matroska", "mpegts"])
@pytest.mark.parametrize("options", [{"bf": "3"}, {"bf": "8", "b_strategy": "0", "x264-params": "b-pyramid=none"}])
def test_frames_with_time_stamps_of_their_decoding_are_all_given_in_order(options, container):
    """FFmpeg's demuxers of AVI, ASF and MXF say of B-frames when they are decoded."""
    pictures = [np.full((48, 64, 3), 20 + 5 * i, np.uint8) for i in range(40)]
    content = hostile.encoded(pictures, "libx264", container, options=X264 | options, fps=25)
    every = list(video.iter_frames(content))
    assert [time_s for time_s, _ in every] == pytest.approx([i / 25 for i in range(40)], abs=1e-3)
    for given in (every, list(video.iter_frames(content, 25))):
        assert [round((image.mean() - 20) / 5) for _, image in given] == list(range(40))
    late, own = video.read_frames(content, [1.0, 1.4])
    assert [round((image.mean() - 20) / 5) for image in late] == [25, 35] and own == pytest.approx([1, 1.4], abs=1e-3)
    assert next(iter(video.iter_frames(content, start_s=1.2)))[0] == pytest.approx(1.2, abs=1e-3)
    assert len(list(video.times(content))) == 40 and video.field_order(content) == ""


def test_parts_are_shots(frames):
    same = [(0, frames[0])] * 10 + [(1, frames[0])] * 10
    for least in (20.0, None):
        assert shots.cuts(shots.changes(same), least) == [10]


@pytest.mark.parametrize(
    ("codec", "container"),
    [("libx264", "mpegts"), ("mpeg2video", "mpegts"), ("libx264", "matroska"), ("mpeg4", "matroska")],
)
def test_a_file_begins_with_its_first_key_frame(codec, container, frames):
    content = hostile.headless(frames, codec, container, 8)
    given = list(video.iter_frames(content))
    assert len(given) == 16 and given[0][0] == 0
    for (time_s, image), frame in zip(given, frames[8:], strict=True):
        assert unlike(image, frame) < 18, time_s
    steady = [image for _, image in video.iter_frames(content, fps=hostile.FPS)]
    assert len(steady) == 16 and unlike(steady[1], steady[0]) > 0
    late, own = video.read_frames(content, [1.0])
    assert own == pytest.approx([1.0]) and unlike(late[0], frames[18]) < 14


@pytest.mark.parametrize("name", ["thumbnail", "preview"])
def test_the_best_stream_is_the_video(name, frames):
    if name == "thumbnail":
        content = hostile.beside(frames[:1], "mjpeg", frames, "mov", "yuvj420p")
    else:
        content = hostile.beside([frame[::4, ::4] for frame in frames], "mpeg4", frames, "matroska")
    assert video.probe(content).codec == "h264"
    assert all_of(content).shape == (24, 96, 56, 3)


# ---- limits ----


def test_a_year_of_two_frames_is_refused_everywhere(frames):
    year = hostile.encoded(frames[:2], "libx264", "matroska", times=[0, 365 * 24 * 3600 * hostile.FPS])
    for read in (
        lambda: list(video.iter_frames(year, fps=12)),
        lambda: video.read_frames(year, [0, 1e6]),
        lambda: list(video.thumbnails(year, 12, (8, 8))),
    ):
        with pytest.raises(VideoError) as raised:
            read()
        assert raised.value.reason in ("too_long", "corrupt")
    for fps in (float("inf"), float("nan"), 0, -1):
        with pytest.raises(ValueError, match="positive number"):
            next(video.iter_frames(hostile.encoded(frames[:2], "libx264", "mp4"), fps=fps))


def test_frames_and_time_of_a_source_are_bounded(frames):
    content = hostile.encoded(frames, "libx264", "mp4")
    with pytest.raises(VideoError, match="more than 10 frames") as raised:
        list(video.iter_frames(content, limits=Limits(max_frames=10)))
    assert raised.value.reason == "too_long"
    with pytest.raises(VideoError, match=r"not decoded within 0\.05 s") as raised:
        for _ in video.iter_frames(content, limits=Limits(max_work_s=0.05)):
            time.sleep(0.03)
    assert raised.value.reason == "too_long"


def test_no_memory_is_one_line(frames, monkeypatch):
    def none_left(*args, **options):
        raise MemoryError

    content = h264.encode(np.stack(frames[:2]), 12)
    monkeypatch.setattr(av, "open", none_left)
    with pytest.raises(VideoError, match="not enough memory") as raised:
        video.probe(content)
    assert raised.value.reason == "too_large"
