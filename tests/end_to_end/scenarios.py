"""Runs one after the other in one launch of the ranks (ranks_disturbed.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.launch import run_ranks


def launch(scenarios: list[dict[str, Any]], num_ranks: int, folder: Path, limit_s: float) -> None:
    """All of them, which must end well; what each rank says goes to FOLDER/rankN.log."""
    folder.mkdir()
    (folder / "scenarios.json").write_text(json.dumps(scenarios), encoding="utf-8")
    run_ranks("tests.end_to_end.ranks_disturbed", num_ranks, folder, limit_s)
    said = (folder / "rank0.log").read_text(encoding="utf-8")
    for rank in range(num_ranks):
        codes = json.loads((folder / f"codes-rank{rank}.json").read_text(encoding="utf-8"))
        assert codes == {one["name"]: 0 for one in scenarios}, said
