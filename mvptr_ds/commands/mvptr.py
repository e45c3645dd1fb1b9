"""The command `mvptr`: trains, evaluates, and makes, checks and shows shards; `mvptr COMMAND --help` says how."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from typing import NamedTuple

from mvptr_ds import __version__
from mvptr_ds.user_io.signals import end_on_interrupt
from mvptr_ds.user_io.terminal import accept_any_text


class Command(NamedTuple):
    """A command of `mvptr`: the module whose `main` it runs, and what is said of it."""

    module: str
    purpose: str
    interrupted: str = "interrupted"  # what Ctrl-C says


COMMANDS = {
    "train": Command("mvptr_ds.commands.train", "trains; --ranks N starts DeepSpeed's launcher"),
    "eval": Command("mvptr_ds.eval", "evaluates a run, a checkpoint or a model folder"),
    "demo": Command("mvptr_ds.commands.demo", "trains on drawn scenes or photo cut-outs, and evaluates"),
    "shards": Command(
        "mvptr_ds.commands.shards",
        "builds shards from annotations and images",
        "interrupted; the same command goes on from here",
    ),
    "phrases": Command("mvptr_ds.commands.phrases", "finds the phrases of captions"),
    "vocab": Command("mvptr_ds.commands.vocab", "builds the phrase vocabulary"),
    "build-answers": Command("mvptr_ds.commands.answers", "builds the list of answers to questions"),
    "regions": Command("mvptr_ds.commands.regions", "runs a detector: boxes, tags and features"),
    "import-vinvl": Command("mvptr_ds.commands.import_vinvl", "imports region features of VinVL or Oscar"),
    "validate": Command("mvptr_ds.commands.validate", "checks shards or sidecars, and repairs them"),
    "preview": Command("mvptr_ds.commands.preview", "writes an HTML page of records and statistics"),
    "demo-page": Command("mvptr_ds.commands.demo_page", "opens a page that shows what a model finds"),
    "export": Command("mvptr_ds.commands.export", "writes a trained model for transformers and the hub"),
    "ask": Command("mvptr_ds.commands.ask", "asks a trained model about a picture"),
    "import-model": Command("mvptr_ds.commands.import_model", "makes a model folder of a published checkpoint"),
    "zero-shot": Command("mvptr_ds.commands.zero_shot", "classifies pictures by the names of their classes"),
    "clip-benchmark": Command("mvptr_ds.commands.clip_benchmark_mvptr", "runs CLIP_benchmark on a trained model"),
    "plan": Command("mvptr_ds.commands.plan", "estimates memory, traffic and time of a run"),
    "demo-shards": Command("mvptr_ds.commands.demo_shards", "builds the shards of the demo alone"),
    "demo-tasks": Command(
        "mvptr_ds.commands.demo_tasks",
        "fine-tunes a demo run for four tasks, and shows what pre-training is worth",
        "interrupted; the same command goes on from here",
    ),
    "parity": Command("mvptr_ds.commands.parity", "compares the package with numbers of the published code"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names, and returns its exit status. Only its modules are imported."""
    accept_any_text()
    lines = [f"  {name:<16}{command.purpose}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="mvptr",
        description=__doc__,
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mvptr_ds {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    given = sys.argv[1:] if argv is None else argv
    if not given:
        parser.print_help()
        return 2
    parsed = parser.parse_args(given[:1])  # what follows is the command's, also --help
    name = parsed.command
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"there is no command {name!r}; choose from {', '.join(COMMANDS)}{meant}")
    command = COMMANDS[name]
    sys.argv = [f"mvptr {name}", *given[1:]]  # argparse takes its name of the program from here
    end_on_interrupt(command.interrupted)  # before the imports, which may take seconds
    code: int = importlib.import_module(command.module).main(given[1:])
    return code
