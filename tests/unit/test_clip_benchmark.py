"""What CLIP_benchmark reads of shards, calls of a model and writes of scores.

Its own code is used where it is installed; elsewhere what stands here does the same in the same calls.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import sys
import tarfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mvptr_ds import eval as evaluation
from mvptr_ds.benchmarks import adapter
from mvptr_ds.benchmarks.results import retrieval_metrics
from mvptr_ds.benchmarks.webdataset_layout import write_classification, write_retrieval
from mvptr_ds.benchmarks.zero_shot import TEMPLATES
from mvptr_ds.checkpoints.model_folder import load_model_folder
from mvptr_ds.data.schema import Caption, Record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.errors import DataError
from mvptr_ds.evaluation.report import evaluate_split
from mvptr_ds.inference.loading import parse
from tests.support.tools import run_tool
from tests.support.untrained_folder import COLOURS, NOUNS, Untrained, untrained_folder

INSTALLED = importlib.util.find_spec("clip_benchmark") is not None
NUM, RANKS = 14, (1, 5, 10)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    return untrained_folder(tmp_path_factory.mktemp("image"), "image")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Pictures without regions, with one to three captions whose phrases are those of the parser."""
    texts = []
    for n in range(NUM):
        several = [
            f"A {COLOURS[n % 2]} {NOUNS[n % 4]} and {n} more",
            f"{n} trees beside\u2028a\tcar",
            f"\nSeen {n} times",
        ]
        texts.append(several[: 1 + n % 3])
    items = []
    for number, of_picture in enumerate(texts):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (50, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG" if number % 2 else "JPEG")
        label = {"kind": NOUNS[number % 4]}
        captions = tuple(Caption(t, tuple(p), label) for t, p in zip(of_picture, parse(of_picture), strict=True))
        members = {"png" if number % 2 else "jpg": file.getvalue()}
        items.append((f"{number:04d}", Record(str(number), 40, 50, captions), members))
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, items, 100)
    return ensure_index(folder)


# --- CLIP_benchmark 1.6.2, as far as it is called


def members_of(folder: Path, split: str = "test") -> Iterator[dict[str, bytes]]:
    """The samples of a webdataset folder: members of one key, in the order of the tars."""
    samples: dict[str, dict[str, bytes]] = {}
    for number in range(int((folder / split / "nshards.txt").read_text())):
        with tarfile.open(folder / split / f"{number}.tar") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    yield from samples.values()


def dataset(folder: Path, transform: Any) -> list[tuple[torch.Tensor, list[str]]]:
    """`build_wds_dataset` of a folder for retrieval."""
    if INSTALLED:
        builder = importlib.import_module("clip_benchmark.datasets.builder")
        return list(builder.build_wds_dataset("mine", transform, data_dir=str(folder)))
    assert (folder / "dataset_type.txt").read_text().strip().lower() == "retrieval"
    found = []
    for members in members_of(folder):
        content = next(members[one] for one in ("webp", "png", "jpg", "jpeg") if one in members)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        found.append((transform(image), members["txt"].decode().splitlines()))
    return found


def evaluate(model: Any, batches: Sequence[Any], tokenizer: Any, ranks: Sequence[int]) -> dict[str, float]:
    """`evaluate` of metrics/zeroshot_retrieval.py."""
    if INSTALLED:
        theirs = importlib.import_module("clip_benchmark.metrics.zeroshot_retrieval")
        found: dict[str, float] = theirs.evaluate(
            model, batches, tokenizer, "cpu", amp=False, recall_k_list=list(ranks)
        )
        return found
    images, texts, image_of = [], [], []
    for pixels, of_pictures in batches:
        tokens = tokenizer([text for one in of_pictures for text in one]).to("cpu")
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            images.append(F.normalize(model.encode_image(pixels.to("cpu")), dim=-1).cpu())
            texts.append(F.normalize(model.encode_text(tokens), dim=-1).cpu())
        first = sum(map(len, images[:-1]))
        image_of += [first + number for number, one in enumerate(of_pictures) for _ in one]
    scores = torch.cat(texts) @ torch.cat(images).T
    own = torch.zeros_like(scores, dtype=torch.bool)
    own[torch.arange(len(scores)), image_of] = True
    out = {}
    for k in ranks:
        for name, of, right in (("image", scores, own), ("text", scores.T, own.T)):
            hits = right.gather(1, of.topk(k, dim=1).indices).any(1)
            out[f"{name}_retrieval_recall@{k}"] = hits.float().mean().item()
    return out


# --- tests


def test_recalls_are_those_of_an_evaluation(untrained: Untrained, shards: Index, tmp_path: Path) -> None:
    written = write_retrieval(shards, tmp_path / "out", per_tar=5)
    assert written == (NUM, sum(1 + n % 3 for n in range(NUM)), 0)
    model, transform, tokenizer = adapter.load_mvptr(
        model_name="mvptr", pretrained=str(untrained.folder), cache_dir=None, device="cpu"
    )
    pairs = dataset(tmp_path / "out", transform)
    batches = [
        (torch.stack([image for image, _ in part]), [texts for _, texts in part])
        for part in (pairs[start : start + 4] for start in range(0, NUM, 4))
    ]
    found = evaluate(model.eval(), batches, tokenizer, RANKS)
    ours = evaluate_split(*load_model_folder(untrained.folder), shards, torch.device("cpu"))
    expected = retrieval_metrics(ours.report["retrieval"])
    assert set(found) == set(expected) and len(found) == 2 * len(RANKS)
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0 < found["text_retrieval_recall@1"] < 1 or 0 < found["text_retrieval_recall@5"] < 1


def test_the_layout_for_retrieval(shards: Index, tmp_path: Path) -> None:
    write_retrieval(shards, tmp_path / "one", split="valid", per_tar=5)
    assert sorted(path.name for path in (tmp_path / "one/valid").iterdir()) == [
        "0.tar", "1.tar", "2.tar", "nshards.txt"
    ]  # fmt: skip
    samples = list(members_of(tmp_path / "one", "valid"))
    assert [sorted(one) for one in samples[:2]] == [["jpg", "txt"], ["png", "txt"]]
    for number, members in enumerate(samples):
        _, theirs = shards.read(shards.place(number))
        assert all(members[kind] == theirs[kind] for kind in members if kind != "txt")
    assert samples[2]["txt"].decode().splitlines() == [
        f"A {COLOURS[0]} {NOUNS[2]} and 2 more", "2 trees beside a car", "Seen 2 times"
    ]  # fmt: skip
    write_retrieval(shards, tmp_path / "two", split="valid", per_tar=5)
    contents = [[path.read_bytes() for path in sorted((tmp_path / one).rglob("*.*"))] for one in ("one", "two")]
    assert contents[0] == contents[1]


def test_records_that_are_no_pairs_are_left_out(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    records = [("0", Record("0", 9, 9, (Caption("a dog"),)), {"png": file.getvalue()}),
               ("1", Record("1", 9, 9, ()), {"png": file.getvalue()}),
               ("2", Record("2", 0, 0, (Caption("a car"),)), {})]  # fmt: skip
    write_shards(tmp_path / "some", records, 9)
    assert write_retrieval(ensure_index(tmp_path / "some"), tmp_path / "out") == (1, 1, 2)
    write_shards(tmp_path / "none", records[1:], 9)
    with pytest.raises(DataError, match="no record has both a picture and captions"):
        write_retrieval(ensure_index(tmp_path / "none"), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_the_layout_for_classification(shards: Index, tmp_path: Path) -> None:
    names = tuple(reversed(NOUNS))
    write_classification(shards, tmp_path / "out", "kind", names, ["one {} of {}", "the {c}"])
    assert (tmp_path / "out/classnames.txt").read_text().split() == list(names)
    templates = (tmp_path / "out/zeroshot_classification_templates.txt").read_text().splitlines()
    assert templates == ["one {c} of {c}", "the {c}"]
    numbers = [int(one["cls"]) for one in members_of(tmp_path / "out")]
    assert numbers == [names.index(NOUNS[n % 4]) for n in range(NUM)]
    assert not (tmp_path / "out/dataset_type.txt").exists()


def test_the_calls_for_classification(untrained: Untrained) -> None:
    """`zero_shot_classifier` divides in place what `encode_text` returns."""
    model, transform, tokenizer = adapter.load_mvptr(pretrained=str(untrained.folder))
    with torch.no_grad():
        states_TD = model.encode_text(tokenizer([TEMPLATES[0].format("dog"), "a dog"]).to("cpu"))
        state_D = F.normalize(states_TD, dim=-1).mean(dim=0)
        state_D /= state_D.norm()
        states_TD /= 2
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 7), dtype=np.uint8))
    image = transform(picture)
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)
    assert model.encode_image(torch.stack([image, image])).shape == (2, 16)
    expected_1D = model.trained.embed_image(picture)
    torch.testing.assert_close(model.encode_image(image[None]), expected_1D, atol=1e-6, rtol=0)


def test_a_model_of_features_is_refused(tmp_path: Path) -> None:
    made = untrained_folder(tmp_path, "features")
    with pytest.raises(DataError, match="reads region features, and CLIP_benchmark gives pixels alone"):
        adapter.load_mvptr(pretrained=str(made.folder))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package with the names of clip_benchmark that the command uses; its `main` notes its arguments."""
    package, models, cli = (types.ModuleType(f"clip_benchmark{end}") for end in ("", ".models", ".cli"))
    models.TYPE2FUNC, models.MODEL_TYPES = {"open_clip": None}, ["open_clip"]  # type: ignore[attr-defined]
    cli.MODEL_TYPES = models.MODEL_TYPES  # type: ignore[attr-defined]
    cli.main = lambda: setattr(cli, "arguments", sys.argv[1:])  # type: ignore[attr-defined]
    package.models, package.cli = models, cli  # type: ignore[attr-defined]
    for module in (package, models, cli):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def test_the_command_runs_theirs_with_the_model_registered(installed: Any) -> None:
    done = run_tool("clip_benchmark_mvptr.py", "eval", "--pretrained", "runs/mine", "--num_workers", "2")
    assert done.returncode == 0, done.stderr
    assert installed.cli.arguments == [
        "eval", "--model_type", "mvptr", "--model", "mvptr", "--num_workers", "1",
        "--pretrained", "runs/mine", "--num_workers", "2",
    ]  # fmt: skip
    assert installed.models.TYPE2FUNC["mvptr"] is adapter.load_mvptr
    assert installed.cli.MODEL_TYPES == ["open_clip", "mvptr"]
    run_tool("clip_benchmark_mvptr.py", "build", "one.json")
    assert installed.cli.arguments == ["build", "one.json"] and installed.cli.MODEL_TYPES.count("mvptr") == 1

    def refuse() -> None:
        raise DataError("no model")

    installed.cli.main = refuse
    done = run_tool("clip_benchmark_mvptr.py", "eval")
    assert (done.returncode, done.stderr) == (1, "error: no model\n")


def test_the_command_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    done = run_tool("clip_benchmark_mvptr.py", "eval", "--pretrained", "runs/mine")
    assert done.returncode == 1
    assert done.stderr.startswith("error: clip_benchmark cannot be imported (") and "docs/benchmarks.md" in done.stderr


def test_the_command_writes_shards(shards: Index, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_tool("clip_benchmark_mvptr.py", "shards", shards.folder, out)
    assert (done.returncode, done.stdout) == (0, f"{out}: {NUM} pictures with 27 captions\n")
    done = run_tool("clip_benchmark_mvptr.py", "shards", shards.folder, out)
    assert (done.returncode, done.stderr) == (1, f"error: {out} holds something; name a new folder\n")
    done = run_tool("clip_benchmark_mvptr.py", "shards", shards.folder, tmp_path / "kinds", "--label", "kind")
    assert done.returncode == 0 and (tmp_path / "kinds/classnames.txt").read_text().split() == sorted(NOUNS)
    done = run_tool("clip_benchmark_mvptr.py", "shards", shards.folder, tmp_path / "x", "--templates", "t.txt")
    assert done.returncode == 2 and "need --label" in done.stderr


def test_an_evaluation_writes_their_json(untrained: Untrained, tmp_path: Path) -> None:
    file = tmp_path / "new" / "retrieval.json"
    report = evaluation.evaluate(untrained.folder, [], tmp_path / "out", file)
    written = json.loads(file.read_text())
    metrics = written.pop("metrics")
    assert written == {
        "dataset": untrained.config.data.held_out, "model": "mvptr", "pretrained": str(untrained.folder),
        "task": "zeroshot_retrieval", "language": "en",
    }  # fmt: skip
    assert list(metrics) == [f"{what}_retrieval_recall@{k}" for k in RANKS for what in ("image", "text")]
    assert metrics["image_retrieval_recall@1"] == report["retrieval"]["t2i_r1"]
    assert metrics["text_retrieval_recall@5"] == report["retrieval"]["i2t_r5"]
    with pytest.raises(ValueError, match="name another file with --clip-benchmark"):
        evaluation.evaluate(untrained.folder, [], tmp_path / "out", tmp_path)


def test_a_model_of_a_task_has_no_retrieval_to_write(
    untrained: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "TASKS", {"kinds": types.SimpleNamespace(name="kinds")})
    monkeypatch.setattr(evaluation, "head_settings", lambda path: {"task": "kinds"})
    with pytest.raises(ValueError, match="is a model of kinds, which has no scores of retrieval"):
        evaluation.evaluate(untrained.folder, [], tmp_path, tmp_path / "retrieval.json")
