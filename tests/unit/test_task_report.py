"""The report of a fine-tuned model, trained for seconds and evaluated by eval.py: scores, guesses, predictions."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvptr_ds import eval as evaluation
from mvptr_ds.data.schema import Caption, Record, Region
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.demo.build import word_subset
from mvptr_ds.tasks.report import task_table
from tests.conftest import REPO
from tests.support.labelled_shards import FEATURES, small_run

KINDS = ("cat", "dog")
NUM_TRAIN, NUM_HELD_OUT = 48, 24


def write_scenes(folder: Path, task: str, num: int, seed: int) -> Path:
    """Scenes that are red or blue, of a dog and a larger cat of the two colours; the texts alone tell nothing."""
    rng = np.random.default_rng(seed)

    def items() -> Iterator[tuple[str, Record, dict[str, bytes]]]:
        for number in range(num):
            is_red = number % 2 == 0
            boxes = [(0.0, 0.0, 40.0, 40.0), (50.0, 50.0, 98.0, 98.0)]  # of the dog, and of the cat, which is larger
            regions = tuple(Region(box, noun) for box, noun in zip(boxes, ("dog", "cat"), strict=True))
            looks = rng.normal(size=(2, FEATURES)) * 0.1
            if task == "referring":
                looks[0, 0 if is_red else 1] = looks[1, 1 if is_red else 0] = 3
            else:
                looks[:, 0 if is_red else 1] = 3
            features = io.BytesIO()
            np.save(features, looks.astype(np.float16))
            record = Record(f"{number:04d}", 100, 100, tuple(captions_of(task, number, is_red, boxes)), regions)
            yield f"{number:04d}", record, {"npy": features.getvalue()}

    write_shards(folder, items(), 100)
    return folder


def captions_of(task: str, number: int, is_red: bool, boxes: list[Any]) -> Iterator[Caption]:
    for place, kind in enumerate(KINDS):
        key = 10 * number + place
        if task == "vqa":
            labels: dict[str, Any] = {"question_id": key, "answers": {"red" if is_red else "blue": 1.0}, "kind": kind}
            yield Caption(f"what colour is the {kind}?", (), labels)
        elif task == "entailment":
            label = "entailment" if is_red else "contradiction"
            yield Caption(f"the {kind} is red", (), {"label": label, "pair_id": str(key), "kind": kind})
        else:
            colour = ("red", "blue")[place]
            is_dog = (colour == "red") == is_red
            yield Caption(f"the {colour} animal", (), {"box": list(boxes[0 if is_dog else 1]), "id": key})


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of three tasks, each with its report."""
    root = tmp_path_factory.mktemp("tasks")
    answers = root / "answers.json"
    answers.write_text('["red", "blue", "green"]', encoding="utf-8")
    words = root / "vocab.txt"  # a small one: the table of BERT's would take most of the time
    texts = ["what colour is the dog?", "the cat is red", "the blue animal"]
    words.write_text("\n".join(word_subset(WordPiece(), texts)) + "\n", encoding="utf-8")
    out = {}
    for task in ("vqa", "entailment", "referring"):
        shards = write_scenes(root / task / "train", task, NUM_TRAIN, 0)
        held_out = write_scenes(root / task / "held_out", task, NUM_HELD_OUT, 1)
        run = root / "runs" / task
        overrides = [
            *small_run(shards), f"data.held_out={held_out}", f"run.dir={run}", f"run.stages=[{task}]",
            f"data.word_vocab={words}", "run.init_from=null", f"{task}.max_steps=80", f"{task}.learning_rate=3e-3",
            f"vqa.answers={answers}",
            "train.batch_size=32", "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=32",
            "model.initializer_range=0.1", "train.log_every_steps=20",
        ]  # fmt: skip
        command = [sys.executable, "mvptr_ds/train.py", "--config", "demo", *overrides]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert evaluation.main([str(run)]) == 0
        out[task] = run
    return out


def read(run: Path, name: str = "report.json") -> Any:
    return json.loads((run / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", ["vqa", "entailment", "referring"])
def test_scores_stand_beside_what_guesses_and_blind_models_earn(reports: dict[str, Path], task: str) -> None:
    report = read(reports[task])
    assert (report["task"], report["n"], report["num_samples"]) == (task, 2 * NUM_HELD_OUT, 2 * NUM_HELD_OUT)
    assert report["score"] > 0.9, "it has not learnt what it is to be compared with"
    blind = report["blind"]
    if task == "referring":
        assert (blind["any_box"]["score"], blind["largest_box"]["score"]) == (0.5, 0.5)
        assert report["upper_bound"] == 1.0 and "majority" not in blind
    else:
        assert blind["majority"]["score"] == pytest.approx(0.5, abs=0.01)
        assert blind["text_alone"]["score"] == pytest.approx(0.5, abs=0.01)
        assert set(report["by_kind"]) == set(KINDS)
        assert sum(part["n"] for part in report["by_kind"].values()) == report["n"]
        assert sum(report["answers_given"].values()) == pytest.approx(1.0)
    assert blind["without_tags"]["score"] > 0.9
    # every second picture is the other way round, and half of the exchanged ones fall on a like one by chance
    assert blind["permuted_pictures"]["score"] < 0.8 and blind["tags_alone"]["score"] < 0.8


def test_predictions_have_the_public_formats(reports: dict[str, Path]) -> None:
    written = read(reports["vqa"], "predictions.json")
    assert [set(line) for line in written] == [{"question_id", "answer"}] * 48
    assert [line["question_id"] for line in written] == [10 * n + c for n in range(NUM_HELD_OUT) for c in (0, 1)]
    right = Counter(line["answer"] for line in written)
    assert right == {"red": 24, "blue": 24}
    statement = read(reports["entailment"], "predictions.json")[1]
    assert statement["pairID"] == "1" and set(statement["probabilities"]) == {"contradiction", "neutral", "entailment"}
    assert sum(statement["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    assert statement["prediction"] == max(statement["probabilities"], key=statement["probabilities"].__getitem__)
    expression = read(reports["referring"], "predictions.json")[0]
    assert expression["id"] == 0 and expression["box"] in ([0, 0, 40, 40], [50, 50, 98, 98])


def test_details_of_each_task(reports: dict[str, Path]) -> None:
    report = read(reports["entailment"])
    confusion = report["confusion"]
    assert sum(confusion["entailment"].values()) == NUM_HELD_OUT == sum(confusion["contradiction"].values())
    assert sum(confusion["neutral"].values()) == 0
    right = confusion["entailment"]["entailment"] + confusion["contradiction"]["contradiction"]
    assert right / report["n"] == pytest.approx(report["score"])
    assert read(reports["vqa"])["answerable"] == 1.0 and read(reports["vqa"])["num_answers"] == 3


def test_the_table(reports: dict[str, Path]) -> None:
    lines = task_table(read(reports["vqa"])).splitlines()
    assert lines[0] == "held out: 48 samples; shares in %"
    assert lines[2].split() == ["VQA", "all", "cat", "dog"] and lines[3].split() == ["samples", "48", "24", "24"]
    assert [line.split("  ")[0] for line in lines[4:-2]] == [
        "the model", "majority", "text alone", "permuted pictures", "without tags", "tags alone",
    ]  # fmt: skip
    assert lines[-2:] == ["", "answerable   100.0"]


def test_the_table_shows_what_detections_are_asked_for() -> None:
    shares = {"upper_bound": 0.75, "best_region": 0.5, "weighted_regions": 0.25, "num_without_boxes": 1}
    report = {"task": "referring", "n": 4, "score": 0.5, "by_kind": {}, "blind": {}, "upper_bound": 1.0}
    assert task_table({**report, "by_detections": shares}).splitlines()[-5:] == [
        "",
        "upper bound                       100.0",
        "by detections: upper bound         75.0",
        "by detections: best region         50.0",
        "by detections: weighted regions    25.0",
    ]


def test_controls_can_be_left_out(reports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(reports["vqa"]), "--out", str(tmp_path), "eval.controls=[tags_alone]", "eval.num_pictures=0"]
    assert evaluation.main(arguments) == 0
    assert f"written: {tmp_path / 'report.json'}, and predictions.json beside it" in capsys.readouterr().out
    report = read(tmp_path)
    assert list(report["blind"]) == ["tags_alone"] and report["score"] == read(reports["vqa"])["score"]
    assert not (tmp_path / "answers.png").exists() and (reports["vqa"] / "answers.png").exists()


def test_tags_can_be_withheld_from_everything(reports: dict[str, Path], tmp_path: Path) -> None:
    run = reports["entailment"]
    arguments = ["eval.withhold_tags=true", "eval.controls=[permuted_pictures]", "eval.num_pictures=0"]
    assert evaluation.main([str(run), "--out", str(tmp_path), *arguments]) == 0
    assert read(tmp_path)["by_kind"] == read(run)["blind"]["without_tags"]["by_kind"]
    bare, given = read(tmp_path, "predictions.json"), read(run, "predictions.json")
    assert [line["probabilities"] for line in bare] != [line["probabilities"] for line in given]


def test_by_detector_boxes(reports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = {f"{number:04d}": [[0, 0, 41, 39], [52, 50, 46, 48]] for number in range(NUM_HELD_OUT - 6)}
    file = tmp_path / "detections.json"
    file.write_text(json.dumps(boxes), encoding="utf-8")
    out = tmp_path / "out"
    assert evaluation.main([str(reports["referring"]), "--out", str(out), f"referring.detections={file}"]) == 0
    found, own = read(out)["by_detections"], read(reports["referring"])
    assert found["num_without_boxes"] == 12 and found["upper_bound"] == 0.75
    assert found["best_region"] == pytest.approx(0.75, abs=0.1) and own["score"] > 0.9


def test_what_is_asked_for_in_vain_is_said_before_the_evaluation(
    reports: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone, out = tmp_path / "gone.json", tmp_path / "out"
    for task, arguments, said in (
        ("vqa", ["--questions", str(gone)], "gone.json"),
        ("entailment", ["--questions", str(gone)], "is a model of entailment, which answers no questions of VQA"),
        ("referring", [f"referring.detections={gone}"], "gone.json"),
    ):
        assert evaluation.main([str(reports[task]), "--out", str(out), *arguments]) == 2
        assert said in caplog.text and not (out / "report.json").exists()
        caplog.clear()


def test_all_sources_of_a_mixture_tell_what_texts_alone_say(
    reports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = reports["vqa"].parents[1] / "vqa/train"
    source = f"{{shards: {shards}, weight: 1}}"
    arguments = [str(reports["vqa"]), "--out", str(tmp_path), "eval.controls=[texts]", "eval.num_pictures=0"]
    mixture = ["data.train=null", f"data.sources={{one: {source}, two: {source}}}"]
    assert evaluation.main([*arguments, *mixture]) == 0
    own = read(reports["vqa"])["blind"]
    assert read(tmp_path)["blind"] == {row: own[row] for row in ("majority", "text_alone")}


def test_a_split_without_answers_gives_predictions_alone(
    reports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unlabelled() -> Iterator[tuple[str, Record, dict[str, bytes]]]:
        features = io.BytesIO()
        np.save(features, np.zeros((1, FEATURES), dtype=np.float16))
        for number in range(3):
            captions = (Caption("what colour is the dog?", (), {"question_id": number}),)
            yield (
                str(number),
                Record(str(number), 9, 9, captions, (Region((0, 0, 9, 9), "dog"),)),
                {"npy": features.getvalue()},
            )

    write_shards(tmp_path / "test", unlabelled(), 10)
    questions = tmp_path / "questions.json"
    arguments = [str(reports["vqa"]), "--out", str(tmp_path / "out"), f"data.held_out={tmp_path / 'test'}"]
    questions.write_text(json.dumps({"questions": [{"question_id": number} for number in range(4)]}), encoding="utf-8")
    assert evaluation.main([*arguments, "--questions", str(questions)]) == 2
    assert not (tmp_path / "out/predictions.json").exists()
    assert evaluation.main(arguments) == 0
    assert [line["question_id"] for line in read(tmp_path / "out", "predictions.json")] == [0, 1, 2]
    assert (
        "score" not in read(tmp_path / "out") and "3 predictions; the split has no answers" in capsys.readouterr().out
    )
