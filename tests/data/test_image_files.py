import os

import pytest

from multistage_diffusion.data.image_files import Stamps, file_times, require_unchanged
from multistage_diffusion.errors import UserError


def test_stamps_depend_on_names_and_times_of_all_files(tmp_path):
    files = [("a", (3, 10, 20)), ("b", (4, 30, 5))]
    stamps = Stamps.of(tmp_path, files)
    assert stamps == Stamps.of(tmp_path, list(files))
    assert stamps.newest == 30
    for other in (files[:1], files[::-1], [files[0], ("c", (4, 30, 5))], [files[0], ("b", (4, 30, 6))]):
        assert Stamps.of(tmp_path, other).digest != stamps.digest
    assert Stamps.of(tmp_path, [(os.fsdecode(b"\xff"), (1, 2, 3))]).newest == 3


def test_the_place_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    assert Stamps.of((tmp_path / "set").relative_to(tmp_path), []).place == str((tmp_path / "set").resolve())


def test_a_change_of_length_or_time_is_a_change(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    before = file_times(file.stat())
    require_unchanged(before, file_times(file.stat()))
    os.utime(file, ns=(0, before[1] + 1))
    with pytest.raises(UserError, match="it has changed since the data set was opened"):
        require_unchanged(before, file_times(file.stat()))
    with pytest.raises(UserError):
        require_unchanged(before, None)
