"""The vision Conformer, built step by step: the package behind the book.

    import conformer_src as cs

    train = cs.FashionSubset(train=True)
    block = cs.ConvBlock(64, 256, project_shortcut=True)

Each module is built by the chapter of the same name.
"""

import torch

try:
    import torchvision  # noqa: F401
except (ImportError, OSError, RuntimeError) as error:  # the three faces of a mismatched pair
    raise ImportError(
        f"torchvision does not fit the installed torch {torch.__version__} ({error}). Repair both: "
        "python -m pip install --upgrade --force-reinstall torch torchvision"
    ) from error

from conformer_src.attention import Attention, Mlp, TransformerBlock
from conformer_src.conv_block import ConvBlock, Stem
from conformer_src.data import FashionSubset, fashion_mnist, image_folder, local_global, photograph

__version__ = "0.1.0"
__all__ = [
    "Attention",
    "ConvBlock",
    "FashionSubset",
    "Mlp",
    "Stem",
    "TransformerBlock",
    "fashion_mnist",
    "image_folder",
    "local_global",
    "photograph",
]
