import os

import pytest

from multistage_diffusion.data.image_files import Stamps, file_times, require_unchanged
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
    with pytest.raises(UserError):
        require_unchanged(before, None)
