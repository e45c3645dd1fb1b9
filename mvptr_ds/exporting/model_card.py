"""The model card of an exported model: what it is, what it was trained on, what it scores, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mvptr_ds.checkpoints.model_folder import head_settings
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


class _TaskWords(NamedTuple):
    """What the card says of a downstream task."""

    title: str
    pipeline: str | None  # the hub's word for it
    call: str  # of the loaded model
    result: str


_TASKS = {
    "vqa": _TaskWords(
        "visual question answering",
        "visual-question-answering",
        'model.ask("street.png", "what is left of the car?")',
        "the best answers, each with its probability",
    ),
    "entailment": _TaskWords(
        "visual entailment",
        None,
        'model.entails("street.png", "a car waits at a crossing")',
        "probabilities of contradiction, neutral, entailment",
    ),
    "referring": _TaskWords(
        "referring expressions",
        None,
        'model.find("street.png", "the car on the left")',
        "the best regions: boxes in pixels with scores",
    ),
}


def write_card(
    path: Path, model: Mvptr, config: Config, model_folder: Path, run: Path | None, licence: str | None
) -> None:
    """Writes the card. What the run's folder does not tell is left out."""
    settings = head_settings(model_folder)
    words = _TASKS.get(settings.get("task", ""))
    known = ("mvptr", "vision-language", "image-text-retrieval", "phrase-grounding")
    tags = "\n".join(f"  - {tag}" for tag in (*known, *([] if words is None else [words.title.replace(" ", "-")])))
    pipeline = (words and words.pipeline) or "feature-extraction"
    header = f"library_name: transformers\npipeline_tag: {pipeline}\ntags:\n{tags}\n"
    if licence is not None:
        header = f"license: {licence}\n{header}"
    parts = [
        f"---\n{header}---\n",
        "# MVPTR: concept-aware vision-language model\n",
        "It encodes texts with their phrases, and pictures with their regions and object tags. It was trained with "
        "[mvptr_ds](https://arxiv.org/abs/2201.12596) after Li et al. 2022, MVPTR.\n",
        _what(model, config),
        _trained(config, model_folder),
        "" if words is None else _task(words, settings),
        _scores(run, settings.get("task")),
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


def _task(words: _TaskWords, settings: Mapping[str, Any]) -> str:
    answers = settings.get("answers")
    over = f" It chooses from {len(answers):,} answers." if answers else ""
    return f"""## The task: {words.title}

It was fine-tuned for {words.title}.{over} The package mvptr_ds loads it with its head:

```python
import mvptr_ds

model = mvptr_ds.load(FOLDER)
{words.call}  # {words.result}
```
"""


def _scores(run: Path | None, task: str | None) -> str:
    """Returns the table of the scores in report.json; of a downstream task that of the task alone."""
    report: dict[str, Any] = {}
    if run is not None and (run / "report.json").is_file():
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    rows = [
        (_spoken(name, task), f"{100 * score:.1f} %")
        for name, score in dict(report.get("scores") or {}).items()
        if task is not None and name.startswith(f"eval/{task}/") and isinstance(score, float)
    ]
    for (section, name), text in _SCORES.items():
        score = report.get(section, {}).get(name) if isinstance(report.get(section), dict) else None
        if isinstance(score, float):
            rows.append((text, f"{100 * score:.1f} %"))
    return _table("Scores on the run's held-out split", ("score", "value"), rows) if rows else ""


def _spoken(name: str, task: str) -> str:
    """Returns `eval/vqa/kind/number` as the card calls it: `vqa score, kind number`."""
    of_task = name.removeprefix(f"eval/{task}/")
    return f"{task} {of_task}" if not of_task.startswith("kind/") else f"{task} score, {of_task.replace('/', ' ', 1)}"


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
