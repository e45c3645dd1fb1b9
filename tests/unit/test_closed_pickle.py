"""The closed unpickler: plain data of every protocol is read, and whatever else a file holds is refused and not run."""

from __future__ import annotations

import copyreg
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from mvptr_ds.corpus.sources import closed_pickle
from mvptr_ds.corpus.sources.closed_pickle import read_closed_pickle
from mvptr_ds.errors import DataError

REFS = [
    {
        "ref_id": 0, "ann_id": 1719310, "image_id": 581857, "split": "train", "sent_ids": [0, 1], "category_id": 1,
        "sentences": [
            {"sent_id": 0, "sent": "navy blue shirt", "raw": "navy blue shirt", "tokens": ["navy", "blue", "shirt"]},
            {"sent_id": 1, "sent": "woman back", "raw": "woman in back é", "tokens": ["woman", "back"]},
        ],
    },
    {"big": 2**70, "negative": -3, "float": 1.25, "none": None, "flags": (True, False), "empty": ((), [], {})},
]  # fmt: skip
# [{'sent': 'caf\xe9', 'n': 70000L}] as Python 2 writes it, its strings as bytes, by protocol
PYTHON_2 = {
    0: b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsS'n'\np4\nL70000L\nsa.",
    1: b"]q\x00}q\x01(U\x04sentq\x02U\x04caf\xe9q\x03U\x01nq\x04L70000L\nua.",
    2: b"\x80\x02]q\x00}q\x01(U\x04sentq\x02U\x04caf\xe9q\x03U\x01nq\x04\x8a\x03p\x11\x01ua.",
}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "refs(unc).p"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = written(tmp_path, pickle.dumps(REFS, protocol))
    assert read_closed_pickle(path) == REFS


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_strings_of_python_2_are_latin_1(tmp_path: Path, protocol: int) -> None:
    assert read_closed_pickle(written(tmp_path, PYTHON_2[protocol])) == [{"sent": "café", "n": 70000}]


class Runs:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("nested", [False, True])
def test_a_call_is_refused_and_not_run(tmp_path: Path, protocol: int, nested: bool) -> None:
    trap = Runs(tmp_path / "made")
    path = written(tmp_path, pickle.dumps([*REFS, {"sentences": [(trap,)]}] if nested else trap, protocol))
    with pytest.raises(
        DataError, match=r"no pickle of plain data: it names '(posix|nt)\.mkdir'; nothing of it was run"
    ):
        read_closed_pickle(path)
    assert not (tmp_path / "made").exists()
    pickle.loads(path.read_bytes())  # the trap is one
    assert (tmp_path / "made").exists()


HOSTILE = {
    "global": (b"cos\nsystem\n(S'true'\ntR.", "names 'os.system'"),
    "stack_global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "names 'os.system'"),
    "inst": (b"(S'true'\nios\nsystem\n.", "names 'os.system'"),
    "obj": (b"(cos\nsystem\nS'true'\no.", "names 'os.system'"),
    "reduce": (b"]](tR.", "operation REDUCE"),
    "build": (b"]}b.", "operation BUILD"),
    "newobj": (b"\x80\x02]]\x81.", "operation NEWOBJ"),
    "newobj_ex": (b"\x80\x04]]}\x92.", "operation NEWOBJ_EX"),
    "obj_alone": (b"(]o.", "operation OBJ"),
    "ext1": (b"\x80\x02\x82\xf0.", "operation EXT1"),
    "ext2": (b"\x80\x02\x83\xf0\x00.", "operation EXT2"),
    "ext4": (b"\x80\x02\x84\xf0\x00\x00\x00.", "operation EXT4"),
    "persid": (b"P17\n.", "operation PERSID"),
    "binpersid": (b"K\x01Q.", "operation BINPERSID"),
    "buffer": (b"\x80\x05\x97.", "operation NEXT_BUFFER"),
    "set": (b"\x80\x04\x8f.", "operation EMPTY_SET"),
    "class": (pickle.dumps(OrderedDict(a=1), 2), "names 'collections.OrderedDict'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_other_operation_is_refused(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    with pytest.raises(DataError, match=f"is no pickle of plain data: it (names|holds the).*{message[-8:]}") as error:
        read_closed_pickle(written(tmp_path, content))
    assert message in str(error.value) and "nothing of it was run" in str(error.value)


@pytest.mark.parametrize("operations", ["}%sK\x01s.", "}(%sK\x01u.", "(%sK\x01d."])
@pytest.mark.parametrize("layer", [b"\x85", b"2\x86"], ids=["deep", "doubled"])
def test_a_key_of_many_layers_is_refused_before_it_is_hashed(tmp_path: Path, operations: str, layer: bytes) -> None:
    """Tuples of tuples: one within the other, so that hash() overflows the stack, or two, so that it takes years."""
    key = b")" + layer * (300_000 if layer == b"\x85" else 100)
    before, after = operations.encode("latin-1").split(b"%s")
    with pytest.raises(DataError, match="no pickle of plain data: a dictionary has a tuple as a key"):
        read_closed_pickle(written(tmp_path, b"\x80\x02" + before + key + after))


def test_a_registered_extension_is_refused_too(tmp_path: Path) -> None:
    """Python's own unpickler takes it from a cache that `find_class` never sees."""
    copyreg.add_extension("os", "getcwd", 0xF0)
    try:
        content = b"\x80\x02\x82\xf0."
        assert pickle.loads(content) is os.getcwd
        with pytest.raises(DataError, match="operation EXT1"):
            read_closed_pickle(written(tmp_path, content))
    finally:
        copyreg.remove_extension("os", "getcwd", 0xF0)


def doubled(times: int) -> bytes:
    """A list of two references to a list of two references to ...: little memory, and 2 ** times values."""
    content = b"]q\x00"
    for number in range(times):
        content += b"]q%c(h%ch%ce" % (number + 1, number, number)
    return content + b"."


@pytest.mark.parametrize(
    "content", [doubled(60), b"]q\x00h\x00a.", b"}q\x00K\x01h\x00s."], ids=["bomb", "list", "dict"]
)
def test_what_unfolds_without_end_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="repeats its own parts to more values than it has bytes"):
        read_closed_pickle(written(tmp_path, content))


def test_a_memo_of_a_large_number_takes_no_memory(tmp_path: Path) -> None:
    assert read_closed_pickle(written(tmp_path, b"]r\xff\xff\xff\xff.")) == []


def test_a_deep_nest_is_read_without_recursion(tmp_path: Path) -> None:
    value = read_closed_pickle(written(tmp_path, b"]" * 50_000 + b"a" * 49_999 + b"."))
    depth = 0
    while value:
        value, depth = value[0], depth + 1
    assert depth == 49_999


def test_the_size_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, pickle.dumps(REFS))
    monkeypatch.setattr(closed_pickle, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(DataError, match="has over 0 MiB, the most that is read of a pickle; give it as JSON"):
        read_closed_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_cut_file_is_an_error_at_every_length(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(REFS[0], protocol)
    for length in range(0, len(content), 7):
        with pytest.raises(DataError, match="is no whole pickle"):
            read_closed_pickle(written(tmp_path, content[:length]))


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_a_file_copied_as_text_says_how_to_mend_it(tmp_path: Path, protocol: int) -> None:
    """Lines of Windows in protocol 0 would be read, with keys such as 'ref_id\\r'."""
    path = written(tmp_path, pickle.dumps([{"ten": "0123456789"}], protocol).replace(b"\n", b"\r\n"))
    with pytest.raises(DataError, match=r"was copied as text: .*; copy it again .* sed -i 's/\\r\$//'"):
        read_closed_pickle(path)
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))  # what the remedy does
    assert read_closed_pickle(path) == [{"ten": "0123456789"}]


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"a.", b"((", b"\x80\x09.", b"}]Ns.", b"L" + b"9" * 9999]
)
def test_what_is_no_pickle_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"refs\(unc\)\.p is no whole pickle \(\w+: .*begins with b.*; copy it again"):
        read_closed_pickle(written(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none is not a file; give the pickle"):
        read_closed_pickle(tmp_path / "none")
