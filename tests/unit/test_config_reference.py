"""docs/configuration.md: made of config.py, and current; every key has a meaning that can be read at first sight."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mvptr_ds.config import load_config
from tools.dev import config_reference

KEYS = [
    key for _, sections, prefix in config_reference.sections() for key in config_reference.keys_of(sections, prefix)
]
PAGE = config_reference.PAGE.read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    assert config_reference.current_page() == PAGE, "run python tools/dev/config_reference.py"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_has_a_meaning_in_short_sentences(key: config_reference.Key) -> None:
    assert key.meaning.endswith("."), f"{key.name}: write its meaning below it, as a sentence"
    long = [sentence for sentence in re.split(r"[.:;] ", key.meaning) if len(sentence.split()) > 25]
    assert long == [] and f"| `{key.name}` |" in PAGE


def test_no_key_is_left_out() -> None:
    """Those of the whole tree, as the saved configuration of a run has them."""
    assert {"run.seed", "data.sources.NAME.weight", "STAGE.weights.itm", "task.wpg.margin"} < {key.name for key in KEYS}
    assert len(KEYS) == len({key.name for key in KEYS}) > 100


def test_check_tells_a_page_that_is_not_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(config_reference, "PAGE", page)
    monkeypatch.setattr(config_reference, "REPO", tmp_path)
    monkeypatch.setattr(config_reference, "reference", lambda: f"{config_reference.MADE}\nnew\n")
    page.write_text(f"by hand\n{config_reference.MADE}\nold\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["config_reference.py", "--check"])
    assert config_reference.main() == 1 and "configuration.md is not current" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["config_reference.py"])
    assert config_reference.main() == 0
    assert page.read_text(encoding="utf-8") == f"by hand\n{config_reference.MADE}\nnew\n"
    monkeypatch.setattr("sys.argv", ["config_reference.py", "--check"])
    assert config_reference.main() == 0
    page.write_text("by hand\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the line"):
        config_reference.main()


def test_the_error_that_the_page_shows_is_printed() -> None:
    found = re.search(r"--config mine\.yaml (train\.batchsize.*)\n((?: {3}(?!`).*\n)+)", PAGE)
    assert found is not None
    with pytest.raises(ValueError) as error:
        load_config("base", shlex.split(found[1]))
    shown = [line.strip() for line in found[2].splitlines()]
    assert shown == [line.strip() for line in f"error: {error.value}".splitlines()]


def test_what_the_page_says_of_values() -> None:
    for override in re.findall(r"`\"?([a-z.]+=[^`\"]+)\"?`", PAGE.partition(config_reference.MADE)[0]):
        if "NAME" not in override and not override.startswith("section."):
            load_config("base", [override])
    overrides = shlex.split("train.batch_size=512 'run.stages=[1, 2]' data.held_out=null \"wandb.name='null'\"")
    config = load_config("base", overrides)
    assert (config.train.batch_size, config.run.stages, config.data.held_out) == (512, ["1", "2"], None)
    assert config.wandb.name == "null"
