"""An exported folder: transformers loads it where the package is not installed, and the package where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

import mvptr_ds
from mvptr_ds.builders import build_model
from mvptr_ds.checkpoints.model_folder import check_fits, load_model_folder, save_model_folder
from mvptr_ds.config import override_config
from mvptr_ds.errors import DataError
from mvptr_ds.exporting.exported_folder import export_model
from mvptr_ds.exporting.published_folder import export_published
from mvptr_ds.inference import MvptrModel, MvptrProcessor, TrainedModel
from mvptr_ds.inference.pictures import rgb_of
from mvptr_ds.model.convert import config_from_reference, from_reference
from tests.support.tools import run_tool
from tests.support.untrained_folder import Untrained, untrained_folder
from tests.unit.test_inference import contents

ABROAD = """
import importlib.util, json, sys
sys.path += json.loads(sys.argv[1])  # what is installed, without this package: its own path comes by a .pth file
assert importlib.util.find_spec("mvptr_ds") is None
import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer
folder = sys.argv[2]
inputs = torch.load(sys.argv[3], weights_only=False)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert model.training is False and type(model).__module__.startswith("transformers_modules.")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
made = processor(**inputs)
with torch.inference_mode():
    outputs = model(**made)
tokens = AutoTokenizer.from_pretrained(folder)(inputs["text"], padding=True)["input_ids"]
torch.save({"made": dict(made), "outputs": dict(outputs), "tokens": tokens}, sys.argv[4])
"""


@pytest.fixture(scope="module", params=["image", "features"])
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    return untrained_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def exported(untrained: Untrained) -> Path:
    out = untrained.folder.parent / "exported"
    export_model(untrained.folder, out, licence="mit")
    return out


@pytest.fixture(scope="module")
def model(untrained: Untrained) -> TrainedModel:
    return mvptr_ds.load(untrained.folder, device="cpu")


def inputs_of(untrained: Untrained) -> dict[str, object]:
    """What a processor takes."""
    pictures, texts, phrases = contents(untrained)
    tags = [list(picture.tags or ()) for picture in pictures]
    out: dict[str, object] = {"text": texts, "phrases": phrases, "tags": tags}
    if untrained.config.visual.source == "image":
        return out | {"images": [rgb_of(p.image) for p in pictures], "boxes": [list(p.boxes) for p in pictures]}
    sizes = np.array([60, 40, 60, 40])
    shares = [(np.array(picture.boxes) / sizes).tolist() for picture in pictures]
    return out | {"boxes": shares, "region_features": [torch.from_numpy(p.features) for p in pictures]}


def test_transformers_loads_it_without_this_package(
    untrained: Untrained, exported: Path, model: TrainedModel, tmp_path: Path
) -> None:
    pictures, texts, phrases = contents(untrained)
    torch.save(inputs_of(untrained), tmp_path / "inputs.pt")
    installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            ABROAD,
            json.dumps(installed),
            exported,
            tmp_path / "inputs.pt",
            tmp_path / "out.pt",
        ],
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    close(found["outputs"]["text_embeds"], model.embed_text(texts, phrases))
    close(found["outputs"]["image_embeds"], model.embed_image(pictures))
    model.samples.find_phrases = lambda wanted: [
        model.samples.captions([t], [phrases[texts.index(t)]])[0].phrases for t in wanted
    ]
    close(found["outputs"]["match_logits"].softmax(-1)[:, 0], model.match(pictures, texts))
    lengths = found["made"]["attention_mask"].sum(1).tolist()
    plain = [ids[:length].tolist() for ids, length in zip(found["made"]["input_ids"], lengths, strict=True)]
    assert [[i for i in row if i != 0] for row in found["tokens"]] == plain  # AutoTokenizer's, with padding


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_the_package_loads_it(untrained: Untrained, exported: Path, model: TrainedModel) -> None:
    pictures, texts, phrases = contents(untrained)
    again = mvptr_ds.load(exported, device="cpu")
    assert torch.equal(again.embed_text(texts, phrases), model.embed_text(texts, phrases))
    assert torch.equal(again.embed_image(pictures), model.embed_image(pictures))
    for folder in (untrained.folder, exported):  # AutoModel knows the type once the package's classes are imported
        loaded = AutoModel.from_pretrained(folder)
        assert type(loaded) is MvptrModel and type(AutoConfig.from_pretrained(folder)).model_type == "mvptr"
    processor = AutoProcessor.from_pretrained(exported)
    assert type(processor) is MvptrProcessor
    with torch.inference_mode():
        outputs = loaded.eval()(**processor(**inputs_of(untrained)))
    close(outputs.text_embeds, model.embed_text(texts, phrases))
    for number, picture in enumerate(pictures[:3]):
        grounded = model.ground(picture, texts[number], phrases[number])
        states_PD = outputs.text_states[number][outputs.phrase_mask[number]]
        regions_RD = outputs.region_states[number][outputs.region_mask[number]]
        similar = torch.nn.functional.normalize(states_PD, dim=-1) @ torch.nn.functional.normalize(regions_RD, dim=-1).T
        close(similar, torch.tensor([one.scores for one in grounded]))


def test_a_run_starts_from_it(untrained: Untrained, exported: Path) -> None:
    fresh = build_model(untrained.config, untrained.vocabs)
    check_fits(fresh, untrained.vocabs, exported)
    loaded, vocabs, config = load_model_folder(exported)
    assert vocabs.phrases.tuples == untrained.vocabs.phrases.tuples
    assert config.data.max_tokens == untrained.config.data.max_tokens
    own = load_file(untrained.folder / "model.safetensors")
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())


def test_no_path_of_the_run_is_exported(untrained: Untrained, exported: Path) -> None:
    place = str(untrained.folder.parent)
    assert [file.name for file in exported.iterdir() if place.encode() in file.read_bytes()] == []
    assert not any("mvptr_ds" in line for file in exported.glob("*.py") for line in imports(file))
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert (
        card.startswith("---\nlicense: mit\n") and "trust_remote_code=True" in card and "| hidden size | 16 |" in card
    )


@pytest.mark.parametrize(
    ("given", "shown"),
    [("/data/me/convnext", "convnext"), ("./nets/tiny", "tiny"), ("facebook/convnext-tiny", "facebook/convnext-tiny")],
)
def test_of_a_backbone_in_a_folder_the_name_is_exported(given: str, shown: str, tmp_path: Path) -> None:
    made = untrained_folder(tmp_path, "image")
    model, vocabs, config = load_model_folder(made.folder)
    model.config.backbone_origin = given
    config = override_config(config, [f"visual.backbone={given}"])
    save_model_folder(tmp_path / "named", model, model.state_dict(), vocabs, config)
    export_model(tmp_path / "named", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["backbone_origin"] == shown
    assert load_model_folder(tmp_path / "out")[2].visual.backbone == shown


def imports(file: Path) -> list[str]:
    return [
        line for line in file.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith(("import ", "from "))
    ]


def test_forward_takes_either_or_both_and_says_what_is_missing(untrained: Untrained, exported: Path) -> None:
    model, processor = MvptrModel.from_pretrained(exported), MvptrProcessor.from_pretrained(exported)
    model.eval()
    both = processor(**inputs_of(untrained))
    text_alone = model(
        input_ids=both["input_ids"], attention_mask=both["attention_mask"], phrase_ids=both["phrase_ids"]
    )
    assert text_alone.image_embeds is None and text_alone.match_logits is None
    torch.testing.assert_close(text_alone.text_embeds, model(**both).text_embeds)
    visual = {k: v for k, v in both.items() if k not in ("input_ids", "attention_mask", "phrase_ids")}
    image_alone = model(**visual)
    assert image_alone.text_embeds is None
    torch.testing.assert_close(image_alone.image_embeds, model(**both).image_embeds)
    assert len(model(**both, return_dict=False)) == 10
    with pytest.raises(ValueError, match="there is nothing to encode"):
        model()
    one = {"input_ids": both["input_ids"][:1], "attention_mask": both["attention_mask"][:1]}
    with pytest.raises(ValueError, match="1 texts and 8 images"):
        model(**one, **visual)
    holes = both["attention_mask"].clone()
    holes[0, 1] = False
    with pytest.raises(ValueError, match="a mask has holes"):
        model(input_ids=both["input_ids"], attention_mask=holes)
    if untrained.config.visual.source == "image":
        with pytest.raises(ValueError, match="this model reads pixels"):
            model(region_features=torch.zeros(1, 2, 5), boxes=torch.zeros(1, 2, 4))
        raw = (processor(images=rgb_of(contents(untrained)[0][0].image))["pixel_values"] * 0).to(torch.uint8)
        assert model(pixel_values=raw).image_embeds.shape == (1, 16)  # the grid; uint8 is normalised in the model
    else:
        with pytest.raises(ValueError, match="region_features come with the boxes"):
            model(region_features=torch.zeros(1, 2, 5))
        with pytest.raises(ValueError, match="this model reads region features"):
            model(pixel_values=torch.zeros(1, 3, 32, 32))
    for given, message in ((both["phrase_ids"][:1].tolist(), "8 texts, and phrases of 1"),):
        with pytest.raises(ValueError, match=message):
            processor(text=inputs_of(untrained)["text"], phrases=given)


def test_a_processor_is_saved_by_itself(exported: Path, untrained: Untrained, tmp_path: Path) -> None:
    processor = MvptrProcessor.from_pretrained(exported)
    processor.save_pretrained(tmp_path)
    again = MvptrProcessor.from_pretrained(tmp_path)
    given = inputs_of(untrained)
    made, remade = processor(**given), again(**given)
    assert made.keys() == remade.keys() and all(torch.equal(made[name], remade[name]) for name in made)
    phrases = (exported / "phrase_vocab.json").read_bytes()
    processor.save_pretrained(exported)
    assert (exported / "phrase_vocab.json").read_bytes() == phrases  # with the rows, which the model needs


def test_the_published_names(untrained: Untrained) -> None:
    out = untrained.folder.parent / "published"
    if untrained.config.visual.source == "image":
        with pytest.raises(ValueError, match="the reference reads detector features only"):
            export_published(untrained.folder, out)
        assert not out.exists()
        return
    export_published(untrained.folder, out)
    state = torch.load(out / "pytorch_model.bin")
    assert state["bert.txt_encoder.layer.0.attention.self.query.weight"].shape == (16, 16)
    model = load_model_folder(untrained.folder)[0]
    sizes = {
        "num_hidden_layers": 4, "only_word_size": len(untrained.vocabs.words), "vocab_size": model.config.num_rows,
        "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "type_vocab_size": 2, "img_feature_dim": 11,
    }  # fmt: skip
    ours = from_reference(state, config_from_reference(sizes, state))
    kept = {n: t for n, t in model.state_dict().items() if not n.startswith("phrase_")}
    assert ours.keys() == kept.keys() and all(torch.equal(ours[name], tensor) for name, tensor in kept.items())


def test_the_command(untrained: Untrained, tmp_path: Path) -> None:
    done = run_tool("export_model.py", untrained.folder, tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out/config.json").is_file(), done.stderr
    again = run_tool("export_model.py", untrained.folder, tmp_path / "out")
    assert again.returncode == 1 and "out holds something already; name a new folder" in again.stderr
    nothing = run_tool("export_model.py", tmp_path / "nowhere", tmp_path / "other")
    assert nothing.returncode == 1 and "nowhere does not exist; give a run folder" in nothing.stderr
    with pytest.raises(DataError, match="name a new folder"):
        export_model(untrained.folder, tmp_path / "out")


def test_the_card_tells_of_the_run(untrained: Untrained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.json").write_text(json.dumps({"retrieval": {"t2i_r1": 0.25}, "grounding": {"accuracy": 0.5}}))
    export_model(untrained.folder, tmp_path / "out", run)
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "| text to image, recall at 1 | 25.0 % |" in card and "| phrase grounding, accuracy | 50.0 % |" in card
    assert "No licence of the weights was given." in card and "license:" not in card
