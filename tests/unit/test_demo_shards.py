"""Demo shards: what a scene promises, held-out pairs, equal bytes from any number of processes, both sources."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Record, parse_record
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.demo import build, captions, plan
from mvptr_ds.demo.build import build_demo_shards
from mvptr_ds.demo.captions import article, relations
from mvptr_ds.demo.marker import FolderTakenError
from mvptr_ds.demo.plan import SplitRule
from mvptr_ds.demo.scene import IMAGE_SIZE_PX, PART_TAG, Scene, area, compose, make_scene, overlap
from mvptr_ds.demo.shapes import BACKGROUNDS_RGB, SHAPES, ShapesSource
from mvptr_ds.errors import DataError
from tests.support.tools import run_tool

NUM_SCENES = 400


def known_concepts(scenes: list[Scene]) -> frozenset[plan.Concept]:
    usage = build._Usage()
    for scene in scenes:
        usage.add(scene.record)
    return usage.known_concepts()


@pytest.fixture(scope="module")
def train_scenes() -> list[Scene]:
    source = ShapesSource()
    return [make_scene(source, SplitRule(5), number) for number in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def held_out_scenes(train_scenes: list[Scene]) -> list[Scene]:
    rule = SplitRule(5, known_concepts(train_scenes))
    return [make_scene(ShapesSource(), rule, number) for number in range(100)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "shards"
    build_demo_shards(out, "shapes", num_train=330, num_held_out=40, seed=2, num_processes=1)
    return out


def test_records_keep_to_the_schema_and_to_the_number_of_regions(
    train_scenes: list[Scene], held_out_scenes: list[Scene]
) -> None:
    for scene in train_scenes + held_out_scenes:
        record = parse_record(json.dumps(scene.record.to_json()).encode())
        assert record == scene.record
        assert 2 <= len(scene.objects) <= 5
        assert 6 <= len(record.regions) <= 10
        assert len(record.regions) > len(scene.objects)
        allowed = {o.plan.noun for o in scene.objects} | set(BACKGROUNDS_RGB) | {PART_TAG}
        assert {region.tag for region in record.regions} <= allowed
        for region in record.regions:
            x1, y1, x2, y2 = region.box
            assert 0 <= x1 < x2 <= IMAGE_SIZE_PX and 0 <= y1 < y2 <= IMAGE_SIZE_PX
    assert len(SHAPES) >= 10
    shares = [len(s.record.captions) == 2 for s in train_scenes]
    assert 0.12 < np.mean(shares) < 0.28  # 20 %, four standard errors of 400 scenes


def test_spans_are_the_words_and_phrases_name_the_right_regions(
    train_scenes: list[Scene], held_out_scenes: list[Scene]
) -> None:
    num_relations = 0
    for scene in train_scenes + held_out_scenes:
        objects = {o.region: o for o in scene.objects}
        for caption in scene.record.captions:
            for phrase in caption.phrases:
                words = [caption.text[start:end].lower() for start, end in phrase.spans]
                assert words == list(phrase.tuple)
                if len(phrase.tuple) == 3:
                    num_relations += 1
                    assert phrase.regions == ()
                    continue
                noun, attributes = phrase.tuple[0], set(phrase.tuple[1:])
                expected = {r for r, o in objects.items() if o.plan.noun == noun and attributes <= o.plan.attributes}
                assert set(phrase.regions) == expected != set()
                assert all(scene.record.regions[r].tag == noun for r in phrase.regions)
    assert num_relations > 200


def test_every_pattern_occurs_and_sentences_look_like_sentences(train_scenes: list[Scene]) -> None:
    texts = [c.text for s in train_scenes for c in s.record.captions]
    assert all(t[0].isupper() and t.endswith(".") and "  " not in t for t in texts)
    nouns = {o.plan.noun for s in train_scenes for o in s.objects}
    attributes = {a for s in train_scenes for o in s.objects for a in o.plan.attributes}

    def skeleton(text: str) -> str:
        words = text.lower().rstrip(".").replace(",", " ,").split()
        kept = [w for w in words if w not in attributes and w not in {"a", "an", "the"}]
        return " ".join("N" if w in nouns else w for w in kept)

    assert len({skeleton(t).replace("left", "right").replace("above", "below") for t in texts}) >= 8
    assert {"left of", "right of", "above", "below", "next to"} == {
        p.tuple[1] for s in train_scenes for c in s.record.captions for p in c.phrases if len(p.tuple) == 3
    }
    assert [article(w) for w in ("orange", "red", "european", "electric", "unicorn")] == ["an", "a", "a", "an", "a"]


def test_relations_are_true_of_the_boxes() -> None:
    left, right, low = (0, 0, 20, 20), (60, 2, 80, 22), (2, 60, 22, 80)
    assert relations(left, right) == ["left of"]
    assert relations(right, left) == ["right of"]
    assert relations(left, low) == ["above"]
    assert relations(low, left) == ["below"]
    assert relations(left, (22, 0, 40, 20)) == ["left of", "next to"]
    assert relations(left, left) == ["next to"]


def test_relations_of_captions_hold(train_scenes: list[Scene]) -> None:
    """Checked on scenes where subject and object are the only ones of their noun, by the centres of their boxes."""
    num_checked = 0
    signs = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    for scene in train_scenes:
        for phrase in (p for c in scene.record.captions for p in c.phrases if len(p.tuple) == 3):
            first, second = ([o for o in scene.objects if o.plan.noun == n] for n in (phrase.tuple[0], phrase.tuple[2]))
            if len(first) != 1 or len(second) != 1 or phrase.tuple[1] not in signs:
                continue
            axis, sign = signs[phrase.tuple[1]]
            centres = [(o.box[axis] + o.box[axis + 2]) / 2 for o in (first[0], second[0])]
            assert (centres[0] - centres[1]) * sign > 0, (scene.key, phrase)
            num_checked += 1
    assert num_checked > 100


def test_no_training_scene_shows_a_held_out_pair_and_every_held_out_caption_says_one(
    train_scenes: list[Scene], held_out_scenes: list[Scene]
) -> None:
    rule = SplitRule(5)
    for scene in train_scenes:
        pairs = itertools.combinations([o.plan.concept for o in scene.objects], 2)
        assert not any(rule.is_held_out(a, b) for a, b in pairs), scene.key
    said_in_training = {p.tuple for s in train_scenes for c in s.record.captions for p in c.phrases}
    for scene in held_out_scenes:
        concepts = {o.plan.concept for o in scene.objects}
        for caption in scene.record.captions:
            said = [p.tuple for p in caption.phrases if len(p.tuple) == 2]
            assert any(rule.is_held_out(a, b) for a, b in itertools.combinations(said, 2) if {a, b} <= concepts), (
                caption.text
            )
            assert {p.tuple for p in caption.phrases if len(p.tuple) < 3} <= said_in_training


def test_about_fifteen_percent_of_the_pairs_are_held_out_whatever_their_order() -> None:
    concepts = [concept for kind in ShapesSource().catalogue.kinds for concept in kind.concepts]
    rule, other = SplitRule(0), SplitRule(1)
    pairs = list(itertools.combinations(concepts, 2))
    held_out = np.array([rule.is_held_out(a, b) for a, b in pairs])
    assert abs(held_out.mean() - plan.HELD_OUT_FRACTION) < 0.015  # 8,646 pairs: four standard errors
    assert all(rule.is_held_out(b, a) == h for (a, b), h in zip(pairs, held_out, strict=True))
    assert (held_out != [other.is_held_out(a, b) for a, b in pairs]).any()


def test_two_of_one_noun_occur_with_different_attributes(
    train_scenes: list[Scene], held_out_scenes: list[Scene]
) -> None:
    for scenes in (train_scenes, held_out_scenes):
        twins = [len({o.plan.noun for o in s.objects}) < len(s.objects) for s in scenes]
        assert 0.2 < np.mean(twins) < 0.65  # a quarter on purpose, more by chance among 12 nouns
        assert all(len({o.plan.concept for o in s.objects}) == len(s.objects) for s in scenes)


def test_boxes_are_tight_around_what_the_object_changes_in_the_picture() -> None:
    """Each object painted alone: what differs from the bare background spans its box, but for an antialiased edge."""
    source = ShapesSource()
    rng = np.random.default_rng(3)
    for kind in source.catalogue.kinds[::7]:
        background, _ = source.background(rng)
        sprite = source.sprite(kind, float(rng.uniform(20, 50)), rng)
        x, y = (int(rng.integers(0, IMAGE_SIZE_PX - side + 1)) for side in (sprite.shape[1], sprite.shape[0]))
        picture, owner = compose(background, [sprite], [(x, y)], [0])
        rows, columns = np.nonzero((picture != background).any(2))
        height, width = sprite.shape[:2]
        assert rows.min() >= y and columns.min() >= x and rows.max() < y + height and columns.max() < x + width
        assert (owner == 0).any(1).sum() == height and (owner == 0).any(0).sum() == width


def test_boxes_of_a_scene_are_those_of_the_visible_pixels_and_overlap_little(train_scenes: list[Scene]) -> None:
    for scene in train_scenes[:100]:
        for index, scene_object in enumerate(scene.objects):
            rows, columns = np.nonzero(scene.owner_HW == index)
            assert scene_object.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert scene.record.regions[scene_object.region].box == scene_object.box
            assert scene.record.regions[scene_object.region].tag == scene_object.plan.noun
        for a, b in itertools.combinations([o.box for o in scene.objects], 2):
            assert overlap(a, b) <= 0.2 * min(area(a), area(b))


def test_the_order_of_regions_says_nothing_of_captions_nor_of_positions(train_scenes: list[Scene]) -> None:
    said_first, left_first = [], []
    for scene in train_scenes:
        first = [p.regions[0] for p in scene.record.captions[0].phrases if len(p.tuple) == 2]
        said_first.append(first[0] < first[1])
        a, b = sorted(scene.objects, key=lambda o: o.box[0])[:2]
        left_first.append(a.region < b.region)
    assert abs(np.mean(said_first) - 0.5) < 0.1  # four standard errors of 400 scenes
    assert abs(np.mean(left_first) - 0.5) < 0.1


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_equal_bytes_from_two_processes(shards: Path, tmp_path: Path) -> None:
    build_demo_shards(tmp_path / "two", "shapes", num_train=330, num_held_out=40, seed=2, num_processes=2)
    assert digest(tmp_path / "two") == digest(shards)
    assert [p.name for p in tmp_path.iterdir()] == ["two"]  # no partial folder is left


def test_plain_webdataset_reads_the_shards(shards: Path) -> None:
    tars = sorted(str(p) for p in (shards / "train").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"train-{i:06d}" for i in range(330)]
    for sample in samples[:20]:
        assert isinstance(parse_record(sample["json"]), Record)
        assert sample["jpg"][:2] == b"\xff\xd8"
        assert "npy" not in sample


def test_vocabularies_fit_each_other_and_spell_any_word(shards: Path) -> None:
    words = WordPiece(shards / "word_vocab.txt")
    assert words.tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(words) < 1500
    for text in ("Xylophone 42 qwerty", "a red circle left of the square."):
        assert words.unk_id not in words.encode(text)[0]
    phrases = PhraseVocab.load(shards / "phrase_vocab.json", words)
    assert min(phrases.counts) >= build.MIN_PHRASE_COUNT
    assert all(phrases.index_of((noun,)) is not None for noun in SHAPES)
    for sample in webdataset.WebDataset([str(p) for p in (shards / "held_out").glob("*.tar")], shardshuffle=False):
        for caption in parse_record(sample["json"]).captions:
            assert all(phrases.index_of(p.tuple) is not None for p in caption.phrases if len(p.tuple) < 3)


def test_same_arguments_return_at_once_and_others_are_refused(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(shards)
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    build_demo_shards(shards, "shapes", num_train=330, num_held_out=40, seed=2, num_processes=2)
    others = {"training scenes 330 there, 340 here": (340, 40, 2), "held-out scenes 40 there, 4 here": (330, 4, 2)}
    others["training scenes 330 there, 1 here; held-out scenes 40 there, 2 here"] = (1, 2, 2)
    others["seed 2 there, 3 here"] = (330, 40, 3)
    for differ, (num_train, num_held_out, seed) in others.items():
        with pytest.raises(FolderTakenError) as error:
            build_demo_shards(shards, "shapes", num_train, num_held_out, seed, num_processes=1)
        assert differ in str(error.value) and str(shards) in str(error.value)
    monkeypatch.setattr(build, "GENERATOR_VERSION", 99)
    with pytest.raises(FolderTakenError, match="version of the generator 2 there, 99 here"):
        build_demo_shards(shards, "shapes", num_train=330, num_held_out=40, seed=2, num_processes=1)
    assert digest(shards) == before


def test_an_interrupted_build_leaves_nothing_and_is_made_when_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty: free
    with monkeypatch.context() as patched:
        patched.setattr(build, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build_demo_shards(out, "shapes", num_train=100, num_held_out=5, seed=1, num_processes=1)
    assert [p.name for p in tmp_path.rglob("*")] == ["out"]
    build_demo_shards(out, "shapes", num_train=100, num_held_out=5, seed=1, num_processes=1)
    assert json.loads((out / "demo.json").read_text())["num_train"] == 100
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_tool_replaces_nothing(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(shards)
    monkeypatch.setenv("HOME", str(shards.parent))
    ran = run_tool("make_demo_shards.py", f"--out=~/{shards.name}", "--train=9")
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert "training scenes 330 there, 9 here" in ran.stderr and "name another folder, or remove this one" in ran.stderr
    assert digest(shards) == before


def test_wrong_arguments_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="photos"):
        build_demo_shards(tmp_path / "a", "photos", 10, 10, 0, 1)
    with pytest.raises(DataError, match="each must be >= 1"):
        build_demo_shards(tmp_path / "a", "shapes", 0, 10, 0, 1)
    monkeypatch.setenv("MVPTR_STAMPS", "/nowhere")
    with pytest.raises(DataError, match="MVPTR_STAMPS is '/nowhere'"):
        build_demo_shards(tmp_path / "a", "stamps", 10, 10, 0, 2)
    assert not any(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(DataError, match="holds other files"):
        build_demo_shards(tmp_path / "mine", "shapes", 10, 10, 0, 1)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(DataError, match="more training scenes"):
        build_demo_shards(tmp_path / "few", "shapes", 2, 2, 0, 1)


def test_descriptions_of_stamps_are_parsed() -> None:
    from mvptr_ds.demo.stamp_words import is_photo, parse_description

    cases = {
        "A Sumatran tiger.": ("tiger", "sumatran"),
        "An albino peahen (a female peafowl, or peacock).": ("peahen", "albino"),
        "A head of red lettuce.": ("lettuce", "red"),
        "A very small pumpkin.": ("pumpkin", None),
        "An avocado fruit.": ("avocado", None),
        "A “pattypan” squash.": ("squash", "pattypan"),
        "A bunch of grapes.": None,
        "This gun last saw service during World War 2.": None,
        "": None,
    }
    assert {line: parse_description("x/none.png", line) for line in cases} == cases
    assert is_photo("animals/birds/crow.png")
    assert not is_photo("town/flags/redflag.png") and not is_photo("animals/birds/cartoon/duck.png")


def test_stamps_are_many_and_make_scenes(stamps_source) -> None:  # type: ignore[no-untyped-def]
    nouns = stamps_source.catalogue.nouns
    assert len(nouns) >= 100 and sum(map(len, stamps_source.stamps.values())) >= 290
    assert len(stamps_source.catalogue.twin_nouns) >= 30
    rng = np.random.default_rng(0)
    for kind in stamps_source.catalogue.kinds:
        sprite = stamps_source.sprite(kind, 20.0, rng)
        opaque = sprite[:, :, 3] >= 128
        assert opaque[0].any() and opaque[-1].any() and opaque[:, 0].any() and opaque[:, -1].any()
        assert not np.array_equal(sprite, stamps_source.sprite(kind, 20.0, rng))
    scenes = [make_scene(stamps_source, SplitRule(1), number) for number in range(40)]
    for scene in scenes:
        assert parse_record(json.dumps(scene.record.to_json()).encode()) == scene.record
        for phrase in (p for c in scene.record.captions for p in c.phrases if len(p.tuple) == 2):
            assert all(scene.record.regions[r].tag == phrase.tuple[0] for r in phrase.regions)


def test_stamp_features_know_the_object(stamps_source) -> None:  # type: ignore[no-untyped-def]
    """The network is right: a zebra and a lemon get ImageNet's classes, and features do not depend on the batch."""
    from mvptr_ds.demo.efficientnet_lite import FEATURE_DIM, load_efficientnet, to_input

    pictures = []
    for noun in ("zebra", "lemon", "pineapple"):
        stamp = next(s for own in stamps_source.stamps.values() for s in own if s.noun == noun)
        pixels = np.asarray(stamp.image.convert("RGBA").resize((128, 128))).astype(np.float32)
        alpha = pixels[:, :, 3:] / 255
        pictures.append((pixels[:, :, :3] * alpha + 128 * (1 - alpha)).astype(np.uint8))
    assert load_efficientnet()(to_input(np.stack(pictures))).argmax(1).tolist() == [340, 951, 953]
    scenes = [make_scene(stamps_source, SplitRule(1), number) for number in range(3)]
    together = stamps_source.region_features(scenes)
    for scene, features in zip(scenes, together, strict=True):
        assert features.shape == (len(scene.record.regions), FEATURE_DIM)
        assert np.isfinite(features).all() and 0.9 < features.std() < 1.1
        alone = stamps_source.region_features([scene])[0]
        np.testing.assert_allclose(features, alone, atol=1e-4)  # float32, another order of sums


def test_stamp_shards_carry_features(stamps_source, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    build_demo_shards(tmp_path / "s", "stamps", num_train=64, num_held_out=2, seed=0, num_processes=1)
    tars = [str(p) for p in (tmp_path / "s" / "train").glob("*.tar")]
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        features = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        assert features.dtype == np.float16
        assert features.shape == (len(parse_record(sample["json"]).regions), 432)


def test_patterns_are_many() -> None:
    assert len(captions.TWO_OBJECT_PATTERNS) + len(captions.THREE_OBJECT_PATTERNS) >= 6
