"""What the modules of the downstream tasks compute for a recorded case, by the published code's names.

Legend: B samples, T text slots, G tag slots, R regions, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mvptr_ds.data.collate import Batch
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.convert_finetuned import to_finetuned
from mvptr_ds.model.packed import Packed, unjoin
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.module import HEAD, TaskModule
from mvptr_ds.objectives.passes import AlignedPass, PairPass
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.parity.recorded_batch import in_slots, masks
from mvptr_ds.tasks import TASKS
from mvptr_ds.tasks.downstream import Downstream
from mvptr_ds.tasks.pair_module import PairModule
from mvptr_ds.tasks.vqa import VqaModule

STATES = ("txt_encoder", "vis_encoder", "sequence_output", "pooled")  # recorded for some cases only


# --- retrieval


def recorded_draws(module: PretrainingLosses, dice_index_B: Tensor) -> RandomDraws:
    """Returns draws by which the first half of `dice_index_B` keeps its text, and the rest its image."""
    num = len(dice_index_B)
    draws = RandomDraws.keyed(0, 0, 0, num, module.max_text_slots)
    draws.itm_takes_image_N[:] = False
    draws.itm_takes_image_N[dice_index_B[: num // 2]] = True
    return draws


def retrieval_losses(module: PretrainingLosses, batch: Batch, draws: RandomDraws) -> dict[str, Tensor]:
    """Returns `loss`, `loss_vsc` and `loss_itm`, with gradient."""
    parts = {f"loss_{name}": part.sum / part.count for name, part in module.sums(batch, draws).items()}
    return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def retrieval_tensors(
    module: PretrainingLosses, batch: Batch, draws: RandomDraws, dice_index_B: Tensor
) -> dict[str, Tensor]:
    """Returns what was recorded of retrieval; their class 1 is a match, ours is class 0."""
    outputs = module.outputs(batch, draws)
    assert isinstance(outputs, AlignedPass)
    model, candidates = module.model, outputs.candidates("global")
    matched, mismatched = outputs.cross
    own_B = torch.arange(len(batch))
    other_image_B = candidates.negative_images("hardest", draws.itm_N, outputs.scale)
    other_text_B = candidates.negative_texts("hardest", draws.itm_N, outputs.scale)
    text_B = torch.where(draws.itm_takes_image_N, own_B, other_text_B)
    image_B = torch.where(draws.itm_takes_image_N, other_image_B, own_B)
    pooled_BD, hard_BD = model.pool(matched.text), model.pool(mismatched.text)[dice_index_B]
    states = candidates.local
    return {
        "global_txt": states.text_ND,
        "global_img": states.image_ND,
        "sim_mat": states.text_ND @ states.image_ND.T,
        "hard_txt_index": text_B[dice_index_B],
        "hard_img_index": image_B[dice_index_B],
        "hard_pooled": hard_BD,
        "logits_fine": model.itm_logits(pooled_BD).flip(-1),
        "logits_itm": model.itm_logits(torch.cat([pooled_BD, hard_BD])).flip(-1),
        "itm_labels": torch.ones(2 * len(batch), dtype=torch.int64).index_fill(0, own_B + len(batch), 0),
        **_states(outputs, batch, first_crossing=None),
    }


# --- the tasks with a head


def pair_tensors(module: PairModule, batch: Batch) -> dict[str, Tensor]:
    """Returns logits, how right the predictions are, and all states; mode 2 of referring records sigmoids."""
    outputs, task = module.outputs(batch), TASKS[module.name]
    assert isinstance(task, Downstream)
    logits = module.logits(outputs)
    if module.head_settings.get("score") == "dot":
        logits = logits.sigmoid()
    first_crossing = module.crossing_tags_from if isinstance(module, VqaModule) else None
    out = {"logits": logits, **_states(outputs, batch, first_crossing)}
    predictions = list(task.predict(module, batch))
    if module.name == "referring":
        chosen = [p.labels["overlaps"][int(p.answer)] for p in predictions]
        return out | {"chosen_iou": torch.tensor(chosen, dtype=torch.float64)}
    name = {"vqa": "scores", "entailment": "correct"}[module.name]
    return out | {name: torch.tensor([p.score for p in predictions], dtype=torch.float64)}


# --- what both have


def _states(outputs: PairPass, batch: Batch, first_crossing: int | None) -> dict[str, Tensor]:
    """Returns the states of all three encoders at all slots, of which the modules compute those that they read."""
    model, packed = outputs.model, outputs.packed
    num_text, num_tags = batch.text_ids_BT.shape[1], batch.tag_ids_BG.shape[1]
    num_regions = batch.region_mask_BR.shape[1]
    embedded = model.embed_regions(packed.features, None, packed.geometry)
    tags, regions = model.encode_visual(packed.tag_ids, embedded)
    text, crossing = model.encode_cross(outputs.text, outputs.crossing_regions())
    first = num_tags if first_crossing is None else first_crossing
    crossing_tags, crossed = unjoin(crossing, [max(0, length - first) for length in tags.lengths])

    def beside(*parts: tuple[Packed, int]) -> Tensor:
        return torch.cat([in_slots(states, num_slots) for states, num_slots in parts], 1)

    return {
        "txt_encoder": in_slots(outputs.text, num_text),
        "vis_encoder": beside((tags, num_tags), (regions, num_regions)),
        "sequence_output": beside((text, num_text), (crossing_tags, num_tags - first), (crossed, num_regions)),
        "pooled": model.pool(text),
    }


def masks_of(module: TaskModule, batch: Batch) -> dict[str, Tensor]:
    """Returns where recorded tensors are of real slots."""
    out = masks(batch)
    first = module.crossing_tags_from if isinstance(module, VqaModule) else None
    if first is not None:
        parts = [batch.text_mask_BT, batch.tag_mask_BG[:, first:], batch.region_mask_BR]
        out["sequence_output"] = torch.cat(parts, 1)
    if isinstance(module, PairModule) and module.name == "referring":
        out["logits"] = batch.region_mask_BR
    return out


def gradients(module: TaskModule, task: str) -> dict[str, Tensor]:
    """Returns the gradients that there are, by the published names."""
    grads = {name: p.grad for name, p in module.named_weights() if p.grad is not None}
    config = module.model.config
    assert isinstance(config, MvptrConfig)
    return to_finetuned(_part(grads, head=False), _part(grads, head=True), config, task)


def _part(grads: Mapping[str, Tensor], head: bool) -> dict[str, Tensor]:
    return {name.removeprefix(HEAD): grad for name, grad in grads.items() if name.startswith(HEAD) == head}
