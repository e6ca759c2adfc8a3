"""Installation. `pip install -e '.[test]'` from a clone, or `pip install .`; everything else is in pyproject.toml."""

import pathlib
import re

from setuptools import find_namespace_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "linscale" / "__init__.py").read_text()).group(1)
README = ROOT / "README.md"

setup(
    name="linscale",
    version=VERSION,
    description="Train, evaluate and fit scaling laws for linear-complexity language models in JAX",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    # linscale/kernels and linscale/configs are links to the folders beside it; the finder follows them, so a wheel
    # carries them as linscale.kernels and linscale.configs. Recipes are plain files without an __init__.py, hence
    # the namespace finder.
    packages=find_namespace_packages(include=["linscale", "linscale.*"]),
    package_data={"": ["*.html", "*.css", "*.js", "*.csv", "*.json", "*.md"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.16",
        "ml-collections>=1.1",
        "tensorflow-datasets>=4.9.9",  # only tfds.data_source on array_record files: TensorFlow is not needed
        "array-record>=0.8",
        "absl-py>=2.1",
        "numpy>=2.0",
        "scipy>=1.13",
        "matplotlib>=3.9",
        "pyarrow>=17",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "tiktoken>=0.8",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
        "pyyaml>=6",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],  # driver 580 or newer; older drivers: pip install 'jax[cuda12]'
        "tpu": ["jax[tpu]>=0.10"],
        "eval": ["lm-eval>=0.4.13", "datasets>=3", "rouge-score>=0.1.2"],
        "hf": ["transformers>=4.45", "safetensors>=0.4"],
        "wandb": ["wandb>=0.18"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "ruff==0.17.6",  # its rules and layout change between releases
            "tensorboard>=2.17",
            "jsonschema>=4.20",
            "lm-eval>=0.4.13",  # tests/evaluation
            "rouge-score>=0.1.2",
            "kubernetes>=30",
            "websocket-client>=1.7",  # drives Chromium, where one is installed, through the pages of reports
        ],
    },
    entry_points={"console_scripts": ["linscale=linscale.cli:main"]},
)
