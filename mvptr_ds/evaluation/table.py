"""Renders a report as one page of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mvptr_ds.evaluation.grounding import SIZES
from mvptr_ds.evaluation.retrieval import RANKS

_FIRST, _CELL = 34, 9  # widths of the columns
_FOLD_ROWS = (("global states", "retrieval"), ("re-ranked", "rerank"))


def table(report: Mapping[str, Any]) -> str:
    """Returns the report as text: shares in percent with one decimal, a dash where nothing was asked."""
    parts = [_retrieval(report), _grounding(report), _masked_and_matched(report)]
    grounding = report["grounding"]
    if not grounding["n"] and not grounding["num_without_slot"]:  # as in public captions, whose boxes nobody knows
        parts[1] = ["GROUNDING: no phrase of the split has a known region"]
    tags = "" if report["num_tags"] else ", no tags"
    lines = [f"held out: {report['num_scenes']} scenes, {report['num_captions']} captions{tags}; shares in %"]
    for part in parts:
        lines += ["", *part]
    lines += ["", "wall time: " + ", ".join(f"{k} {v:.0f} s" for k, v in report["wall_s"].items())]
    return "\n".join(lines)


def _row(name: str, cells: Sequence[Any]) -> str:
    return (f"{name:{_FIRST}}" + "".join(f"{_cell(c):>{_CELL}}" for c in cells)).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)


def _retrieval(report: Mapping[str, Any]) -> list[str]:
    names = [f"{way}_r{k}" for way in ("t2i", "i2t") for k in RANKS]
    rows = [("global states", report["retrieval"]), ("re-ranked", report["rerank"])]
    if report["num_tags"]:
        withheld = report["without_tags"]
        rows.append(("without tags: global states", withheld["retrieval"]))
        rows.append(("without tags: re-ranked", withheld["rerank"]))
    if "folds" in report:
        name = f"{report['folds']['num_folds']} x {report['folds']['num_images']} images"
        rows += [(f"{name}: {part}", report["folds"][key]) for part, key in _FOLD_ROWS]
    rows.append(("permuted regions: global states", report["permuted_regions"]["retrieval"]))
    rows.append(("chance", report["chance"]))
    half = _CELL * len(RANKS)
    head = [f"{'':{_FIRST}}{'text -> image':>{half}}{'image -> text':>{half}}"]
    head.append(_row("RETRIEVAL", [f"R@{k}" for k in RANKS] * 2))
    return head + [_row(name, [part[n] for n in names]) for name, part in rows]


def _grounding(report: Mapping[str, Any]) -> list[str]:
    settings = {"with tags": report} if report["num_tags"] else {}
    settings |= {"without tags": report["without_tags"], "permuted": report["permuted_regions"]}
    parts = [setting["grounding"][states] for setting in settings.values() for states in ("uni", "cross")]
    heads = "".join(f"{name:>{2 * _CELL}}" for name in settings)
    lines = [f"{'':{_FIRST + 2 * _CELL}}{heads}"]
    lines.append(_row("GROUNDING", ["phrases", "chance", *["uni", "cross"] * len(settings)]))
    rows: list[tuple[str, list[Mapping[str, Any]]]] = [("all", parts)]
    rows.append(("nouns", [p["noun"] for p in parts]))
    rows.append(("nouns with attribute", [p["attribute"] for p in parts]))
    bounds = [f"{100 * b:.1f} %" for b in report["grounding"]["size_bounds"]]
    if bounds:
        spans = (f"<= {bounds[0]}", f"<= {bounds[1]}", f"> {bounds[1]}")
        named = zip(SIZES, spans, strict=True)
        rows += [(f"{size} box ({span} of picture)", [p["by_size"][size] for p in parts]) for size, span in named]
    rows.append(("attribute among boxes of one noun", [p["attribute_among_one_noun"] for p in parts]))
    lines += [_row(name, [p[0]["n"], p[0]["chance"], *(q["accuracy"] for q in p)]) for name, p in rows]
    left_out = report["grounding"]["num_without_slot"]
    if left_out:
        lines.append(f"({left_out} more phrases are not in the vocabulary or did not fit)")
    return lines


def _masked_and_matched(report: Mapping[str, Any]) -> list[str]:
    mcr, itm = report["mcr"], report["itm"]
    keys = ("n", "accuracy", "majority")
    return [
        _row("MASKED CONCEPTS", ["asked", "right", "majority"]),
        _row("tag wordpieces, half masked", [mcr[k] for k in keys]),
        _row("phrases, half masked", [mcr["phrases"][k] for k in keys]),
        "",
        _row("MATCHING", ["pairs", "right", "own", "hardest"]),
        _row("own and hardest other image", [itm[k] for k in ("n", "accuracy", "match", "mismatch")]),
    ]
