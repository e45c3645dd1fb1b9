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
COMMAND = re.compile(r"^    ((?:python|deepspeed) [^\n]+)$|^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONFIG = re.compile(r"`(\w+\.yaml)` says:\n\n```yaml\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"\d[\d.,e:+-]*")
SMALLER = (  # the published size would not train here
    "model.hidden_size=32 model.intermediate_size=64 model.num_attention_heads=2 model.num_text_layers=1 "
    "model.num_visual_layers=1 model.num_cross_layers=1 train.batch_size=8 stage1.max_steps=2 stage2.max_steps=2 "
    "stage1.warmup_steps=0 stage2.warmup_steps=0 train.log_every_steps=1 data.num_workers=1"
)
NO_HUB = (  # in place of a backbone that the network would bring
    "visual.backbone=null visual.image_size=32 "
    "'visual.backbone_config={model_type: convnext, hidden_sizes: [8, 8], depths: [1, 1], num_stages: 2}'"
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


def fixed(line: str) -> str:
    """A line of output without what differs between runs: numbers, and the space that they leave."""
    return " ".join(NUMBER.sub("0", line).split())


@pytest.mark.timeout(900)
def test_the_documented_way_from_annotations_to_a_report(tmp_path: Path) -> None:
    text = DOC.read_text(encoding="utf-8")
    write_corpus(tmp_path)
    for name in ("tools", "mvptr_ds", "ds_configs"):
        (tmp_path / name).symlink_to(REPO / name)
    for name, content in CONFIG.findall(text):
        (tmp_path / name).write_text(content, encoding="utf-8")
    found = COMMAND.findall(text)
    commands = [command for command, _ in found if command]
    tools = {command.split()[1] for command in commands if "tools/" in command}
    assert len(tools) >= 4 and commands[-1].endswith("runs/my_corpus")
    assert sum(command.startswith("deepspeed") for command in commands) == 2
    seen: list[str] = []  # lines printed so far, and how many of the page's outputs they had to hold
    outputs = 0
    for number, (command, expected) in enumerate(found):
        if not command:
            outputs += 1
            missing = [line for line in expected.splitlines() if line not in ("", "...") and fixed(line) not in seen]
            assert missing == [], "\n".join(seen)
            continue
        if command.startswith("deepspeed"):
            launcher = f"deepspeed --num_gpus=1 --master_port={free_port()}"
            command = f"{command.replace('deepspeed', launcher, 1)} {SMALLER}"
            command += f" {NO_HUB}" if "pairs.yaml" in command else ""
        code, output = run(["bash", "-c", command], tmp_path / f"{number}.log", 300.0, cwd=tmp_path)
        assert code == 0, f"{command}\n{output}"
        log = (tmp_path / f"{number}.log").read_text(encoding="utf-8", errors="replace")
        seen += [fixed(line) for line in log.splitlines()]
    assert outputs >= 6
    for name in ("pairs", "my_corpus"):
        report = json.loads((tmp_path / f"runs/{name}/report.json").read_text(encoding="utf-8"))
        assert report["num_scenes"] >= 1
    assert (tmp_path / "runs/my_corpus/stage2/checkpoints/step-00000002/model/model.safetensors").is_file()
    page = (tmp_path / "preview.html").read_text(encoding="utf-8")
    assert "data:image/" in page
