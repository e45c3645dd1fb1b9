"""A few hundred inputs, the same in every run; `make fuzz` gives a hundred thousand (docs/hostile_input.md)."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from tests import fuzz

NUM_INPUTS = 60  # of each target


@pytest.mark.parametrize("target", fuzz.TARGETS, ids=lambda target: target.name)
def test_every_input_ends_in_a_result_or_a_data_error(target: fuzz.Target) -> None:
    found = Counter[str]()

    @settings(
        max_examples=NUM_INPUTS,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def examine(value: object) -> None:
        found["accepted" if fuzz.examine(target, value) else "refused"] += 1

    examine()
    assert sum(found.values()) >= NUM_INPUTS
    assert found["refused"] > 0


def test_shares_add_up() -> None:
    assert sum(target.share for target in fuzz.TARGETS) == 100
    assert len({target.name for target in fuzz.TARGETS}) == len(fuzz.TARGETS)


def test_sound_inputs_are_accepted_by_every_target() -> None:
    tar, members = fuzz.sound_tars()[0], fuzz.members()
    sidecar = fuzz.encoded(fuzz.SIDECARS[0])
    sound = {
        "walk": tar, "walk-bytes": tar, "salvage": tar, "parse": members["json"], "features": members["npy"],
        "picture": members["jpg"], "store": members["jpg"], "sample": members,
        "join": (members, sidecar, members["npy"]), "check": members,
        "place": (tar, 0, 4096), "index": tar,
    }  # fmt: skip
    for target in fuzz.TARGETS:
        assert fuzz.examine(target, sound[target.name]), target.name


def _sleep(value: object) -> bool:
    time.sleep(60)
    return True


def _sleep_taken_for_damage(value: object) -> bool:
    with contextlib.suppress(AssertionError):
        time.sleep(60)
    return True


def _unpickle(value: object) -> bool:
    return bool(pickle.loads(pickle.dumps(os.getcwd)))


def _start(value: object) -> bool:
    return subprocess.run(["true"], check=False).returncode == 0


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (_sleep, fuzz.HangError),
        (_sleep_taken_for_damage, fuzz.HangError),
        (_unpickle, fuzz.CodeRunError),
        (_start, fuzz.CodeRunError),
    ],
)
def test_the_guard_itself(run: fuzz.Run, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "LIMIT_S", 0.1 if error is fuzz.HangError else 30.0)
    with pytest.raises(error):
        fuzz.examine(fuzz.Target("bad", fuzz.values, run, 0), None)
    assert fuzz.examine(fuzz.Target("good", fuzz.values, lambda value: True, 0), None)
