"""The whole evaluation: a model that reads a planted signal earns 100 %, an untrained one and permuted regions chance.

Legend: C captions, I images, B samples, T text slots, G tag slots, R regions, D dimensions of the signal, V word rows.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mvptr_ds import eval as entry
from mvptr_ds.checkpoints.model_folder import save_model_folder
from mvptr_ds.config import Config, EvalConfig, override_config
from mvptr_ds.config_data import VisualConfig
from mvptr_ds.data.dataset import read_sample_record
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.schema import Caption, Phrase, Record, Region
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.eval import _write_report, evaluate
from mvptr_ds.evaluation.curves import draw_curves, draw_scores, read_metrics, wall_s
from mvptr_ds.evaluation.figures import drawable
from mvptr_ds.evaluation.grounding import GroundedPhrase
from mvptr_ds.evaluation.pictures import choose_scenes, draw_grounding
from mvptr_ds.evaluation.report import Evaluation, evaluate_model, evaluate_split, flatten_scores
from mvptr_ds.evaluation.table import table
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed
from tests.support.odd_pictures import DAMAGED, STORED, png

CPU = torch.device("cpu")
PART = "part"
NOUNS = (PART, "dog", "cat", "owl", "cup", "key", "fig", "hen", "bat", "pen")
ATTRIBUTES = ("red", "blue", "large", "small")
SIGNAL = (*NOUNS, *ATTRIBUTES)
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SIGNAL, "a", "and", "the", ".")
OOV = ("pen", "red")  # a phrase that the vocabulary lacks
NUM_SCENES = 60
Thing = tuple[str, str]  # noun, attribute


def scene(rng: np.random.Generator, number: int, things: Sequence[Thing]) -> tuple[Record, np.ndarray]:
    """Things and a part in any order, 1 to 3 captions; scene 0 has no boxes, the last caption of scene 1 no phrases."""
    shown: list[Thing | None] = [*things, None]
    order = rng.permutation(len(shown))
    regions, features_RD = [], rng.standard_normal((len(shown), len(SIGNAL))) * 0.01  # no ties
    for place, which in enumerate(order):
        noun, attribute = shown[which] or (PART, PART)
        x1, y1, size = *rng.integers(0, 30, 2), int(rng.integers(4, 30))
        regions.append(Region((float(x1), float(y1), float(x1 + size), float(y1 + size)), noun))
        features_RD[place, [SIGNAL.index(noun), SIGNAL.index(attribute)]] += 1
    place_of = [int(np.flatnonzero(order == i)[0]) for i in range(len(things))]
    phrases = []
    for noun, attribute in things:
        alike = [p for p, thing in zip(place_of, things, strict=True) if thing[0] == noun]
        same = [p for p, thing in zip(place_of, things, strict=True) if thing == (noun, attribute)]
        phrases += [Phrase((noun,), ((0, 1),), tuple(alike)), Phrase((noun, attribute), ((0, 1),), tuple(same))]
    phrases.append(Phrase((things[0][0], "and", things[-1][0]), ((0, 1),)))
    text = " and ".join(f"a {attribute} {noun}" for noun, attribute in things)
    captions = [Caption(text + "." * i, tuple(phrases)) for i in range(1 + number % 3)]
    if number == 1:
        captions[-1] = Caption(text)
    if number == 0:  # a grid of 16 cells that no phrase can name
        features_RD = np.concatenate([features_RD, np.zeros((16 - len(features_RD), len(SIGNAL)))])
        phrases = [Phrase(p.tuple, p.spans) for p in phrases]
        regions, captions = [], [Caption(text, tuple(phrases))]
    return Record(f"s{number}", 60, 60, tuple(captions), tuple(regions)), features_RD.astype(np.float16)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Vocabs, Config]:
    """Shards of scenes whose region features spell noun and attribute; every scene another set of things."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    items, seen = [], set()
    while len(items) < NUM_SCENES:
        nouns = rng.choice(NOUNS[1:], int(rng.integers(3, 6)))
        things = [(str(noun), str(rng.choice(ATTRIBUTES))) for noun in nouns]
        key = frozenset(word for thing in things for word in thing)
        if key in seen:
            continue
        seen.add(key)
        record, features_RD = scene(rng, len(items), things)
        npy, picture = io.BytesIO(), io.BytesIO()
        np.save(npy, features_RD)
        Image.new("RGB", (30, 30), "grey").save(picture, "JPEG")  # half the record's size
        items.append((record.image_id, record, {"npy": npy.getvalue(), "jpg": picture.getvalue()}))
    write_shards(folder / "shards", items, 25)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    words = WordPiece(folder / "vocab.txt")
    known = {(n,): 9 for n in NOUNS} | {(n, a): 5 for n in NOUNS for a in ATTRIBUTES if (n, a) != OOV}
    config = Config(visual=VisualConfig(feature_dim=len(SIGNAL)), eval=EvalConfig(batch_size=16, rerank_top_k=8))
    index = ensure_index(folder / "shards")
    return index, Vocabs(words, PhraseVocab.build(known, words, 1)), config


class PlantedModel(nn.Module):
    """Reads the signal: words, phrases and regions are sums of unit vectors; only a part is not looked at."""

    dtype = torch.float32

    def __init__(self, vocabs: Vocabs) -> None:
        super().__init__()
        self.config = MvptrConfig(num_phrases=len(vocabs.phrases))
        self.table_VD = torch.zeros(vocabs.phrases.num_rows, len(SIGNAL))
        for row, word in enumerate(WORDS):
            if word in SIGNAL:
                self.table_VD[row, SIGNAL.index(word)] = 1
        for row, words in zip(vocabs.phrases.rows.tolist(), vocabs.phrases.tuples, strict=True):
            for word in words:
                self.table_VD[row, SIGNAL.index(word)] = 1
        self.num_phrases, self.favourite = len(vocabs.phrases), vocabs.phrases.index_of(("dog",))

    def encode_text(self, ids: Packed) -> Packed:
        assert not self.training
        states = ids.like(self.table_VD[ids.rows])
        states.rows[states.starts] = states.padded().sum(1).clamp(max=1)
        return states

    def embed_regions(self, features: Packed, images: None, geometry: Packed) -> Packed:
        return features

    @staticmethod
    def union(regions: Packed) -> Tensor:
        union_BD = regions.padded().round().sum(1).clamp(max=1)
        union_BD[:, SIGNAL.index(PART)] = 0
        return union_BD

    def encode_visual(self, ids: Packed, regions: Packed) -> tuple[Packed, Packed]:
        """Tag slot k is the k-th distinct noun of the regions: as tags are laid out."""
        tags = ids.like(torch.zeros(len(ids.rows), len(SIGNAL)))
        parts = tags.rows.split(tags.lengths), regions.rows.split(regions.lengths)
        for tags_GD, regions_RD in zip(*parts, strict=True):
            nouns = dict.fromkeys(regions_RD[:, : len(NOUNS)].argmax(1).tolist())
            for slot, noun in list(enumerate(nouns, start=1))[: len(tags_GD) - 2]:
                tags_GD[slot, noun] = 1
        tags.rows[tags.starts] = self.union(regions)
        return tags, regions

    def encode_cross(self, text: Packed, regions: Packed, needed_K: Tensor | None = None) -> tuple[Packed, Packed]:
        text = text.like(text.rows.clone())
        text.rows[text.starts] -= self.union(regions)
        return text, regions

    def text_global(self, states: Packed) -> Tensor:
        return F.normalize(states.firsts(), dim=-1)

    visual_global = text_global

    def pool(self, states: Packed) -> Tensor:
        return states.firsts()

    def itm_logits(self, pooled_BD: Tensor) -> Tensor:
        distance_B = pooled_BD.abs().sum(-1)
        return torch.stack([0.5 - distance_B, distance_B - 0.5], dim=-1) * 4

    def tag_logits(self, states_ND: Tensor) -> Tensor:
        return states_ND @ self.table_VD[: len(WORDS)].T

    def phrase_logits(self, states_ND: Tensor) -> Tensor:
        """Always the same answer, and a mask's state is zero: what was asked for cannot be read off the input."""
        assert not states_ND.any()
        return F.one_hot(torch.full((len(states_ND),), self.favourite), self.num_phrases).float()


def untrained(vocabs: Vocabs, **changes: Any) -> Mvptr:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_positions": 40}
    layers = dict.fromkeys(("num_text_layers", "num_visual_layers", "num_cross_layers"), 1)
    rows = {"num_words": len(WORDS), "num_rows": vocabs.phrases.num_rows, "num_phrases": len(vocabs.phrases)}
    model = Mvptr(MvptrConfig(**{**sizes, **layers, **rows, "region_feature_dim": len(SIGNAL), **changes}))
    model.set_phrase_rows(torch.from_numpy(vocabs.phrases.rows))
    return model


@pytest.fixture(scope="module")
def evaluation(planted: tuple[Index, Vocabs, Config]) -> Evaluation:
    index, vocabs, config = planted
    return evaluate_split(PlantedModel(vocabs), vocabs, config, index, CPU)  # type: ignore[arg-type]


def test_a_planted_signal_earns_all(evaluation: Evaluation, planted: tuple[Index, Vocabs, Config]) -> None:
    report, index = evaluation.report, planted[0]
    assert (report["num_scenes"], report["num_captions"]) == (NUM_SCENES, len(index))
    assert len(index) > 1.5 * NUM_SCENES
    for setting in (report, report["without_tags"]):  # the pixels carry it: tags withheld change nothing
        assert set(setting["retrieval"].values()) == set(setting["rerank"].values()) == {1.0}
        for states in ("uni", "cross"):
            part = setting["grounding"][states]
            kinds = [part, part["noun"], part["attribute"], part["attribute_among_one_noun"], *part["by_size"].values()]
            assert [kind["accuracy"] for kind in kinds] == [1.0] * 7
            assert all(0.1 < kind["chance"] < 0.6 for kind in kinds)
            assert (
                part["noun"]["n"] + part["attribute"]["n"]
                == part["n"]
                == sum(size["n"] for size in part["by_size"].values())
            )
    assert report["itm"] == {"accuracy": 1.0, "match": 1.0, "mismatch": 1.0, "n": 2 * len(index)}
    assert report["mcr"]["accuracy"] == 1.0
    assert report["mcr"]["majority"] < 0.3


def test_permuted_regions_earn_chance(evaluation: Evaluation) -> None:
    permuted = evaluation.report["permuted_regions"]
    assert permuted["retrieval"]["t2i_r1"] < 0.1  # chance 1.7 %
    for states in ("uni", "cross"):
        part = permuted["grounding"][states]
        assert part["chance"] == evaluation.report["grounding"]["chance"]
        # about 900 phrases of 60 scenes, alike within a scene: a standard error of some 3 points
        assert abs(part["accuracy"] - part["chance"]) < 0.1


def test_the_number_of_phrases_and_their_chance_by_hand(
    evaluation: Evaluation, planted: tuple[Index, Vocabs, Config]
) -> None:
    index, vocabs, _ = planted
    shares, left_out = [], 0
    for caption in range(len(index)):
        record, number = read_sample_record(index, caption)
        for phrase in record.captions[number].phrases:
            if phrase.regions and vocabs.phrases.index_of(phrase.tuple) is None:
                left_out += 1
            elif phrase.regions:
                shares.append(len(phrase.regions) / len(record.regions))
    grounding = evaluation.report["grounding"]
    assert left_out > 0
    assert (grounding["n"], grounding["num_without_slot"]) == (len(shares), left_out)
    assert grounding["chance"] == pytest.approx(np.mean(shares))
    assert grounding["accuracy"] == grounding["uni"]["accuracy"]


def test_one_answer_to_every_phrase_earns_its_share(evaluation: Evaluation) -> None:
    phrases = evaluation.report["mcr"]["phrases"]
    assert 0 < phrases["accuracy"] <= phrases["majority"] < 0.2
    assert phrases["n"] > 200


def test_an_untrained_model_earns_chance_and_leaves_as_it_came(planted: tuple[Index, Vocabs, Config]) -> None:
    index, vocabs, config = planted
    model = untrained(vocabs, hidden_dropout=0.5)
    model.train()
    before = torch.get_rng_state()
    report = evaluate_model(model, vocabs, config, index, CPU, seed=3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    for part in (report, report["without_tags"], report["permuted_regions"]):
        assert part["retrieval"]["t2i_r1"] < 0.15
        grounding = part["grounding"]["uni"]
        assert abs(grounding["accuracy"] - grounding["chance"]) < 0.15
    assert report["mcr"]["accuracy"] < report["mcr"]["majority"] + 0.1
    assert report["without_tags"] != {name: report[name] for name in report["without_tags"]}  # it looks at tags
    again = evaluate_model(model, vocabs, config, index, CPU, seed=3)
    assert {**again, "wall_s": 0} == {**report, "wall_s": 0}
    other = evaluate_model(model, vocabs, config, index, CPU, seed=4)
    assert other["permuted_regions"] != report["permuted_regions"]
    assert other["without_tags"] == report["without_tags"]
    config = replace(config, eval=replace(config.eval, withhold_tags=True))
    bare = evaluate_model(model, vocabs, config, index, CPU, seed=3)
    assert bare["num_tags"] == 0 and {name: bare[name] for name in report["without_tags"]} == report["without_tags"]


def test_a_model_and_a_split_without_phrases(tmp_path: Path, planted: tuple[Index, Vocabs, Config]) -> None:
    """Nothing to ask is None in the report, a dash in the table, and no key of the log."""
    config, words = planted[2], planted[1].words
    npy = io.BytesIO()
    np.save(npy, np.ones((2, len(SIGNAL)), dtype=np.float16))
    regions = (Region((0, 0, 5, 5), "dog"), Region((5, 5, 9, 9), "cat"))
    records = [Record(f"k{i}", 9, 9, (Caption("a dog"), Caption("a cat")), regions) for i in range(2)]
    write_shards(tmp_path / "shards", [(r.image_id, r, {"npy": npy.getvalue()}) for r in records], 9)
    vocabs = Vocabs(words, PhraseVocab.empty(words))
    model = PlantedModel(planted[1])
    report = evaluate_model(model, vocabs, config, ensure_index(tmp_path / "shards"), CPU)  # type: ignore[arg-type]
    assert report["grounding"]["uni"]["noun"] == {"accuracy": None, "chance": None, "n": 0}
    assert report["mcr"]["phrases"] == {"accuracy": None, "majority": None, "n": 0}
    assert "eval/grounding/accuracy" not in flatten_scores(report)
    lines = {line[:30].strip(): line for line in table(report).splitlines()}
    assert lines["phrases, half masked"].split()[3:] == ["0", "-", "-"]
    assert "GROUNDING: no phrase of the split has a known region" in table(report) and "nouns" not in lines
    assert "NaN" not in json.dumps(report)


def test_a_split_without_tags_is_not_shown_twice(tmp_path: Path, planted: tuple[Index, Vocabs, Config]) -> None:
    _, vocabs, config = planted
    rng, records = np.random.default_rng(5), []
    for number in range(4):
        record, features_RD = scene(rng, 2, [(NOUNS[1 + number], "blue"), (NOUNS[5 + number % 4], "small")])
        regions = tuple(Region(region.box, "") for region in record.regions)
        npy = io.BytesIO()
        np.save(npy, features_RD)
        records.append((f"t{number}", replace(record, image_id=f"t{number}", regions=regions), {"npy": npy.getvalue()}))
    write_shards(tmp_path / "shards", records, 9)
    report = evaluate_model(untrained(vocabs), vocabs, config, ensure_index(tmp_path / "shards"), CPU)
    assert report["num_tags"] == 0 and report["mcr"]["n"] == 0
    for name, part in report["without_tags"].items():
        assert part == report[name]
    lines = table(report).splitlines()
    assert lines[0] == "held out: 4 scenes, 12 captions, no tags; shares in %"
    assert not any(line.startswith("without tags") for line in lines)
    (heads,) = [line.split() for line in lines if "permuted" in line and "regions" not in line]
    assert heads == ["without", "tags", "permuted"]
    assert next(line for line in lines if line.startswith("GROUNDING")).split()[3:] == ["uni", "cross"] * 2


def test_flat_scores_are_the_shares_of_the_report(evaluation: Evaluation) -> None:
    flat = flatten_scores(evaluation.report)
    assert flat["eval/retrieval/t2i_r1"] == 1.0
    assert flat["eval/permuted_regions/grounding/uni/accuracy"] < 0.5
    assert flat["eval/grounding/chance"] == evaluation.report["grounding"]["chance"]
    assert all(0 <= value <= 1 for value in flat.values())
    assert not any(key.endswith(("/n", "wall_s/evaluation", "num_scenes")) for key in flat)


def test_the_table_fits_a_page(evaluation: Evaluation) -> None:
    lines = table(evaluation.report).splitlines()
    assert len(lines) < 40
    assert max(len(line) for line in lines) <= 110
    assert len({line[:34] for line in lines if line[:34].strip()}) == len([line for line in lines if line[:34].strip()])
    row = next(line for line in lines if line.startswith("all "))
    part = evaluation.report["permuted_regions"]["grounding"]["uni"]
    assert row.split()[:7] == [
        "all", str(part["n"]), f"{100 * part['chance']:.1f}", "100.0", "100.0", "100.0", "100.0",
    ]  # fmt: skip
    assert row.split()[7] == f"{100 * part['accuracy']:.1f}"


def test_pictures_show_right_and_wrong_scenes(
    tmp_path: Path, evaluation: Evaluation, planted: tuple[Index, Vocabs, Config]
) -> None:
    index = planted[0]
    found = [replace(g, region=(g.region + 1) % 3) if g.caption % 9 == 0 else g for g in evaluation.grounded]
    chosen = choose_scenes(index, found, 8)
    wrong = [any(g.right is False for g in phrases) for _, phrases in chosen]
    assert (len(chosen), sum(wrong)) == (8, 4)
    assert len({index.locate(caption).record for caption, _ in chosen}) == 8  # no image twice
    assert all(0 < len(phrases) <= 6 and all(g.right is not None for g in phrases) for _, phrases in chosen)
    assert sum(any(g.right is False for g in p) for _, p in choose_scenes(index, evaluation.grounded, 8)) == 0
    draw_grounding(index, found, 8, tmp_path / "pictures.png")
    with Image.open(tmp_path / "pictures.png") as image:
        assert image.width > 800


HOSTILE_TEXTS = (
    r"$\frac{$ costs $5 and $6", r"\$^_{}#&%~",
    "\x07 a\tdog\x00\n\n $_$", "犬" * 300, "\u202etac\u202c \u200b👩\u200d👧", "x" * 5000,
)  # fmt: skip
HOSTILE_PICTURES = (DAMAGED["PostScript"], DAMAGED["cut"], b"\0", png(30_000, 8, 2, b"", height=30_000))


def test_texts_and_pictures_of_others_do_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`$` is no mathematics, what the font lacks is no warning, and a picture that cannot be shown is left out."""
    regions = (Region((-9, -9, 1e12, 5), "$dog$"), Region((0, 0, 9, 9), "cat"))
    items, found = [], []
    for number, text in enumerate([*HOSTILE_TEXTS, *["a dog"] * (len(HOSTILE_PICTURES) + 2)]):
        phrase = Phrase((text[:2000], "$"), ((0, 1),), (1,))
        picture = STORED["RGBA"].content
        if number >= len(HOSTILE_TEXTS) + 2:
            picture = HOSTILE_PICTURES[number - len(HOSTILE_TEXTS) - 2]
        items.append((f"k{number}", Record(str(number), 3, 1, (Caption(text, (phrase,)),), regions), {"png": picture}))
        found.append(GroundedPhrase(number, phrase, region=99 if number == len(HOSTILE_TEXTS) else number % 2))
    write_shards(tmp_path / "shards", items, 99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_grounding(ensure_index(tmp_path / "shards"), found, 20, tmp_path / "pictures.png")
    with Image.open(tmp_path / "pictures.png") as image:
        assert image.height > 2 * image.width / 3  # two rows: seven scenes are left
    (line,) = caplog.messages
    assert line.startswith("5 pictures were left out of pictures.png; the first: sample 8: the image cannot be decoded")


def test_texts_that_can_be_drawn() -> None:
    assert drawable("A  café.\n", 20) == "A café."
    assert drawable("a\x00b\u202ec 犬", 20) == "a bc □"
    assert drawable("y" * 99, 9) == "y" * 8 + "…"
    assert drawable("\u200b" * 99 + "z", 9) == "…"  # not all of it is looked at


def test_names_of_curves_are_no_mathematics(tmp_path: Path) -> None:
    reports: list[Any] = [{"step": 1, r"loss/$\frac{$": 1.0, "loss/犬": 2.0}, 5, None, "text"]
    folder = metrics(tmp_path / "stage1", reports)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves([folder], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert wall_s(read_metrics(folder / "metrics.jsonl")) is None


def metrics(folder: Path, reports: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    text = "".join(json.dumps(report) + "\n" for report in reports)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9, "lo', encoding="utf-8")  # killed while it wrote
    return folder


def test_curves_of_losses_and_of_scores(tmp_path: Path) -> None:
    losses = [{"step": s, "loss/mlm": 1 / s, "wall_s": 2.0 * s} for s in (5, 10)]
    scores = [{"step": s, "eval/retrieval/t2i_r1": 0.1, "eval/mcr/accuracy": 0.2} for s in (5, 10)]
    plain, scored = metrics(tmp_path / "stage1", losses), metrics(tmp_path / "stage2", losses + scores)
    assert not draw_scores([plain], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert draw_scores([plain, scored], tmp_path / "scores.png")
    draw_curves([plain, scored], tmp_path / "curves.png")
    for name in ("scores.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert wall_s(read_metrics(scored / "metrics.jsonl")) == 20.0  # though the last lines are scores
    assert wall_s([]) is None


@pytest.mark.parametrize("source", ["features", "image"])
def test_the_entry_writes_report_and_pictures(
    tmp_path: Path, planted: tuple[Index, Vocabs, Config], source: str
) -> None:
    index, vocabs, config = planted
    backbone = {"model_type": "convnext", "hidden_sizes": [8], "depths": [1], "num_stages": 1}
    config = override_config(config, [f"visual.source={source}", "visual.image_size=32"])
    model = untrained(vocabs, visual_source=source, backbone_config=backbone if source == "image" else None)
    save_model_folder(tmp_path / "model", model, model.state_dict(), vocabs, config)
    report = evaluate(tmp_path / "model", [f"data.held_out={index.folder}"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
    assert report["grounding"]["n"] > 500
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pictures.png", "report.json"]


@pytest.mark.timeout(120)
def test_what_cannot_be_evaluated_or_written_is_said_before_the_work(
    tmp_path: Path,
    planted: tuple[Index, Vocabs, Config],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One message and exit code 2, before anything is evaluated."""
    index, vocabs, config = planted
    model = untrained(vocabs, visual_source="features", backbone_config=None)
    save_model_folder(tmp_path / "model", model, model.state_dict(), vocabs, config)
    (tmp_path / "taken/report.json").mkdir(parents=True)
    (tmp_path / "file").touch()
    held_out = f"data.held_out={index.folder}"
    for arguments, message in (
        (["--out", str(tmp_path / "file")], "file/report.json cannot be written (File exists): name another folder"),
        (["--out", str(tmp_path / "file/out")], "out/report.json cannot be written (Not a directory): name another"),
        (["--out", str(tmp_path / "taken")], "report.json cannot be written (Is a directory): name another folder"),
        (["eval.rerank_top_k=-1"], "eval.rerank_top_k is -1, must be at least 1"),
    ):
        caplog.clear()
        monkeypatch.setattr("mvptr_ds.eval.evaluate_split", lambda *_: pytest.fail("it would have evaluated"))
        monkeypatch.setattr("sys.argv", ["eval.py", str(tmp_path / "model"), held_out, *arguments])
        assert entry.main() == 2
        (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert message in error


def test_a_report_that_cannot_be_written_after_all_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.json"
    path.write_text("of before", encoding="utf-8")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        _write_report(path, "{}\n")
    assert capsys.readouterr().out == "{}\n" and path.read_text(encoding="utf-8") == "of before"


def test_the_report_is_there_whatever_becomes_of_the_pictures(
    tmp_path: Path, planted: tuple[Index, Vocabs, Config], caplog: pytest.LogCaptureFixture
) -> None:
    index, vocabs, config = planted
    model = untrained(vocabs, visual_source="features", backbone_config=None)
    save_model_folder(tmp_path / "model", model, model.state_dict(), vocabs, config)
    metrics(tmp_path / "model" / "stage1", [{"step": 1, "loss/mlm": "much"}])
    (tmp_path / "out" / "pictures.png").mkdir(parents=True)
    report = evaluate(tmp_path / "model", [f"data.held_out={index.folder}"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
    said = [message for message in caplog.messages if "was not drawn" in message]
    assert [message.split(" was")[0] for message in said] == ["pictures.png", "curves.png"]
    assert "IsADirectoryError" in said[0] and "could not convert string to float" in said[1]
