"""Reading video files: which frames come out, upright, and what is said about files that are none."""

from __future__ import annotations

import sys
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from command_line import call, refused
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

import sightline
from sightline.errors import InputError
from sightline.models import videos
from sightline.models.videos import is_video, read_video, stream_video

WIDTH, HEIGHT = 64, 48
LEVELS = 240


def write(
    file: Path,
    frames: int = 40,
    *,
    codec: str = "mpeg4",
    fps: int = 10,
    gop: int = 12,
    b_frames: int = 0,
    **options: str,
) -> Path:
    """A video whose frame number n has the grey level 6 n, a white corner on the top left."""
    with av.open(file, "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size, stream.max_b_frames, stream.bit_rate = gop, b_frames, 8_000_000
        for number in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), 6 * number % LEVELS, dtype=np.uint8)
            pixels[:16, :16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file


def numbers(frames: Any) -> list[int]:
    """Which frames these are, read from their grey level."""
    return [round(frame.getpixel((40, 30))[0] / 6) for frame in frames]


def without_av(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("videos") / "film.mp4", sc_threshold="1000000000")  # a key frame in twelve


def test_the_frames_are_the_middles_of_equal_segments(film: Path) -> None:
    frames = read_video(film, frames=4)
    assert [(frame.mode, frame.size) for frame in frames] == [("RGB", (WIDTH, HEIGHT))] * 4
    assert numbers(frames) == [5, 15, 25, 35]
    assert numbers(read_video(film, frames=1)) == [20]
    assert numbers(read_video(film, frames=3)) == [6, 20, 33]
    assert len(read_video(film)) == 32
    assert min(frames[0].getpixel((4, 4))) > 240


def test_of_a_short_video_each_frame_comes_once(tmp_path: Path) -> None:
    short = write(tmp_path / "short.mp4", 3)
    assert numbers(read_video(short, frames=8)) == [0, 1, 2]
    assert numbers(read_video(str(short), frames=2)) == [0, 2]


@pytest.mark.parametrize(
    ("name", "codec", "b_frames", "gop"),
    [
        ("film.mkv", "ffv1", 0, 1),
        ("film.mkv", "libx264", 2, 12),
        ("film.mp4", "libx264", 3, 7),
        ("film.mp4", "libx264", 0, 1000),
        ("film.avi", "mpeg4", 2, 12),
        ("film.mpg", "mpeg2video", 2, 6),
        ("film.ts", "mpeg2video", 2, 6),
        ("film.m4v", "mpeg4", 0, 12),  # bare pictures, which tell no times
    ],
)
@pytest.mark.parametrize("frames", [1, 7, 40])
def test_seeking_finds_the_frames_that_decoding_everything_finds(
    name: str, codec: str, b_frames: int, gop: int, frames: int, tmp_path: Path
) -> None:
    try:
        file = write(tmp_path / name, codec=codec, b_frames=b_frames, gop=gop, fps=25)
    except av.error.EncoderNotFoundError:
        pytest.skip(f"this FFmpeg has no {codec}")
    with av.open(file) as container:
        everything = [frame.to_image() for frame in container.decode(video=0)]
    segments = np.linspace(0, len(everything), frames + 1)
    middles = [int((low + high) / 2 + 1e-9) for low, high in pairwise(segments.tolist())]
    taken = read_video(file, frames=frames)
    assert [frame.tobytes() for frame in taken] == [everything[middle].tobytes() for middle in middles]


def test_what_lies_before_the_key_frame_is_skipped(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counted(container: Any, *arguments: Any) -> Any:
        for frame in real(container, *arguments):
            decoded.append(frame.pts)
            yield frame

    real = videos._decoded
    monkeypatch.setattr(videos, "_decoded", counted)
    assert numbers(read_video(film, frames=1)) == [20]
    assert len(decoded) == 9  # from key frame 12 on


def test_frames_stream_one_by_one(film: Path) -> None:
    assert numbers(stream_video(film)) == list(range(40))
    assert numbers(stream_video(film, fps=5)) == list(range(0, 40, 2))
    assert numbers(stream_video(film, fps=4)) == [0, 3, 5, 8] + [10 * s + n for s in (1, 2, 3) for n in (0, 3, 5, 8)]
    assert numbers(stream_video(film, fps=1000)) == list(range(40))
    assert numbers(islice(stream_video(film, fps=1), 2)) == [0, 10]


def test_a_video_that_was_filmed_on_its_side_is_turned_upright(film: Path, tmp_path: Path) -> None:
    data = film.read_bytes()
    header = data.index(b"tkhd") + 4  # version 0: the matrix is 40 bytes on
    one = 1 << 16

    def matrix(*values: int) -> bytes:
        return b"".join(
            value.to_bytes(4, "big", signed=True) for value in (*values[:2], 0, *values[2:], 0, 0, 0, 1 << 30)
        )

    upright, on_its_side = matrix(one, 0, 0, one), matrix(0, one, -one, 0)
    assert data[header + 40 : header + 76] == upright
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data[: header + 40] + on_its_side + data[header + 76 :])
    (frame,) = read_video(turned, frames=1)
    assert frame.size == (HEIGHT, WIDTH)
    # Clockwise by a quarter: what was on the top left is on the top right.
    assert min(frame.getpixel((HEIGHT - 5, 4))) > 240
    assert max(frame.getpixel((4, 4))) < 200


def test_the_package_exports_the_readers(film: Path) -> None:
    assert numbers(sightline.read_video(film, frames=2)) == [10, 30]
    assert numbers(islice(sightline.stream_video(film), 1)) == [0]
    assert is_video("a.MP4")
    assert not is_video(Path("a.gif"))


# --- What is refused ---


@pytest.mark.parametrize("frames", [0, -3, 2.5, True])
def test_fewer_frames_than_one_are_refused(film: Path, frames: Any) -> None:
    with pytest.raises(InputError, match=f"number of frames must be a whole number from 1 on, not {frames}"):
        read_video(film, frames=frames)


@pytest.mark.parametrize("fps", [0, -1.0, float("inf"), float("nan"), "2", True])
def test_a_bad_rate_is_refused_at_once(film: Path, fps: Any) -> None:
    with pytest.raises(InputError, match="fps must be a number above 0"):
        stream_video(film, fps=fps)


def test_without_the_extra_it_is_named(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_av(monkeypatch)
    for read in (read_video, stream_video):
        with pytest.raises(InputError, match=r"needs PyAV; install it with: pip install 'sightline\[video\]'"):
            read(film)


def test_files_that_are_no_videos_are_refused(film: Path, tmp_path: Path) -> None:
    def message(name: str, content: bytes | None = None) -> str:
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        said = []
        for read in (read_video, stream_video):
            with pytest.raises(InputError) as caught:
                list(read(file))
            said.append(str(caught.value))
        assert said[0] == said[1]
        assert f"video '{file}'" in said[0]
        return said[0]

    whole = film.read_bytes()
    assert message("none.mp4").endswith("does not exist")
    assert message(".").endswith("is a folder, not a file")
    assert message("empty.mp4", b"").endswith("is empty")
    assert "is not a video that can be read" in message("junk.mp4", b"no video at all" * 100)
    assert "is not a video that can be read" in message("cut.mp4", whole[: len(whole) // 2])


def test_a_file_without_frames_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "none.avi"
    with av.open(file, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()
    for read in (read_video, stream_video):
        with pytest.raises(InputError, match=r"none\.avi' has no frames"):
            list(read(file))


def test_a_file_with_sound_only_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sound.wav"
    with av.open(file, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match="has no pictures in it"):
        read_video(file)


def test_damage_in_the_middle_is_told(film: Path, tmp_path: Path) -> None:
    data = bytearray(film.read_bytes())
    start = data.index(b"mdat") + 4
    for place in range(start + 400, start + 900):
        data[place] = 0
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    with pytest.raises(InputError, match=r"broken\.mp4' is damaged or cut off"):
        read_video(broken, frames=40)
    with pytest.raises(InputError, match=r"broken\.mp4' is damaged or cut off"):
        list(stream_video(broken))


def test_too_large_frames_are_refused_before_they_are_decoded(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(InputError, match=f"too large: {WIDTH} x {HEIGHT} pixels, at most {WIDTH * HEIGHT - 1}"):
        read_video(film)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    other = write(tmp_path / "other.ts", codec="mpeg2video", fps=25)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{other}\n#EXT-X-ENDLIST\n")
    with open(playlist, "rb") as file, av.open(file) as container:
        assert len(list(container.decode(video=0))) == 40  # FFmpeg by itself follows it
    with pytest.raises(InputError, match="is not a video that can be read"):
        read_video(playlist)


# --- sightline ask ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


def test_ask_shows_a_video_or_several_pictures(checkpoint: str, film: Path, tmp_path: Path) -> None:
    from sightline.models.answering import prepare, reply
    from sightline.models.loading import load

    model, processor = load(checkpoint)
    options = ["--model", checkpoint, "--max-new-tokens", "4"]
    files = []
    for place, frame in enumerate(read_video(film, frames=2)):
        files.append(tmp_path / f"{place}.png")
        frame.save(files[-1])
    shown = [Image.open(file) for file in files]
    (expected,) = reply(model, processor, prepare(model, processor, [shown], ["What is there?"]), 4)
    told = f"{expected.text} [cut off: 4 tokens]\n" if expected.cut_off else f"{expected.text}\n"
    assert call("ask", str(film), "What is there?", "--frames", "2", *options).stdout == told
    assert call("ask", *map(str, files), "What is there?", *options).stdout == told
    one = call("ask", str(files[0]), "What is there?", *options)
    assert one.exit_code == 0
    reduced = call(
        "ask", str(film), "What is there?", "--frames", "2", *options, "--methods", "none", "fastervlm:keep=0.5"
    )
    assert reduced.stdout.startswith(f"none: {told}fastervlm:keep=0.5: ")


def test_ask_refuses_what_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, film: Path) -> None:
    assert "does not exist" in refused("ask", str(tmp_path / "none.mp4"), "What?", "--model", "nowhere")
    none = refused("ask", str(film), "What?", "--frames", "0", "--model", "nowhere")
    assert "number of frames must be a whole number from 1 on, not 0" in none
    without_av(monkeypatch)
    assert "sightline[video]" in refused("ask", str(film), "What?", "--model", "nowhere")
