"""tools/validate_shards.py as a user runs it."""

from __future__ import annotations

import io
import tarfile
from functools import partial
from pathlib import Path

import pytest

from mvptr_ds.data.shards.index import Index
from tests.support.hostile import picture, sound_folder
from tests.support.tools import run_tool

run = partial(run_tool, "validate_shards.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sound_folder(tmp_path / "shards")


def damage(folder: Path) -> None:
    """The first shard is cut in the content of its third record; the second has another one's picture of zeros."""
    first, second = sorted(folder.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:9000])
    data = bytearray(second.read_bytes())
    data[512:1500] = bytes(988)
    second.write_bytes(data)


def test_a_sound_folder(folder: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "index.npy"):
        (folder / name).unlink()
    done = run(folder, "--out", tmp_path / "index", "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert "records sound: 8" in done.stdout and "2 shards, 8 records, 16 samples" in done.stdout
    assert not (folder / "manifest.json").exists()
    assert len(Index.open(tmp_path / "index")) == 16


def test_a_damaged_folder_and_its_repair(folder: Path, tmp_path: Path) -> None:
    damage(folder)
    (folder / "manifest.json").unlink()
    found = run(folder, "--processes", 1)
    assert found.returncode == 1 and not (folder / "manifest.json").exists()
    assert "wrong 1: the tar is cut\n    shard-000000.tar, byte 8192, key 'k0002': " in found.stdout
    assert "wrong 1: a picture that cannot be decoded\n    shard-000001.tar, byte 0, key 'k0004': " in found.stdout
    assert len(found.stderr.splitlines()) == 1 and ": 2 things are wrong, no index was written; " in found.stderr

    repaired = run(folder, "--repair", tmp_path / "sound", "--max-examples", 0, "--processes", 1)
    assert repaired.returncode == 0, repaired.stderr
    assert "records written: 5" in repaired.stdout and "k0004" not in repaired.stdout
    assert Index.open(tmp_path / "sound").num_records == 5
    again = run(folder, "--repair", tmp_path / "sound", "--processes", 1)
    assert again.returncode == 0 and "records written: 5" in again.stdout

    headers_only = run(folder, "--no-decode", "--processes", 1)
    assert "the tar is cut" in headers_only.stdout


def test_tars_of_img2dataset(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw/00000.tar", "w") as tar:
        for name, content in (
            ("0.jpg", picture()),
            ("0.json", b'{"caption": "a dog", "url": "x"}'),
            ("0.txt", b"a dog"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = run(tmp_path / "raw", "--processes", 1)
    assert found.returncode == 1 and "wrong 1: a record of img2dataset" in found.stdout
    remedy = f"; python tools/build_shards.py img2dataset {tmp_path / 'raw'} --out DIR makes shards of such tars\n"
    assert found.stderr.endswith(remedy) and "--repair" not in found.stderr


def test_wrong_usage(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--out", tmp_path, "--repair", tmp_path).returncode == 2
    missing = run(tmp_path / "none")
    assert missing.returncode == 1 and "error: " in missing.stderr and "Traceback" not in missing.stderr
