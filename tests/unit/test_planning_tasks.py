"""Plans of the downstream tasks: what is trained, the head among it, against real modules and by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mvptr_ds.builders import model_config
from mvptr_ds.config import Config, load_config
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.schema import Record, Region
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.planning.lengths import Ranges, drawn
from mvptr_ds.planning.plan import PUBLISHED_PHRASES, PUBLISHED_ROWS, groups_of, needs_of, task_without_memory
from mvptr_ds.tasks import DOWNSTREAM, TASKS
from tests.support.tiny_models import whole_batch
from tests.support.tools import run_tool

NAMES = [task.name for task in DOWNSTREAM]
SMALL = [
    "visual.feature_dim=5", "data.phrase_vocab=null", "model.hidden_size=16", "model.num_attention_heads=2",
    "model.intermediate_size=32", "model.num_text_layers=1", "model.num_visual_layers=1", "model.num_cross_layers=2",
]  # fmt: skip
D = 768


def num_trained(config: Config, stage: str, vocab: tuple[int, int] | None = None) -> tuple[int, int]:
    groups, frozen = groups_of(task_without_memory(config, stage, vocab), 0.01)
    return sum(map(sum, groups)), frozen


@pytest.mark.parametrize("overrides", [[], ["referring.cross_layers=1", "vqa.head=linear"]])
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_trains_what_gets_a_gradient(name: str, overrides: list[str], tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(["dog", "puppy", "cat"]), encoding="utf-8")
    config = load_config("base", [*SMALL, f"vqa.answers={answers}", *overrides])
    words = WordPiece()
    model, task = Mvptr(model_config(config, Vocabs(words, PhraseVocab.empty(words)))), TASKS[name]
    module = task.build(config, model, seed=0)
    module.freeze_untrained()
    needs, batch = task.sample_needs(config), whole_batch()
    labels = dict(needs.labels)
    if needs.read_labels is not None:
        regions = tuple(Region((8.0 * n, 8.0, 64.0, 48.0), "dog") for n in range(4))
        labels = needs.read_labels(labels, Record("1", 128, 128, (), regions))
    batch = dataclasses.replace(batch, labels=(labels,) * len(batch), phrase_mask_BT=batch.phrase_mask_BT & False)
    module(batch, 0).loss.backward()
    reached = sum(p.numel() for _, p in module.named_weights() if p.grad is not None)
    everything = sum(p.numel() for _, p in module.named_weights())
    assert num_trained(config, name) == (reached, everything - reached)


def test_heads_by_hand() -> None:
    """A probe trains the head alone: a dense layer, LayerNorm and a row with its bias for each answer, and so on."""
    wanted = {
        "vqa": (D * D + D) + 2 * D + 3_129 * (D + 1),
        "entailment": 3 * D + 3,
        "referring": D * D + D,
        # two projections, the temperature, the pooler, and whether a pair matches
        "retrieval": 2 * D * D + 1 + (D * D + D) + (2 * D + 2),
    }
    for name, head in wanted.items():
        config = load_config("base", [f"{name}.probe=true"])
        assert num_trained(config, name, (PUBLISHED_ROWS, PUBLISHED_PHRASES))[0] == head, name
    linear = load_config("base", ["vqa.probe=true", "vqa.head=linear"])
    assert num_trained(linear, "vqa", (PUBLISHED_ROWS, PUBLISHED_PHRASES))[0] == 3_129 * (D + 1)


def test_a_given_list_of_answers_has_its_own_length(tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text('["dog", "cat"]', encoding="utf-8")
    known, unknown = (load_config("base", [f"vqa.answers={path}"]) for path in (answers, tmp_path / "not-made-yet"))
    vocab = PUBLISHED_ROWS, PUBLISHED_PHRASES
    difference = num_trained(unknown, "vqa", vocab)[0] - num_trained(known, "vqa", vocab)[0]
    assert difference == (3_129 - 2) * (D + 1)


def test_the_layers_of_the_cross_encoder_that_run_are_counted() -> None:
    """Half of the layers: half of what the encoder costs but for the last layer, of which some rows are read."""
    lengths = Lengths(
        samples=4, text=40, text_pairs=400, visual=60, visual_pairs=900, cross=80, cross_pairs=1600, regions=40
    )  # fmt: skip
    flops = {}
    for layers in (3, 4, 6):
        task = task_without_memory(load_config("base", [f"referring.cross_layers={layers}"]), "referring", (40_000, 9))
        flops[layers] = StepFlops(task, 1).of_lengths(lengths)
    assert flops[6] - flops[4] == pytest.approx(2 * (flops[4] - flops[3]), rel=1e-9)
    a_layer = 80 * (2 * 4 * D**2 + 2 * 2 * D * 3072) + 4 * D * 1600  # projections, feed-forward, attention
    assert flops[4] - flops[3] == pytest.approx(3 * a_layer, rel=1e-9)


def test_tags_behind_the_question_lengthen_it() -> None:
    config = load_config("base", ["vqa.tags_in_text=true", "data.max_text_slots=133"])
    needs = needs_of(config, "vqa")
    assert needs.tags_in_text and needs.masking.word_prob == 0
    plain, behind = (drawn(Ranges(), config.data, needs.masking, False, tags) for tags in (False, True))
    assert behind.text == pytest.approx(plain.text + plain.regions)
    assert behind.cross == pytest.approx(behind.text + behind.regions)
    short = drawn(Ranges(), load_config("base").data, needs.masking, False, True)
    assert short.text <= 40


@pytest.mark.parametrize("name", NAMES)
def test_the_command_plans_every_task(name: str) -> None:
    done = run_tool("plan_run.py", "--stage", name, "--gpus-per-node", "1", "--micro-batch", "32")
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout.splitlines()[-1])["plans"]
    assert plan["stage"] == name and plan["micro_batch"] == 32 and plan["fits"]
    assert ("no list of answers here: planned with the published one's 3,129 answers" in done.stdout) == (name == "vqa")
