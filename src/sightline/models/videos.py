"""Opening a video file: upright RGB frames come out, a few of them or one after another, or one clear sentence.

Files of every format that FFmpeg knows are read, through PyAV (`pip install 'sightline[video]'`). A file that names
other files or addresses (a playlist) is refused: nothing but the given file is opened.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from numbers import Real
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline.errors import InputError
from sightline.models.images import MAX_PIXELS, open_file

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
"""What the names of video files end in."""

INDEXED = ("mov", "matroska", "avi")
"""Formats that say where their key frames are; in others a jump may land elsewhere than it says."""

Source = str | os.PathLike[str]


def is_video(path: Source) -> bool:
    """Whether a file's name is that of a video. (GIF and WEBP count as pictures.)"""
    return Path(path).suffix.lower() in SUFFIXES


def read_video(path: Source, *, frames: int = 32) -> list[Image.Image]:
    """Frames of a video, uniformly sampled: of equal segments of it, the middle frame of each.

    In MP4, MOV, MKV, WEBM and AVI only what lies between a wanted frame and the key frame before it is decoded.

    Args:
        path: the file.
        frames: how many; a video that has fewer gives each of its frames once.

    Returns:
        The frames as RGB, upright, in the order in which they are shown.

    Raises:
        InputError: if PyAV is missing, for fewer frames than one, and, naming the file, when it is missing, a folder,
            empty, no video, without a frame, too large, or damaged.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise InputError(f"the number of frames must be a whole number from 1 on, not {frames!r}")
    name = _name(path)
    with _opened(path) as (container, stream):
        packets = [
            (packet.pts, packet.dts, packet.is_keyframe)  # and not its data: a file may be larger than the memory
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard  # the last one is empty; a frame to discard is not shown
        ]
        timed = all(pts is not None for pts, _, _ in packets)
        times = sorted(pts for pts, _, _ in packets) if timed else []
        jumps = timed and container.format.name.startswith(INDEXED)
        keys = sorted(((pts, dts) for pts, dts, is_key in packets if jumps and is_key), key=itemgetter(0))
    if timed and len(set(times)) == len(times):
        with _opened(path) as (container, stream):
            wanted = [times[place] for place in _middles(len(times), frames)]
            taken = list(_seek(container, stream, times, wanted, keys))
    else:  # a bare stream of pictures tells no times: they are counted first
        with _opened(path) as (container, stream):
            count = sum(1 for _ in _decoded(container, stream))
        with _opened(path) as (container, stream):
            places = frozenset(wanted := _middles(count, frames))
            taken = [_upright(frame) for place, frame in enumerate(_decoded(container, stream)) if place in places]
    if not wanted:
        raise InputError(f"{name} has no frames")
    if len(taken) < len(wanted):
        raise InputError(f"{name} is damaged or cut off: some of its frames cannot be decoded")
    return taken


def stream_video(path: Source, *, fps: float | None = None) -> Iterator[Image.Image]:
    """The frames of a video one after another, decoded as they are asked for.

    Args:
        path: the file.
        fps: so many of each second of the video, the first at or after each time; None, or more than it has: each
            frame once.

    Raises:
        InputError: as `read_video`, at once or, where the file is damaged further on, when the frame is reached.
    """
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps < math.inf):
        raise InputError(f"fps must be a number above 0, or None for every frame, not {fps!r}")
    with _opened(path):
        pass  # what is wrong with the file as a whole is said here and not at the first frame
    return _stream(path, fps)


def _stream(path: Source, fps: float | None) -> Iterator[Image.Image]:
    start: float | None = None
    due = -math.inf
    with _opened(path) as (container, stream):
        for frame in _decoded(container, stream):
            now = frame.time
            start = now if start is None else start
            if fps is not None and now is not None and start is not None:
                if now < due:
                    continue
                due = start + (math.floor((now - start) * fps + 1e-6) + 1) / fps - 1e-6
            yield _upright(frame)
    if start is None:
        raise InputError(f"{_name(path)} has no frames")


def _seek(
    container: Any, stream: Any, times: Sequence[int], wanted: Sequence[int], keys: Sequence[tuple[int, int | None]]
) -> Iterator[Image.Image]:
    """The frames at the wanted ones of all times; of what is between them, whole stretches up to a key frame are
    skipped."""
    decoded = _decoded(container, stream)
    following = 0  # the place in `times` of the frame that comes next
    for time in wanted:
        place = bisect_right(keys, time, key=itemgetter(0)) - 1
        if place >= 0 and bisect_left(times, keys[place][0]) > following:
            pts, dts = keys[place]
            container.seek(pts if dts is None else min(pts, dts), stream=stream)
            decoded = _decoded(container, stream)
        for frame in decoded:
            if frame.pts is not None and frame.pts >= time:
                following = bisect_right(times, frame.pts)
                yield _upright(frame)
                break


def _middles(count: int, frames: int) -> list[int]:
    """The middle of each of `frames` equal segments of `count` things, each thing at most once.

    >>> _middles(10, 2), _middles(3, 8)
    ([2, 7], [0, 1, 2])
    """
    segments = min(count, frames)
    return [(2 * segment + 1) * count // (2 * segments) for segment in range(segments)]


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    yield from container.decode(stream)


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


@contextmanager
def _opened(path: Source) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; what FFmpeg finds wrong with them is told in one sentence."""
    try:
        av = import_module("av")
    except ImportError as error:
        raise InputError("reading videos needs PyAV; install it with: pip install 'sightline[video]'") from error
    name = _name(path)
    with open_file(Path(path), name) as file:
        try:
            # From the open file, and with no way to open another: a playlist may name any file or address.
            container = av.open(file, options={"protocol_whitelist": "pipe"})
        except av.error.FFmpegError as error:
            raise InputError(f"{name} is not a video that can be read: {error.strerror}") from error
        with container:
            covers = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & covers]
            if not streams:
                raise InputError(f"{name} has no pictures in it, only other streams")
            stream = streams[0]
            if stream.codec_context is None:
                raise InputError(f"{name} is in a format that this FFmpeg cannot decode")
            if stream.width * stream.height > MAX_PIXELS:
                raise InputError(
                    f"{name} is too large: {stream.width} x {stream.height} pixels, at most {MAX_PIXELS} are allowed"
                )
            stream.thread_type = "AUTO"
            try:
                yield container, stream
            except av.error.FFmpegError as error:
                raise InputError(f"{name} is damaged or cut off: {error.strerror}") from error


def _name(path: Source) -> str:
    return f"video {str(path)!r}"
