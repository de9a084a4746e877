"""Event files for TensorBoard. A full disk raises an error in the calling thread."""

import errno
import resource
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jax_rlhf.runtime.tensorboard import TensorBoard


def events(file):
    """The events of a TFRecord file. Each record is a length, its checksum, the content, and its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_an_event_file_has_its_first_step_and_all_points(tmp_path):
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


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path):
    board = TensorBoard(tmp_path, first=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # bytes per file
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            board.add(1, {f"curve {i}": 0.0 for i in range(100)})
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path))
        with pytest.raises(OSError, match="File too large"):
            board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
