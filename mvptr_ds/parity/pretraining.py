"""Compares `joint` with recorded numbers of the published code's pre-training.

A folder holds config.json, weights.safetensors (under the reference's names), inputs.safetensors (one forward pass),
expected.safetensors and expected.json (results in float64 and float32, and the random choices that were drawn).

Legend: B samples, T text slots, G tag slots, R regions, D hidden.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mvptr_ds.config import TaskConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.model import convert
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.embeddings import TAG_SEGMENT, TEXT_SEGMENT
from mvptr_ds.model.encoder import Execution
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives import hard_negatives
from mvptr_ds.objectives.hard_negatives import OwnDraws, RandomDraws
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.objectives.pairs import Pairs, grounding_scores
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.parity import recorded_batch
from mvptr_ds.parity.comparison import SHORT, TOLERANCE, Comparison
from mvptr_ds.parity.recorded_batch import in_slots, make_batch

LOSSES = {"vis_mlm": "mcr_tags", "retrieval": "vsc", "masked_lm": "mlm", "itm": "itm", "wra": "wpg"}  # theirs: ours
GRADIENT_TOLERANCE = 1e-5
ROWS = "word_embeddings_rows"


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

    def text_slots(states: Packed) -> Tensor:
        return in_slots(states, num_slots)

    def both(first: Tensor, second: Packed) -> Tensor:
        return torch.cat([first, in_slots(second, num_regions)], 1)

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
    negative = cross_regions.take(negative_index_B.tolist())
    pos_B, neg_B, _ = grounding_scores(cross_pairs, negative, OwnDraws.of(draws), task.config.wpg)
    return {
        "embeddings_text": text_slots(model.embeddings(packed.text_ids, TEXT_SEGMENT)),
        "embeddings_tags": in_slots(model.embeddings(packed.tag_ids, TAG_SEGMENT), batch.tag_ids_BG.shape[1]),
        "img_embedding": in_slots(embedded, num_regions),
        "txt_encoder": text_slots(text),
        "vis_encoder": both(in_slots(tags, batch.tag_ids_BG.shape[1]), regions),
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
    }


def _masks(batch: Batch, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    text_from, image_from = tensors["hard_txt_index_full"], tensors["hard_img_index_full"]
    hard = torch.cat([batch.text_mask_BT[text_from], batch.region_mask_BR[image_from]], 1)
    return recorded_batch.masks(batch) | {
        "embeddings_text": batch.text_mask_BT,
        "embeddings_tags": batch.tag_mask_BG,
        "img_embedding": batch.region_mask_BR,
        "hard_sequence_output": hard,
    }


@dataclass
class _Recorded:
    """What a folder holds."""

    config: MvptrConfig
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    scalars: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _Recorded:
        state = load_file(folder / "weights.safetensors")
        config_json = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = convert.config_from_reference(config_json, state)
        config.tie_word_heads = False  # the reference's decoders are parameters of their own: so are their gradients
        scalars = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        inputs, expected = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
        return cls(config, state, inputs, expected, scalars)


def check_folder(comparison: Comparison, folder: Path, execution: Execution = "packed") -> None:
    """Compares both dtypes' losses and tensors, and the gradients, by the encoders' `execution`."""
    recorded = _Recorded.read(folder)
    for dtype in (torch.float64, torch.float32):
        _check_dtype(comparison, dtype, execution, recorded)


def _check_dtype(comparison: Comparison, dtype: torch.dtype, execution: Execution, recorded: _Recorded) -> None:
    tolerance, suffix, config = TOLERANCE[dtype], SHORT[dtype], recorded.config
    model = Mvptr(config)
    model.load_state_dict(convert.from_reference(recorded.state, config))
    model.eval().to(dtype)
    model.set_execution(execution)
    batch = make_batch(recorded.inputs, config.region_feature_dim, dtype)
    weights = WeightsConfig(mcr_tags=1.0, mlm=1.0, vsc=1.0, wpg=1.0, itm=1.0)
    num_slots = batch.text_ids_BT.shape[1]
    task_config = TaskConfig()
    task = PretrainingLosses(
        model, STAGES["joint"], weights, task_config, max_text_slots=num_slots, max_steps=1, seed=0
    )
    random = recorded.scalars["random"]
    draws = recorded_draws(random, batch, task_config.wpg.top_k)
    parts = {name: part.sum / part.count for name, part in task.sums(batch, draws).items()}
    total = torch.stack(list(parts.values())).sum()
    ours = {theirs: parts[name] for theirs, name in LOSSES.items()} | {"total": total}
    losses = recorded.scalars[f"losses_{suffix}"]
    for name in sorted(ours.keys() | losses.keys()):
        if name not in losses:
            comparison.missing(f"{suffix} loss {name}")
        else:
            given = torch.tensor(losses[name], dtype=torch.float64)
            comparison.add(f"{suffix} loss {name}", given, ours.get(name), tolerance * (1 + 9 * (name == "total")))
    total.backward()
    with torch.no_grad():
        tensors = compute(model, task, batch, draws, torch.tensor(random["dice_index"]))
    expected = {name: tensor for name, tensor in recorded.expected.items() if not name.startswith("grad32.")}
    comparison.tensors(suffix, expected, tensors, tolerance, _masks(batch, tensors))
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    theirs = convert.to_reference(grads, config)
    _check_gradients(comparison, suffix, theirs, recorded)


def _check_gradients(comparison: Comparison, suffix: str, theirs: dict[str, Tensor], recorded: _Recorded) -> None:
    words, expected = theirs["bert.embeddings.word_embeddings.weight"], recorded.expected
    for name in sorted(n for n in expected if n.startswith("grad32.") and n != f"grad32.{ROWS}"):
        found = words[expected[f"grad32.{ROWS}"]] if name == f"grad32.{ROWS}_grad" else theirs.get(name[7:])
        comparison.add(f"{suffix} {name}", expected[name], found, GRADIENT_TOLERANCE)
    norms: dict[str, float | None] = recorded.scalars["grad_norms_fp64"]
    for name, norm in norms.items():  # None: a parameter that the pass does not reach
        found = theirs[name].norm() if name in theirs else None
        comparison.add(f"{suffix} gradient norm {name}", torch.tensor(norm or 0.0), found, GRADIENT_TOLERANCE)
