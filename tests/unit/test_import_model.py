"""Published checkpoints as model folders: what is taken, how a run and an evaluation go on, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvptr_ds import eval as evaluation
from mvptr_ds.builders import build_model, build_vocabs
from mvptr_ds.checkpoints.model_folder import (
    head_settings,
    init_from_folder,
    load_model_folder,
    load_weights,
    save_model_folder,
)
from mvptr_ds.config import Config, RunConfig, load_config, override_config
from mvptr_ds.corpus.phrases.id2phrase import write_id2phrase
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.demo.build import word_subset
from mvptr_ds.exporting.published_folder import task_of
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.convert import to_reference
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.shard_folders import open_held_out
from mvptr_ds.tasks import TASKS
from tests.support.labelled_shards import write_labelled
from tests.support.published_states import DIM, NUM_ANSWERS, PUBLISHED, published_checkpoint
from tests.support.tools import run_tool

ANSWERS = [f"answer {number}" for number in range(NUM_ANSWERS)]
NOUNS = {("dog",): 3, ("dog", "brown"): 2, ("cat", "black"): 2}


@pytest.fixture(scope="module")
def vocabs(tmp_path_factory: pytest.TempPathFactory) -> Vocabs:
    """A small list of words, and phrases of which two own a row."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(word_subset(WordPiece(), ["a brown dog sleeps", "black cat"])) + "\n", encoding="utf-8")
    words = WordPiece(path)
    return Vocabs(words, PhraseVocab.build(NOUNS, words, 1))


def write_checkpoint(
    folder: Path, vocabs: Vocabs, kind: str, **changes: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Writes a published checkpoint with its lists, as safetensors for half of the kinds."""
    folder.mkdir(parents=True)
    state, config_json = published_checkpoint(kind, len(vocabs.words), vocabs.phrases.num_rows)
    state |= changes
    if kind in ("vqa", "referring"):
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config_json), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(vocabs.words.tokens) + "\n", encoding="utf-8")
    write_id2phrase(vocabs.phrases, folder / "id2phrase.json")
    if kind.startswith("vqa"):
        (folder / "answers.json").write_text(json.dumps(ANSWERS), encoding="utf-8")
    return state, config_json


def module_of(folder: Path, *overrides: str) -> tuple[TaskModule, Vocabs, Config]:
    """The module of a model folder with its weights, as eval.py makes it."""
    model, vocabs, config = load_model_folder(folder)
    config = override_config(config, overrides)
    module = TASKS[config.stage_names[-1]].build(config, model, 0)
    load_weights(module, folder)
    return module, vocabs, config


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_folder_comes_back_with_every_tensor(kind: str, vocabs: Vocabs, tmp_path: Path) -> None:
    state, config_json = write_checkpoint(tmp_path / "there", vocabs, kind)
    task = kind.split("-")[0]
    done = run_tool("import_model.py", tmp_path / "there", "--task", task, "--out", tmp_path / "here")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("taken: ") and f"phrases: 3 of {tmp_path / 'there/id2phrase.json'}" in lines
    fresh = {name for line in lines if line.startswith("fresh: ") for name in line.removeprefix("fresh: ").split(", ")}
    scale_and_pairs = set() if task == "retrieval" else {"logit_scale", "itm_head.weight", "itm_head.bias"}
    parts = ("bias", "dense.weight", "dense.bias", "norm.weight", "norm.bias")
    heads = {f"{head}.{part}" for head in ("token_head", "tag_head", "phrase_head") for part in parts}
    assert fresh == heads | scale_and_pairs

    back = run_tool("export_model.py", tmp_path / "here", tmp_path / "back", "--format", "published")
    assert back.returncode == 0, back.stderr
    again = torch.load(tmp_path / "back/pytorch_model.bin", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert json.loads((tmp_path / "back/config.json").read_text("utf-8")) == config_json
    for name in ("id2phrase.json", *(["answers.json"] if task == "vqa" else [])):
        assert json.loads((tmp_path / "back" / name).read_text("utf-8")) == json.loads(
            (tmp_path / "there" / name).read_text("utf-8")
        )


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_run_starts_from_it(kind: str, vocabs: Vocabs, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "there", vocabs, kind)
    task, out = kind.split("-")[0], tmp_path / "here"
    done = run_tool("import_model.py", tmp_path / "there", "--task", task, "--out", out)
    assert done.returncode == 0, done.stderr
    config = load_config(out / "mvptr.yaml")
    assert config.stage_names == [task] and config.data.max_text_slots == 16  # all positions that there are
    own = build_vocabs(config.data)
    module = TASKS[task].build(config, build_model(config, own), 1)
    assert init_from_folder(module, own, out, TASKS[task].fresh_weights) == []
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.model.state_dict().items())
    if module.head is not None:
        head = load_file(out / "head.safetensors")
        assert all(torch.equal(tensor, head[name]) for name, tensor in module.head.state_dict().items())


def test_the_configuration_is_that_of_the_published_script(vocabs: Vocabs, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "vqa", vocabs, "vqa")
    run_tool("import_model.py", tmp_path / "vqa", "--task", "vqa", "--out", tmp_path / "a")
    module, _, config = module_of(tmp_path / "a")
    assert (config.vqa.head, config.vqa.tags_in_text, config.vqa.crossing_tags_from) == ("words", True, 20)
    assert config.vqa.answers == str(tmp_path / "a/answers.json")
    assert head_settings(tmp_path / "a") == {"task": "vqa", "head": "words", "answers": ANSWERS}
    assert (config.data.max_regions, config.visual.feature_dim, config.model.dropout) == (50, 5, 0.1)
    write_checkpoint(tmp_path / "re", vocabs, "referring")
    run_tool("import_model.py", tmp_path / "re", "--task", "referring", "--out", tmp_path / "b")
    module, _, config = module_of(tmp_path / "b")
    assert module.head is None and head_settings(tmp_path / "b") == {
        "task": "referring", "score": "cosine", "cross_layers": 1,
    }  # fmt: skip
    run_tool(
        "import_model.py", tmp_path / "re", "--task", "referring", "--out", tmp_path / "c",
        "referring.score=region", "referring.cross_layers=null",
    )  # fmt: skip
    module, _, config = module_of(tmp_path / "c")
    assert module.head is not None and config.referring.cross_layers is None
    assert torch.equal(module.head.weight, load_file(tmp_path / "re/model.safetensors")["classifier.weight"])  # type: ignore[union-attr]


def test_labels_and_answers_keep_their_order(vocabs: Vocabs, tmp_path: Path) -> None:
    """A head that always says one class scores what share of the labels is of that class."""
    labels = [{"label": label} for label in ("neutral", "entailment", "neutral", "contradiction", "neutral")]
    shards = write_labelled(tmp_path / "statements", labels)
    nothing = torch.zeros(3, DIM)
    for number, share in enumerate((0.2, 0.6, 0.2)):  # contradiction, neutral, entailment
        bias = torch.zeros(3).index_fill(0, torch.tensor(number), 5.0)
        there, here = tmp_path / f"there{number}", tmp_path / f"here{number}"
        write_checkpoint(there, vocabs, "entailment", **{"classifier.weight": nothing, "classifier.bias": bias})
        run_tool("import_model.py", there, "--task", "entailment", "--out", here)
        assert score(here, "entailment", shards) == pytest.approx(share)
    answers = [{"question_id": n, "answers": {ANSWERS[4]: 0.6} if n else {ANSWERS[2]: 1.0}} for n in range(4)]
    shards = write_labelled(tmp_path / "questions", answers)
    changes = {
        "cls.predictions.decoder.weight": torch.zeros(NUM_ANSWERS, DIM),
        "cls.predictions.bias": torch.zeros(NUM_ANSWERS).index_fill(0, torch.tensor(4), 5.0),
    }
    write_checkpoint(tmp_path / "vqa", vocabs, "vqa", **changes)
    run_tool("import_model.py", tmp_path / "vqa", "--task", "vqa", "--out", tmp_path / "answering")
    assert score(tmp_path / "answering", "vqa", shards) == pytest.approx(3 * 0.6 / 4)


def score(folder: Path, task: str, shards: Path) -> float:
    """What eval.py and the task itself say of a folder."""
    assert evaluation.main([str(folder), f"data.held_out={shards}"]) == 0
    assert json.loads((folder / "report.json").read_text("utf-8"))["task"] == task
    module, vocabs, config = module_of(folder, f"data.held_out={shards}")
    index = open_held_out(config.data, folder / "joins")
    scores = TASKS[task].evaluate(module, vocabs, config, index, torch.device("cpu"))
    return scores[f"eval/{task}/score"]


def test_regions_are_chosen_by_the_published_score(vocabs: Vocabs, tmp_path: Path) -> None:
    """A layer on a region whose weights are zero likes all regions alike: the first is chosen."""
    boxes = [{"box": [0, 0, 8, 8]}, {"box": [0, 0, 8, 8]}, {"box": [1, 1, 4, 4]}, {"box": [0, 0, 8, 8]}]
    shards = write_labelled(tmp_path / "expressions", boxes)
    write_checkpoint(tmp_path / "re", vocabs, "referring", **{"classifier.weight": torch.zeros(1, DIM)})
    arguments = ("--task", "referring", "--out", tmp_path / "here", "referring.score=region")
    assert run_tool("import_model.py", tmp_path / "re", *arguments).returncode == 0
    assert score(tmp_path / "here", "referring", shards) == 0.75


def test_pre_training_is_imported_with_the_head_that_it_carries(vocabs: Vocabs, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "there", vocabs, "retrieval")
    run_tool("import_model.py", tmp_path / "there", "--task", "retrieval", "--out", tmp_path / "like")
    config = MvptrConfig.from_pretrained(tmp_path / "like")
    assert isinstance(config, MvptrConfig)
    config.num_phrases, config.num_answers, config.region_norm = 0, 4, False
    torch.manual_seed(0)
    state = to_reference(Mvptr(config), config)
    folder = tmp_path / "base"
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    content = json.loads((tmp_path / "there/config.json").read_text("utf-8")) | {"use_img_layernorm": 0}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("vocab.txt", "id2phrase.json"):
        (folder / name).write_bytes((tmp_path / "there" / name).read_bytes())
    done = run_tool("import_model.py", folder, "--task", "pretraining", "--out", tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("fresh")] == [
        "fresh: phrase_head.bias, phrase_head.dense.weight, phrase_head.dense.bias, phrase_head.norm.weight, "
        "phrase_head.norm.bias"
    ]
    trained = load_config(tmp_path / "here/mvptr.yaml")
    own = build_vocabs(trained.data)
    module = TASKS["entailment"].build(trained, build_model(trained, own), 1)
    started = init_from_folder(module, own, tmp_path / "here", TASKS["entailment"].fresh_weights)
    assert started == ["head.weight", "head.bias"]
    back = run_tool("export_model.py", tmp_path / "here", tmp_path / "back", "--format", "published")
    assert back.returncode == 0, back.stderr
    again = torch.load(tmp_path / "back/pytorch_model.bin", weights_only=True)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_without_the_list_of_phrases_their_rows_are_left_out(vocabs: Vocabs, tmp_path: Path) -> None:
    state, _ = write_checkpoint(tmp_path / "there", vocabs, "entailment")
    (tmp_path / "there/id2phrase.json").unlink()
    done = run_tool("import_model.py", tmp_path / "there", "--task", "entailment", "--out", tmp_path / "here")
    assert done.returncode == 0 and "left out: 2 rows of phrases; give --id2phrase to keep them\n" in done.stdout
    table = load_file(tmp_path / "here/model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(table, state["bert.embeddings.word_embeddings.weight"][: len(vocabs.words)])


# --- what is refused


class Code:
    """Would run when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def refused(tmp_path: Path, *arguments: object) -> str:
    done = run_tool("import_model.py", tmp_path / "there", "--out", tmp_path / "here", *arguments)
    assert done.returncode == 1 and not (tmp_path / "here").exists(), done.stdout
    assert done.stderr.startswith("error: ")
    return done.stderr


def test_a_folder_without_weights_is_refused(vocabs: Vocabs, tmp_path: Path) -> None:
    there, task = tmp_path / "there", ("--task", "entailment")
    there.mkdir()
    assert f"cannot read {there / 'config.json'}: No such file or directory" in refused(tmp_path, *task)
    (there / "config.json").write_text("{}", encoding="utf-8")
    assert "holds neither pytorch_model.bin nor model.safetensors" in refused(tmp_path, *task)
    torch.save({"a": Code()}, there / "pytorch_model.bin")
    assert "pytorch_model.bin holds no weights that can be read safely" in refused(tmp_path, *task)
    torch.save({"step": 3, "weights": {}}, there / "pytorch_model.bin")
    assert "pytorch_model.bin holds more than weights (step, weights)" in refused(tmp_path, *task)
    torch.save({"weight": torch.zeros(2)}, there / "pytorch_model.bin")
    assert "this is no checkpoint of the published code: num_hidden_layers, only_word_size" in refused(tmp_path, *task)
    (there / "model.safetensors").write_bytes(b"nothing")
    assert "model.safetensors holds no weights that can be read safely" in refused(tmp_path, *task)


def test_lists_of_other_lengths_are_refused(vocabs: Vocabs, tmp_path: Path) -> None:
    there = tmp_path / "there"
    task: tuple[str, ...] = ("--task", "vqa")
    write_checkpoint(there, vocabs, "vqa")
    (there / "answers.json").write_text('["a", "b"]', encoding="utf-8")
    assert "decoder has shape (7, 8) there, (2, 8) here; vqa.answers must list" in refused(tmp_path, *task)
    (there / "answers.json").unlink()
    assert "give --answers FILE, which build_answers.py --from-pickle makes" in refused(tmp_path, *task)
    (tmp_path / "mine.json").write_text(json.dumps(ANSWERS), encoding="utf-8")
    task = (*task, "--answers", str(tmp_path / "mine.json"))
    (there / "id2phrase.json").write_text(json.dumps({"3": [vocabs.words.tokens[3]]}), encoding="utf-8")
    rows = vocabs.phrases.num_rows
    assert f"but the checkpoint has {rows} rows: give the list that it was trained with" in refused(tmp_path, *task)
    (there / "vocab.txt").unlink()
    said = refused(tmp_path, *task)
    assert f"has {len(vocabs.words)} rows of words, but " in said and "has 30522: put the vocab.txt" in said


def test_what_the_published_models_do_not_compute_is_refused(vocabs: Vocabs, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "there", vocabs, "referring")
    said = refused(tmp_path, "--task", "referring", "referring.score=product")
    assert "referring.score is 'product': published models score by cosine, dot or region" in said
    said = refused(tmp_path, "--task", "entailment")
    assert "classifier.weight has shape (1, 8), expected (3, 8)" in said
    (tmp_path / "here").mkdir()
    (tmp_path / "here/mine").touch()
    done = run_tool("import_model.py", tmp_path / "there", "--out", tmp_path / "here", "--task", "referring")
    assert done.returncode == 1 and "here holds something already; name a new folder" in done.stderr
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["mine"]


def test_a_score_of_our_own_is_not_exported(vocabs: Vocabs, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "there", vocabs, "referring")
    run_tool("import_model.py", tmp_path / "there", "--task", "referring", "--out", tmp_path / "here")
    model, own, config = load_model_folder(tmp_path / "here")
    config = override_config(config, ["referring.score=product"])
    module = TASKS["referring"].build(config, model, 0)
    assert module.head is not None
    weights = {**model.state_dict(), **{f"head.{name}": t for name, t in module.head.state_dict().items()}}
    save_model_folder(tmp_path / "ours", model, weights, own, config, module.head_settings)
    done = run_tool("export_model.py", tmp_path / "ours", tmp_path / "back", "--format", "published")
    assert done.returncode == 1 and not (tmp_path / "back").exists()
    assert done.stderr == "error: referring.score is 'product': the published code scores by cosine, dot or region\n"


@pytest.mark.parametrize(
    ("folder", "stages", "task"),
    [
        ("run/retrieval/checkpoints/step-00000009/model", ["2", "retrieval"], "retrieval"),
        ("run/stage2/checkpoints/step-00000009/model", ["2", "retrieval"], None),
        ("models/mine", ["2", "retrieval"], "retrieval"),
        ("models/mine", ["retrieval", "2"], None),
    ],
)
def test_retrieval_is_known_by_its_stage(folder: str, stages: list[str], task: str | None, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    assert task_of(tmp_path / folder, Config(run=RunConfig(stages=stages))) == task
    (tmp_path / folder / "task.json").write_text('{"task": "vqa"}', encoding="utf-8")
    assert task_of(tmp_path / folder, Config(run=RunConfig(stages=stages))) == "vqa"
    (tmp_path / folder / "task.json").write_text('{"task": "pretraining"}', encoding="utf-8")
    assert task_of(tmp_path / folder, Config(run=RunConfig(stages=stages))) == task
