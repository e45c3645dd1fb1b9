"""Completes the DeepSpeed JSON: fills what is `"auto"` or absent, and lists every conflict with the configuration.

The configuration sets batch sizes, clipping, optimiser and schedule. The JSON sets ZeRO, precision and communication.
`"bf16": {"enabled": "auto"}` and the same for `fp16` follow the device: bf16 where it is supported, else fp16 on a GPU,
else float32. DeepSpeed's timer of the throughput is off unless the JSON turns it on.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from mvptr_ds.batch_size import micro_batch_size
from mvptr_ds.config import OptimConfig, TrainConfig
from mvptr_ds.user_io.user_files import expanded, parse_json, read_text

# the packaged JSONs; they stand at the top of the repository, and beside the package in a checkout
_FOLDERS = (Path(__file__).resolve().parent / "ds_configs", Path(__file__).resolve().parents[1] / "ds_configs")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def packaged_ds_configs() -> dict[str, Path]:
    """Returns the packaged JSONs by their names, such as z2."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Reads the JSON object in `path`, or in the packaged JSON of this name where there is no such file.

    Raises:
        ValueError: there is neither, it is no JSON object, or a key comes twice in it.
    """
    path = Path(expanded(str(path)))
    if not path.is_file():
        packaged = packaged_ds_configs()
        name = str(path).removesuffix(".json")
        if name not in packaged:
            meant = f"; did you mean {path.stem}?" if path.stem in packaged else ""
            known = ", ".join(packaged)
            raise ValueError(f"there is no DeepSpeed JSON {str(path)!r}; the packaged ones are {known}{meant}")
        path = packaged[name]
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def fill_ds_config(
    content: dict[str, Any],
    train: TrainConfig,
    optim: OptimConfig,
    num_ranks: int,
    *,
    bf16_supported: bool,
    fp16_supported: bool,
) -> dict[str, Any]:
    """Returns the JSON that the engine gets.

    Raises:
        ValueError: every disagreement at once, each with both values.
    """
    filled = copy.deepcopy(content)
    problems: list[str] = []
    ours = {
        "train_batch_size": ("train.batch_size", train.batch_size),
        "train_micro_batch_size_per_gpu": (
            "train.batch_size / (ranks x train.accumulation_steps)",
            micro_batch_size(train, num_ranks),
        ),
        "gradient_accumulation_steps": ("train.accumulation_steps", train.accumulation_steps),
        "gradient_clipping": ("optim.clip_norm", optim.clip_norm),
    }
    for key, (name, value) in ours.items():
        given = filled.get(key, "auto")
        if given not in ("auto", value):
            problems.append(f'{key} is {given!r}, but {name} is {value!r}: write "auto" in the JSON or change {name}')
        filled[key] = value
    for key, owner in (("optimizer", "the section optim"), ("scheduler", "learning_rate and warmup_steps of a stage")):
        if key in filled:
            problems.append(f"{key!r} is set in the JSON, but belongs to {owner}: remove it from the JSON")
    # deepspeed 0.19.8 waits for the device twice a micro-batch to time a throughput that nobody reads
    filled.setdefault("timers", {"throughput": {"enabled": False}})
    problems += _fill_precision(filled, bf16_supported=bf16_supported, fp16_supported=fp16_supported)
    problems += _zero_problems(filled, optim)
    if optim.name == "lamb":  # under ZeRO, DeepSpeed takes only optimisers that it knows, unless it is forced
        filled["zero_allow_untested_optimizer"] = True
    problems += [f'{key} is "auto", which nothing here fills: give a value' for key in _autos(filled)]
    if problems:
        raise ValueError("the DeepSpeed JSON does not fit the configuration:\n  - " + "\n  - ".join(problems))
    return filled


def precision_supported() -> tuple[bool, bool]:
    """Returns whether this device trains in bf16 and in fp16 at full speed. A CPU counts as neither."""
    if not torch.cuda.is_available():
        return False, False
    return torch.cuda.is_bf16_supported(including_emulation=False), True


def precision_of(filled: dict[str, Any]) -> str:
    """Returns the precision that the engine computes in: bf16, fp16 or float32."""
    return next((name for name in ("bf16", "fp16") if filled[name].get("enabled")), "float32")


def zero_stage_of(filled: dict[str, Any]) -> int:
    """Returns what ZeRO divides among the ranks: 1 the optimiser's state, 2 also gradients, 3 also weights."""
    return int(filled["zero_optimization"]["stage"])


def optimizer_device(filled: dict[str, Any], device: torch.device) -> torch.device:
    """Returns where the optimiser steps: on the engine's device, or on the host where the JSON offloads it."""
    offload = filled["zero_optimization"].get("offload_optimizer") or {}
    return device if offload.get("device", "none") == "none" else torch.device("cpu")


def _zero_problems(filled: dict[str, Any], optim: OptimConfig) -> list[str]:
    """Lists settings of ZeRO that deepspeed 0.19.8 gets wrong, and LAMB with stage 3, which is not supported."""
    zero = filled.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [f'zero_optimization is {zero!r}, expected an object such as {{"stage": 2}}']
    problems = []
    stage = zero.get("stage", 0)
    if stage == 0:
        problems.append(
            "zero_optimization.stage is 0, with which DeepSpeed steps on gradients that are not finite and keeps no "
            "float32 weights beside those of bf16: take stage 1 (--deepspeed z1), which cuts the least"
        )
    elif (type(stage) is not int or stage not in (1, 2, 3)) and stage != "auto":
        problems.append(f"zero_optimization.stage is {stage!r}; choose from 1, 2, 3")
    if stage == 3 and optim.name == "lamb":
        problems.append(
            "zero_optimization.stage is 3, but optim.name is 'lamb', which steps stages 1 and 2: take "
            "--deepspeed z2 or optim.name=adamw"
        )
    if zero.get("round_robin_gradients"):
        problems.append(
            "zero_optimization.round_robin_gradients is true, with which DeepSpeed loses track of where each float32 "
            "weight lies, so that checkpoints would hold wrong ones: remove it"
        )
    unchecked = {
        "zero_optimization.compute_grad_norm": zero.get("compute_grad_norm", True),
        "bf16.check_grad_overflow": filled["bf16"].get("check_grad_overflow", True),
    }
    problems += [
        f"{key} is false, with which DeepSpeed steps on gradients that are not finite: remove it"
        for key, value in unchecked.items()
        if value is False
    ]
    return problems


def _fill_precision(filled: dict[str, Any], *, bf16_supported: bool, fp16_supported: bool) -> list[str]:
    bf16, fp16 = filled.setdefault("bf16", {}), filled.setdefault("fp16", {})
    if bf16.get("enabled") == "auto":
        bf16["enabled"] = bf16_supported and fp16.get("enabled") is not True
    if fp16.get("enabled") == "auto":
        fp16["enabled"] = fp16_supported and not bf16.get("enabled")
    problems = []
    if bf16.get("enabled") and fp16.get("enabled"):
        problems.append("bf16 and fp16 are both enabled: keep one")
    if fp16.get("enabled") and not fp16_supported:
        problems.append('fp16 is enabled, but this machine has no GPU: write "auto" or false')
    if bf16.get("enabled") and torch.cuda.is_available() and not bf16_supported:
        name = torch.cuda.get_device_name()
        problems.append(f'bf16 is enabled, but {name} does not compute it: write "auto" (fp16 is then used)')
    return problems


def _autos(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict):
        return [name for key, value in node.items() for name in _autos(value, f"{prefix}.{key}" if prefix else key)]
    return [prefix] if node == "auto" else []
