"""Makes the keys of records from what the source calls the image."""

from __future__ import annotations

import hashlib
import re

KEY_SCHEMES = ("image-id", "number", "hash")
_SUFFIX = re.compile(r"\.(jpe?g|jpe|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)


def make_key(scheme: str, image_id: str, number: int) -> str:
    """Returns the key of a record; unless the scheme is `image-id`, different ids have different keys.

    image-id: the id without a picture's suffix, each character but A-Z a-z 0-9 _ - as "_". number: nine digits of
    `number`. hash: 32 hexadecimal digits of the id's BLAKE2b, the same in every build.
    """
    if scheme == "number":
        return f"{number:09d}"
    if scheme == "hash":
        return hashlib.blake2b(image_id.encode(), digest_size=16).hexdigest()
    return re.sub(r"[^A-Za-z0-9_-]", "_", _SUFFIX.sub("", image_id))
