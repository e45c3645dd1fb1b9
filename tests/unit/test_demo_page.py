"""What the page answers, and how answers are drawn: against the model itself, and with texts that mean harm."""

from __future__ import annotations

import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvptr_ds
from mvptr_ds.commands.demo_page import main
from mvptr_ds.data.schema import Phrase
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.demo_page import answers as answers_module
from mvptr_ds.demo_page import drawing
from mvptr_ds.demo_page.answers import (
    MAX_SENTENCE_CHARS,
    Answers,
    Found,
    HeldOut,
    ReadOut,
    Search,
    read_held_out,
    swap_words,
    without_tags,
)
from mvptr_ds.demo_page.page import _in_words, import_gradio
from mvptr_ds.errors import DataError
from mvptr_ds.inference import Grounding, Picture, TrainedModel
from tests.support.preview_items import hostile_texts, jpeg
from tests.support.untrained_folder import NUM_RECORDS, Untrained, untrained_folder

SENTENCE = "A red dog stands beside a blue car."


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    return untrained_folder(tmp_path_factory.mktemp("image"), "image")


@pytest.fixture(scope="module")
def model(untrained: Untrained) -> TrainedModel:
    return mvptr_ds.load(untrained.folder, device="cpu")


@pytest.fixture(scope="module")
def answers(untrained: Untrained, model: TrainedModel) -> Answers:
    return Answers(model, read_held_out(untrained.index, 500, with_features=False))


# --- what the model is asked


@pytest.mark.parametrize("with_tags", [True, False])
def test_a_search_ranks_as_the_model_does(
    answers: Answers, model: TrainedModel, with_tags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "NUM_RERANKED", 5)
    pictures = [one.picture if with_tags else without_tags(one.picture) for one in answers.held_out]
    found = answers.search(f"  {SENTENCE} ", with_tags)
    by_cosine = model.rank(pictures, SENTENCE, rerank=0)[0][:5]
    reranked = model.rank(pictures, SENTENCE, rerank=5)[0][:5]
    assert [one.number for one in found.by_similarity] == [one.picture for one in by_cosine]
    assert [one.score for one in found.by_similarity] == pytest.approx([one.similarity for one in by_cosine], abs=1e-5)
    assert [one.number for one in found.reranked] == [one.picture for one in reranked]
    assert [one.score for one in found.reranked] == pytest.approx([one.match for one in reranked], abs=1e-5)


def test_tags_count(answers: Answers, model: TrainedModel) -> None:
    on, off = answers.picture(0, None, True), answers.picture(0, None, False)
    assert on.tags and off.tags is None and on.boxes == off.boxes
    assert not torch.allclose(model.embed_image(on), model.embed_image(off), atol=1e-4)
    scores = [one.scores for one in answers.ground(on, SENTENCE, "uni")]
    assert scores != [one.scores for one in answers.ground(off, SENTENCE, "uni")]


def test_captions_are_compared_by_every_read_out(answers: Answers, model: TrainedModel) -> None:
    picture, other = answers.picture(1, None, True), "A blue dog stands beside a red car."
    read_outs = answers.compare(picture, SENTENCE, other)
    for n, caption in enumerate((SENTENCE, other)):
        wanted = [float(model.similarity(picture, caption)), float(model.match(picture, caption))]
        for states in ("uni", "cross"):
            wanted.append(float(np.mean([one.score for one in model.ground(picture, caption, states=states)])))
        assert [(one.first, one.second)[n] for one in read_outs] == pytest.approx(wanted, abs=1e-5)
    assert all(one.true_one == int(one.second > one.first) for one in read_outs)  # type: ignore[operator]


def test_a_caption_without_a_known_phrase_gets_no_mean(answers: Answers) -> None:
    read_outs = answers.compare(answers.picture(1, None, True), SENTENCE, "An aeroplane.")
    assert [one.second is None for one in read_outs] == [False, False, True, True]
    assert read_outs[2].true_one is None and "“An aeroplane.” is in the vocabulary" in read_outs[2].note
    assert "is in the vocabulary" in drawing.comparison(read_outs, SENTENCE, "An aeroplane.")


def test_equal_numbers_hold_neither_for_true() -> None:
    assert ReadOut("", 0.5, 0.5).true_one is None
    assert ReadOut("", 0.5, 0.4).true_one == 0 and ReadOut("", 0.4, 0.5).true_one == 1


def test_masks_are_filled(answers: Answers, model: TrainedModel) -> None:
    picture = answers.picture(0, None, True)
    assert answers.fill(picture, "A [MASK] and a [MASK].") == model.fill(picture, "A [MASK] and a [MASK].", top_k=5)


@pytest.mark.parametrize(
    ("sentence", "swapped", "masked"),
    [
        (SENTENCE, "A blue dog stands beside a red car.", "A red [MASK] stands beside a blue car."),
        ("A red dog and a red car.", "A red car and a red dog.", "A red [MASK] and a red car."),
        ("A dog chases a cat.", "A cat chases a dog.", "A [MASK] chases a cat."),
        ("Hello", "Hello", None),
    ],
)
def test_captions_are_proposed(answers: Answers, sentence: str, swapped: str, masked: str | None) -> None:
    assert answers.swapped(sentence) == swapped
    assert masked is None or answers.masked(sentence) == masked


def test_spans_that_overlap_are_not_swapped() -> None:
    phrases = [Phrase(("dog",), ((0, 3),)), Phrase(("dogs",), ((1, 4),))]
    assert swap_words("dogs run", phrases) == "dogs run"


# --- what somebody does wrongly


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no picture", "cannot be decoded"),
        (png(9000, 9000), "at most 64000000 are decoded"),
        (jpeg()[:300], "cannot be decoded"),
        (b"", "cannot be decoded"),
        (None, "cannot be read"),
    ],
)
def test_an_upload_that_is_no_picture(answers: Answers, tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "upload.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        drawing.chosen(answers.picture(0, path, True))
    if content is not None:
        with pytest.raises(DataError, match=said):
            answers.ground(answers.picture(0, path, True), SENTENCE, "uni")


def test_an_upload_that_is_too_large(answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "MAX_UPLOAD_BYTES", 100)
    (tmp_path / "upload.jpg").write_bytes(jpeg())
    with pytest.raises(DataError, match="larger than"):
        answers.picture(None, tmp_path / "upload.jpg", True)


def test_an_upload_goes_before_the_held_out_picture(answers: Answers, tmp_path: Path) -> None:
    (tmp_path / "upload.jpg").write_bytes(jpeg())
    picture = answers.picture(0, tmp_path / "upload.jpg", True)
    assert picture == Picture(jpeg())
    assert "cells of a grid" in drawing.chosen(picture)
    found = answers.ground(picture, SENTENCE, "cross")
    assert len(found[0].boxes) == 9 and "mv-r8" in drawing.grounding(picture, SENTENCE, found)


@pytest.mark.parametrize("text", ["", "  ", None, "a" * (MAX_SENTENCE_CHARS + 1)])
def test_a_sentence_that_is_none(answers: Answers, text: str | None) -> None:
    picture = answers.picture(0, None, True)
    for ask in (
        lambda: answers.search(text, True),  # type: ignore[arg-type]
        lambda: answers.ground(picture, text, "uni"),  # type: ignore[arg-type]
        lambda: answers.compare(picture, SENTENCE, text),  # type: ignore[arg-type]
        lambda: answers.fill(picture, text),  # type: ignore[arg-type]
    ):
        with pytest.raises(DataError, match=r"type one|at most 1,000"):
            ask()


def test_other_questions_without_an_answer(answers: Answers) -> None:
    picture = answers.picture(0, None, True)
    with pytest.raises(DataError, match="no picture is chosen"):
        answers.picture(None, None, True)
    with pytest.raises(DataError, match="no picture is chosen"):
        answers.picture(NUM_RECORDS, None, True)
    with pytest.raises(DataError, match="both captions are the same"):
        answers.compare(picture, SENTENCE, f" {SENTENCE}")
    with pytest.raises(DataError, match="no phrase of"):
        answers.ground(picture, "An aeroplane.", "uni")
    with pytest.raises(DataError, match=r"holds no \[MASK\]"):
        answers.fill(picture, SENTENCE)


def test_errors_of_users_are_messages_and_others_are_not() -> None:
    def fails(error: Exception) -> str:
        raise error

    said = _in_words(fails)(DataError("no <b>picture</b>"))  # type: ignore[arg-type]
    assert said == '<p class="mv-problem" role="alert">no &lt;b&gt;picture&lt;/b&gt;</p>'
    with pytest.raises(KeyError):
        _in_words(fails)(KeyError("a bug"))  # type: ignore[arg-type]


# --- what is shown


def test_records_that_cannot_be_read_are_left_out(
    untrained: Untrained, model: TrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record, members = untrained.index.read(untrained.index.place(0))
    write_shards(tmp_path, [("0", record, {"png": b"broken"}), ("1", record, members)], 5)
    assert len(Answers(model, read_held_out(ensure_index(tmp_path), 9, with_features=False)).held_out) == 1
    assert "a held-out picture is left out: picture 0 of 1: the image cannot be decoded" in caplog.text
    with pytest.raises(DataError, match="no held-out picture can be shown; held-out record 0 is left out"):
        read_held_out(ensure_index(tmp_path), 1, with_features=True)
    with pytest.raises(DataError, match="can read none of the held-out pictures"):
        Answers(model, [HeldOut(Picture(b"broken"), ())])


def test_shards_of_features_alone_are_shown_on_a_plain_sheet(tmp_path: Path) -> None:
    made = untrained_folder(tmp_path, "features")
    items = []
    for number in range(3):
        record, members = made.index.read(made.index.place(number))
        items.append((str(number), record, {"npy": members["npy"]}))
    write_shards(tmp_path / "features", items, 5)
    model = mvptr_ds.load(made.folder, device="cpu")
    answers = Answers(model, read_held_out(ensure_index(tmp_path / "features"), 9, with_features=True))
    assert len(answers.held_out) == 3 and not answers.has_pictures
    picture = answers.picture(0, None, True)
    shown = drawing.grounding(picture, SENTENCE, answers.ground(picture, SENTENCE, "uni"))
    assert 'class="mv-sheet"' in shown and "<image" not in shown
    (tmp_path / "upload.jpg").write_bytes(jpeg())
    with pytest.raises(DataError, match="this model reads region features"):
        answers.ground(answers.picture(0, tmp_path / "upload.jpg", True), SENTENCE, "uni")


class Reader(HTMLParser):
    """Collects the elements of a page, and the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]


def test_no_text_leaves_its_element() -> None:
    texts = hostile_texts("http://127.0.0.1:9")
    boxes = [(0.0, 0.0, 20.0, 30.0), (10.0, 10.0, 64.0, 48.0)]
    for text in texts:
        picture = Picture(jpeg(), boxes, [text, text])
        found = [Grounding((text, text), ((0, 3), (5, 400)), boxes[0], 0.5, [0.5, 0.1], boxes)] * 2
        held_out = [HeldOut(picture, (text,))]
        pages = {
            "grounding": drawing.grounding(picture, text, found),
            "chosen": drawing.chosen(picture),
            "search": drawing.search(Search([Found(0, 0.5)], [Found(0, 0.7)]), held_out),
            "comparison": drawing.comparison([ReadOut("cosine", 0.1, None, text)], text, text),
            "masks": drawing.filled_masks([[(text, 0.5)]]),
            "message": drawing.message(text),
        }
        for name, page in pages.items():
            read = Reader(page)
            ours = "p div ul li i b svg g title rect image text span section h3 ol table thead tbody tr th td"
            assert read.elements <= set(ours.split()), name
            assert not [attribute for attribute in read.attributes if attribute.startswith("on")], name
            assert all(address.startswith("data:image/jpeg;base64,") for address in read.addresses), name
            assert "\u202e" not in page and "\x00" not in page, name


def test_every_region_has_the_score_of_every_phrase(answers: Answers) -> None:
    picture = answers.picture(2, None, True)
    found = answers.ground(picture, SENTENCE, "uni")
    page = str(drawing.grounding(picture, SENTENCE, found))
    assert [" ".join(one.phrase) for one in found] == ["dog", "car", "dog red", "car blue"]
    for r in range(len(picture.boxes)):
        (title,) = re.findall(rf'<g class="mv-region mv-r{r}"><title>(.*?)</title>', page)
        assert title.startswith(f"region {r}, {picture.tags[r]}: ")  # type: ignore[index]
        for one in found:
            assert f"{' '.join(one.phrase)} {one.scores[r]:.2f}" in title
    for p, one in enumerate(found):
        (scores,) = re.findall(rf'<g class="mv-scores mv-s{p}">(.*?)</g>', page)
        assert re.findall(r">([-\d.]+)</text>", scores) == [f"{score:.2f}" for score in one.scores]
        assert f'mv-chip mv-p{p}"' in page and f"mv-b{p}" in page
    colours = {drawing.COLOURS[p] for p in range(len(found))}
    assert set(re.findall(r'mv-mark mv-p\d" style="box-shadow: 0 3px 0 (#\w+)', page)) <= colours
    assert re.sub("<.*?>", "", page.split("</p>")[0]) == SENTENCE


def test_boxes_stand_where_they_are() -> None:
    picture = Picture(jpeg(64, 32), [(16, 8, 32, 40)], ["dog"])  # it reaches below the picture
    assert 'viewBox="0 0 520 260"' in drawing.chosen(picture)
    assert '<rect x="130.0" y="65.0" width="130.0" height="195.0"/>' in drawing.chosen(picture)


def test_the_style_sheet_has_a_rule_for_every_phrase_and_region() -> None:
    style = drawing.style()
    assert f".mv-ground:has(.mv-p{drawing.MAX_PHRASES - 1}:hover) .mv-s{drawing.MAX_PHRASES - 1}" in style
    assert f".mv-ground:has(.mv-r{drawing.MAX_REGIONS - 1}:hover) .mv-t{drawing.MAX_REGIONS - 1}" in style
    assert "url(" not in style and "@import" not in style and style.count("{") == style.count("}")


def test_what_is_not_shown_is_counted() -> None:
    boxes = [(float(n), 0.0, n + 5.0, 5.0) for n in range(drawing.MAX_REGIONS + 2)]
    one = Grounding(("dog",), (), boxes[0], 0.5, [0.5] * len(boxes), boxes)
    page = drawing.grounding(Picture(jpeg(), boxes), "dogs", [one] * (drawing.MAX_PHRASES + 3))
    assert "3 more phrases are not shown. 2 more regions are not shown." in page
    assert f"mv-r{drawing.MAX_REGIONS}" not in page and f"mv-s{drawing.MAX_PHRASES}" not in page


# --- the command


def test_without_gradio_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'mvptr_ds\[demo\]'"):
        import_gradio()
    assert main(["nowhere"]) == 1
    assert "pip install 'mvptr_ds[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["x", "--num", "0"], ["x", "--port", "70000"], ["x", "--sidecars", "y"], []])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_run_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    assert main([str(tmp_path)]) == 1
    assert "holds no complete checkpoint" in capsys.readouterr().err
