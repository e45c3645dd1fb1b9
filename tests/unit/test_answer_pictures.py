"""The sheet of right and wrong answers: which items it takes, and what it draws of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvptr_ds.data.schema import Caption, Extractor, Record, Region
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.evaluation import answer_pictures
from mvptr_ds.evaluation.answer_pictures import AnswerItem, choose_items, draw_answers
from mvptr_ds.evaluation.panels import DrawnBox, Line, Panel, drawn_sheet

WIDTH, HEIGHT, NUM = 80, 60, 8
CHOSEN, MEANT = (4.0, 4.0, 40.0, 30.0), (30.0, 20.0, 70.0, 50.0)


def shards(folder: Path, with_images: bool) -> SampleIndex:
    """Eight records of two captions and two regions each; the second caption means the second box."""

    def items() -> Iterator[tuple[str, Record, dict[str, bytes]]]:
        for number in range(NUM):
            pixels, features = io.BytesIO(), io.BytesIO()
            Image.new("RGB", (WIDTH, HEIGHT), (30 * number, 120, 200)).save(pixels, "PNG")
            np.save(features, np.zeros((2, 5), np.float32))
            captions = (Caption("what is it?"), Caption("the dog", (), {"box": list(MEANT)}))
            regions = (Region(CHOSEN, "cat"), Region(MEANT, "dog"))
            record = Record(str(number), WIDTH, HEIGHT, captions, regions, Extractor("e", "1"))
            yield f"{number:04d}", record, {"png": pixels.getvalue()} if with_images else {"npy": features.getvalue()}

    write_shards(folder, items(), 100)
    return ensure_index(folder)


def item(record: int, score: float | None, caption: int = 0) -> AnswerItem:
    return AnswerItem(2 * record + caption, "dog", "cat", score)


def test_half_are_wrong_where_there_are_enough(tmp_path: Path) -> None:
    index = shards(tmp_path / "shards", with_images=True)
    items = [item(n, float(n not in (2, 5, 6))) for n in range(NUM)]

    def chosen(items: list[AnswerItem], num: int) -> list[tuple[int, bool | None]]:
        return [(one.sample // 2, one.is_right) for one in choose_items(index, items, num)]

    assert chosen(items, 4) == [(0, True), (1, True), (2, False), (5, False)]
    assert chosen(items, 8) == [(n, n not in (2, 5, 6)) for n in range(8)]
    assert chosen(items[:3], 4) == [(0, True), (1, True), (2, False)]
    assert chosen(items[5:7], 4) == [(5, False), (6, False)]
    # one of each picture, and what is not known only where nothing is
    assert chosen([item(0, 1.0), item(0, 0.0, caption=1), item(1, None)], 4) == [(0, True)]
    assert chosen([item(0, None), item(1, None)], 4) == [(0, None), (1, None)]
    assert [item(0, score).is_right for score in (0.0, 0.3, 0.5, 1.0)] == [False, False, True, True]


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Panel]:
    """The panels that are drawn."""
    drawn: list[Panel] = []

    def noting(given: list[Panel]) -> bytes:
        drawn.extend(given)
        return drawn_sheet(given)

    monkeypatch.setattr(answer_pictures, "drawn_sheet", noting)
    return drawn


def test_answers_are_right_or_wrong_in_words_and_colours(tmp_path: Path, panels: list[Panel]) -> None:
    index = shards(tmp_path / "shards", with_images=True)
    items = [
        AnswerItem(0, "cat", "cat", 1.0),
        AnswerItem(2, "dog", "cat", 0.0),
        AnswerItem(4, "puppy", "dog", 0.6),
        AnswerItem(6, "tree", "dog", 0.3),
    ]
    draw_answers(tmp_path / "answers.png", index, items)
    assert [panel.lines for panel in panels] == [
        [Line("what is it?"), Line("cat (right)", "tab:green")],
        [Line("what is it?"), Line("dog (wrong)", "tab:red"), Line("known: cat")],
        [Line("what is it?"), Line("puppy (right, score 0.60)", "tab:green"), Line("known: dog")],
        [Line("what is it?"), Line("tree (wrong, score 0.30)", "tab:red"), Line("known: dog")],
    ]
    assert all(panel.image is not None and panel.boxes == [] for panel in panels)
    with Image.open(tmp_path / "answers.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


@pytest.mark.parametrize("with_images", [True, False])
def test_the_chosen_box_and_the_right_one(with_images: bool, tmp_path: Path, panels: list[Panel]) -> None:
    index = shards(tmp_path / "shards", with_images)
    draw_answers(
        tmp_path / "answers.png",
        index,
        [AnswerItem(1, "1", None, 1.0, MEANT), AnswerItem(3, "0", None, 0.0, CHOSEN)],
    )
    regions = [DrawnBox(box, "dimgray", "-", tag, 0.6) for box, tag in ((CHOSEN, "cat"), (MEANT, "dog"))]
    tagged = [] if with_images else regions
    right = DrawnBox(MEANT, "tab:green", ":")
    assert panels[0].boxes == [*tagged, DrawnBox(MEANT, "tab:green", "-"), right]
    assert panels[1].boxes == [*tagged, DrawnBox(CHOSEN, "tab:red", "--"), right]
    assert panels[1].lines == [Line("the dog"), Line("wrong", "tab:red")]
    assert (panels[0].image is not None) == with_images


def test_boxes_are_drawn_where_they_lie(tmp_path: Path) -> None:
    """The pixels of a single panel: red above a box's own edge, none in a sheet without it."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    red = []
    for boxes in ([], [DrawnBox(CHOSEN, "#ff0000")]):
        content = drawn_sheet([Panel(image, WIDTH, HEIGHT, boxes, [Line("a $ dog \u202e")])])
        with Image.open(io.BytesIO(content)) as sheet:
            pixels = np.asarray(sheet.convert("RGB")).astype(int)
        red.append((pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(-1))
    assert red[0].sum() == 0
    rows, columns = np.nonzero(red[1])
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(36 / 26, rel=0.05)


def test_a_picture_that_cannot_be_read_is_left_out(
    tmp_path: Path, panels: list[Panel], caplog: pytest.LogCaptureFixture
) -> None:
    record = Record("0", 8, 8, (Caption("a"),), (Region((0.0, 0.0, 4.0, 4.0), "dog"),), Extractor("e", "1"))
    good = io.BytesIO()
    Image.new("RGB", (8, 8)).save(good, "PNG")
    write_shards(tmp_path / "shards", [("0", record, {"png": b"none"}), ("1", record, {"png": good.getvalue()})], 10)
    index = ensure_index(tmp_path / "shards")
    with caplog.at_level("WARNING"):
        draw_answers(tmp_path / "a.png", index, [AnswerItem(n, "dog", "dog", 1.0) for n in range(2)])
    assert len(panels) == 1
    assert "1 pictures were left out of a.png; the first: sample 0: the image cannot be decoded" in caplog.text
    draw_answers(tmp_path / "none.png", index, [])
    assert Image.open(tmp_path / "none.png").format == "PNG"
