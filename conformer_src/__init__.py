"""The vision Conformer, built step by step: the package behind the book.

    import conformer_src as cs

    model = cs.create_model("conformer_tiny_patch16", num_classes=10)
    logits = model(images)  # DualLogits(conv, trans)

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
from conformer_src.conformer import (
    Conformer,
    ConformerConfig,
    DualLogits,
    ModelCard,
    list_models,
    model_card,
)
from conformer_src.conv_block import ConvBlock, Stem
from conformer_src.cost import optimize_for_inference
from conformer_src.coupled_block import ConvTransBlock, Features, MedConvBlock
from conformer_src.data import FashionSubset, fashion_mnist, image_folder, local_global, photograph
from conformer_src.export import export_model
from conformer_src.fcu import FCUDown, FCUUp
from conformer_src.files import WeightsError
from conformer_src.inputs import InputConfig
from conformer_src.predict import extract_features, predict
from conformer_src.trained import list_trained, load_trained
from conformer_src.weights import (
    create_model,
    export_weights,
    load_model,
    load_weights,
    save_weights,
)

__version__ = "0.1.0"
__all__ = [
    "Attention",
    "Conformer",
    "ConformerConfig",
    "ConvBlock",
    "ConvTransBlock",
    "DualLogits",
    "FCUDown",
    "FCUUp",
    "FashionSubset",
    "Features",
    "InputConfig",
    "MedConvBlock",
    "Mlp",
    "ModelCard",
    "Stem",
    "TransformerBlock",
    "WeightsError",
    "create_model",
    "export_model",
    "export_weights",
    "extract_features",
    "fashion_mnist",
    "image_folder",
    "list_models",
    "list_trained",
    "load_model",
    "load_trained",
    "load_weights",
    "local_global",
    "model_card",
    "optimize_for_inference",
    "photograph",
    "predict",
    "save_weights",
]
