from __future__ import annotations

import base64
import functools
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mvptr_ds.corpus.record_keys import make_key
from mvptr_ds.corpus.regions.tsv import Table
from mvptr_ds.corpus.regions.vinvl import KeyRule, import_vinvl, plan_rows
from mvptr_ds.corpus.regions.vinvl_rows import RowError, parse_features, parse_predictions
from mvptr_ds.errors import DataError
from tests.support.tools import run_tool

FEATURE_DIM = 10  # 4 numbers of the feature, 6 of the geometry
WIDTH, HEIGHT = 640, 480

run_import = functools.partial(import_vinvl, feature_dim=FEATURE_DIM, version="test", key_rule=KeyRule())


class Image:
    """One image of a corpus, and its rows in the layouts that are about."""

    def __init__(self, image_id: str, num_boxes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.image_id = image_id
        corners = rng.uniform(0.0, 1.0, (num_boxes, 2, 2))
        low, high = corners.min(axis=1) * 0.8, corners.max(axis=1) * 0.8 + 0.1
        self.boxes = np.concatenate([low, high], axis=1) * [WIDTH, HEIGHT, WIDTH, HEIGHT]
        self.scores = rng.permutation(num_boxes) / num_boxes + 0.001
        self.features = rng.normal(0.0, 5.0, (num_boxes, FEATURE_DIM - 6)).astype(np.float32)

    @property
    def geometry(self) -> np.ndarray:
        shares = self.boxes / [WIDTH, HEIGHT, WIDTH, HEIGHT]
        return np.concatenate([shares, shares[:, 2:] - shares[:, :2]], axis=1)

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate([self.features, self.geometry], axis=1).astype(np.float32)

    def feature_line(self, rows: np.ndarray | None = None, as_json: bool = False) -> str:
        rows = self.rows if rows is None else rows
        encoded = base64.b64encode(rows.tobytes()).decode()
        if as_json:
            return f"{self.image_id}\t{json.dumps({'num_boxes': len(rows), 'features': encoded})}\n"
        return f"{self.image_id}\t{len(rows)}\t{encoded}\n"

    def objects(self) -> list[dict[str, Any]]:
        return [
            {"class": f"Tag  {n}", "conf": float(score), "rect": box.tolist(), "attributes": ["red"]}
            for n, (box, score) in enumerate(zip(self.boxes, self.scores, strict=True))
        ]

    def prediction_line(self, older: bool = False, **changed: Any) -> str:
        content = {
            "image_h": HEIGHT,
            "image_w": WIDTH,
            "num_boxes": len(self.boxes),
            "objects": self.objects(),
            **changed,
        }
        return f"{self.image_id}\t{json.dumps(content['objects'] if older else content)}\n"


def _write(folder: Path, features: list[str] | None, predictions: list[str], lineidx: bool = True) -> dict[str, Any]:
    """The files of a corpus; returns the first arguments of import_vinvl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("features", features), ("predictions", predictions)):
        if lines is None:
            continue
        content = [line.encode() for line in lines]
        (folder / f"{name}.tsv").write_bytes(b"".join(content))
        if lineidx:
            offsets = np.cumsum([0, *(len(line) for line in content[:-1])])
            (folder / f"{name}.lineidx").write_text("".join(f"{offset}\n" for offset in offsets))
    return {
        "predictions": folder / "predictions.tsv",
        "features": None if features is None else folder / "features.tsv",
        "out": folder / "out",
    }


def _read(out: Path) -> dict[str, dict[str, Any]]:
    """The sidecar through plain webdataset, undecoded."""
    urls = sorted(str(path) for path in out.glob("*.tar"))
    records = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        records[sample["__key__"]] = {
            "json": json.loads(sample["json"]),
            "npy": np.load(io.BytesIO(sample["npy"]), allow_pickle=False) if "npy" in sample else None,
        }
    return records


IMAGES = [Image(str(100 + n), 3 + n, seed=n) for n in range(5)]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("lineidx", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_features_and_boxes_arrive_as_they_were(tmp_path: Path, as_json: bool, lineidx: bool, older: bool) -> None:
    """In both layouts of either file; the older labels do not know the picture's size, which the geometry tells."""
    features = [image.feature_line(as_json=as_json) for image in IMAGES]
    predictions = [image.prediction_line(older) for image in reversed(IMAGES)]  # the order of the two may differ
    summary = run_import(
        **_write(tmp_path, features, predictions, lineidx), records_per_shard=2, key_rule=KeyRule(width=6)
    )
    assert not summary.dropped and summary.counts["records"] == 5 and summary.counts["regions"] == 25
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == [f"shard-00000{n}.tar" for n in range(3)]
    records = _read(tmp_path / "out")
    assert list(records) == [f"000{image.image_id}" for image in IMAGES]
    for image in IMAGES:
        record = records[f"000{image.image_id}"]
        order = np.argsort(-image.scores)
        assert record["npy"].dtype == np.float16
        np.testing.assert_array_equal(record["npy"], image.features[order].astype(np.float16))
        content = record["json"]
        assert content["schema"] == 1 and content["extractor"] == {"name": "vinvl", "version": "test"}
        assert (content["width"], content["height"]) == (WIDTH, HEIGHT)
        assert [region["tag"] for region in content["regions"]] == [f"tag {n}" for n in order]
        boxes = [region["box"] for region in content["regions"]]
        np.testing.assert_allclose(boxes, image.boxes[order], atol=0.006)  # stored with two decimals


def test_at_most_max_regions_by_confidence_and_boxes_within_the_picture(tmp_path: Path) -> None:
    image = Image("a/b.c", 6, seed=9)
    image.boxes[0] = [-20.0, -20.0, 700.0, 500.0]
    image.boxes[1] = [10.0, 10.0, 10.5, 200.0]
    image.scores = np.array([0.5, 0.9, 0.8, 0.1, 0.2, 0.3])
    rows = image.rows
    rows[:, -6:] = np.clip(rows[:, -6:], 0.0, 1.0)  # as extractors write the geometry of a box beyond the picture
    rows[:, [-2, -1]] = rows[:, [-1, -2]]  # some files put the height first
    summary = run_import(**_write(tmp_path, [image.feature_line(rows)], [image.prediction_line()]), max_regions=3)
    record = _read(tmp_path / "out")["a_b_c"]
    assert [region["tag"] for region in record["json"]["regions"]] == ["tag 2", "tag 0", "tag 5"]
    assert record["json"]["regions"][1]["box"] == [0.0, 0.0, WIDTH, HEIGHT]
    np.testing.assert_array_equal(record["npy"], image.features[[2, 0, 5]].astype(np.float16))
    assert summary.counts["boxes below 1 pixel left out"] == 1
    assert summary.counts["boxes beyond --max-regions left out"] == 2


def test_predictions_alone_and_features_within_the_objects(tmp_path: Path) -> None:
    image = IMAGES[0]
    objects = image.objects()
    for number, found in enumerate(objects):
        found["feature"] = base64.b64encode(image.features[number].tobytes()).decode()
    within = f"7\t{json.dumps({'image_h': HEIGHT, 'image_w': WIDTH, 'objects': objects})}\n"
    run_import(**_write(tmp_path, None, [image.prediction_line(), within]))
    records = _read(tmp_path / "out")
    assert records["100"]["npy"] is None and len(records["100"]["json"]["regions"]) == 3
    np.testing.assert_array_equal(records["7"]["npy"], image.features[np.argsort(-image.scores)].astype(np.float16))


def _broken_rows() -> dict[str, tuple[str | None, str | None]]:
    """Reason -> (line of features, line of predictions) of an image that cannot be used."""
    image = Image("broken", 4, seed=5)
    line, rows = image.feature_line(), image.rows
    with_nan, too_large, shuffled = rows.copy(), rows.copy(), rows[::-1]
    with_nan[1, 2], too_large[1, 2] = np.nan, 70_000.0
    objects = image.objects()
    nan_box = [{**objects[0], "rect": [0.0, 0.0, float("nan"), 5.0]}, *objects[1:]]
    short_rect = [{**objects[0], "rect": [0.0, 0.0, 5.0]}, *objects[1:]]
    no_class = [{"rect": o["rect"]} for o in objects]
    predictions = image.prediction_line()
    nothing = Image("broken", 4, seed=6)
    nothing.boxes[:, 2] = nothing.boxes[:, 0] + 0.2
    return {
        "the line has no image id": ("broken row without a tab\n", None),
        "the image id was seen before": (IMAGES[0].feature_line(), None),
        "the image has features and no predictions": (line, None),
        "the image has predictions and no features": (None, predictions),
        "the predictions are not JSON": (line, predictions[:-9] + "\n"),
        "the predictions lack a field, or it is of the wrong type": (line, image.prediction_line(objects=no_class)),
        "a rect is not of four numbers": (line, image.prediction_line(objects=short_rect)),
        "a box or a score is NaN or infinity": (line, image.prediction_line(objects=nan_box)),
        "the picture's size makes no sense": (line, image.prediction_line(image_w=0)),
        "features and predictions differ in number": (image.feature_line(rows[:3]), predictions),
        "the features lack their number or themselves": ("broken\tmany\tAAAA\n", predictions),
        "the features are not base64 of float32": (line.replace(line[-8:], "!*%$#!!\n"), predictions),
        "the features are not as many numbers as their boxes ask": (line.replace("\t4\t", "\t5\t"), predictions),
        "a feature is NaN or infinity": (image.feature_line(with_nan), predictions),
        "a feature is too large for float16": (image.feature_line(too_large), predictions),
        "boxes and the features' geometry are not of each other": (image.feature_line(shuffled), predictions),
        "no box is left": (nothing.feature_line(), nothing.prediction_line()),
    }


@pytest.mark.parametrize("reason", _broken_rows())
def test_a_broken_row_is_dropped_and_counted_and_the_others_stay(tmp_path: Path, reason: str) -> None:
    feature_line, prediction_line = _broken_rows()[reason]
    features = [IMAGES[0].feature_line(), *([feature_line] if feature_line else []), IMAGES[1].feature_line()]
    predictions = [
        IMAGES[0].prediction_line(),
        *([prediction_line] if prediction_line else []),
        IMAGES[1].prediction_line(),
    ]
    summary = run_import(**_write(tmp_path, features, predictions))
    assert dict(summary.dropped) == {reason: 1}
    assert list(_read(tmp_path / "out")) == ["100", "101"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"image_w": 10**9}, "makes no sense"),
        ({"image_w": float("inf")}, "wrong type"),
        ({"objects": [{"class": "\ud800", "rect": [0, 0, 9, 9]}]}, "wrong type"),
        ({"objects": [{"class": "dog", "rect": [0, 0, 10**400, 9]}]}, "wrong type"),
        ({"objects": [{"class": "dog", "rect": None}]}, "wrong type"),
        ({"objects": [3]}, "wrong type"),
        ({"objects": None}, "wrong type"),
    ],
)
def test_predictions_that_nobody_would_write(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_predictions(IMAGES[0].prediction_line(**changed).partition("\t")[2].encode())


def test_objects_whose_features_do_not_fit_each_other() -> None:
    objects = IMAGES[0].objects()
    objects[0]["feature"] = base64.b64encode(bytes(8)).decode()
    with pytest.raises(RowError, match="some objects bring"):
        parse_predictions(json.dumps(objects).encode())
    objects[1]["feature"] = objects[0]["feature"]
    objects[2]["feature"] = base64.b64encode(bytes(12)).decode()
    with pytest.raises(RowError, match="differ in length"):
        parse_predictions(json.dumps(objects).encode())


def test_the_size_of_a_picture_that_nothing_tells(tmp_path: Path) -> None:
    summary = run_import(**_write(tmp_path, None, [IMAGES[0].prediction_line(older=True)]))
    assert dict(summary.dropped) == {"the picture's size is not known: neither predictions nor features tell": 1}
    assert summary.counts["records"] == 0 and not list((tmp_path / "out").glob("*.tar"))


def test_truncated_base64_is_an_error_of_the_row() -> None:
    encoded = base64.b64encode(np.zeros(FEATURE_DIM, dtype=np.float32).tobytes())
    assert parse_features(b"1\t" + encoded, FEATURE_DIM).shape == (1, FEATURE_DIM)
    with pytest.raises(RowError, match="not base64"):
        parse_features(b"1\t" + encoded[:-3], FEATURE_DIM)


def test_lineidx_must_fit_its_file(tmp_path: Path) -> None:
    _write(tmp_path, [image.feature_line() for image in IMAGES], [])
    path, lineidx = tmp_path / "features.tsv", tmp_path / "features.lineidx"
    offsets = [int(line) for line in lineidx.read_text().split()]
    with_index = Table(path)
    assert with_index.ids == [image.image_id for image in IMAGES]
    lineidx.unlink()
    np.testing.assert_array_equal(Table(path).spans_L2, with_index.spans_L2)
    for wrong, message in (
        ([*offsets[:2], offsets[2] + 1, *offsets[3:]], "does not begin at byte"),
        ([1, *offsets[1:]], "begin at 0"),
        ([*offsets, path.stat().st_size], "does not fit"),
        ([0, offsets[2], offsets[1]], "does not fit"),
        (["many"], "no list of byte offsets"),
    ):
        lineidx.write_text("\n".join(map(str, wrong)))
        with pytest.raises(DataError, match=message):
            Table(path)


def test_a_lineidx_that_skips_lines_loses_no_line_silently(tmp_path: Path) -> None:
    places = _write(tmp_path, [image.feature_line() for image in IMAGES], [image.prediction_line() for image in IMAGES])
    lineidx = tmp_path / "features.lineidx"
    lines = lineidx.read_text().split()
    lineidx.write_text("\n".join([*lines[:1], *lines[2:]]))
    summary = run_import(**places)
    assert summary.dropped["the .lineidx skips lines"] == 1
    assert summary.dropped["the image has predictions and no features"] == 1
    assert list(_read(tmp_path / "out")) == ["102", "103", "104"]


def test_blank_lines_and_a_missing_newline_at_the_end(tmp_path: Path) -> None:
    features = [IMAGES[0].feature_line(), "\n", IMAGES[1].feature_line(), "\n"]
    predictions = [IMAGES[0].prediction_line(), IMAGES[1].prediction_line().rstrip("\n")]
    summary = run_import(**_write(tmp_path, features, predictions, lineidx=False))
    assert not summary.dropped and list(_read(tmp_path / "out")) == ["100", "101"]


def test_imageid2idx_is_compared(tmp_path: Path) -> None:
    places = _write(tmp_path, [image.feature_line() for image in IMAGES], [image.prediction_line() for image in IMAGES])
    numbers = {image.image_id: n for n, image in enumerate(IMAGES)}
    (tmp_path / "imageid2idx.json").write_text(json.dumps(numbers))
    assert run_import(**places).counts["records"] == 5
    for wrong in ({**numbers, "100": 1}, {**numbers, "99": 7}, {**numbers, "100": "0"}):
        (tmp_path / "imageid2idx.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="another download"):
            run_import(**{**places, "out": tmp_path / "again"})


def test_keys(tmp_path: Path) -> None:
    """As build_shards makes them, so that the two join."""
    assert KeyRule(width=12).key("391895") == "000000391895" == make_key("image-id", "000000391895.jpg", 0)
    assert KeyRule(width=12).key("COCO_val2014_000000391895") == "COCO_val2014_000000391895"
    assert KeyRule().key("a.b/c-d") == "a_b_c-d"
    assert KeyRule("hash", 12).key("391895") == make_key("hash", "000000391895", 0)
    one, other, long = Image("7", 1, 0), Image("07", 1, 0), Image("k" * 91, 1, 0)
    places = _write(tmp_path, None, [one.prediction_line(), other.prediction_line(), long.prediction_line()])
    table = Table(tmp_path / "predictions.tsv")
    with pytest.raises(DataError, match="get one key"):
        plan_rows(None, table, KeyRule(width=3))
    summary = run_import(**places)
    assert list(_read(tmp_path / "out")) == ["7", "07"]
    assert dict(summary.dropped) == {"the image id makes no key": 1}


@pytest.mark.parametrize("padded", ["features", "predictions"])
def test_an_image_with_and_without_zeros_in_front_is_one(tmp_path: Path, padded: str) -> None:
    def renamed(name: str) -> list[Image]:
        images = [Image(str(100 + n).zfill(12 if name == padded else 0), 3 + n, seed=n) for n in range(3)]
        return [*images, Image("007", 2, 7), Image("7", 2, 8)]  # both files have these two: two images

    features = [image.feature_line() for image in renamed("features")]
    predictions = [image.prediction_line() for image in renamed("predictions")]
    predictions.append(predictions[0])
    places = _write(tmp_path, features, predictions)
    numbers = {str(100 + n): n for n in range(3)}
    (tmp_path / "imageid2idx.json").write_text(json.dumps(numbers))
    summary = run_import(**places)
    assert dict(summary.dropped) == {"the image id was seen before": 1}
    width = 12 if padded == "predictions" else 0
    assert list(_read(places["out"])) == [*(str(100 + n).zfill(width) for n in range(3)), "007", "7"]
    places = _write(tmp_path, features[:3], predictions[:3])
    for width in (1, 6):
        run_import(**{**places, "out": tmp_path / f"out{width}"}, key_rule=KeyRule(width=width))
        assert list(_read(tmp_path / f"out{width}")) == [str(100 + n).zfill(width) for n in range(3)]


def test_a_number_that_a_file_writes_in_two_ways_joins_its_own_spelling_only(tmp_path: Path) -> None:
    one, other, third = Image("7", 2, 0), Image("07", 2, 1), Image("007", 2, 2)
    places = _write(tmp_path, [one.feature_line(), other.feature_line()], [third.prediction_line()])
    summary = run_import(**places)
    assert summary.counts["records"] == 0
    assert dict(summary.dropped) == {
        "the image has features and no predictions": 2,
        "the image has predictions and no features": 1,
    }


@pytest.mark.parametrize("lineidx", [False, True])
def test_byte_order_marks(tmp_path: Path, lineidx: bool) -> None:
    features = ["\ufeff" + IMAGES[0].feature_line(), *(image.feature_line() for image in IMAGES[1:])]
    predictions = ["\ufeff" + IMAGES[0].prediction_line(), *(image.prediction_line() for image in IMAGES[1:])]
    places = _write(tmp_path, features, predictions, lineidx)
    for path in tmp_path.glob("*.lineidx"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    numbers = json.dumps({image.image_id: n for n, image in enumerate(IMAGES)})
    (tmp_path / "imageid2idx.json").write_text("\ufeff" + numbers, encoding="utf-8")
    summary = run_import(**places)
    assert not summary.dropped and list(_read(places["out"])) == [image.image_id for image in IMAGES]
    (tmp_path / "mark.tsv").write_bytes(b"\xef\xbb\xbf")
    assert Table(tmp_path / "mark.tsv").ids == []


def test_missing_files_and_another_run_in_the_folder(tmp_path: Path) -> None:
    places = _write(tmp_path, None, [IMAGES[0].prediction_line()])
    with pytest.raises(DataError, match="absent or empty"):
        run_import(**{**places, "features": tmp_path / "none.tsv"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shard-000000.tar").write_bytes(b"pictures")
    with pytest.raises(DataError, match="already holds tars"):
        run_import(**places)
    assert (tmp_path / "out/shard-000000.tar").read_bytes() == b"pictures"
    (tmp_path / "out/shard-000000.tar").unlink()
    run_import(**places)
    before = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    assert run_import(**places).counts["records"] == 1  # done already
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == before
    with pytest.raises(DataError, match="max_regions"):
        run_import(**places, max_regions=1)


def test_tool(tmp_path: Path) -> None:
    run = partial(run_tool, "import_vinvl.py")

    features = [image.feature_line() for image in IMAGES]
    predictions = [image.prediction_line() for image in IMAGES[1:]]
    places = _write(tmp_path, features, predictions)
    arguments = ("--predictions", places["predictions"], "--features", places["features"], "--version", "x")
    sizes = ("--feature-dim", FEATURE_DIM, "--records-per-shard", 2, "--processes", 2)
    done = run(*arguments, *sizes, "--out", places["out"])
    assert done.returncode == 0, done.stderr
    assert "features and no predictions" in done.stdout and list(_read(places["out"])) == ["101", "102", "103", "104"]
    unusable = run(*arguments, "--out", tmp_path / "none")  # 2054 numbers a box
    assert unusable.returncode == 1 and "not as many numbers" in unusable.stdout
    assert unusable.stderr.splitlines()[-1].startswith("error: no image could be used")
    wrong = run(*arguments, "--out", tmp_path / "none", "--max-regions", 0)
    assert wrong.returncode == 2 and "max-regions" in wrong.stderr
    absent = run("--predictions", tmp_path / "no.tsv", "--version", "x", "--out", tmp_path / "none")
    assert absent.returncode == 1 and absent.stderr.startswith("error: ") and "Traceback" not in absent.stderr
