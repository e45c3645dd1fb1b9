"""Makes tests/golden/published_heads.json of the recorded numbers: what the published losses are functions of.

Run it where the recorded numbers are there: `python -m tests.support.golden_heads FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "published_heads.json"
DIGITS = 7  # the losses agree within 1e-6 then


def golden_heads(folder: Path) -> dict[str, Any]:
    """Returns logits, labels and losses of the cases, and for entailment pooled states and the head, too."""
    inputs, heads = load_file(folder / "inputs.safetensors"), load_file(folder / "heads.safetensors")
    losses = json.loads((folder / "expected.json").read_text("utf-8"))["losses"]
    ve, re = load_file(folder / "expected.ve.safetensors"), load_file(folder / "expected.re.safetensors")
    vqa, retrieval = (
        load_file(folder / "expected.vqa.safetensors"),
        load_file(folder / "expected.retrieval.safetensors"),
    )
    is_region = inputs["re.labels"] >= 0
    return {
        "entailment": {
            "pooled": _rounded(ve["ve.pooled"]),
            "weight": _rounded(heads["ve.classifier.weight"]),
            "bias": _rounded(heads["ve.classifier.bias"]),
            "labels": inputs["ve.labels"].tolist(),
            "logits": _rounded(ve["ve.logits"]),
            "loss": losses["ve"]["loss"][0],
        },
        "vqa": {
            "labels": _rounded(inputs["vqa.labels"]),
            "logits": _rounded(vqa["vqa.logits"]),
            "loss": losses["vqa"]["loss"][0],
        },
        "referring": {
            "num_regions": is_region.sum(1).tolist(),
            "overlaps": _rounded(inputs["re.labels"][is_region]),
            **{
                f"mode{mode}": {
                    # of mode 2 sigmoids were recorded, which lie close to 1
                    "logits": _rounded(re[f"re_mod{mode}.logits"][is_region], 16 if mode == 2 else DIGITS),
                    "loss": losses[f"re_mod{mode}"]["loss"][0],
                    "chosen_iou": _rounded(re[f"re_mod{mode}.chosen_iou"]),
                }
                for mode in (1, 2, 3)
            },
        },
        "retrieval": {
            "global_txt": _rounded(retrieval["retrieval_plain.global_txt"]),
            "global_img": _rounded(retrieval["retrieval_plain.global_img"]),
            "logits_itm": _rounded(retrieval["retrieval_plain.logits_itm"]),
            "loss_vsc": losses["retrieval_plain"]["loss_vsc"][0],
            "loss_itm": losses["retrieval_plain"]["loss_itm"][0],
            "scale": round(float(load_file(folder / "weights.safetensors")["logit_scale"].double().exp()), DIGITS),
        },
    }


def _rounded(values: Tensor, digits: int = DIGITS) -> Any:
    rows = values.double().tolist()
    return [[round(x, digits) for x in row] if isinstance(row, list) else round(row, digits) for row in rows]


if __name__ == "__main__":
    text = json.dumps(golden_heads(Path(sys.argv[1])), separators=(",", ":")).replace("],", "],\n")
    GOLDEN.write_text(text + "\n", encoding="utf-8")
