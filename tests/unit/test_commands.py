"""The command `mvptr`: what it lists, whose `main` it runs, and that the files of tools/ run the same."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import mvptr_ds
from mvptr_ds.commands import demo, mvptr, train
from mvptr_ds.monitoring import versions
from mvptr_ds.user_io import tool_names
from tests.conftest import REPO

TOOLS = sorted((REPO / "tools").glob("*.py"))


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`mvptr ARGUMENTS` as its script starts it, in a process of its own; the modules that it left are listed last."""
    script = (
        "import sys; from mvptr_ds.commands.mvptr import main\n"
        "try: sys.exit(main())\n"
        "finally: print('\\nmodules', *sys.modules, file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO), "COLUMNS": "120"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def modules(done: subprocess.CompletedProcess[str]) -> set[str]:
    return set(done.stderr.rpartition("\nmodules")[2].split())


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For `main()` called here: Ctrl-C and the arguments of this process stay as they are."""
    monkeypatch.setattr(mvptr, "end_on_interrupt", lambda line: None)
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_help_lists_every_command_and_imports_none() -> None:
    done = run("--help")
    assert done.returncode == 0
    listed = re.findall(r"^  ([a-z-]+)  +\w", done.stdout.partition("commands:")[2], re.MULTILINE)
    assert listed == list(mvptr.COMMANDS)
    heavy = {"torch", "numpy", "nltk", "transformers", "deepspeed", "fsspec", "webdataset"}
    assert not modules(done) & heavy
    none = run()
    assert none.returncode == 2 and "commands:" in none.stdout


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"mvptr_ds {mvptr_ds.__version__}\n")
    assert not modules(done) & {"torch", "numpy"}


def test_an_unknown_command_names_the_nearest() -> None:
    done = run("validat", "shards/train")
    assert done.returncode == 2
    assert "there is no command 'validat'; choose from train, eval, " in done.stderr
    assert "; did you mean validate?\n" in done.stderr
    assert run("xyz").stderr.count("did you mean") == 0


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", mvptr.COMMANDS)
def test_every_command_has_help_under_the_name_that_was_typed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        mvptr.main([name, "--help"])
    said = capsys.readouterr().out
    assert not stop.value.code
    assert said.startswith(f"usage: mvptr {name} [-h]") and "%(prog)" not in said
    assert "tools/" not in said  # which an installed package lacks


@pytest.mark.parametrize("name", ["demo", "plan", "regions", "train"])
def test_wrong_usage_does_not_wait_for_torch(name: str) -> None:
    done = run(name, "--ranks=0" if name in ("demo", "train") else "--no-such-option")
    assert done.returncode == 2 and f"mvptr {name}: error: " in done.stderr
    assert "torch" not in modules(done)


@pytest.mark.usefixtures("in_this_process")
def test_arguments_and_exit_status_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def main(argv: list[str]) -> int:
        given.append([*sys.argv, "|", *argv])
        return 75

    interrupted: list[str] = []
    monkeypatch.setattr(mvptr, "end_on_interrupt", interrupted.append)
    monkeypatch.setitem(sys.modules, "mvptr_ds.commands.shards", types.SimpleNamespace(main=main))
    assert mvptr.main(["shards", "text", "--version", "a", "--", "-h"]) == 75
    words = ["text", "--version", "a", "--", "-h"]
    assert given == [["mvptr shards", *words, "|", *words]]
    assert interrupted == ["interrupted; the same command goes on from here"]


def test_no_other_repository_is_taken_for_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a project whose environment, with the installed package, stands in it."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    assert versions._git("rev-parse", "--git-dir") or not (REPO / ".git").exists()
    package = tmp_path / "venv/mvptr_ds/monitoring/versions.py"
    monkeypatch.setattr(versions, "__file__", str(package))
    assert versions._git("rev-parse", "--git-dir") == ""


def test_train_starts_the_launcher_for_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setattr(os, "execv", lambda path, command: started.append([path, *command]))
    fake = types.SimpleNamespace(main=lambda argv: started.append(argv) or 3)
    monkeypatch.setitem(sys.modules, "mvptr_ds.train", fake)
    monkeypatch.setattr(mvptr_ds, "train", fake, raising=False)
    words = ["--config", "base", "train.batch_size=8"]
    assert train.main(words) == 3 and started == [words]
    assert train.main(["--ranks", "2", "--help"]) == 3  # one help, not that of every rank
    for option in (["--ranks", "2"], ["--num_gpus=2"]):
        started.clear()
        train.main([*words, *option])
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "mvptr_ds.train"]
        assert started[0] == [sys.executable, *launcher, *words]
    monkeypatch.setenv("MASTER_PORT", "29511")
    assert "--master_port 29511 --module" in " ".join(train.launch(2, words))


def test_demo_trains_then_evaluates_what_it_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, ran = {"train": 0, "eval": 5}, []
    monkeypatch.setattr(demo, "_run", lambda command: ran.append(command) or codes["train"])
    monkeypatch.setattr("mvptr_ds.eval.main", lambda argv: ran.append(argv) or codes["eval"])
    assert demo.main(["--ranks", "3", "stage1.max_steps=2", "--source", "stamps", "run.dir=runs/x"]) == 5
    arguments = ["--deepspeed", "z2", "--config", "demo_stamps", "stage1.max_steps=2", "run.dir=runs/x"]
    assert ran == [train.launch(3, [*arguments, "train.resume=never"]), ["runs/x"]]
    codes["train"], ran[:] = 75, []
    assert demo.main([]) == 75 and len(ran) == 1
    assert demo.main(["run.dirr=x"]) == 2 and len(ran) == 1


def test_signals_reach_the_training_of_a_demo() -> None:
    """One that stops the demo is handed on, so that the training may save; its exit status is what counts."""
    before = signal.getsignal(signal.SIGTERM)
    program = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(75)); {}; time.sleep(60)"
    assert demo._run([sys.executable, "-c", program.format("os.kill(os.getppid(), signal.SIGTERM)")]) == 75
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert demo._run([sys.executable, "-c", killed]) == 137
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_tool_runs_the_main_of_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    name = re.search(r"The command `mvptr ([a-z-]+)` as a file", text)
    line = re.search(r"end_on_interrupt\((?:\"(.*)\")?\)", text)
    assert name is not None and line is not None
    command = mvptr.COMMANDS[name.group(1)]
    assert runpy.run_path(str(path))["main"].__module__ == command.module
    assert (line.group(1) or "interrupted") == command.interrupted


def test_every_tool_has_a_command_and_messages_name_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {name for name, command in mvptr.COMMANDS.items() if command.module.startswith("mvptr_ds.commands")}
    tools = {re.findall(r"`mvptr ([a-z-]+)`", path.read_text(encoding="utf-8"))[0] for path in TOOLS}
    assert tools == commands - {"train", "demo"}
    assert tool_names.FILES.keys() <= tools
    assert all((REPO / tool_names.tool(name)).is_file() for name in tool_names.FILES)
    assert tool_names.command("validate") == "python tools/validate_shards.py"
    monkeypatch.setattr(tool_names, "TOOLS", REPO / "nowhere")
    assert tool_names.tool("validate") == tool_names.command("validate") == "mvptr validate"
