"""Each purpose has a stream of random numbers of its own, and nothing else makes a generator in a run."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch

from mvptr_ds.checkpoints.rng import begin_rng
from mvptr_ds.streams import Stream, generator, seed_sequence
from tests.conftest import REPO

PACKAGE = REPO / "mvptr_ds"
MAKERS = {"default_rng", "SeedSequence", "RandomState", "PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937"}
MAKERS |= {"Random", "seed", "manual_seed", "manual_seed_all"}
ELSEWHERE = {
    "benchmarks/gpu_step/drawn_batch.py": "a batch to count a step with, always the same",
    "benchmarks/gpu_step/engine_step.py": "weights of a model that only counts",
    "builders.py": "the first weights",
    "checkpoints/rng.py": "torch's own state, for dropout",
    "corpus/concepts/templates.py": "what the shipped parser was trained on",
    "commands/importing.py": "weights that a published checkpoint lacks",
    "corpus/preview/measures.py": "the records of a page",
    "demo/expressions.py": "the items of the demo's tasks, which stay as they are",
    "demo/questions.py": "the same",
    "demo/scene.py": "the scenes of the demo, which stay as they are",
    "demo/statements.py": "the items of the demo's tasks, which stay as they are",
    "parity/layouts.py": "nothing: all probabilities are 0",
    "planning/lengths.py": "lengths to plan with, always the same",
    "preflight/sample_checks.py": "a masking that nobody trains on",
    "streams.py": "here",
    "tasks/pair_module.py": "the first weights of a head",
    "monitoring/timing.py": "numbers to measure a device with",
    "inference/samples.py": "nothing: all probabilities are 0",
}


def test_numbers_differ_and_stay() -> None:
    """A resume with a later version must draw what the run began with."""
    assert {stream.name: stream.value for stream in Stream} == {
        "ROTATION": 1, "BLOCKS": 2, "WINDOW": 3, "MIXTURE": 4, "BUCKETS": 5,
        "SAMPLE": 11, "SUBSTITUTE": 12, "STEP": 21, "PERMUTED_REGIONS": 31, "NEW_RANKS": 32,
        "OTHER_PICTURES": 33,
    }  # fmt: skip
    assert len({stream.value for stream in Stream}) == len(Stream.__members__)  # an alias is a member that is not one


@pytest.mark.parametrize("key", [(0,), (0, 0, 0), (5, 2, 2**40)])
def test_the_purpose_is_the_first_word_of_the_key(key: tuple[int, ...]) -> None:
    """0 and what is left out read alike in a key, so that only its first word can tell two purposes apart."""
    drawn = {stream: generator(stream, *key).integers(2**63) for stream in Stream}
    assert len(set(drawn.values())) == len(Stream)
    for stream, number in drawn.items():
        assert np.random.default_rng([int(stream), *key]).integers(2**63) == number
        wanted = np.random.SeedSequence([int(stream), *key]).generate_state(4).tolist()
        assert seed_sequence(stream, *key).generate_state(4).tolist() == wanted


def makes_generators(code: str) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    names = {f.attr if isinstance(f, ast.Attribute) else f.id for f in calls if isinstance(f, ast.Attribute | ast.Name)}
    return bool(names & MAKERS)


def test_no_other_file_makes_generators() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if makes_generators(path.read_text(encoding="utf-8"))
    }
    assert found == set(ELSEWHERE), "draw from mvptr_ds.streams, or say here what is drawn"
    assert makes_generators("from numpy.random import default_rng\nrng = default_rng([3, seed])")


def test_every_rank_begins_with_a_dropout_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(seed: int, rank: int) -> int:
        monkeypatch.setattr("mvptr_ds.distributed.collectives.rank", lambda: rank)
        begin_rng(seed)
        return torch.initial_seed()

    assert [begun(0, 0), begun(0, 1), begun(5, 2)] == [1_000_003, 2_000_006, 3_000_014]
