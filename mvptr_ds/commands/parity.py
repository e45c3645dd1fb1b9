"""Compares `joint` with recorded numbers of the published code: one line a tensor with its largest difference.

A folder holds config.json, weights.safetensors (under the reference's names), inputs.safetensors (one forward pass),
expected.safetensors and expected.json (results in float64 and float32, and the random choices that were drawn).
A missing, extra, wrongly shaped or NaN tensor fails, and so does a difference above the tolerance.

Legend: B samples, T text slots, G tag slots, R regions, D hidden.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mvptr_ds.config import TaskConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import IGNORE, Batch
from mvptr_ds.model import convert
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.embeddings import TAG_SEGMENT, TEXT_SEGMENT
from mvptr_ds.model.encoder import Execution
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives import hard_negatives
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.objectives.pairs import Pairs, grounding_scores
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

LOSSES = {"vis_mlm": "mcr_tags", "retrieval": "vsc", "masked_lm": "mlm", "itm": "itm", "wra": "wpg"}  # theirs: ours
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # absolute; the reference's own dtypes differ by under 2e-6
GRADIENT_TOLERANCE = 1e-5
ROWS = "word_embeddings_rows"


def make_batch(inputs: dict[str, Tensor], feature_dim: int, dtype: torch.dtype) -> Batch:
    """Returns the recorded keyword arguments as a Batch."""
    num_tags = inputs["input_ids_b"].shape[1]
    text_ids_BT, phrase_range_B2 = inputs["input_ids_a"], inputs["phrase_index"]
    slots_T = torch.arange(text_ids_BT.shape[1])
    features_BRX = inputs["img_feats"].to(dtype)
    num = len(text_ids_BT)
    none_B = torch.zeros(num, dtype=torch.int64)

    def labels(given: Tensor) -> Tensor:
        return torch.where(given == -1, IGNORE, given)

    def lengths(mask: Tensor) -> tuple[int, ...]:
        return tuple(mask.sum(1).tolist())

    return Batch(
        text_ids_BT=text_ids_BT,
        text_mask_BT=inputs["attention_mask_a"].bool(),
        phrase_mask_BT=(slots_T >= phrase_range_B2[:, :1]) & (slots_T < phrase_range_B2[:, 1:]),
        mlm_labels_BT=labels(inputs["masked_lm_labels_a"]),
        phrase_labels_BT=torch.full_like(text_ids_BT, IGNORE),
        tag_ids_BG=inputs["input_ids_b"],
        tag_mask_BG=inputs["attention_mask_b"][:, :num_tags].bool(),
        tag_labels_BG=labels(inputs["masked_lm_labels_b"][:, :num_tags]),
        region_geometry_BR6=features_BRX[..., feature_dim:],
        region_mask_BR=inputs["attention_mask_b"][:, num_tags:].bool(),
        region_features_BRF=features_BRX[..., :feature_dim],
        images_B3HW=None,
        image_index_B=torch.arange(num),
        position_B=torch.arange(num),
        num_oov_phrases_B=none_B,
        num_phrases_B=none_B,
        num_bad_B=none_B,
        source_B=none_B,
        text_lengths=lengths(inputs["attention_mask_a"]),
        tag_lengths=lengths(inputs["attention_mask_b"][:, :num_tags]),
        region_lengths=lengths(inputs["attention_mask_b"][:, num_tags:]),
    )


def recorded_draws(random: dict[str, Any], batch: Batch, top_k: int) -> RandomDraws:
    """Returns the recorded choices as the uniform numbers that lead to them (the middle of each choice's interval)."""
    num, num_slots = batch.text_ids_BT.shape
    draws = RandomDraws.keyed(0, 0, 0, num, num_slots)
    draws.itm_takes_image_N[:] = False
    draws.itm_takes_image_N[random["dice_index"][: num // 2]] = True
    num_choices_B = batch.region_mask_BR.sum(1).clamp(max=top_k).tolist()
    for choice in random["wpg"]:
        sample, other = choice["sample"], choice["neg_image"]
        draws.wpg_image_N[sample] = (other - (other > sample) + 0.5) / (num - 1)
        slots = batch.phrase_mask_BT[sample].nonzero().flatten()
        for values, ranks, image in (
            (draws.wpg_own_NT, choice["pos_top3_rank"], sample),
            (draws.wpg_other_NT, choice["neg_top3_rank"], other),
        ):
            if ranks is not None:
                values[sample, slots] = (torch.tensor(ranks, dtype=torch.float64) + 0.5) / num_choices_B[image]
    return draws


def compute(model: Mvptr, task: PretrainingLosses, batch: Batch, draws: RandomDraws, dice: Tensor) -> dict[str, Tensor]:
    """Returns every recorded tensor of the forward pass, by the reference's name."""
    packed = PackedBatch.of(batch)
    embedded = model.embed_regions(packed.features, None, packed.geometry)
    text = model.encode_text(packed.text_ids)
    tags, regions = model.encode_visual(packed.tag_ids, embedded)
    cross_text, cross_regions = model.encode_cross(text, regions)
    num_slots, num_regions = batch.text_ids_BT.shape[1], batch.region_mask_BR.shape[1]

    def slots(states: Packed, num: int) -> Tensor:
        padded = states.padded()
        return F.pad(padded, (0, 0, 0, num - padded.shape[1]))

    def text_slots(states: Packed) -> Tensor:
        return slots(states, num_slots)

    def both(first: Tensor, second: Packed) -> Tensor:
        return torch.cat([first, slots(second, num_regions)], 1)

    sim_BB = model.text_global(text) @ model.visual_global(tags).T
    same_BB = torch.eye(len(sim_BB), dtype=torch.bool)
    hardest_image_B = hard_negatives.choose("hardest", sim_BB, same_BB, draws.itm_N)
    hardest_text_B = hard_negatives.choose("hardest", sim_BB.T, same_BB, draws.itm_N)
    takes_image_B = draws.itm_takes_image_N[dice]
    text_from = torch.where(takes_image_B, dice, hardest_text_B[dice])
    image_from = torch.where(takes_image_B, hardest_image_B[dice], dice)
    pairs = list(zip(text_from.tolist(), image_from.tolist(), strict=True))
    hard_text, hard_regions = model.encode_cross(text, regions, pairs)
    pooled_BD, hard_pooled_BD = model.pool(cross_text), model.pool(hard_text)
    phrases_PD = F.normalize(cross_text.rows[packed.phrase_mask.rows], dim=-1)
    picked_text, picked_tags = packed.masked_tokens.rows_K, packed.masked_tags.rows_K
    negative_index_B = hard_negatives.choose("random", sim_BB, same_BB, draws.wpg_image_N)
    cross_pairs = Pairs(cross_text, packed.phrase_mask, cross_regions)
    pos_B, neg_B, _ = grounding_scores(cross_pairs, negative_index_B, draws, task.config.wpg)
    return {
        "embeddings_text": text_slots(model.embeddings(packed.text_ids, TEXT_SEGMENT)),
        "embeddings_tags": slots(model.embeddings(packed.tag_ids, TAG_SEGMENT), batch.tag_ids_BG.shape[1]),
        "img_embedding": slots(embedded, num_regions),
        "txt_encoder": text_slots(text),
        "vis_encoder": both(slots(tags, batch.tag_ids_BG.shape[1]), regions),
        "sim_mat": sim_BB,
        "hard_txt_index_full": text_from,
        "hard_img_index_full": image_from,
        "hard_sequence_output": both(text_slots(hard_text), hard_regions),
        "hard_pooled": hard_pooled_BD,
        "sequence_output": both(text_slots(cross_text), cross_regions),
        "pooled": pooled_BD,
        "tag_mlm_logits": model.tag_logits(tags.rows[picked_tags]),
        "text_mlm_logits": model.token_logits(cross_text.rows[picked_text]),
        "itm_logits": model.itm_logits(torch.cat([pooled_BD, hard_pooled_BD])),
        "wpg_full_sims": phrases_PD @ F.normalize(cross_regions.rows, dim=-1).T,
        "wpg_pos_sims": pos_B,
        "wpg_neg_sims": neg_B,
        "retrieval.global_txt": model.text_global(text),
        "retrieval.global_img": model.visual_global(tags),
        "retrieval.fine_logits": model.itm_logits(pooled_BD),
        "_mask.embeddings_text": batch.text_mask_BT,
        "_mask.embeddings_tags": batch.tag_mask_BG,
        "_mask.img_embedding": batch.region_mask_BR,
        "_mask.txt_encoder": batch.text_mask_BT,
        "_mask.vis_encoder": torch.cat([batch.tag_mask_BG, batch.region_mask_BR], 1),
        "_mask.sequence_output": torch.cat([batch.text_mask_BT, batch.region_mask_BR], 1),
        "_mask.hard_sequence_output": torch.cat([batch.text_mask_BT[text_from], batch.region_mask_BR[image_from]], 1),
    }


class Comparison:
    """Prints a line a tensor and remembers whether all were well."""

    def __init__(self) -> None:
        self.failed = 0
        self.lines = 0

    def add(
        self, name: str, expected: Tensor, found: Tensor | None, tolerance: float, mask: Tensor | None = None
    ) -> None:
        problem = None
        difference = float("nan")
        if found is None:
            problem = "not computed here: an extra tensor"
        elif found.shape != expected.shape:
            problem = f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        else:
            expected, found = expected.double(), found.detach().double()
            if mask is not None:
                expected, found = expected[mask], found[mask]
            difference = float((expected - found).abs().max()) if expected.numel() else 0.0
            if not difference <= tolerance:  # NaN is not
                problem = f"above {tolerance:g}"
        self._line(name, difference, problem)

    def missing(self, name: str) -> None:
        self._line(name, float("nan"), "missing in the folder")

    def _line(self, name: str, difference: float, problem: str | None) -> None:
        self.lines += 1
        self.failed += problem is not None
        verdict = "FAIL" if problem else "ok"
        sys.stdout.write(f"{verdict:4}  {name:70} {difference:9.2e}  {problem or ''}".rstrip() + "\n")


def check_folder(folder: Path, execution: Execution = "packed") -> Comparison:
    """Both dtypes' losses and tensors, and the gradients, by the encoders' `execution`."""
    state = load_file(folder / "weights.safetensors")
    inputs = load_file(folder / "inputs.safetensors")
    expected = load_file(folder / "expected.safetensors")
    scalars = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    config = convert.config_from_reference(json.loads((folder / "config.json").read_text(encoding="utf-8")), state)
    config.tie_word_heads = False  # the reference's decoders are parameters of their own: so are their gradients
    comparison = Comparison()
    for dtype in (torch.float64, torch.float32):
        _check_dtype(comparison, dtype, execution, config, state, inputs, expected, scalars)
    return comparison


def _check_dtype(
    comparison: Comparison,
    dtype: torch.dtype,
    execution: Execution,
    config: MvptrConfig,
    state: dict[str, Tensor],
    inputs: dict[str, Tensor],
    expected: dict[str, Tensor],
    scalars: dict[str, Any],
) -> None:
    tolerance, suffix = TOLERANCE[dtype], "fp64" if dtype == torch.float64 else "fp32"
    model = Mvptr(config)
    model.load_state_dict(convert.from_reference(state, config))
    model.eval().to(dtype)
    model.set_execution(execution)
    batch = make_batch(inputs, config.region_feature_dim, dtype)
    weights = WeightsConfig(mcr_tags=1.0, mlm=1.0, vsc=1.0, wpg=1.0, itm=1.0)
    num_slots = batch.text_ids_BT.shape[1]
    task_config = TaskConfig()
    task = PretrainingLosses(
        model, STAGES["joint"], weights, task_config, max_text_slots=num_slots, max_steps=1, seed=0
    )
    draws = recorded_draws(scalars["random"], batch, task_config.wpg.top_k)
    parts = {name: part.sum / part.count for name, part in task.sums(batch, draws).items()}
    total = torch.stack(list(parts.values())).sum()
    ours = {theirs: parts[name] for theirs, name in LOSSES.items()} | {"total": total}
    recorded = scalars[f"losses_{suffix}"]
    for name in sorted(ours.keys() | recorded.keys()):
        if name not in recorded:
            comparison.missing(f"{suffix} loss {name}")
        else:
            given = torch.tensor(recorded[name], dtype=torch.float64)
            comparison.add(f"{suffix} loss {name}", given, ours.get(name), tolerance * (1 + 9 * (name == "total")))
    total.backward()
    with torch.no_grad():
        tensors = compute(model, task, batch, draws, torch.tensor(scalars["random"]["dice_index"]))
    names = {n for n in tensors if not n.startswith("_mask.")}
    for name in sorted(names | {n for n in expected if not n.startswith("grad32.")}):
        if name not in expected:
            comparison.missing(f"{suffix} {name}")
        else:
            bound = max(tolerance, TOLERANCE[expected[name].dtype]) if expected[name].is_floating_point() else 0.0
            comparison.add(f"{suffix} {name}", expected[name], tensors.get(name), bound, tensors.get(f"_mask.{name}"))
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    theirs = convert.to_reference(grads, config)
    _check_gradients(comparison, suffix, theirs, expected, scalars["grad_norms_fp64"])


def _check_gradients(
    comparison: Comparison,
    suffix: str,
    theirs: dict[str, Tensor],
    expected: dict[str, Tensor],
    norms: dict[str, float | None],
) -> None:
    words = theirs["bert.embeddings.word_embeddings.weight"]
    for name in sorted(n for n in expected if n.startswith("grad32.") and n != f"grad32.{ROWS}"):
        found = words[expected[f"grad32.{ROWS}"]] if name == f"grad32.{ROWS}_grad" else theirs.get(name[7:])
        comparison.add(f"{suffix} {name}", expected[name], found, GRADIENT_TOLERANCE)
    for name, norm in norms.items():  # None: a parameter that the pass does not reach
        found = theirs[name].norm() if name in theirs else None
        comparison.add(f"{suffix} gradient norm {name}", torch.tensor(norm or 0.0), found, GRADIENT_TOLERANCE)


def main(argv: list[str] | None = None) -> int:
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="folder of recorded numbers")
    parser.add_argument("--execution", choices=get_args(Execution), default="packed", help="of the encoders")
    arguments = parser.parse_args(argv)
    try:
        comparison = check_folder(arguments.folder, arguments.execution)
    except (OSError, KeyError, ValueError) as error:
        sys.stderr.write(f"error: {arguments.folder} is not a folder of recorded numbers: {error!r}\n")
        return 2
    sys.stdout.write(f"{comparison.lines} compared, {comparison.failed} failed\n")
    return 1 if comparison.failed else 0
