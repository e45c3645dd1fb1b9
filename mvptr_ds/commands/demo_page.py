"""Shows in the browser what a trained model finds in held-out pictures, and in your own."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import tempfile
import threading
from pathlib import Path

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path, whole_number

EPILOG = """\
examples:
  %(prog)s runs/demo
  %(prog)s runs/mine --held-out shards/coco/held_out --num 2000
  %(prog)s runs/mine --detector PekingU/rtdetr_r50vd_coco_o365       (finds the regions of pictures that you upload)

The page listens on this machine alone, asks no other host, and writes nothing into the run. Ctrl-C ends it.
It needs gradio: pip install 'mvptr_ds[demo]'
Exit status: 0 ended by Ctrl-C or SIGTERM, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="run, stage folder, checkpoint or model folder")
    parser.add_argument("--held-out", metavar="FOLDER", help="shards to show (default: data.held_out of the run)")
    parser.add_argument("--sidecars", nargs="+", default=[], metavar="FOLDER", help="sidecars of --held-out")
    parser.add_argument(
        "--num",
        type=whole_number(1),
        default=500,
        metavar="N",
        help="pictures to search at most (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=whole_number(1, 65535), help="where the page listens (default: the first free one from 7860)"
    )
    parser.add_argument("--detector", metavar="NAME", help="folder or hub name of what finds regions in uploads")
    args = parser.parse_args(argv)
    if args.sidecars and args.held_out is None:
        parser.error("--sidecars are those of --held-out FOLDER, which is not given")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # torch and transformers take seconds to import, which --help and wrong usage need not wait for
    from mvptr_ds.config import override_config
    from mvptr_ds.demo_page.answers import Answers, read_held_out
    from mvptr_ds.demo_page.page import import_gradio, served
    from mvptr_ds.errors import USER_ERRORS
    from mvptr_ds.inference import load
    from mvptr_ds.shard_folders import open_held_out

    ended = threading.Event()
    try:
        import_gradio()  # before the minutes that encoding may take
        trained = load(args.run, detector=args.detector)
        overrides = (
            []
            if args.held_out is None
            else [f"data.held_out={args.held_out}", f"data.held_out_sidecars={json.dumps(args.sidecars)}"]
        )
        data = override_config(trained.config, overrides).data
        with tempfile.TemporaryDirectory(prefix="mvptr-joins-") as joins:
            held_out = read_held_out(
                open_held_out(data, Path(joins)), args.num, trained.config.visual.source == "features"
            )
        answers = Answers(trained, held_out)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        with served(answers, str(args.run), args.port) as address:
            sys.stdout.write(f"{len(answers.held_out)} held-out pictures: {address} (Ctrl-C ends it)\n")
            sys.stdout.flush()
            ended.wait()
    except USER_ERRORS as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
