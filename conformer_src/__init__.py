"""The vision Conformer, built step by step: the package behind the book.

import conformer_src as cs

train = cs.FashionSubset(train=True)
"""

import torch

try:
    import torchvision  # noqa: F401
except (ImportError, OSError, RuntimeError) as error:  # the three faces of a mismatched pair
    raise ImportError(
        f"torchvision does not fit the installed torch {torch.__version__} ({error}). Repair both: "
        "python -m pip install --upgrade --force-reinstall torch torchvision"
    ) from error

from conformer_src.data import FashionSubset, fashion_mnist, image_folder, local_global, photograph

__version__ = "0.1.0"
__all__ = [
    "FashionSubset",
    "fashion_mnist",
    "image_folder",
    "local_global",
    "photograph",
]
