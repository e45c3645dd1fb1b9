"""Exports a trained model as a folder that transformers loads, or under the published code's names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

EPILOG = """\
examples:
  %(prog)s runs/demo exported
  %(prog)s runs/demo/stage1 exported --licence cc-by-4.0
  %(prog)s runs/demo exported --push-to-hub me/my-model        (needs `hf auth login`)
  %(prog)s runs/mine published --format published              (pytorch_model.bin; models of region features)
  %(prog)s runs/vqa published --format published               (as the published class of the task)

Where mvptr_ds is not installed, AutoModel.from_pretrained(OUT, trust_remote_code=True) loads the folder.
Where it is, mvptr_ds.load(OUT) does. A run starts from it with run.init_from=OUT. docs/export.md shows both.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="run, stage folder, checkpoint or model folder")
    parser.add_argument("out", type=user_path, metavar="OUT", help="new folder to write")
    parser.add_argument(
        "--format",
        choices=("transformers", "published"),
        default="transformers",
        help="published: the names of the published code, without a phrase head (default: %(default)s)",
    )
    parser.add_argument("--licence", metavar="ID", help="licence of the weights for the model card, such as mit")
    parser.add_argument("--push-to-hub", metavar="NAME", help="also upload the folder as NAME, such as me/my-model")
    parser.add_argument("--private", action="store_true", help="upload it as a private model")
    args = parser.parse_args(argv)
    # torch and transformers take seconds to import, which --help and wrong usage need not wait for
    from mvptr_ds.checkpoints.hand_over import find_model
    from mvptr_ds.errors import USER_ERRORS
    from mvptr_ds.exporting.exported_folder import export_model, push_to_hub
    from mvptr_ds.exporting.published_folder import export_published

    try:
        folder = find_model(args.run)
        if args.format == "published":
            export_published(folder, args.out)
            _write_phrases(folder, args.out)
        else:
            export_model(folder, args.out, args.run, args.licence)
        print(f"{args.out}: the model of {folder}")
        if args.push_to_hub:
            print(push_to_hub(args.out, args.push_to_hub, args.private))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _write_phrases(model_folder: Path, out: Path) -> None:
    """Writes the phrases in the published layout, since they give the rows behind the words their meaning."""
    from mvptr_ds.corpus.phrases.id2phrase import write_id2phrase
    from mvptr_ds.data.phrases import PhraseVocab
    from mvptr_ds.data.wordpiece import WordPiece
    from mvptr_ds.exporting.published_folder import ID2PHRASE

    phrases = PhraseVocab.load(model_folder / "phrase_vocab.json", WordPiece(model_folder / "vocab.txt"))
    if len(phrases):
        write_id2phrase(phrases, out / ID2PHRASE)
