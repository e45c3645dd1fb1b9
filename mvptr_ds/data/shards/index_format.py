"""How the index of a folder of shards is stored, and the digests by which it is checked.

    folder/manifest.json   shards, counts, tags, extractors, sha256 of the index
    folder/index.npy       one row a record (`ROW`): where it lies, its first sample, its key's hash

Tars lie in blocks of 512 bytes, so a row counts blocks: it has 20 bytes, and ten million records take 200 MB.
"""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

import numpy as np

from mvptr_ds.user_io.tool_names import tool

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
INDEX_VERSION = 3
REBUILD = f"rebuild the index with {tool('validate')}"  # the remedy that messages name

RECORDS, SIDECAR = "records", "sidecar"  # kinds of folders
UNNAMED_EXTRACTOR = "an unnamed extractor"  # of regions or features that name none
BLOCK = 512  # bytes
ROW = np.dtype([("block", "<u4"), ("span", "<u4"), ("first_sample", "<u4"), ("key_hash", "<u8")])
MAX_SAMPLES = (1 << 32) - 1  # of a folder, by the width of first_sample
NOT_VISUAL, NO_CAPTION = 1, 2  # flags
NO_REGIONS = 4  # of a sidecar's entry: it says that there are none, and has no features either
_SPAN_BITS = 24  # of `span`: the record's blocks; the bits above them are the flags
_NUM_SAMPLED, _SAMPLED_BYTES = 16, 4096


def pack_span(num_blocks: int, flags: int) -> int:
    """Returns the `span` of a row: blocks of the record, and its flags."""
    return num_blocks | flags << _SPAN_BITS


def span_bytes(span: int) -> int:
    """Bytes of a record, whose row has this `span`."""
    return (span & ((1 << _SPAN_BITS) - 1)) * BLOCK


def span_flags(spans_N: np.ndarray) -> np.ndarray:
    """Flags of records, uint8 [N], by the `span` uint32 [N] of their rows."""
    return (spans_N >> _SPAN_BITS).astype(np.uint8)


def key_hash(key: str) -> int:
    """Returns 64 bits of a key's hash, by which folders are joined."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def sha256(file: BinaryIO) -> str:
    """Returns the digest of a file from where it stands to its end."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sampled_digest(file: BinaryIO, whole_sha256: str) -> str:
    """Returns the digest that `Index.open` compares: of 16 places of the index, its size and its hash.

    Key hashes stand in every place. So the digest tells another index of the same size, or one whose tail was lost to
    zeros. A changed byte between the places goes unnoticed. An index of up to 64 KiB is read whole.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    digest = hashlib.sha256(f"{num_bytes} {whole_sha256}".encode())
    last = num_bytes - _SAMPLED_BYTES
    starts = [last * n // (_NUM_SAMPLED - 1) for n in range(_NUM_SAMPLED)]
    if num_bytes <= _NUM_SAMPLED * _SAMPLED_BYTES:
        starts = list(range(0, num_bytes, _SAMPLED_BYTES))
    for start in starts:
        file.seek(start)
        digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()
