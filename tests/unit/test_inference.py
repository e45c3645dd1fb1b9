"""A trained model by itself: the same states as an evaluation's, whatever a picture is given as."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvptr_ds
from mvptr_ds.builders import NOTHING_MASKED, build_samples
from mvptr_ds.errors import CheckpointError, DataError
from mvptr_ds.evaluation import encode
from mvptr_ds.evaluation.grounding import list_phrases, similarities
from mvptr_ds.evaluation.retrieval import rerank, score_pairs
from mvptr_ds.inference import Picture, TrainedModel
from tests.conftest import REPO
from tests.support.tiny_detector import save_detector
from tests.support.untrained_folder import Untrained, untrained_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["image", "features"])
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    return untrained_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(untrained: Untrained) -> TrainedModel:
    return mvptr_ds.load(untrained.folder, device="cpu")


@pytest.fixture(scope="module")
def split(untrained: Untrained, model: TrainedModel) -> encode.EncodedSplit:
    samples = build_samples(untrained.config, untrained.vocabs, untrained.index, NOTHING_MASKED, tag_noise=False)
    read = encode.read_split(model.model, untrained.index, samples, 3, CPU)
    return encode.encode_images(model.model, read, 3, CPU)


def contents(untrained: Untrained) -> tuple[list[Picture], list[str], list[list[tuple[str, ...]]]]:
    """The pictures with their regions, the captions and their phrases."""
    pictures, texts, phrases = [], [], []
    for number in range(len(untrained.index)):
        record, members = untrained.index.read(untrained.index.place(number))
        features = np.load(io.BytesIO(members["npy"]))
        boxes, tags = [region.box for region in record.regions], [region.tag for region in record.regions]
        pictures.append(Picture(members["png"], boxes, tags, features))
        texts.append(record.captions[0].text)
        phrases.append([phrase.tuple for phrase in record.captions[0].phrases])
    return pictures, texts, phrases


def test_states_are_those_of_an_evaluation(
    untrained: Untrained, model: TrainedModel, split: encode.EncodedSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, texts, phrases = contents(untrained)
    text_ND, image_ND = model.embed_text(texts, phrases), model.embed_image(pictures)
    assert text_ND.dtype == torch.float32 and not text_ND.requires_grad
    torch.testing.assert_close(text_ND, split.text_global_CD, atol=1e-6, rtol=0)
    torch.testing.assert_close(image_ND, split.image_global_ID, atol=1e-6, rtol=0)
    torch.testing.assert_close(text_ND.norm(dim=-1), torch.ones(len(texts)), atol=1e-6, rtol=0)
    monkeypatch.setattr(model, "batch_size", 3)
    torch.testing.assert_close(model.embed_image(pictures), image_ND, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.embed_text(texts, phrases), text_ND, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_pairs_are_scored_as_an_evaluation_does(
    untrained: Untrained,
    model: TrainedModel,
    split: encode.EncodedSplit,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures, texts, _ = contents(untrained)
    monkeypatch.setattr(model, "batch_size", batch_size)
    monkeypatch.setattr(model.samples, "find_phrases", phrases_of_captions(untrained))
    every = torch.arange(len(texts))
    torch.testing.assert_close(model.similarity(pictures, texts), split.sim_CI.T, atol=1e-6, rtol=0)
    own = score_pairs(model.model, split, every, every, 3, CPU)
    torch.testing.assert_close(model.match(pictures, texts), own.float(), atol=1e-6, rtol=0)
    one = score_pairs(model.model, split, every, torch.zeros_like(every), 3, CPU)
    torch.testing.assert_close(model.match(pictures[0], texts), one.float(), atol=1e-6, rtol=0)
    scores_CI, _ = rerank(model.model, split, 3, 3, CPU)
    for text, ranked in enumerate(model.rank(pictures, texts, rerank=3)):
        assert [place.picture for place in ranked] == scores_CI[text].argsort(descending=True).tolist()
        assert [place.match is not None for place in ranked] == [True] * 3 + [False] * 5
    assert [place.picture for place in model.rank(pictures, texts[0], rerank=0)[0]] == split.sim_CI[0].argsort(
        descending=True
    ).tolist()


def phrases_of_captions(untrained: Untrained):  # type: ignore[no-untyped-def]
    known = {}
    for number in range(len(untrained.index)):
        (caption,) = untrained.index.read(untrained.index.place(number))[0].captions
        known[caption.text] = list(caption.phrases)
    return lambda texts: [known[text] for text in texts]


def test_phrases_are_grounded_as_an_evaluation_does(
    untrained: Untrained, model: TrainedModel, split: encode.EncodedSplit
) -> None:
    pictures, texts, phrases = contents(untrained)
    asked, _ = list_phrases(split, untrained.index, untrained.vocabs.phrases)
    sim_PR = similarities(split, asked)
    found = [one for n in range(len(texts)) for one in model.ground(pictures[n], texts[n], phrases[n])]
    assert [one.phrase for one in found] == [one.phrase.tuple for one in asked] and len(found) > len(texts)
    for one, similar_R, wanted in zip(found, sim_PR, asked, strict=True):
        scores = torch.tensor(one.scores)
        torch.testing.assert_close(scores, similar_R[: len(scores)], atol=1e-6, rtol=0)
        best = int(scores.argmax())
        assert one.score == pytest.approx(float(scores[best])) and one.box == one.boxes[best]
        regions = untrained.index.read(untrained.index.place(wanted.caption))[0].regions
        assert one.box == pytest.approx(regions[best].box, abs=1e-3)
    cross = model.ground(pictures[0], texts[0], phrases[0], states="cross")
    assert cross[0].scores != found[0].scores


def test_the_parser_finds_phrases_where_none_are_given(untrained: Untrained, model: TrainedModel) -> None:
    pictures, _, _ = contents(untrained)
    found = {one.phrase: one for one in model.ground(pictures[0], "A red dog and a blue car.")}
    assert set(found) == {("dog",), ("dog", "red"), ("car",), ("car", "blue")}
    assert found["car", "blue"].spans == ((21, 24), (16, 20))
    with pytest.raises(DataError, match=r"no phrase of 'Some zebras\.' is in the vocabulary \(zebra\)"):
        model.ground(pictures[0], "Some zebras.")


def test_masks_are_filled(untrained: Untrained, model: TrainedModel) -> None:
    picture = contents(untrained)[0][0]
    filled = model.fill(picture, "A [MASK] beside a red dog and a [MASK].", top_k=4)
    assert [len(words) for words in filled] == [4, 4]
    words = untrained.vocabs.words
    chances = [chance for _, chance in filled[0]]
    assert chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1
    # the same by hand: the ids of the text with the mask's own
    (caption,) = model.samples.captions(["A [MASK] beside a red dog and a [MASK]."], None)
    assert [phrase.tuple for phrase in caption.phrases] == [("dog",), ("dog", "red")]
    assert caption.text[slice(*caption.phrases[0].spans[0])] == "dog"
    ids = model.samples.of_text(caption).text_ids_T.tolist()
    rows = [int(untrained.vocabs.phrases.rows[untrained.vocabs.phrases.index_of(p.tuple)]) for p in caption.phrases]
    plain = words.encode("A beside a red dog and a .")[0]
    assert ids == [words.cls_id, plain[0], words.mask_id, *plain[1:-1], words.mask_id, plain[-1], *rows, words.sep_id]
    with pytest.raises(DataError, match=r"'a dog' holds no \[MASK\]"):
        model.fill(picture, "a dog")
    with pytest.raises(DataError, match="stands beyond the 33 wordpieces"):
        model.fill(picture, "dog " * 40 + "[MASK]")


def test_classes_are_texts(untrained: Untrained, model: TrainedModel) -> None:
    pictures, _, _ = contents(untrained)
    chances = model.classify(pictures, ["dog", "car", "tree"], ["a {}.", "a red {}."])
    assert chances.shape == (len(pictures), 3)
    torch.testing.assert_close(chances.sum(-1), torch.ones(len(pictures)))
    templates = {name: model.embed_text([f"a {name}.", f"a red {name}."]).mean(0) for name in ("dog", "car")}
    dog_N, car_N = (model.embed_image(pictures) @ (state / state.norm()) for state in templates.values())
    wanted = (dog_N - car_N) * model.model.logit_scale.detach().exp()
    torch.testing.assert_close((chances[:, 0] / chances[:, 1]).log(), wanted, atol=1e-4, rtol=1e-4)


def test_a_picture_may_be_given_in_many_ways(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    untrained = untrained_folder(tmp_path, "image")
    model = mvptr_ds.load(tmp_path / "model", device="cpu")
    content = contents(untrained)[0][0].image
    (tmp_path / "picture.png").write_bytes(content)
    image = Image.open(io.BytesIO(content))
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    ways = [content, tmp_path / "picture.png", str(tmp_path / "picture.png"), image, array, array / 255.0, tensor]
    wanted = model.embed_image(content)
    assert wanted.shape == (1, 16)
    for way in ways:
        torch.testing.assert_close(model.embed_image(way), wanted, atol=2e-3, rtol=0)  # kernels of resizing differ by 1
    torch.testing.assert_close(model.embed_image(ways), wanted.expand(len(ways), -1), atol=2e-3, rtol=0)
    torch.testing.assert_close(
        model.embed_image(torch.stack([tensor, tensor])), wanted.expand(2, -1), atol=2e-3, rtol=0
    )
    # alpha on white, grey as grey
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    torch.testing.assert_close(model.embed_image(clear), model.embed_image(Image.new("RGB", (20, 20), "white")))
    assert model.embed_image(Image.new("L", (20, 20), 7)).shape == (1, 16)
    grid = model.ground(image, "a dog", [("dog",)])[0].boxes
    assert len(grid) == 9 and grid[0] == pytest.approx((0, 0, 20, 40 / 3), abs=1e-3)
    found = TrainedModel(model.model, model.vocabs, model.config, model.samples.find_phrases, detector)
    assert found.ground(image, "a dog", [("dog",)])[0].boxes == [pytest.approx((1, 2, 30, 20), abs=1e-4)]


@pytest.mark.parametrize("source", ["image", "features"])
def test_a_detector_finds_the_regions_that_are_not_given(source: str, tmp_path: Path) -> None:
    untrained_folder(tmp_path, source)
    name = str(save_detector("detr", tmp_path / "detector"))
    if source == "features":  # the detector's states are of another size than the model's features
        model = mvptr_ds.load(tmp_path / "model", device="cpu", detector=name)
        with pytest.raises(ValueError, match="region features have 16 numbers, this model takes 5"):
            model.embed_image(Image.new("RGB", (64, 48), "grey"))
        return
    model, plain = (mvptr_ds.load(tmp_path / "model", device="cpu", detector=d) for d in (name, None))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    found = model.samples.find_regions(picture)  # type: ignore[misc]
    assert len(found.boxes) == len(found.tags) > 0 and set(found.tags) <= {"dog", "traffic light", "cabinet", ""}
    boxes = model.ground(picture, "a dog", [("dog",)])[0].boxes
    assert boxes == [pytest.approx(box, abs=1e-3) for box in found.boxes]
    assert not torch.allclose(model.embed_image(picture), plain.embed_image(picture))
    given = plain.embed_image(Picture(picture, found.boxes, found.tags))
    torch.testing.assert_close(model.embed_image(picture), given)


def test_a_long_text_is_cut_and_that_is_said(image_model: TrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        both = image_model.embed_text(["dog " * 33, "dog " * 50], phrases=[[], []])
    assert torch.equal(both[0], both[1])
    assert caplog.text.count("a text is cut to 33 of its 50 wordpieces: 'dog dog") == 1


def test_a_model_of_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: what the hub's own function would have put on the disk."""
    untrained_folder(tmp_path, "image")
    asked = {}

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked[name] = (revision, allow_patterns)
        return str(tmp_path / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert mvptr_ds.load("me/model", device="cpu", revision="v1").embed_text("a dog").shape == (1, 16)
    assert asked == {"me/model": ("v1", ["*.json", "*.txt", "*.yaml", "*.safetensors"])}


def detector(image: Image.Image) -> Picture:
    assert image.mode == "RGB" and image.size == (60, 40)
    return Picture(image, [(1, 2, 30, 20)], ["dog"])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"not a picture", "picture 1 of 2: the image cannot be decoded: its format is not known"),
        ("nowhere.jpg", r"picture 1 of 2: nowhere\.jpg cannot be read \(No such file or directory\)"),
        (np.zeros((4, 4)), r"picture 1 of 2: a picture has shape \(4, 4\), expected an array \[H, W, 3\]"),
        (np.full((4, 4, 3), 7.0), "a picture of floats must lie within 0 to 1"),
        (np.zeros((4, 4, 3), np.int64), "a picture is int64, expected uint8 or floats"),
        (3, "a picture is int, expected a PIL image, path, bytes, array or tensor"),
        (Picture(), "there is no image, and this model reads pixels"),
        (Picture(Image.new("RGB", (9, 9)), [(0, 0, 4)]), r"boxes have shape \(1, 3\), expected \[R, 4\]"),
        (Picture(Image.new("RGB", (9, 9)), [(1, 1, 5, 5), (20, 0, 30, 5)]), "box 1 is 20 0 30 5, which holds nothing"),
        (Picture(Image.new("RGB", (9, 9)), [(0, 0, 4, 4)], ["a", "b"]), "2 tags for 1 boxes"),
        (Picture(Image.new("RGB", (9, 9)), None, ["a"]), "there are tags or features, but no boxes"),
    ],
)
def test_what_is_wrong_with_a_picture_is_said(
    picture: object, message: str, tmp_path_factory: pytest.TempPathFactory, image_model: TrainedModel
) -> None:
    with pytest.raises(DataError, match=message):
        image_model.embed_image([Image.new("RGB", (8, 8)), picture])


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("said")
    untrained_folder(folder, "image")
    return mvptr_ds.load(folder / "model", device="cpu")


def test_what_is_wrong_with_texts_and_pairs_is_said(image_model: TrainedModel) -> None:
    picture = Image.new("RGB", (8, 8))
    for texts, message in (
        (["a", " "], "text 1 of 2 is ' ', expected words"),
        ([], "there is no text"),
        ([3], "text 0 of 1 is 3"),
    ):
        with pytest.raises(DataError, match=message):
            image_model.embed_text(texts)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 pictures and 3 texts: give as many, or one of either"):
        image_model.match([picture, picture], ["a", "b", "c"])
    with pytest.raises(DataError, match="there is no picture"):
        image_model.embed_image([])
    with pytest.raises(DataError, match="pictures are int"):
        image_model.embed_image(7)
    with pytest.raises(ValueError, match="states is 'both'"):
        image_model.ground(picture, "a dog", states="both")


def test_features_are_asked_for(tmp_path: Path) -> None:
    untrained = untrained_folder(tmp_path, "features")
    model = mvptr_ds.load(tmp_path / "model", device="cpu")
    with pytest.raises(DataError, match="this model reads region features: give boxes and features, or load it with a"):
        model.embed_image(Image.new("RGB", (8, 8)))
    with pytest.raises(DataError, match=r"features have shape \(1, 5\) for 2 boxes"):
        model.embed_image(Picture(None, [(0, 0, 4, 4)] * 2, None, np.zeros((1, 5)), (8, 8)))
    with pytest.raises(ValueError, match="region features have 4 numbers, this model takes 5"):
        model.embed_image(Picture(None, [(0, 0, 4, 4)], None, np.zeros((1, 4)), (8, 8)))
    given = contents(untrained)[0][0]
    alone = Picture(None, given.boxes, given.tags, given.features, (60, 40))
    torch.testing.assert_close(model.embed_image(alone), model.embed_image(given))


def test_half_precision_is_near(untrained: Untrained, model: TrainedModel) -> None:
    pictures, texts, phrases = contents(untrained)
    half = mvptr_ds.load(untrained.folder, device="cpu", dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    cosines = (half.embed_text(texts, phrases) * model.embed_text(texts, phrases)).sum(-1)
    assert cosines.min() > 0.98 and half.embed_image(pictures).dtype == torch.float32


ALONE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "wandb", "webdataset", "matplotlib"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Missing())
import mvptr_ds
assert not {"torch", "transformers", "numpy"} & set(sys.modules)  # nothing heavy until it is used
model = mvptr_ds.load(sys.argv[1], device="cpu")
print(tuple(model.embed_text(["A red dog."]).shape))
"""


def test_loading_needs_nothing_of_training(untrained: Untrained) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, untrained.folder], capture_output=True, text=True, timeout=120, cwd=REPO
    )
    assert done.returncode == 0 and done.stdout == "(1, 16)\n", done.stderr[-2000:]


def test_what_cannot_be_loaded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "file", "is no folder; give a run"),
        ("./nowhere", r"\./nowhere is no folder"),
        (tmp_path / "empty", "holds no complete checkpoint; give a run folder"),
        ("nobody/nothing", "nobody/nothing is neither a folder here nor a model of the hub"),
    ):
        with pytest.raises(CheckpointError, match=message):
            mvptr_ds.load(source)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").touch()
    with pytest.raises(
        CheckpointError, match=r"other holds no model of mvptr_ds: config\.json, vocab\.txt, .* are missing"
    ):
        mvptr_ds.load(tmp_path / "other")
