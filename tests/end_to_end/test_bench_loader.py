"""tools/bench/bench_loader.py at a small size: every contender runs, and the last line holds the promised figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPO

FIGURES = [
    "features_samples_per_cpu_s",
    "features_vs_published",
    "jpeg_images_per_cpu_s",
    "jpeg_vs_bare_decode",
    "resume_first_batch_ms",
    "index_bytes_per_sample",
]


def test_the_benchmark_measures_what_it_says(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/bench/bench_loader.py",
        "--records",
        "40",
        "--rounds",
        "1",
        "--folder",
        str(tmp_path),
    ]
    small = ["--index-samples", "2000", "--worker-samples", "640"]
    done = subprocess.run([*command, *small], cwd=REPO, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1])
    assert list(found) == FIGURES and all(value > 0 for value in found.values())
    assert 20 < found["index_bytes_per_sample"] < 25  # its manifest is small only beside millions of samples
    assert 0 < found["jpeg_vs_bare_decode"] < 1.5
    assert sum("after" in line and "samples" in line for line in lines) >= 8  # the memory of two workers
    assert not list(tmp_path.iterdir())
