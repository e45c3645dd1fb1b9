"""Plans: formulas against what torch keeps, totals by hand, the command's table, JSON and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mvptr_ds.benchmarks.gpu_step.pace import PaceOfGpu
from mvptr_ds.config import Config, load_config
from mvptr_ds.data.collate import collate
from mvptr_ds.ds_config import load_ds_config
from mvptr_ds.errors import DataError
from mvptr_ds.monitoring.flops import last_layer_rows
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.objectives.table import Chosen
from mvptr_ds.planning.cost import GPUS, Assumptions, EngineCost, MicroBatchCost, compute_time, traffic
from mvptr_ds.planning.lengths import Ranges, drawn, measured
from mvptr_ds.planning.measured import MeasuredStep, nearest, read_measured
from mvptr_ds.planning.memory import Zero, activation_bytes, largest_state_bytes, state_bytes
from mvptr_ds.planning.plan import (
    PUBLISHED_PHRASES,
    PUBLISHED_ROWS,
    Cluster,
    Pace,
    groups_of,
    make_plan,
    task_without_memory,
)
from tests.conftest import REPO
from tests.support.tiny_models import sample, tiny_model
from tests.support.tools import run_tool

Z2 = load_ds_config(REPO / "ds_configs/z2.json")
BASE = load_config("base")
SHARE = {"parameters", "gradients", "optimizer"}


def saved_bytes(task: PretrainingLosses, lengths: tuple[int, int, int, int]) -> tuple[int, Lengths]:
    """What autograd keeps of a forward pass, weights aside: unique storages of all saved tensors."""
    tokens, phrases, tags, regions = lengths
    batch = collate([sample(i, i, tokens, phrases, tags, regions) for i in range(8)])
    weights = {p.untyped_storage().data_ptr() for p in task.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = task(batch, step=0)  # held: what is saved must not be freed and its address used again
    assert output.loss.requires_grad
    return sum(kept.values()), Lengths.of(batch)


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.1)])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, dropout: float) -> None:
    """Within 10 %: word heads, losses and embeddings' indices are left out, and small beside so wide a model."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    layers = {"num_text_layers": 3, "num_visual_layers": 2, "num_cross_layers": 2}
    model = tiny_model(**sizes, **layers, hidden_dropout=dropout, attention_dropout=0.0).to(dtype)  # type: ignore[arg-type]
    weights = Config().stage2.weights
    task = PretrainingLosses(
        model, STAGES["stage2"], weights, Config().task, max_text_slots=16, max_steps=4, seed=0
    ).train()
    found, lengths = saved_bytes(task, (8, 3, 4, 12))
    parts = frozenset(task.trained_parts())
    masks = {"checkpointing": False, "num_groundings": 4, "mask_bytes": dtype.itemsize}  # of a CPU
    read = last_layer_rows(lengths, task.objectives)
    planned = activation_bytes(lengths, model.config, parts, 2, read, dtype.itemsize, **masks)  # type: ignore[arg-type]
    assert planned == pytest.approx(found, rel=0.1)


def test_a_partition_keeps_whole_what_reaches_into_it() -> None:
    """Two groups of 10 + 6 and 3 elements over two ranks: flat buffers of 16 and 4, parts of 8 and 2."""
    zero = Zero.of({"zero_optimization": {"stage": 2}})
    first, second = (state_bytes([[10, 6], [3]], 5, 2, zero, 2, rank) for rank in range(2))
    assert first.parameters == second.parameters == 2 * (16 + 4 + 5)
    assert first.optimizer == second.optimizer == 12 * (8 + 2)
    assert (first.gradients, second.gradients) == (2 * (10 + 3), 2 * (10 + 6 + 3))
    assert largest_state_bytes([[10, 6], [3]], 5, 2, zero, 2) == second


def test_stages_divide_more_and_more() -> None:
    groups, frozen = [[1000, 300_000, 200_000], [100]], 0
    held = {s: state_bytes(groups, frozen, 2, Zero.of({"zero_optimization": {"stage": s}}), 8, 0) for s in (1, 2, 3)}
    assert held[1].total >= held[2].total > held[3].total
    assert held[1].all_gradients > held[2].all_gradients
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    on_host = state_bytes(groups, frozen, 2, Zero.of(offload), 8, 0)
    assert on_host.optimizer == 0 and on_host.on_host == held[2].optimizer


def test_a_single_rank_has_no_buckets_and_flat_gradients() -> None:
    """What optim/zero_flat_gradients.py spares it; offloading and stage 3 stay as DeepSpeed has them."""
    zero = Zero.of({"zero_optimization": {"stage": 2, "reduce_bucket_size": 100}})
    alone, pair = (state_bytes([[10, 6], [4]], 0, 2, zero, num, 0) for num in (1, 2))
    assert (alone.buckets, pair.buckets) == (0, 2 * 100)
    assert (alone.step, pair.step) == (4 * 16, (4 + 2) * 8)
    assert alone.gradients == alone.all_gradients == 2 * 20
    offload = {"stage": 2, "reduce_bucket_size": 100, "offload_optimizer": {"device": "cpu"}}
    assert state_bytes([[10, 6], [4]], 0, 2, Zero.of({"zero_optimization": offload}), 1, 0).buckets == 2 * 100


def test_the_published_model_has_its_parameters() -> None:
    """The published size: 198,660,471 with tied decoders; ours has a phrase head beside it."""
    task = task_without_memory(BASE, "stage2", (PUBLISHED_ROWS, PUBLISHED_PHRASES))
    groups, frozen = groups_of(task, 0.01)
    phrase_head = sum(p.numel() for name, p in task.model.named_parameters() if name.startswith("phrase_head."))
    assert frozen == phrase_head
    assert sum(map(sum, groups)) == 198_660_471


def test_what_is_sent() -> None:
    lengths = Lengths(
        samples=4, text=40, text_pairs=0, visual=0, visual_pairs=0, cross=0, cross_pairs=0, regions=80
    )  # fmt: skip
    zero = Zero.of({"zero_optimization": {"stage": 2}})
    chosen = Chosen.of(("vsc", "itm", "wpg"), aligned=True, wpg_states="uni")
    sent = traffic(1000, 16, 2, zero, 4, 2, lengths, chosen)
    assert sent.gradients == 2 * 1000 * 2 * 0.75  # each micro-batch's are reduced
    assert sent.parameters == 1000 * 2 * 0.75
    assert sent.contrast == 2 * 4 * 16 * 0.75 * 16 * 4  # two states and their gradients, of 16 samples, float32
    assert sent.exchanged == 2 * 2 * ((40 + 80) / 2 + 80) * 0.75 * 16 * 2
    alone = traffic(1000, 16, 2, zero, 1, 2, lengths, chosen)
    assert alone.total == 0.0


def test_drawn_lengths_are_within_their_ranges_and_cuts() -> None:
    mean = drawn(Ranges(), BASE.data, BASE.stage2.masking, with_images=False)
    assert mean.samples == 1.0 and mean.text == pytest.approx(14 + 2.5 + 2, abs=0.1)
    assert mean.regions == pytest.approx(35, abs=0.2) and mean.cross == pytest.approx(mean.text + mean.regions)
    assert mean.cross_pairs > mean.cross**2 and mean.picked_tags == pytest.approx(0.15 * 13, abs=0.1)
    assert 0.8 * mean.regions < mean.scored_regions < mean.regions


def test_lengths_and_loader_measured_on_shards(tmp_path: Path) -> None:
    from mvptr_ds.demo.build import build_demo_shards

    build_demo_shards(tmp_path / "shards", "shapes", 48, 4, seed=0, num_processes=1)
    names = {"train": "train", "word_vocab": "word_vocab.txt", "phrase_vocab": "phrase_vocab.json"}
    paths = [f"data.{key}={tmp_path / 'shards' / name}" for key, name in names.items()]
    mean, per_core_s = measured(load_config("demo", paths), "stage2", 20)
    assert mean.samples == 1.0 and 4 < mean.text < 34 and 2 <= mean.regions <= 10 and per_core_s > 1


def pace(samples: int, precision: str) -> MicroBatchCost:
    """100 samples take 12 ms of kernels and 1,700 operations of the host, which at 25 us take 42 ms."""
    assert precision == "bf16"
    return MicroBatchCost(flop=5e10 * samples, device_s=1.2e-4 * samples, operations=1_700)


def plan_of(num_nodes: int, batch_size: int, ds_content: dict[str, Any] = Z2, **assumed: float) -> dict[str, Any]:
    config = load_config("base", [f"train.batch_size={batch_size}"])
    task = task_without_memory(config, "stage2", (PUBLISHED_ROWS, PUBLISHED_PHRASES))
    mean = drawn(Ranges(), config.data, config.stage2.masking, with_images=False)
    cluster = Cluster(GPUS["A100"], num_nodes, 8)
    return make_plan(
        config, "stage2", task, ds_content, cluster, mean, Assumptions(**assumed), num_samples=1e6, pace=Pace(pace)
    )


def test_a_plan_of_the_base_model() -> None:
    plan, larger = plan_of(1, 1024), plan_of(4, 4096)
    assert plan["precision"] == "bf16" and plan["micro_batch"] == larger["micro_batch"] == 128
    assert plan["parameters_gib"] == pytest.approx(2 * 198.7e6 / 2**30, rel=0.01)
    assert plan["optimizer_gib"] == pytest.approx(12 * 198.7e6 / 8 / 2**30, rel=0.01)
    assert larger["optimizer_gib"] == pytest.approx(plan["optimizer_gib"] / 4, rel=0.01)
    assert plan["fits"] and plan["total_gib"] < 20
    assert larger["exposed_communication_s"] > plan["exposed_communication_s"]  # the network is slower than NVLink
    assert plan["time_is"] == "modelled" and plan["calibration"] == 1.0
    assert plan["compute_s"] == plan["host_s"] > plan["device_s"]
    assert plan_of(1, 1024, host_us=10.0)["host_s"] == pytest.approx(0.4 * plan["host_s"])
    full = plan_of(1, 8192)
    assert full["compute_s"] == full["device_s"] > full["host_s"] == plan["host_s"]
    assert full["mfu_frac"] == pytest.approx(full["tflop_per_step"] / 312 / full["step_s"])
    hours = 1e6 / plan["samples_per_s"] * plan["gpus"] / 3600
    assert plan["gpu_hours"] == pytest.approx(hours)
    assert not plan_of(1, 65536)["fits"]


def test_communication_hides_only_where_the_json_asks_for_it() -> None:
    overlapping = {**Z2, "zero_optimization": {**Z2["zero_optimization"], "overlap_comm": True}}
    plain, hidden = plan_of(4, 4096), plan_of(4, 4096, overlapping)
    assert hidden["compute_s"] == plain["compute_s"]
    assert 0 < hidden["exposed_communication_s"] < plain["exposed_communication_s"]


def test_what_the_engine_adds() -> None:
    """One rank spares the hooks; of two, each steps half of the weights and copies all gradients twice."""
    alone, pair = (EngineCost.of(1_000, 10, num, 2) for num in (1, 2))
    assert (alone.bytes, alone.hook_operations, alone.step_operations) == (44_000, 6, 26)
    assert (pair.bytes, pair.hook_operations, pair.step_operations) == (22_000 + 24_000, 26, 90)
    gpu, assumed = GPUS["H200"], Assumptions(bandwidth_efficiency=0.5, host_us=100.0)
    micro = MicroBatchCost(1e12, 0.002, 1_000)
    took = compute_time(micro, EngineCost(2.4e9, 10, 20), 3, gpu, assumed, 2.0)
    assert took.device_s == pytest.approx(3 * 0.002 + 0.001) and took.host_s == pytest.approx((3 * 1_010 + 20) * 1e-4)
    assert took.total_s == 2 * took.host_s
    assert micro.scaled_to(3e12) == MicroBatchCost(3e12, pytest.approx(0.006), 1_000)


# --- the time of a step: counted, modelled, and calibrated by a measurement

SMALL = [
    "model.hidden_size=64", "model.num_attention_heads=4", "model.intermediate_size=128", "visual.feature_dim=32",
    "model.num_text_layers=1", "model.num_visual_layers=1", "model.num_cross_layers=1",
]  # fmt: skip


def bench_output(path: Path, **changes: Any) -> Path:
    """What bench_gpu.py prints of a step of 4 samples of the small model, and of a way that was left out."""
    step = {
        "stage": "stage2", "samples": 4, "way": "packed", "precision": "bf16", "ms_per_step": 500.0, "config": "base",
    } | changes  # fmt: skip
    results = [{**step, "way": "flash", "ms_per_step": None}, step, {**step, "way": "published", "ms_per_step": 900.0}]
    report = {"gpu": "NVIDIA A100-SXM4-80GB", "overrides": SMALL, "results": results}
    path.write_text(f"stage  samples\nstage2  4\n{json.dumps(report)}\n", encoding="utf-8")
    return path


def paced(steps: list[MeasuredStep], gpu: str = "A100", **assumed: float) -> PaceOfGpu:
    return PaceOfGpu(load_config("base", SMALL), "stage2", GPUS[gpu], Assumptions(**assumed), steps)


def test_a_faster_gpu_takes_less_and_the_host_as_long() -> None:
    slow = paced([], "A10", bandwidth_efficiency=1e-3).cost(4, "bf16")
    fast = paced([], "H200").cost(4, "bf16")
    assert slow.flop == fast.flop > 0 and slow.operations == fast.operations > 500
    assert 0 < 2 * fast.device_s < slow.device_s


def test_the_measured_step_is_planned_as_it_was_measured(tmp_path: Path) -> None:
    steps = read_measured(bench_output(tmp_path / "bench.json"))
    assert [str(step) for step in steps] == ["stage2, 4 samples, bf16: 500 ms on NVIDIA A100-SXM4-80GB"]
    pace = paced(steps)
    factor, how = pace.calibration("bf16", 4, 1, 1)
    engine = EngineCost.of(*_trained(), 1, 1)
    modelled = compute_time(pace.cost(4, "bf16"), engine, 1, GPUS["A100"], Assumptions(), 1.0)
    assert how == "measured" and factor * modelled.total_s == pytest.approx(0.5)
    for others in (("bf16", 8, 1, 1), ("bf16", 4, 8, 1), ("bf16", 4, 1, 2)):
        assert pace.calibration(*others) == (factor, "calibrated")
    assert paced([]).pace().calibration("bf16", 4, 1, 1) == (1.0, "modelled")


def _trained() -> tuple[int, int]:
    task = task_without_memory(load_config("base", SMALL), "stage2", (PUBLISHED_ROWS, PUBLISHED_PHRASES))
    groups, _ = groups_of(task, 0.01)
    return sum(map(sum, groups)), sum(map(len, groups))


def test_the_nearest_step_calibrates() -> None:
    def step(stage: str, samples: int, gpu: str = "NVIDIA H100 80GB HBM3") -> MeasuredStep:
        return MeasuredStep(gpu, stage, samples, "bf16", 0.1, "base", ())

    steps = [step("stage2", 256), step("stage2", 1024), step("stage1", 512), step("stage2", 512, "NVIDIA H100 PCIe")]
    assert nearest(steps, "H100", "bf16", "stage2", 400) == steps[0]
    assert nearest(steps, "H100", "bf16", "stage2", 600) == steps[1]
    assert nearest(steps, "H100", "bf16", "stage1", 1024) == steps[2]
    with pytest.raises(DataError, match="none of A100 in bf16"):
        nearest(steps, "A100", "bf16", "stage2", 256)
    with pytest.raises(DataError, match="none of H100 in fp16"):
        nearest(steps, "H100", "fp16", "stage2", 256)


def test_what_is_no_output_of_the_bench_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    for text in ("", "no JSON", "[]", '{"gpu": "NVIDIA H200"}', '{"results": [{"way": "packed", "ms_per_step": 3}]}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="is not the JSON of tools/bench/bench_gpu"):
            read_measured(path)
    with pytest.raises(DataError, match="no step of 'packed' was timed on a GPU there"):
        read_measured(bench_output(path, ms_per_step=None))


def test_the_command_prints_a_table_and_json() -> None:
    done = run_tool(
        "plan_run.py", "--gpu", "V100", "--nodes", "1,2", "--micro-batch", "32", "--host-us", "30", "run.stages=[1]"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [(p["gpus"], p["batch_size"], p["precision"], p["stage"]) for p in report["plans"]] == [
        (8, 256, "fp16", "stage1"),
        (16, 512, "fp16", "stage1"),
    ]
    assert report["assumed"]["host_us"] == 30
    assert [p["time_is"] for p in report["plans"]] == ["modelled", "modelled"]
    for said in ("optimiser", "MFU", "loader cores a GPU", "host_us 30", "73,599 phrases", "timed on no GPU"):
        assert said in done.stdout


def test_the_command_says_what_it_was_calibrated_with(tmp_path: Path) -> None:
    path = bench_output(tmp_path / "bench.json")
    given = "--gpu", "A100", "--gpus-per-node", "1", "--micro-batch", "4", "--measured", path
    done = run_tool("plan_run.py", *given, *SMALL)
    assert done.returncode == 0, done.stderr
    assert f"calibrated with {path}: stage2, 4 samples, bf16: 500 ms on NVIDIA A100" in done.stdout
    (plan,) = json.loads(done.stdout.splitlines()[-1])["plans"]
    assert plan["time_is"] == "measured" and plan["step_s"] == pytest.approx(0.5, rel=0.01)
    wrong = run_tool("plan_run.py", "--gpu", "H200", "--micro-batch", "4", "--measured", path, *SMALL)
    assert wrong.returncode == 1 and "none of H200 in bf16" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--gpu", "A1000"], 1, "--gpu is 'A1000'; choose from V100, A100, H100,"),
        (["--nodes", "one"], 2, "--nodes is 'one', must be numbers such as 1 or 1,4,16"),
        (["--nodes", "0"], 2, "--nodes is 0, must be at least 1"),
        (["train.batch_size=100"], 1, "train.batch_size=100 cannot be shared by 8 ranks"),
        (["--measure", "10", "data.train=nowhere"], 1, "nowhere (data.train) holds no .tar file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], code: int, message: str) -> None:
    done = run_tool("plan_run.py", *arguments)
    assert done.returncode == code and message in done.stderr.splitlines()[-1], done.stderr
