"""Records for the tests of the preview: sound ones, and texts that try to leave their element."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from mvptr_ds.data.schema import Caption, Phrase, Record, Region

Item = tuple[str, Record, dict[str, bytes]]
CAPTION = "A brown dog chases a black cat."
PHRASES = (
    Phrase(("dog",), ((8, 11),), (0,)),
    Phrase(("dog", "brown"), ((8, 11), (2, 7)), (0,)),
    Phrase(("dog", "chase", "cat"), ((8, 11), (12, 18), (27, 30)), (0, 1)),
)
REGIONS = (Region((4, 4, 30, 40), "dog", 0.9), Region((30, 10, 60, 44), "cat", 0.75))


def hostile_texts(url: str) -> list[str]:
    """Texts that, unescaped, would run a script, ask `url` for something or turn the page's text around."""
    return [
        "</p></article><script>document.title='owned'</script>",
        f'<img src="{url}/img" onerror="document.title=\'owned\'">',
        f"'\"><svg/onload=\"document.title='owned'\"><style>@import '{url}/css'</style>",
        f"<iframe src='{url}/frame'></iframe><link rel=stylesheet href='{url}/link'><base href='{url}/'>",
        "\u202eevil\u202c \x00\x1b[31m\u2028 שלום 👩\u200d👩\u200d👧"
        " 日本語 {{ policy }} {% include 'page.js' %} {# &lt;b&gt;",
    ]


def hostile_record(url: str) -> Record:
    """Every text of the record is hostile."""
    texts = hostile_texts(url)
    captions = tuple(Caption(text, (Phrase((text, texts[0]), ((0, 5), (3, len(text)))),)) for text in texts)
    regions = tuple(Region((1.0, 1.0, 20.0 + i, 30.0), text, 0.5) for i, text in enumerate(texts))
    return Record(texts[0], 64, 48, captions, regions)


def jpeg(width: int = 64, height: int = 48) -> bytes:
    buffer = io.BytesIO()
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    Image.fromarray(ramp.astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def features(num_regions: int, value: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.full((num_regions, 4), value, np.float16), allow_pickle=False)
    return buffer.getvalue()


def items(url: str = "http://127.0.0.1:9") -> list[Item]:
    """One record of each kind that a page must show."""
    regions = REGIONS
    return [
        ("sound", Record("1", 64, 48, (Caption(CAPTION, PHRASES),), regions), {"jpg": jpeg(), "npy": features(2)}),
        ("features-only", Record("2", 64, 48, (Caption("No picture."),), regions), {"npy": features(2)}),
        ("no-boxes", Record("3", 20, 90, (Caption("Tall."), Caption("Thin.")), ()), {"jpg": jpeg(20, 90)}),
        ("bad-picture", Record("4", 64, 48, (Caption("Damaged."),), regions), {"png": b"not a picture"}),
        ("bad-features", Record("5", 64, 48, (Caption("NaN."),), regions), {"npy": features(2, float("nan"))}),
        ("panorama", Record("6", 900, 3, (Caption("Wide."),), regions[:1]), {"jpg": jpeg(900, 3)}),
        ("hostile", hostile_record(url), {"jpg": jpeg()}),
    ]
