"""Small networks that come with the package, ready to be looked at.

They are runs of the studies of `ablation` with seed 0, stored in 16 bits;
`python benchmarks/ablation.py --ship` writes them.
"""

from difflib import get_close_matches
from pathlib import Path

from conformer_src.conformer import Conformer
from conformer_src.weights import load_model

_FOLDER = Path(__file__).parent / "assets" / "weights"


def list_trained() -> list[str]:
    """Return the names of the networks that come with the package, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def load_trained(name: str) -> Conformer:
    """Return a network that comes with the package, in evaluation mode.

    The `fashion-` ones take images (B, 1, 32, 32) of Fashion-MNIST as `fashion_transform` makes
    them, the `drawn-` ones images (B, 1, 64, 64) of `local_global`. Each set has a Conformer, a CNN
    and a ViT with about as many parameters. The drawn label is the additive one, which names both
    cues: the CNN knows the corners, the ViT the bars, the Conformer the bars and, of four corners,
    about three.

    Raises:
        ValueError: There is no such network.
        WeightsError: Its file was altered.
    """
    names = list_trained()
    if name not in names:
        close = get_close_matches(str(name), names, 1) or names
        raise ValueError(f"no network {name!r} comes with the package; choose {', '.join(close)}.")
    return load_model(_FOLDER / f"{name}.safetensors").float().eval()
