"""docs/corpus.md, typed as it stands in a folder with a small corpus of COCO's layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mvptr_ds.demo.plan import SplitRule
from mvptr_ds.demo.scene import make_scene
from mvptr_ds.demo.shapes import ShapesSource
from tests.conftest import REPO
from tests.support.launch import free_port, run
from tests.support.tiny_detector import save_detector

DOC = REPO / "docs/corpus.md"
NUM_IMAGES = 60
COMMAND = re.compile(r"^    ((?:python|deepspeed) .+)$", re.MULTILINE)
SMALLER = (  # the published size would not train here
    "model.hidden_size=32 model.intermediate_size=64 model.num_attention_heads=2 model.num_text_layers=1 "
    "model.num_visual_layers=1 model.num_cross_layers=1 train.batch_size=8 stage1.max_steps=2 stage2.max_steps=2"
)


def write_corpus(folder: Path) -> None:
    """`annotations/captions_train2014.json`, `train2014/` and `models/detector`."""
    (folder / "train2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    source, rule = ShapesSource(), SplitRule(seed=0)
    images, annotations = [], []
    for number in range(NUM_IMAGES):
        scene = make_scene(source, rule, number)
        name = f"COCO_train2014_{number + 1:012d}.jpg"
        Image.fromarray(scene.image_HW3).save(folder / "train2014" / name)
        images.append({"id": number + 1, "file_name": name, "width": 128, "height": 128})
        annotations += [
            {"id": len(annotations) + i, "image_id": number + 1, "caption": caption.text}
            for i, caption in enumerate(scene.record.captions)
        ]
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "annotations/captions_train2014.json").write_text(content, encoding="utf-8")
    save_detector("detr", folder / "models/detector")


@pytest.mark.timeout(900)
def test_the_documented_way_from_annotations_to_a_report(tmp_path: Path) -> None:
    text = DOC.read_text(encoding="utf-8")
    write_corpus(tmp_path)
    for name in ("tools", "mvptr_ds", "ds_configs"):
        (tmp_path / name).symlink_to(REPO / name)
    (config,) = re.findall(r"^`(\w+\.yaml)`:\n\n```yaml\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / config[0]).write_text(config[1], encoding="utf-8")
    commands = COMMAND.findall(text)
    tools = {command.split()[1] for command in commands if "tools/" in command}
    assert len(tools) >= 4 and commands[-1].endswith("runs/my_corpus")
    for number, command in enumerate(commands):
        if command.startswith("deepspeed"):
            launcher = f"deepspeed --num_gpus=1 --master_port={free_port()}"
            command = f"{command.replace('deepspeed', launcher, 1)} {SMALLER}"
        code, output = run(["bash", "-c", command], tmp_path / f"{number}.log", 300.0, cwd=tmp_path)
        assert code == 0, f"{command}\n{output}"
    report = json.loads((tmp_path / "runs/my_corpus/report.json").read_text(encoding="utf-8"))
    assert report["num_scenes"] >= 1
    page = (tmp_path / "preview.html").read_text(encoding="utf-8")
    assert "data:image/" in page
