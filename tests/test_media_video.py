"""Frames by time, rotation, damage: on real clips, and on others made from them."""

import io
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entprog.media import assets, h264, samples, video
from entprog.media.video import VideoError
from helpers import hostile


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """40 consecutive frames of a real clip, small: uint8 [40, 96, 54, 3]."""
    return video.read_frames(assets.clip("cam01"), video.clip_times(0, 40, 60), size=(96, 54))[0]


def write(path, frames, pts, codec="libx264", start=0, **options):
    """Frames with the given presentation times (milliseconds)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for image, at in zip(frames, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = start + int(at), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def all_frames(path) -> tuple[np.ndarray, np.ndarray]:
    """Brute force: every frame and its time, straight from PyAV."""
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    times = np.array([float(frame.pts * frame.time_base) for frame in decoded])
    exact = {"interpolation": video.EXACT, "src_colorspace": "ITU601", "dst_color_range": "JPEG"}
    return np.stack([frame.to_rgb(**exact).to_ndarray() for frame in decoded]), times - times[0]


VARIABLE = np.cumsum(np.random.default_rng(0).integers(10, 120, 40))
KINDS = {
    "variable rate": {"name": "a.mp4", "pts": VARIABLE - VARIABLE[0], "bf": 0, "g": 6},
    "B-frames": {"name": "a.mp4", "pts": np.arange(40) * 40, "bf": 3, "g": 12},
    "B-frames, one key frame, variable rate": {"name": "a.mkv", "pts": VARIABLE, "bf": 3, "g": 250},
    "open GOP": dict(
        name="a.mp4", pts=np.arange(40) * 40, **{"x264-params": "open-gop=1:bframes=3:keyint=8:b-adapt=0"}
    ),
    "starts late": {"name": "a.mkv", "pts": np.arange(40) * 40, "start": 7000, "bf": 2, "g": 8},
    "transport stream": {"name": "a.ts", "pts": np.arange(40) * 40, "start": 3000, "bf": 2, "g": 8},
    "VP9": dict(name="a.webm", pts=VARIABLE - VARIABLE[0], codec="libvpx-vp9", **{"cpu-used": 8, "g": 9}),
    "MPEG-4 in AVI": {"name": "a.avi", "pts": np.arange(40) * 40, "codec": "mpeg4", "g": 7},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frame_for_a_time_is_the_nearest_of_all(kind, frames, tmp_path):
    made = dict(KINDS[kind])
    path = write(tmp_path / made.pop("name"), frames, **made)
    images, times = all_frames(path)
    end = times[-1]
    for wanted in (
        np.linspace(0, end + 0.3, 25),
        np.sort(np.random.default_rng(1).uniform(0.6, end, 9)),  # far from the start: seeks
        np.array([end * 0.95]),
        np.repeat(times[5:8], 2),
    ):
        nearest = np.abs(times[None] - wanted[:, None]).argmin(1)
        got, own = video.read_frames(path, wanted)
        np.testing.assert_allclose(own, times[nearest], atol=1e-6)
        np.testing.assert_array_equal(got, images[nearest])


@pytest.mark.parametrize("kind", ["variable rate", "starts late"])
def test_iterated_frames_are_the_frames_read(kind, frames, tmp_path):
    made = dict(KINDS[kind])
    path = write(tmp_path / made.pop("name"), frames, **made)
    every = list(video.iter_frames(path))
    assert len(every) == 40 and every[0][0] == 0
    for start_s in (0.0, 0.8):
        steady = list(video.iter_frames(path, fps=7, start_s=start_s))
        read, _ = video.read_frames(path, [time_s for time_s, _ in steady])
        np.testing.assert_array_equal(np.stack([image for _, image in steady]), read)
        np.testing.assert_allclose([t for t, _ in steady], video.clip_times(start_s, len(steady), 7))
        assert len(list(video.iter_frames(path, fps=7, start_s=start_s, end_s=start_s + 0.5))) == 4
    within = [t for t, _ in video.iter_frames(path, start_s=0.5, end_s=1.0)]
    assert within == [t for t, _ in every if 0.5 <= t < 1.0]


def test_steady_frames_fill_the_duration():
    assert len(list(video.iter_frames(assets.clip("cam01"), fps=12, size=(96, 54)))) == 20  # 100 frames at 60 fps


def test_odd_sizes(frames, tmp_path):
    odd = frames[:4, :95, :53]
    path = write(tmp_path / "odd.mkv", odd, np.arange(4) * 40, codec="ffv1")
    assert (video.probe(path).height, video.probe(path).width) == (95, 53)
    got, _ = video.read_frames(path, [0, 0.08])
    assert got.shape == (2, 95, 53, 3) and np.abs(got.astype(int) - odd[[0, 2]]).mean() < 6
    with pytest.raises(ValueError, match="even"):
        h264.encode(odd, 12)
    written = h264.write(tmp_path / "odd.mp4", odd, 12)
    assert (video.probe(written).height, video.probe(written).width) == (96, 54)


def test_probe_of_real_clips():
    info = video.probe(assets.clip("cam03"))
    assert (info.width, info.height, info.fps, info.frames, info.codec) == (1088, 1920, 60, 100, "h264")
    assert info.duration_s == pytest.approx(100 / 60)
    assert video.probe(assets.clip("cam02")).codec == "vp9"
    assert video.probe(assets.clip("cam01").read_bytes()) == video.probe(str(assets.clip("cam01")))


def test_a_crop_outside_the_frame_is_refused():
    with pytest.raises(ValueError, match="not inside the 1080x1920"):
        video.read_frames(assets.clip("cam01"), [0], crop=(1000, 0, 81, 10))


def test_scaled_frames_are_averages():
    image = video.read_frames(assets.clip("cam01"), [0.5])[0][0]
    means = image.reshape(96, 20, 54, 20, 3).mean((1, 3))
    small = video.scale(image, (96, 54))
    assert np.abs(small - means).mean() < 3  # bicubic keeps edges a little sharper than plain means
    assert video.scale(small, (96, 54)) is small


def test_encoding_is_repeatable_and_tagged(frames):
    once, again = h264.encode(frames[:9], 12, gop=4), h264.encode(frames[:9].copy(), 12, gop=4)
    assert once == again
    with av.open(io.BytesIO(once)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert stream.average_rate == 12 and stream.frames == 9
        assert [packet.is_keyframe for packet in container.demux(stream) if packet.size] == [
            i % 4 == 0 for i in range(9)
        ]


def test_encoding_does_not_depend_on_what_memory_held():
    """x264 with its macroblock tree fails this: it reads memory that it never wrote."""
    program = (
        "import hashlib, sys; from entprog.media import assets, h264, video;"
        "frames, _ = video.read_frames(assets.clip('jump'), video.clip_times(0, 12, 30), size=(240, 352));"
        "print(hashlib.sha256(h264.encode(frames, 30)).hexdigest())"
    )
    said = set()
    for filling in ("1", "85"):  # glibc fills new memory with it
        environment = {**os.environ, "MALLOC_PERTURB_": filling}
        said.add(
            subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
        )
    assert len(said) == 1


def test_encoding_keeps_the_picture(frames):
    back = h264.decode_rgb(h264.encode(frames[:8], 12, crf=10))
    error = back.astype(float) - frames[:8]
    assert np.abs(error).mean() < 3 and np.abs(error.mean((0, 1, 2))).max() < 0.5  # no tint: the matrices match


def test_planes_are_those_of_the_decoder(frames):
    for height, width in ((96, 54), (90, 50), (16, 16)):  # widths that FFmpeg pads; 90: chroma rows do not fill lines
        mp4 = h264.encode(frames[:5, :height, :width], 24)
        with av.open(io.BytesIO(mp4)) as container:
            expected = np.stack([frame.to_ndarray() for frame in container.decode(video=0)])
        np.testing.assert_array_equal(h264.decode_yuv(mp4), expected)
        np.testing.assert_array_equal(h264.decode_yuv(mp4, range(1, 5, 2)), expected[1:5:2])
        np.testing.assert_array_equal(h264.decode_rgb(mp4, range(3, 4)), h264.decode_rgb(mp4)[3:4])
    with pytest.raises(VideoError, match="only 2 of 3") as raised:
        h264.decode_yuv(mp4, range(3, 6))
    assert raised.value.reason == "corrupt"


@pytest.mark.parametrize("large", [False, True])
def test_a_clips_frames_are_found_as_the_demuxer_finds_them(frames, large):
    images = np.random.default_rng(0).integers(0, 256, (3, 640, 640, 3), dtype=np.uint8) if large else frames[:9]
    mp4 = h264.encode(images, 12, crf=1, gop=4)
    assert len(mp4) > 1 << 20 or not large  # more than one chunk of the file
    found = samples.of(mp4)
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert found.extradata == bytes(stream.codec_context.extradata)
    assert [mp4[a:b] for a, b in pairwise(found.begins)] == [bytes(packet) for packet in packets]
    assert found.keys.tolist() == [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert [found.key(i) for i in range(len(found))] == [i // 4 * 4 for i in range(len(images))]


def test_other_files_are_left_to_the_demuxer(frames, tmp_path):
    """They have frames out of order, or at no constant rate, or are cut by an edit list, or hold sound too."""
    for times, reordered in (([0, 40, 80], 2), ([0, 40, 400], 0)):
        path = write(tmp_path / "a.mp4", frames[:3], times, bf=reordered)
        assert samples.of(path.read_bytes()) is None and video.probe(path).frames == 3
    assert samples.of(assets.clip("no_face").read_bytes()) is None
    assert samples.of(b"") is None


def test_a_clip_damaged_in_a_frame_is_no_clip(frames):
    mp4 = h264.encode(frames[:6], 12)
    begin, end = samples.of(mp4).begins[3:5]
    with pytest.raises(VideoError, match=r"damaged after 0\.17 s"):
        h264.decode_yuv(mp4[: begin + 8] + bytes(end - begin - 8) + mp4[end:])


def test_a_clip_that_claims_more_than_it_holds_takes_no_memory(frames):
    """Two frames of 4096 by 4096, or a header that says two thousand million frames."""
    large = h264.encode(np.zeros((2, 4096, 4096, 3), np.uint8), 12)
    assert len(large) < 100_000
    for decode in (h264.decode_yuv, h264.decode_rgb):
        with pytest.raises(VideoError, match=r"more than 1024 MiB|cannot hold"):
            decode(large, range(60))
        with pytest.raises(VideoError, match="cannot hold 2000000000 frames"):
            decode(h264.encode(frames[:2], 12), range(2_000_000_000))
    with pytest.raises(VideoError, match="4096x4096, more than"):
        h264.decode_rgb(large, size=(96, 54))
    with pytest.raises(VideoError, match="is due"):
        h264.decode_rgb(h264.encode(frames[:2, :90], 12), size=(96, 54))


def test_only_our_clips_are_decoded_to_planes(frames, tmp_path):
    with pytest.raises(VideoError, match=r"BT\.709"):
        h264.decode_yuv(write(tmp_path / "a.mp4", frames[:2], [0, 40]).read_bytes())


def test_written_videos_play_while_they_load(frames, tmp_path):
    path = h264.write(tmp_path / "new" / "a.mp4", (image for image in frames), 30)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert video.probe(path).frames == 40
    with pytest.raises(ValueError, match="no frames"):
        h264.write(path, frames[:0], 30)
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"] and path.read_bytes() == content


# ---- what cannot be read ----


def reason(source) -> str:
    reasons = set()
    for read in (video.probe, lambda s: video.read_frames(s, [0.0]), lambda s: list(video.iter_frames(s))):
        with pytest.raises(VideoError) as raised:
            read(source)
        assert "\n" not in str(raised.value)
        reasons.add(raised.value.reason)
    assert len(reasons) == 1 and reasons <= set(video.REASONS)
    return reasons.pop()


def test_reasons(frames, tmp_path):
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame) + stream.encode(None))
    noise = tmp_path / "a: strange, name.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.mp4").touch()
    clip = h264.encode(frames[:4], 12)
    assert reason(sound) == "no_video_stream"
    assert reason(noise) == "corrupt"
    assert reason(tmp_path / "empty.mp4") == reason(b"") == "empty"
    assert reason(tmp_path / "missing.mp4") == reason(tmp_path) == "unreadable"
    assert reason(clip[: len(clip) // 2]) == "corrupt"
    assert reason(b"#EXTM3U\n#EXTINF:1\nfile:" + str(assets.clip("cam01")).encode()) == "corrupt"  # opens no other file


def test_a_name_is_only_a_name(frames, tmp_path):
    path = tmp_path / "http:é, 50% [x] #1.mp4"
    path.write_bytes(h264.encode(frames[:4], 12))
    assert video.probe(path).frames == 4


def test_what_comes_before_the_damage_is_given():
    content = bytearray(assets.clip("cam01").read_bytes())
    content[200_000:200_400] = b"\xaa" * 400
    given = []
    with pytest.raises(VideoError, match=r"damaged after 0\.98 s") as raised:
        given.extend(t for t, _ in video.iter_frames(bytes(content), size=(96, 54)))
    assert raised.value.reason == "corrupt" and len(given) == 60
    assert len(video.read_frames(bytes(content), [0, 0.5], size=(96, 54))[0]) == 2
    with pytest.raises(VideoError):
        video.read_frames(bytes(content), [0.5, 1.2], size=(96, 54))


@pytest.mark.parametrize(("codec", "container"), [("libx264", "matroska"), ("libvpx-vp9", "webm")])
def test_matroska_that_is_cut_off_is_no_shorter_video(frames, tmp_path, codec, container):
    whole = hostile.encoded(list(frames), codec, container, options={"b": "300k", "cpu-used": "8"})
    assert len(list(video.iter_frames(whole))) == 40
    last = len(whole) - whole.rindex(b"\x1c\x53\xbb\x6b")  # of it the index is missing
    for missing in (last, *(int(len(whole) * share) for share in (0.1, 0.4, 0.7))):
        (tmp_path / "cut").write_bytes(whole[:-missing])
        for source in (whole[:-missing], tmp_path / "cut"):
            given = []
            with pytest.raises(VideoError, match="cut off") as raised:
                given.extend(video.iter_frames(source))
            assert raised.value.reason == "corrupt" and given
            assert video.probe(source).codec in ("h264", "vp9")  # as of other files that break behind their first frame


def test_matroska_that_does_not_say_its_size_is_whole(frames):
    """As it is streamed; and with sound that lasts longer than the picture."""
    whole = hostile.encoded(list(frames[:8]), "libx264", "matroska")
    at = whole.index(b"\x18\x53\x80\x67") + 4
    assert len(list(video.iter_frames(whole[:at] + b"\x01" + b"\xff" * 7 + whole[at + 8 :]))) == 8
    with av.open(out := io.BytesIO(), "w", format="matroska") as file:
        stream, sound = file.add_stream("libx264", rate=10), file.add_stream("aac", rate=16000, layout="mono")
        hostile.put(file, stream, list(frames[:8]))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 80000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        file.mux(sound.encode(silence) + sound.encode(None))
    assert video.probe(out.getvalue()).duration_s == pytest.approx(5, abs=0.2)
    assert len(list(video.iter_frames(out.getvalue()))) == 8


def test_the_error_crosses_process_borders():
    error = pickle.loads(pickle.dumps(VideoError("corrupt", "told")))
    assert (error.reason, str(error)) == ("corrupt", "told")


SMALL = h264.encode(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), 12)


@settings(max_examples=150, deadline=None)
@given(
    keep=st.integers(0, len(SMALL)),
    at=st.integers(0, len(SMALL) - 1),
    damage=st.binary(min_size=0, max_size=40),
)
@example(keep=len(SMALL), at=0, damage=b"")
def test_damage_raises_nothing_else(keep, at, damage):
    content = bytearray(SMALL)
    content[at : at + len(damage)] = damage
    content = bytes(content[:keep])
    for read in (video.probe, h264.decode_yuv, lambda s: video.read_frames(s, [0, 0.3])):
        try:
            read(content)
        except VideoError as error:
            assert error.reason in video.REASONS
        else:
            assert keep


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(SMALL) - 1), damage=st.binary(min_size=1, max_size=4))
def test_damage_gives_no_other_pixels_without_a_demuxer(at, damage):
    content = SMALL[:at] + damage + SMALL[at + len(damage) :]
    try:
        found = h264.decode_yuv(content)
    except VideoError:
        return
    with pytest.MonkeyPatch.context() as patch, suppress(VideoError):
        patch.setattr(samples, "of", lambda mp4: None)
        np.testing.assert_array_equal(found, h264.decode_yuv(content))


def test_a_key_frame_that_an_edit_list_cuts_away_still_begins_what_follows():
    """The first picture shown is a B-frame, whole all the same."""
    path = assets.clip("no_face")
    with av.open(str(path)) as container:
        first = next(frame for packet in container.demux(video=0) for frame in packet.decode())
        assert not first.key_frame, "or this clip shows nothing here"
    times = [shown[0] for shown in video.iter_frames(path)]
    assert times[0] == 0 and times == sorted(times) and len(times) > 90
