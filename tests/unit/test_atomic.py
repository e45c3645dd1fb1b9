"""Files and folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvptr_ds.user_io.atomic import partial_path, replacing, replacing_folder


@pytest.mark.parametrize("unique", [None, 7])
def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path: Path, unique: int | None) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with replacing(path, unique) as partial:
        assert partial == partial_path(path, unique) and partial.parent == tmp_path
        assert partial.name == ("file.json.partial" if unique is None else "file.json.7.partial")
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="Is a directory"), replacing(path) as partial:
        partial.mkdir()
        partial.write_text("new")
    partial.rmdir()  # a folder is none of ours to remove: the first error is the one that is told
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "folder"
    with pytest.raises(ValueError, match="half"), replacing_folder(folder) as partial:
        (partial / "a").touch()
        raise ValueError("half")
    assert not list((tmp_path / "parent").iterdir())
    with replacing_folder(folder) as partial:
        (partial / "a").touch()
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["a"] and list((tmp_path / "parent").iterdir()) == [folder]


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    with pytest.raises(OSError, match="not empty"), replacing_folder(tmp_path / "folder") as partial:
        (partial / "a").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "precious"]
