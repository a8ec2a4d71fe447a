from __future__ import annotations

import os
from pathlib import Path

import pytest

from multistage_diffusion.errors import UserError
from multistage_diffusion.output_paths import require_place, require_room, require_utf8


@pytest.mark.parametrize("name", [".", "/", "..", "x/.."])
def test_a_place_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(UserError, match="names no file or folder of its own"):
        require_place(Path(name))


def test_links_that_lead_nowhere_are_no_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("absent")
    with pytest.raises(UserError, match=r"link: is a link that leads nowhere"):
        require_place(tmp_path / "link")
    with pytest.raises(UserError, match=r"nothing can be written in .*/link"):
        require_place(tmp_path / "link" / "new")
    (tmp_path / "absent").mkdir()
    require_place(tmp_path / "link" / "new")


def test_what_is_below_a_file_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"nothing can be written in .*/file"):
        require_place(tmp_path / "file" / "a" / "b")
    require_place(tmp_path / "a" / "b")


def test_room_is_made_only_where_it_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert not require_room(folder, "resume it", replace=False)
    folder.mkdir()
    (folder / ".lock").touch()
    assert not require_room(folder, "resume it", replace=False, ignored=".lock")
    with pytest.raises(UserError, match=r"folder: exists; resume it, choose another --out, or replace it"):
        require_room(folder, "resume it", replace=False)
    assert require_room(folder, "resume it", replace=True)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match=rf"link: is a link; name what it leads to, {folder}"):
        require_room(tmp_path / "link", "resume it", replace=True)


def test_folders_of_tensors_have_utf8_paths(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"x\xff")
    require_utf8(tmp_path / "\u00e9")
    for path in (odd, odd / "run"):
        with pytest.raises(UserError, match="not valid UTF-8"):
            require_utf8(path)
