"""Curves that TensorBoard reads; a full disk is an error, and no thread that everybody waits for."""

import errno
import resource
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jax_rlhf.runtime.tensorboard import TensorBoard


def events(file):
    """Of a file of TensorFlow's records: length, its checksum, content, its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_points_stand_in_a_file_that_says_where_its_start_began(tmp_path):
    board = TensorBoard(tmp_path / "tensorboard", first=3)
    board.add(3, {"train/loss": 0.5, "train/accuracy": 1.0})
    board.add(4, {"train/loss": 0.25})
    board.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    version, start, *points = events(file)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (SessionLog.START, 3)
    found = [(point.step, point.summary.value[0].tag, point.summary.value[0].simple_value) for point in points]
    assert found == [(3, "train/loss", 0.5), (3, "train/accuracy", 1.0), (4, "train/loss", 0.25)]
    assert all(point.wall_time > 1e9 for point in points)


def test_a_full_disk_is_said_at_once_with_the_folder(tmp_path):
    board = TensorBoard(tmp_path, first=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # bytes of a file
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            board.add(1, {f"curve {i}": 0.0 for i in range(100)})
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path))
        with pytest.raises(OSError, match="File too large"):
            board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
