"""The model card of an exported model: what it is, what it was trained on, what it scores, how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mvptr_ds.checkpoints.state import read_state
from mvptr_ds.config import Config
from mvptr_ds.model.mvptr import Mvptr

_SCORES = {  # of report.json: path -> what the card calls it
    ("retrieval", "t2i_r1"): "text to image, recall at 1",
    ("retrieval", "i2t_r1"): "image to text, recall at 1",
    ("rerank", "t2i_r1"): "text to image, recall at 1, re-ranked",
    ("grounding", "accuracy"): "phrase grounding, accuracy",
    ("matching", "accuracy"): "image-text matching, accuracy",
}


def write_card(
    path: Path, model: Mvptr, config: Config, model_folder: Path, run: Path | None, licence: str | None
) -> None:
    """Writes the card. What the run's folder does not tell is left out."""
    tags = "\n".join(f"  - {tag}" for tag in ("mvptr", "vision-language", "image-text-retrieval", "phrase-grounding"))
    header = f"library_name: transformers\npipeline_tag: feature-extraction\ntags:\n{tags}\n"
    if licence is not None:
        header = f"license: {licence}\n{header}"
    parts = [
        f"---\n{header}---\n",
        "# MVPTR: concept-aware vision-language model\n",
        "It encodes texts with their phrases, and pictures with their regions and object tags. It was trained with "
        "[mvptr_ds](https://arxiv.org/abs/2201.12596) after Li et al. 2022, MVPTR.\n",
        _what(model, config),
        _trained(config, model_folder),
        _scores(run),
        _use(config),
        "## Licence\n\n" + (f"{licence}\n" if licence else "No licence of the weights was given.\n"),
    ]
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _what(model: Mvptr, config: Config) -> str:
    sizes = model.config
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    reads = (
        f"pixels of {sizes.image_size} x {sizes.image_size}, through a backbone of type "
        f"`{(sizes.backbone_config or {}).get('model_type')}`"
        if sizes.visual_source == "image"
        else f"region features of {sizes.region_feature_dim} numbers"
    )
    rows = [
        ("parameters", f"{millions:.1f} M"),
        ("hidden size", str(sizes.hidden_size)),
        ("layers", f"{sizes.num_text_layers} text, {sizes.num_visual_layers} visual, {sizes.num_cross_layers} cross"),
        ("phrase vocabulary", str(sizes.num_phrases)),
        ("reads", reads),
        ("regions by", ", ".join(sizes.region_extractors) or "no extractor that was named"),
        ("text", f"up to {config.data.max_tokens} wordpieces"),
    ]
    return _table("The model", ("property", "value"), rows)


def _trained(config: Config, model_folder: Path) -> str:
    sources = ", ".join(config.data.sources) or str(config.data.train)
    rows = [("data", f"`{Path(sources).name if not config.data.sources else sources}`")]
    try:
        state = read_state(model_folder.parent)
        rows += [
            ("stage", state.stage),
            ("steps", str(state.step)),
            ("samples seen", str(state.samples_seen)),
            ("batch size", str(state.batch_size)),
            ("precision", str(state.precision)),
        ]
    except (ValueError, OSError, KeyError):  # a model folder without its checkpoint
        pass
    return _table("Training", ("what", "value"), rows)


def _scores(run: Path | None) -> str:
    report: dict[str, Any] = {}
    if run is not None and (run / "report.json").is_file():
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    rows = []
    for (section, name), text in _SCORES.items():
        score = report.get(section, {}).get(name) if isinstance(report.get(section), dict) else None
        if isinstance(score, float):
            rows.append((text, f"{100 * score:.1f} %"))
    return _table("Scores on the run's held-out split", ("score", "value"), rows) if rows else ""


def _use(config: Config) -> str:
    given = "images=[picture]"
    if config.visual.source == "features":
        given = "region_features=[features], boxes=[boxes]"
    return f"""## Use

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
inputs = processor(text=["a red car"], phrases=[[("car",), ("car", "red")]], {given})
outputs = model(**inputs)
outputs.text_embeds @ outputs.image_embeds.T  # cosines
outputs.match_logits.softmax(-1)[:, 0]  # probability that text and image belong together
```

Phrases are optional. With the package mvptr_ds, `mvptr_ds.load(FOLDER)` finds them, grounds them in regions, fills
masked words, ranks and classifies.
"""


def _table(title: str, heading: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in [heading, ("---", "---"), *rows]]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"
