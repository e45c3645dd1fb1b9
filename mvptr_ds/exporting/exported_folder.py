"""Writes a trained model as a folder that `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads.

The folder is a model folder as well, so that a stage, a fine-tuning or an evaluation can start from it. Beside that:

    modeling_mvptr.py processing_mvptr.py config.py ...   copies of mvptr_ds/model, which import each other relatively
    tokenizer.json tokenizer_config.json                  wordpieces with [CLS] and [SEP] around them
    processor_config.json preprocessor_config.json        sizes; mean and standard deviation of pixels
    README.md                                             the model card
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers.dynamic_module_utils import get_relative_import_files

from mvptr_ds.checkpoints.model_folder import HEAD_SETTINGS, HEAD_WEIGHTS, load_model_folder
from mvptr_ds.config import Config, save_config
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.wordpiece import SPECIALS, WordPiece
from mvptr_ds.errors import DataError
from mvptr_ds.exporting.model_card import write_card
from mvptr_ds.model import modeling_mvptr, processing_mvptr
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.processing_mvptr import MvptrProcessor

AUTO_MAP = {
    "AutoConfig": "config.MvptrConfig",
    "AutoModel": "modeling_mvptr.MvptrModel",
    "AutoProcessor": "processing_mvptr.MvptrProcessor",
}
_COPIED = ("vocab.txt", "phrase_vocab.json", HEAD_WEIGHTS, HEAD_SETTINGS)


def export_model(model_folder: Path, out: Path, run: Path | None = None, licence: str | None = None) -> None:
    """Writes the exported folder of a trained model.

    Args:
        model_folder: of a checkpoint, see `checkpoints.model_folder`.
        out: a new folder, or an empty one.
        run: the folder whose report and metrics the model card tells of.
        licence: of the weights, an identifier of the hub such as `mit`; None: the card says that none was given.

    Raises:
        DataError: `out` holds something already.
    """
    make_new(out)
    model, vocabs, config = load_model_folder(model_folder)
    for name in _COPIED:
        if (model_folder / name).exists():
            shutil.copyfile(model_folder / name, out / name)
    save_config(_without_paths(config), out / "mvptr.yaml")
    _write_model(out, model, vocabs, config)
    _write_code(out)
    _processor(vocabs, config).save_pretrained(out)
    _write_tokenizer_config(out, vocabs.words, config)
    write_card(out / "README.md", model, config, model_folder, run, licence)


def push_to_hub(folder: Path, name: str, private: bool = False) -> str:
    """Uploads an exported folder to the hub and returns its address.

    Raises:
        DataError: the hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except (OSError, ValueError) as error:  # all of the hub's errors are one of the two
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name} was not uploaded ({reason}); log in with `hf auth login`; {folder} is whole"
        ) from error
    return f"{api.endpoint}/{name}"


def make_new(out: Path) -> None:
    """Makes the folder. Raises DataError where it holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} holds something already; name a new folder")
    out.mkdir(parents=True, exist_ok=True)


def _without_paths(config: Config) -> Config:
    """Returns the configuration without what says where things lay on the machine of the run."""
    plain = Config()
    names = (
        "train",
        "held_out",
        "sidecars",
        "held_out_sidecars",
        "sources",
        "word_vocab",
        "phrase_vocab",
        "demo_source",
        "demo_task",
        "cache_dir",
    )
    cleared = {name: getattr(plain.data, name) for name in names}
    run = replace(plain.run, stages=config.run.stages, seed=config.run.seed)
    visual = replace(config.visual, backbone=_without_folder(config.visual.backbone))
    vqa = replace(config.vqa, answers=None)  # task.json holds them
    return replace(config, run=run, data=replace(config.data, **cleared), visual=visual, vqa=vqa, wandb=plain.wandb)


def _without_folder(backbone: str | None) -> str | None:
    """Returns the name of a backbone: of one that lies in a folder the last part of its path."""
    is_path = backbone is not None and (backbone.startswith((".", "/", "~")) or Path(backbone).is_dir())
    return Path(backbone).name if backbone is not None and is_path else backbone


def _write_model(out: Path, model: Mvptr, vocabs: Vocabs, config: Config) -> None:
    structure = cast(MvptrConfig, copy.deepcopy(model.config))
    structure.architectures, structure.dtype = ["MvptrModel"], str(model.dtype).removeprefix("torch.")
    structure.auto_map = AUTO_MAP
    structure.backbone_origin = _without_folder(structure.backbone_origin)
    # an older run's model does not hold these
    structure.grid_size = config.visual.grid_size
    structure.cls_token_id, structure.sep_token_id = vocabs.words.cls_id, vocabs.words.sep_id
    structure.save_pretrained(out)
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})


def _write_code(out: Path) -> None:
    """Copies the files of both classes, and all that they import relatively."""
    for module in (modeling_mvptr, processing_mvptr):
        assert module.__file__ is not None
        for file in (module.__file__, *get_relative_import_files(module.__file__)):
            shutil.copyfile(file, out / Path(file).name)


def _processor(vocabs: Vocabs, config: Config) -> MvptrProcessor:
    data = config.data
    return MvptrProcessor(
        _tokenizer(vocabs.words),
        vocabs.phrases.tuples,
        image_size=config.visual.image_size,
        max_tokens=data.max_tokens,
        max_text_slots=data.max_text_slots,
        max_tag_slots=data.max_tag_slots,
        max_regions=data.max_regions,
    )


def _tokenizer(words: WordPiece) -> Tokenizer:
    """Returns the tokenizer of training with the special tokens around a text, and `[MASK]` as one token."""
    tokenizer = words.tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words.cls_id), ("[SEP]", words.sep_id)]
    )
    return tokenizer


def _write_tokenizer_config(out: Path, words: WordPiece, config: Config) -> None:
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": min(config.data.max_tokens, config.data.max_text_slots - 2) + 2,
        "padding_side": "right",
        **dict(zip(names, SPECIALS, strict=True)),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
