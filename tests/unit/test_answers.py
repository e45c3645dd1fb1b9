"""A fine-tuned model by itself: it answers with the numbers of its task's own evaluation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import mvptr_ds
from mvptr_ds.checkpoints.model_folder import head_settings, load_model_folder, load_weights
from mvptr_ds.data.loader import eval_batches
from mvptr_ds.errors import CheckpointError, DataError
from mvptr_ds.evaluation.encode import evaluating
from mvptr_ds.exporting.exported_folder import export_model
from mvptr_ds.inference import TrainedModel
from mvptr_ds.tasks import TASKS
from mvptr_ds.tasks.downstream import Downstream, Prediction
from mvptr_ds.tasks.pair_module import PairModule
from tests.conftest import REPO
from tests.support.finetuned_folder import ANSWERS, finetuned_folder
from tests.support.untrained_folder import Untrained, untrained_folder
from tests.unit.test_inference import ALONE, contents

CLASSES = ["contradiction", "neutral", "entailment"]


@pytest.fixture(scope="module", params=["image", "features"])
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    return untrained_folder(tmp_path_factory.mktemp(request.param), request.param)


def evaluated(made: Untrained, folder: Path, overrides: Sequence[str] = ()) -> tuple[list[Prediction], list[Tensor]]:
    """The predictions of the task's own evaluation of a model folder, and the logits of each sample."""
    model, vocabs, config = load_model_folder(folder)
    settings = head_settings(folder)
    task = TASKS[settings["task"]]
    assert isinstance(task, Downstream)
    module = task.build_from(settings, config, model)
    load_weights(module, folder)
    assert isinstance(module, PairModule)
    samples, logits = task.samples(config, vocabs, made.index), []
    with evaluating(module):
        for batch in eval_batches(made.index, samples, 3):
            rows = module.logits(module.outputs(batch))
            logits += [row[: batch.region_lengths[n]] for n, row in enumerate(rows)] if rows.isinf().any() else [*rows]
    return list(task.predictions(module, made.index, samples, config)), logits


def close(found: Sequence[float], wanted: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["vqa.head=words"],
        ["vqa.head=linear"],
        ["vqa.head=words", "vqa.tags_in_text=true", "vqa.crossing_tags_from=3"],
    ],
)
def test_answers_are_those_of_the_evaluation(untrained: Untrained, overrides: list[str], tmp_path: Path) -> None:
    folder = finetuned_folder(untrained, "vqa", tmp_path / "vqa", overrides)
    predictions, logits = evaluated(untrained, folder)
    model, (pictures, texts, phrases) = mvptr_ds.load(folder, device="cpu"), contents(untrained)
    model.batch_size = 5
    found = model.ask(pictures, texts, k=4, phrases=phrases)
    assert len(found) == len(predictions) == len(texts)
    assert torch.stack(logits).std(0).min() > 1e-3  # the samples differ by more than rounding
    for answers, prediction, logits_A in zip(found, predictions, logits, strict=True):
        assert len(answers) == 4 and answers[0].answer == prediction.answer
        order = logits_A.argsort(descending=True)[:4]
        assert [answer for answer, _ in answers] == [ANSWERS[n] for n in order.tolist()]
        close([chance for _, chance in answers], torch.sigmoid(logits_A[order]))
    assert len(model.ask(pictures[0], texts[0], k=99)) == len(ANSWERS)


def test_the_tags_behind_a_question_are_read(untrained: Untrained, tmp_path: Path) -> None:
    picture, text = contents(untrained)[0][0], "What is left of it?"
    for name, overrides, same in (("without", [], True), ("with", ["vqa.tags_in_text=true"], False)):
        model = mvptr_ds.load(finetuned_folder(untrained, "vqa", tmp_path / name, overrides), device="cpu")
        (caption,) = model.samples.captions([text], [[]])
        seen = model.samples.see(picture, 0, 1)
        ids = model.samples.of_pair(caption, seen).text_ids_T.tolist()
        pieces = [piece for tag in picture.tags or () for piece in model.vocabs.words.encode(tag)[0]]
        plain = model.samples.of_text(caption).text_ids_T.tolist()
        assert ids == (plain if same else plain + pieces) and pieces


def test_entailment_is_that_of_the_evaluation(untrained: Untrained, tmp_path: Path) -> None:
    folder = finetuned_folder(untrained, "entailment", tmp_path / "entailment")
    predictions, _ = evaluated(untrained, folder)
    model, (pictures, texts, phrases) = mvptr_ds.load(folder, device="cpu"), contents(untrained)
    found = model.entails(pictures, texts, phrases)
    for chances, prediction in zip(found, predictions, strict=True):
        assert isinstance(chances, dict) and list(chances) == CLASSES
        assert max(chances, key=chances.__getitem__) == prediction.answer
        close([*chances.values()], torch.tensor([prediction.written["probabilities"][name] for name in CLASSES]))
        assert sum(chances.values()) == pytest.approx(1)


@pytest.mark.parametrize("score", ["product", "cosine", "dot", "region"])
def test_regions_are_those_of_the_evaluation(untrained: Untrained, score: str, tmp_path: Path) -> None:
    overrides = [f"referring.score={score}", "referring.cross_layers=1"]
    folder = finetuned_folder(untrained, "referring", tmp_path / "referring", overrides)
    assert (folder / "head.safetensors").exists() == (score in ("product", "region"))
    predictions, logits = evaluated(untrained, folder)
    model, (pictures, texts, phrases) = mvptr_ds.load(folder, device="cpu"), contents(untrained)
    found = model.find(pictures, texts, k=2, phrases=phrases)
    for number, (regions, prediction, logits_R) in enumerate(zip(found, predictions, logits, strict=True)):
        scores_R = {"product": logits_R.softmax(-1), "cosine": logits_R}.get(score, logits_R.sigmoid())
        order = scores_R.argsort(descending=True)[:2].tolist()
        assert [region.box for region in regions] == [pictures[number].boxes[n] for n in order]
        assert list(regions[0].box) == prediction.written["box"]
        close([value for _, value in regions], scores_R[order])
        assert regions[0].score == pytest.approx(prediction.written["score"], abs=1e-6)
    assert len(model.find(pictures[2], texts[2], k=99)) == len(pictures[2].boxes)


def test_a_lone_pair_gives_one_result_and_a_list_a_list(untrained: Untrained, tmp_path: Path) -> None:
    model = mvptr_ds.load(finetuned_folder(untrained, "entailment", tmp_path / "model"), device="cpu")
    pictures, texts, phrases = contents(untrained)
    (first, second), (picture, other) = texts[:2], pictures[:2]
    alone = model.entails(picture, first, phrases[0])
    assert isinstance(alone, dict)
    for one in (
        model.entails([picture], first, phrases[0]),
        model.entails(picture, [first], phrases[:1]),
        model.entails([picture], [first], phrases[:1]),
    ):
        assert isinstance(one, list) and len(one) == 1
        close([*one[0].values()], torch.tensor([*alone.values()]))
    apart = [model.entails(p, t, f) for p, t, f in ((picture, first, phrases[0]), (picture, second, phrases[1]))]
    together = model.entails(picture, [first, second], phrases[:2])
    for one, wanted in zip(together, apart, strict=True):
        close([*one.values()], torch.tensor([*wanted.values()]))
    apart = [model.entails(p, first, phrases[0]) for p in (picture, other)]
    for one, wanted in zip(model.entails([picture, other], first, phrases[0]), apart, strict=True):
        close([*one.values()], torch.tensor([*wanted.values()]))
    with pytest.raises(DataError, match="2 pictures and 3 texts: give as many, or one of either"):
        model.entails([picture, other], ["a", "b", "c"])
    with pytest.raises(DataError, match="there is no picture"):
        model.entails([], "a dog")
    with pytest.raises(DataError, match=r"picture 1 of 2: nowhere\.png cannot be read"):
        model.entails([picture, "nowhere.png"], "a dog")
    text = "A red dog stands beside a car."
    by_parser, given = (model.entails(picture, text, said) for said in (None, [("dog",), ("car",), ("dog", "red")]))
    assert isinstance(by_parser, dict) and isinstance(given, dict)
    close([*by_parser.values()], torch.tensor([*given.values()]))


def test_one_picture_with_many_texts_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = untrained_folder(tmp_path, "image")
    model = mvptr_ds.load(finetuned_folder(made, "referring", tmp_path / "tuned"), device="cpu")
    model.batch_size, asked = 2, []
    see = model.samples.see

    def counted(*given: Any) -> Any:
        asked.append(given[1])
        return see(*given)

    monkeypatch.setattr(model.samples, "see", counted)
    image = Image.new("RGB", (60, 40), "grey")
    found = model.find(image, ["a dog", "a car", "a tree", "a cat", "it"])
    assert len(found) == 5 and asked == [0]
    # without boxes: cells of a grid of three a side, in pixels, whose probabilities add up to 1
    assert found[0][0].box[2] - found[0][0].box[0] == pytest.approx(20)
    everything = model.find(image, "a dog", k=9)
    assert sum(score for _, score in everything) == pytest.approx(1)


def test_a_model_of_another_task_says_what_fits(untrained: Untrained, tmp_path: Path) -> None:
    picture = contents(untrained)[0][0]
    plain = mvptr_ds.load(untrained.folder, device="cpu")
    with pytest.raises(DataError, match=r"ask\(\) needs a model that was fine-tuned for vqa, and this one has no head"):
        plain.ask(picture, "Is it red?")
    made = {task: finetuned_folder(untrained, task, tmp_path / task) for task in ("vqa", "entailment", "referring")}
    models = {task: mvptr_ds.load(folder, device="cpu") for task, folder in made.items()}
    with pytest.raises(DataError, match=r"entails\(\) needs .* for entailment, and this one .* for vqa: use ask\(\)"):
        models["vqa"].entails(picture, "a dog")
    with pytest.raises(DataError, match=r"find\(\) .* for referring, and this one .* for entailment: use entails\(\)"):
        models["entailment"].find(picture, "a dog")
    with pytest.raises(DataError, match=r"ask\(\) needs .* for vqa, and this one .* for referring: use find\(\)"):
        models["referring"].ask(picture, "Is it red?")
    # what every model can do, it does
    assert models["vqa"].embed_text("a dog").shape == (1, 16)
    close(models["vqa"].match(picture, "a dog").tolist(), plain.match(picture, "a dog"))


def test_half_precision_takes_the_head_along(untrained: Untrained, tmp_path: Path) -> None:
    folder = finetuned_folder(untrained, "entailment", tmp_path / "model")
    model = mvptr_ds.load(folder, device="cpu", dtype=torch.bfloat16)
    assert model.finetuned is not None and model.finetuned.module.head is not None
    assert {p.dtype for p in model.finetuned.module.parameters()} == {torch.bfloat16}
    picture, text = contents(untrained)[0][0], contents(untrained)[1][0]
    chances = model.entails(picture, text)
    assert isinstance(chances, dict) and sum(chances.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("task", ["vqa", "referring"])
def test_an_exported_folder_answers_alike(untrained: Untrained, task: str, tmp_path: Path) -> None:
    folder = finetuned_folder(untrained, task, tmp_path / "tuned", ["referring.score=dot"])
    export_model(folder, tmp_path / "exported")
    first, second = (mvptr_ds.load(path, device="cpu") for path in (folder, tmp_path / "exported"))
    pictures, texts, phrases = contents(untrained)

    def answer(model: TrainedModel) -> list[Any]:
        return list((model.ask if task == "vqa" else model.find)(pictures, texts, 3, phrases))

    assert answer(first) == answer(second)
    place = str(tmp_path).encode()
    assert [file.name for file in (tmp_path / "exported").iterdir() if place in file.read_bytes()] == []


def test_the_card_names_the_task_its_score_and_its_use(untrained: Untrained, tmp_path: Path) -> None:
    folder, run = finetuned_folder(untrained, "vqa", tmp_path / "tuned"), tmp_path / "run"
    run.mkdir()
    scores = {"eval/vqa/score": 0.5, "eval/vqa/kind/number": 0.125, "eval/entailment/score": 0.9}
    (run / "report.json").write_text(json.dumps({"task": "vqa", "scores": scores}), encoding="utf-8")
    export_model(folder, tmp_path / "exported", run)
    card = (tmp_path / "exported/README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: visual-question-answering\n" in card and "  - visual-question-answering\n" in card
    assert "It was fine-tuned for visual question answering. It chooses from 7 answers." in card
    assert "| vqa score | 50.0 % |\n| vqa score, kind number | 12.5 % |\n" in card and "90.0" not in card
    (call,) = re.findall(r"^model\.ask.*$", card, re.MULTILINE)
    model = mvptr_ds.load(tmp_path / "exported", device="cpu")
    picture = contents(untrained)[0][0]
    found = eval(call.replace('"street.png"', "picture"), {"model": model, "picture": picture})
    assert found == model.ask(picture, "what is left of the car?")


def test_asking_needs_nothing_of_training(untrained: Untrained, tmp_path: Path) -> None:
    folder = finetuned_folder(untrained, "entailment", tmp_path / "model")
    given = "Picture(None, [(0, 0, 40, 30)], ['dog'], np.zeros((1, 5)), (60, 40))"
    if untrained.config.visual.source == "image":
        given = "np.zeros((40, 60, 3), dtype=np.uint8)"
    asks = f"import numpy as np\nfrom mvptr_ds import Picture\nprint([*model.entails({given}, 'A red dog.')])\n"
    command = [sys.executable, "-c", ALONE + asks, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO)
    assert done.returncode == 0 and done.stdout == f"(1, 16)\n{CLASSES}\n", done.stderr[-2000:]


def test_a_folder_whose_settings_are_damaged_is_refused(untrained: Untrained, tmp_path: Path) -> None:
    folder = finetuned_folder(untrained, "vqa", tmp_path / "model")
    settings = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    for answers, message in (
        (None, "task.json of the model holds no list of answers; take the folder as the run wrote it"),
        (["dog", "dog"], "task.json of the model names 'dog' twice"),
    ):
        (folder / "task.json").write_text(json.dumps({**settings, "answers": answers}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=re.escape(message)):
            mvptr_ds.load(folder, device="cpu")
    (folder / "task.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds the own weights of none"):
        mvptr_ds.load(folder, device="cpu")
