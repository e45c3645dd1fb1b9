"""The data path of the published MVPTR code, as a yardstick for tools/bench/bench_loader.py: written anew.

Features are base64 of float32 [R, 2054] in the lines of a TSV file, found by offsets and read as text; captions,
phrases and tags lie in memory. Every sample is tokenised and masked in Python piece by piece, a random piece drawn from
a fresh list of the whole vocabulary; its features are copied twice, everything is padded to fixed slots, and tensors of
equal size are stacked.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from mvptr_ds.data.collate import IGNORE
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Record, Region
from mvptr_ds.data.wordpiece import WordPiece

MAX_TOKENS, MAX_TEXT, MAX_TAGS, MAX_REGIONS = 33, 40, 20, 50
MASK_PROB = 0.15


def write_tsv(folder: Path, records: Iterable[tuple[Record, np.ndarray]]) -> list[Record]:
    """features.tsv of (record, features [R, F]) and features.lineidx; returns the records."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, offsets = [], []
    with open(folder / "features.tsv", "wb") as file:
        for record, features_RF in records:
            with_geometry = np.concatenate([features_RF.astype(np.float32), _geometry(record)], axis=1)
            offsets.append(file.tell())
            head = f"{record.image_id}\t{len(with_geometry)}\t"
            file.write(head.encode() + base64.b64encode(with_geometry.tobytes()) + b"\n")
            kept.append(record)
    (folder / "features.lineidx").write_text("\n".join(map(str, offsets)))
    return kept


def _geometry(record: Record) -> np.ndarray:
    def row(region: Region) -> list[float]:
        x1, y1, x2, y2 = region.box
        w, h = record.width, record.height
        return [x1 / w, y1 / h, x2 / w, y2 / h, (x2 - x1) / w, (y2 - y1) / h]

    return np.array([row(region) for region in record.regions], dtype=np.float32)


def python_tokenizer(words: WordPiece, folder: Path) -> BertTokenizerLegacy:
    """BERT's tokenizer as it is written in Python, which the published code brings along in an older version."""
    path = folder / "vocab.txt"
    path.write_text("\n".join(words.tokens) + "\n", encoding="utf-8")
    return BertTokenizerLegacy(str(path), do_lower_case=True)


class PublishedDataset(Dataset[tuple[Tensor, ...]]):
    """Sample n is caption `n % captions` of record `n // captions`, as tensors of fixed size."""

    def __init__(self, folder: Path, records: list[Record], words: WordPiece, phrases: PhraseVocab) -> None:
        self.tokenize = python_tokenizer(words, folder)._tokenize  # without what newer versions do around it
        self.rows = {token: row for row, token in enumerate(words.tokens)}
        self.phrases = phrases
        self.captions = [(n, caption) for n, record in enumerate(records) for caption in record.captions]
        self.tags = ["\t".join({region.tag for region in record.regions}) for record in records]
        self.file = open(folder / "features.tsv")  # noqa: SIM115  kept open, as there
        self.offsets = [int(line) for line in (folder / "features.lineidx").read_text().split("\n")]

    def __len__(self) -> int:
        return len(self.captions)

    def _features(self, line: int) -> Tensor:
        self.file.seek(self.offsets[line])
        _, num_regions, encoded = (part.strip() for part in self.file.readline().split("\t"))
        features = np.frombuffer(base64.b64decode(encoded), np.float32).reshape(int(num_regions), -1)
        return torch.tensor(np.copy(features), dtype=torch.float32)[:MAX_REGIONS]

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        line, caption = self.captions[number]
        tokens = self.tokenize(caption.text)[:MAX_TOKENS]
        tag_tokens = self.tokenize(self.tags[line])[: MAX_TAGS - 2]
        regions_RF = self._features(line)
        padding = torch.zeros((MAX_REGIONS - len(regions_RF), regions_RF.shape[1]), dtype=torch.float32)
        image_mask = [1] * len(regions_RF) + [0] * len(padding)
        regions_RF = torch.cat((regions_RF, padding), 0)

        tokens, labels = self._mask(tokens)
        tag_tokens, tag_labels = self._mask(tag_tokens)
        found = (self.phrases.index_of(phrase.tuple) for phrase in caption.phrases)
        phrase_ids = [int(self.phrases.rows[index]) for index in found if index is not None]
        phrase_ids = self._mask_phrases(phrase_ids[: MAX_TEXT - 2 - len(tokens)])
        rows = self.rows
        text_ids = [rows[token] for token in ["[CLS]", *tokens]] + phrase_ids + [rows["[SEP]"]]
        text_labels = [IGNORE, *labels, *([IGNORE] * len(phrase_ids)), IGNORE]
        tag_ids = [rows[token] for token in ["[CLS]", *tag_tokens, "[SEP]"]]
        return (
            regions_RF,
            *self._padded(text_ids, text_labels, MAX_TEXT, 0),
            *self._padded(tag_ids, [IGNORE, *tag_labels, IGNORE], MAX_TAGS, 1),
            torch.tensor(image_mask, dtype=torch.long),
            torch.tensor([1 + len(tokens), 1 + len(tokens) + len(phrase_ids)], dtype=torch.long),
            torch.tensor(line, dtype=torch.long),
        )

    def _mask(self, tokens: list[str]) -> tuple[list[str], list[int]]:
        labels = []
        for place, token in enumerate(tokens):
            chance = random.random()
            if chance >= MASK_PROB:
                labels.append(IGNORE)
                continue
            chance /= MASK_PROB
            if chance < 0.8:
                tokens[place] = "[MASK]"
            elif chance < 0.9:
                tokens[place] = random.choice(list(self.rows.items()))[0]  # as it is there
            labels.append(self.rows.get(token, self.rows["[UNK]"]))
        return tokens, labels

    def _mask_phrases(self, ids: list[int]) -> list[int]:
        for place in range(len(ids)):
            if random.random() < MASK_PROB:
                ids[place] = self.rows["[MASK]"]
        return ids

    @staticmethod
    def _padded(ids: list[int], labels: list[int], length: int, segment: int) -> tuple[Tensor, ...]:
        missing = length - len(ids)
        mask = [1] * len(ids) + [0] * missing
        lists = (ids + [0] * missing, mask, [segment] * length, labels + [IGNORE] * missing)
        return tuple(torch.tensor(values, dtype=torch.long) for values in lists)
