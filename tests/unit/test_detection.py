from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mvptr_ds.corpus.regions.detection import Detections, RegionChoice, choose_regions, clip_boxes, nms, tag_of
from mvptr_ds.corpus.regions.detector import Detector, DetectorSource, choose_device, find_model
from mvptr_ds.errors import DataError
from tests.support.tiny_detector import HIDDEN, NUM_QUERIES, fix_heads, save_detector

KINDS = ("detr", "yolos", "rt_detr")
SIZES = ((100, 80), (60, 90), (200, 50), (100, 80), (33, 90))  # width, height


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_detector(kind, tmp_path_factory.mktemp("models") / kind) for kind in KINDS}


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("Dog", "dog"),
        ("traffic_light", "traffic light"),
        ("Handbag/Satchel", "handbag"),
        ("bow_(weapon)", "bow"),
        ("man, men", "man"),
        ("  Wild   Bird ", "wild bird"),
        ("LABEL_17", ""),
        ("N/A", None),
        ("background", None),
        ("", None),
    ],
)
def test_tags_of_class_names(name: str, tag: str | None) -> None:
    assert tag_of(name) == tag


def _nms_slowly(boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, max_iou: float) -> list[int]:
    """The definition, pair by pair."""
    kept: list[int] = []
    for number in sorted(range(len(boxes)), key=lambda n: (-scores[n], n)):
        x1, y1, x2, y2 = boxes[number]
        for other in kept:
            a1, b1, a2, b2 = boxes[other]
            common = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common
            if groups[other] == groups[number] and common > max_iou * union:
                break
        else:
            kept.append(number)
    return kept


@pytest.mark.parametrize("max_iou", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_nms_is_its_definition(max_iou: float) -> None:
    rng = np.random.default_rng(1)
    for count in (0, 1, 2, 40, 120):
        corners = rng.uniform(0.0, 100.0, (count, 2, 2))
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        boxes[: count // 8] = boxes[count // 8 : 2 * (count // 8)]  # the same box twice
        boxes[count // 2 : count // 2 + count // 10, 2] = boxes[count // 2 : count // 2 + count // 10, 0]  # no area
        scores = rng.integers(0, 10, count) / 10  # with ties
        groups = rng.integers(0, 3, count)
        expected = _nms_slowly(boxes, scores, groups, max_iou)
        assert nms(boxes, scores, groups, max_iou, limit=1000).tolist() == expected
        assert nms(boxes, scores, groups, max_iou, limit=7).tolist() == expected[:7]


def _found(boxes: list[list[float]], scores: list[float], tags: list[str | None]) -> Detections:
    return Detections(np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(scores, np.float32), tuple(tags))


def test_regions_are_clipped_named_and_ordered() -> None:
    found = _found(
        [[-5, 10, 30, 40], [0, 10, 30, 41], [1, 10, 30, 40], [90, 70, 140, 90], [99.5, 10, 140, 40], [0, 0, 9, 9]],
        [0.5, 0.9, 0.8, 0.7, 0.99, 0.29],
        ["dog", "dog", "cat", None, "dog", "dog"],
    )
    regions, queries = choose_regions(found, 100, 80, RegionChoice())
    # 0 repeats 1; 2 is of another tag; 3 is no object; 4 has half a pixel within the picture; 5 is below the threshold
    assert queries.tolist() == [1, 2]
    assert [(region.box, region.tag, region.score) for region in regions] == [
        ((0.0, 10.0, 30.0, 41.0), "dog", 0.9),
        ((1.0, 10.0, 30.0, 40.0), "cat", 0.8),
    ]
    more = choose_regions(found, 100, 80, RegionChoice(score_threshold=0.1, nms_iou=1.0, max_regions=3))[1]
    assert more.tolist() == [1, 2, 0]


def test_at_least_one_region_where_features_are_wanted() -> None:
    choice = RegionChoice(score_threshold=0.9, at_least_one=True)
    found = _found([[0, 0, 10, 10], [5, 5, 30, 30]], [0.2, 0.4], ["dog", "cat"])
    assert choose_regions(found, 100, 80, RegionChoice(score_threshold=0.9)) == ((), pytest.approx(np.zeros(0)))
    regions, queries = choose_regions(found, 100, 80, choice)
    assert queries.tolist() == [1] and regions[0].tag == "cat"
    nothing_usable = _found([[0, 0, 10, 10], [200, 5, 300, 30]], [0.2, 0.4], [None, "cat"])
    regions, queries = choose_regions(nothing_usable, 100, 80, choice)
    assert queries.tolist() == [1] and regions[0].box == (0.0, 0.0, 100.0, 80.0)


def test_boxes_of_a_pixel_stay_and_smaller_ones_go() -> None:
    clipped, usable = clip_boxes(np.array([[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.9, 9.0], [-9.0, -9.0, 0.0, 0.0]]), 10, 10)
    assert usable.tolist() == [True, False, False]
    assert clipped[2].tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("wrong", [{"score_threshold": 1.5}, {"nms_iou": -0.1}, {"max_regions": 0}])
def test_choices_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RegionChoice(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_the_models_own(kind: str, folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    """One picture against model and processor by hand; each query's state belongs to its box and its score."""
    detector = Detector(DetectorSource(str(folders[kind]), states=True))
    model = transformers.AutoModelForObjectDetection.from_pretrained(folders[kind]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folders[kind])
    picture, (width, height) = pictures[2], SIZES[2]
    with torch.inference_mode():
        outputs = model(pixel_values=processor(images=[picture], return_tensors="pt")["pixel_values"])
    by_library = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(height, width)])[0]
    (found,) = detector.detect([picture], [(width, height)])
    assert found is not None and found.states_QD is not None
    assert found.states_QD.shape == (len(found.tags), HIDDEN) and len(found.tags) <= NUM_QUERIES
    # of several classes of one query, the tool keeps the best
    best: dict[tuple[float, ...], float] = {}
    for box, score in zip(by_library["boxes"].tolist(), by_library["scores"].tolist(), strict=True):
        key = tuple(round(value, 2) for value in box)
        best[key] = max(score, best.get(key, 0.0))
    ours = {
        tuple(round(float(v), 2) for v in box): float(s) for box, s in zip(found.boxes_Q4, found.scores_Q, strict=True)
    }
    assert ours == pytest.approx(best, abs=1e-5)
    states = outputs.last_hidden_state[0, -NUM_QUERIES:].numpy()
    centres = outputs.pred_boxes[0, :, :2].numpy() * [width, height]
    for state, box in zip(found.states_QD, found.boxes_Q4, strict=True):
        query = int(np.argmin(np.abs(states - state).sum(axis=1)))
        np.testing.assert_allclose(state, states[query], atol=1e-5)
        np.testing.assert_allclose((box[:2] + box[2:]) / 2, centres[query], atol=1e-3)


@pytest.mark.parametrize("kind", ["yolos", "rt_detr"])
def test_a_picture_in_a_batch_is_as_alone(kind: str, folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    detector = Detector(DetectorSource(str(folders[kind]), states=True))
    for picture, size, found in zip(pictures, SIZES, detector.detect(pictures, SIZES), strict=True):
        (alone,) = detector.detect([picture], [size])
        assert found is not None and alone is not None and found.tags == alone.tags
        np.testing.assert_allclose(found.boxes_Q4, alone.boxes_Q4, atol=1e-4 * max(size))
        np.testing.assert_allclose(found.scores_Q, alone.scores_Q, atol=1e-4)


def test_padding_is_masked(folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    """Equal it cannot be: DETR's convolutions see the padding beyond a picture's edge."""
    detector = Detector(DetectorSource(str(folders["detr"]), states=True))
    inputs = detector._processor(images=pictures[1:3], return_tensors="pt")  # high beside wide
    with torch.inference_mode():
        without_mask = detector._run({"pixel_values": inputs["pixel_values"]}, SIZES[1:3])
    for number, found in enumerate(detector.detect(pictures[1:3], SIZES[1:3])):
        (alone,) = detector.detect([pictures[1 + number]], [SIZES[1 + number]])
        unmasked = without_mask[number]
        assert found is not None and alone is not None and unmasked is not None
        apart = np.abs(found.boxes_Q4 - alone.boxes_Q4).mean()
        assert apart < 0.5 * np.abs(unmasked.boxes_Q4 - alone.boxes_Q4).mean()


def test_boxes_are_in_pixels_of_the_size_that_is_given(tmp_path: Path, pictures: list[Image.Image]) -> None:
    folder = save_detector("yolos", tmp_path / "yolos")
    fix_heads(folder, box=(0.5, 0.4, 0.2, 0.6), class_number=1, logit=5.0)
    detector = Detector(DetectorSource(str(folder)))
    score = float(np.exp(5.0) / (np.exp(5.0) + 4))  # softmax over four classes and no object
    sizes = [(1000, 500), (60, 90)]
    for (width, height), found in zip(sizes, detector.detect(pictures[:2], sizes), strict=True):
        assert found is not None and set(found.tags) == {"dog"}
        np.testing.assert_allclose(found.scores_Q, score, rtol=1e-5)
        regions, _ = choose_regions(found, width, height, RegionChoice())
        assert len(regions) == 1  # all queries say the same
        expected = (0.4 * width, 0.1 * height, 0.6 * width, 0.7 * height)
        assert regions[0].box == pytest.approx(expected, abs=0.02) and regions[0].tag == "dog"


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_boxes_finer_than_its_own_steps(
    kind: str, folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    fine = Detector(DetectorSource(str(folders[kind]))).detect(pictures, SIZES)
    coarse = Detector(DetectorSource(str(folders[kind]), precision="bfloat16", states=True)).detect(pictures, SIZES)
    for one, other, size in zip(fine, coarse, SIZES, strict=True):
        assert one is not None and other is not None and other.states_QD is not None
        assert other.states_QD.dtype == np.float32
        if one.tags == other.tags:
            np.testing.assert_allclose(one.boxes_Q4, other.boxes_Q4, atol=0.01 * max(size))
        centres = (other.boxes_Q4[:, :2] + other.boxes_Q4[:, 2:]) / 2 / np.array(size)
        as_bfloat16 = torch.from_numpy(centres).bfloat16().float().numpy()
        assert np.abs(centres - as_bfloat16).max() > 1e-5


def test_numbers_that_are_not_finite_give_no_detections(folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    detector = Detector(DetectorSource(str(folders["detr"]), states=True))
    with torch.no_grad():
        next(p for name, p in detector._model.named_parameters() if "bbox_predictor" in name).fill_(float("nan"))
    assert detector.detect(pictures[:2], SIZES[:2]) == [None, None]


def test_a_local_folder_never_asks_the_network(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for folder in folders.values():
        found, extractor = find_model(str(folder))
        assert extractor.name.startswith(f"{folder.name} (")
        Detector(DetectorSource(str(found))).check()


def test_the_version_follows_weights_and_configuration(tmp_path: Path, folders: dict[str, Path]) -> None:
    first = find_model(str(folders["yolos"]))[1]
    copy = Path(shutil.copytree(folders["yolos"], tmp_path / "yolos"))
    assert find_model(str(copy))[1] == first and len(first.version) == 12
    other = find_model(str(save_detector("yolos", tmp_path / "other" / "yolos", seed=1)))[1]
    assert other.name == first.name and other.version != first.version
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**processor, "do_normalize": False}))
    assert find_model(str(copy))[1].version not in (first.version, other.version)


def test_a_hub_name_is_taken_from_the_cache(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own code with a cache that holds the model, and offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "models--someone--yolos"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folders["yolos"], model / "snapshots" / ("0" * 40))
    folder, extractor = find_model("someone/yolos")
    assert extractor.name == "someone/yolos" and extractor.version == find_model(str(folders["yolos"]))[1].version
    Detector(DetectorSource(str(folder))).check()
    with pytest.raises(DataError, match="'someone/absent' is neither a folder nor a model"):
        find_model("someone/absent")


def test_what_is_no_detector(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        find_model(str(tmp_path / "none"))
    with pytest.raises(DataError, match="holds no config"):
        find_model(str(tmp_path))
    with pytest.raises(DataError, match="has no revision"):
        find_model(str(folders["detr"]), revision="main")
    without_weights = Path(shutil.copytree(folders["yolos"], tmp_path / "yolos"))
    (without_weights / "model.safetensors").unlink()
    with pytest.raises(DataError, match="holds no weights"):
        find_model(str(without_weights))
    bert = tmp_path / "bert"
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(bert)
    with pytest.raises(DataError, match="cannot be loaded as an object detector"):
        Detector(DetectorSource(str(bert)))


def test_weights_that_do_not_fill_the_model(tmp_path: Path, folders: dict[str, Path]) -> None:
    """transformers would go on with random heads."""
    model = transformers.YolosModel.from_pretrained(folders["yolos"])
    model.save_pretrained(tmp_path)
    shutil.copy(folders["yolos"] / "preprocessor_config.json", tmp_path)
    with pytest.raises(DataError, match=r"lack \d+ tensors"):
        Detector(DetectorSource(str(tmp_path)))


def test_features_of_a_model_without_a_state_a_query(folders: dict[str, Path]) -> None:
    detector = Detector(DetectorSource(str(folders["yolos"]), states=True))
    detector._num_detection_tokens = None  # as if its queries could not be found among its states
    with pytest.raises(DataError, match=r"--features needs .*'yolos'"):
        detector.check()


def test_devices() -> None:
    assert choose_device("cpu", "auto") == ("cpu", "float32")
    assert choose_device("cpu", "bfloat16") == ("cpu", "bfloat16")
    if not torch.cuda.is_available():
        assert choose_device("auto", "auto") == ("cpu", "float32")
        with pytest.raises(DataError, match="no GPU"):
            choose_device("cuda", "auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_what_the_cpu_finds(
    kind: str, folders: dict[str, Path], pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, precision = choose_device("auto", "auto")
    assert device == "cuda"
    half = Detector(DetectorSource(str(folders[kind]), device, precision, states=True)).detect(pictures, SIZES)
    assert all(found is not None and np.isfinite(found.scores_Q).all() for found in half)
    # float32 on both, without TF32: devices round half precision differently, and fresh weights make much of it
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_gpu = Detector(DetectorSource(str(folders[kind]), device, "float32", states=True)).detect(pictures, SIZES)
    on_cpu = Detector(DetectorSource(str(folders[kind]), "cpu", "float32", states=True)).detect(pictures, SIZES)
    for one, other, size in zip(on_gpu, on_cpu, SIZES, strict=True):
        assert one is not None and other is not None
        np.testing.assert_allclose(np.sort(one.scores_Q), np.sort(other.scores_Q), atol=0.02)
        if one.tags == other.tags:
            np.testing.assert_allclose(one.boxes_Q4, other.boxes_Q4, atol=0.02 * max(size))
