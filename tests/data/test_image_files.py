import os

import pytest

from multistage_diffusion.data.image_files import Stamps, file_times, read_unchanged, require_unchanged
from multistage_diffusion.errors import UserError


def test_stamps_depend_on_names_and_times_of_all_files():
    files = [("a", (3, 10, 20)), ("b", (4, 30, 5))]
    stamps = Stamps.of("set", files)
    assert stamps == Stamps.of("set", list(files))
    assert stamps.newest == 30
    for other in (files[:1], files[::-1], [files[0], ("c", (4, 30, 5))], [files[0], ("b", (4, 30, 6))]):
        assert Stamps.of("set", other).digest != stamps.digest
    assert Stamps.of("set", [(os.fsdecode(b"\xff"), (1, 2, 3))]).newest == 3


def test_a_change_of_length_or_time_is_a_change(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    before = file_times(file.stat())
    require_unchanged(before, file_times(file.stat()))
    os.utime(file, ns=(0, before[1] + 1))
    with pytest.raises(UserError, match="it has changed since the data set was opened"):
        require_unchanged(before, file_times(file.stat()))


def test_a_file_is_read_whole_or_in_part_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"0123456789")
    before = file_times(file.stat())
    assert read_unchanged(str(file), before) == b"0123456789"
    assert read_unchanged(str(file), before, 3, 4) == b"3456"
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, place: pread(handle, min(size, 3), place))
    assert read_unchanged(str(file), before) == b"0123456789"
    with pytest.raises(UserError, match="it is cut short"):
        read_unchanged(str(file), before, 3, 40)
    file.write_bytes(b"01234567890")
    with pytest.raises(UserError, match="it has changed since the data set was opened"):
        read_unchanged(str(file), before)


def test_what_has_become_of_a_file_is_said_without_waiting(tmp_path):
    file = tmp_path / "a"
    with pytest.raises(UserError, match="No such file or directory"):
        read_unchanged(str(file), (1, 2, 3))
    os.mkfifo(file)
    with pytest.raises(UserError, match="it is no longer a file"):
        read_unchanged(str(file), (1, 2, 3))
