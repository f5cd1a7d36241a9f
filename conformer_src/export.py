"""A network as one file that runs without this package: ONNX, or PyTorch's exported program.

Write it, and any program that reads ONNX can rank images::

    cs.export_model(model, "flowers.onnx")

"images" goes in: (B, C, H, W) as `input_transform(model.input)` makes them, in batches of any size.
"logits" comes out: (B, num_classes), the sum of both heads, by which the Conformer paper ranks
(section 3.1). The names of the classes and `model.input` stand in the file, as JSON.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conformer_src.conformer import Conformer
from conformer_src.files import written_whole
from conformer_src.inputs import own_input
from conformer_src.predict import USUAL_INPUTS, _config
from conformer_src.weights import _notes_of, _unwrapped

TOLERANCE = 1e-3  # in units of the logits' root mean square; rounding leaves far less


class Exported(NamedTuple):
    """What was written."""

    path: Path
    shape: tuple[int, int, int]  # of one image: (C, H, W)
    notes: dict[str, str]  # "classes" and "input", as JSON; only what is known
    deviation: float | None  # from the model, in units of the root mean square; None: not compared


class _Ranked(nn.Module):
    """One tensor out: torch.export.save refuses the named pair of both heads."""

    def __init__(self, model: Conformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).sum()


@torch.no_grad()
def export_model(model: nn.Module, path: str | Path, image_size: int | None = None) -> Exported:
    """Write a network to a file that runs without this package, and compare both.

    Args:
        model: on any device, compiled or not; a copy in single precision is written.
        path: `.onnx` needs onnxscript, and is compared if onnxruntime is installed; `.pt2` is for
            `torch.export.load`.
        image_size: side of the images in pixels, the only one that the file will take; by default
            that of `model.input`, or else the usual one for the stem.

    Raises:
        ValueError: The ending is another, the model has no classes, the size does not fit,
            onnxscript is missing, torch is too old for ONNX (2.6 is), or what was written computes
            something else.
        WeightsError: The file cannot be written; nothing is left.
    """
    path = Path(path)
    if path.suffix not in _KINDS:
        raise ValueError(f"{path} must end with {' or '.join(ENDINGS)}, which says what to write.")
    translate, opened = _KINDS[path.suffix]
    network = copy.deepcopy(_unwrapped(model)).cpu().float().eval()
    notes, shape = _notes_and_shape(network, image_size)
    ranked = _Ranked(network).eval()
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = [ranked(images[:count]) for count in (1, 3)]  # first, because it refuses what is odd
    write = translate(ranked, images[:2], notes)
    with written_whole(path) as temporary:
        write(temporary)
        run = opened(temporary)
        deviations = [_deviation(run(images[: len(one)]), one) for one in expected] if run else []
        if wrong := [one for one in deviations if not one <= TOLERANCE]:
            raise ValueError(
                f"{path} would compute something else (deviation {wrong[0]:.2g}) and was not "
                "written; are all weights finite?"
            )
    return Exported(path, shape, notes, max(deviations, default=None))


def _notes_and_shape(
    network: Conformer, image_size: int | None
) -> tuple[dict[str, str], tuple[int, int, int]]:
    config, ready = _config(network), own_input(network)
    if not config.num_classes:
        raise ValueError("a model of num_classes=0 ranks nothing; export one with heads.")
    usual = ready or USUAL_INPUTS[config.stem]
    side = replace(usual, image_size=usual.image_size if image_size is None else image_size)
    if ready or config.in_chans == 3:  # else nobody knows how its images were normalised
        network.input = side
    return _notes_of(network), (config.in_chans, side.image_size, side.image_size)


def _deviation(found: Tensor, expected: Tensor) -> float:
    usual = expected.square().mean().sqrt().clamp_min(1e-12)  # fresh heads may be all zero
    return ((found - expected).abs().max() / usual).item()


def _to_onnx(ranked: nn.Module, images: Tensor, notes: dict[str, str]) -> Callable[[Path], None]:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        words = "ONNX needs a package more; install it: python -m pip install onnxscript"
        raise ValueError(words) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the translator about itself
            program = torch.onnx.export(
                ranked,
                (images,),
                dynamo=True,
                verbose=False,
                dynamic_shapes=_ANY_BATCH,
                input_names=["images"],
                output_names=["logits"],
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"torch {torch.__version__} cannot translate this network to ONNX; update torch, or "
            "write a .pt2 file."
        ) from error
    program.model.metadata_props.update(notes)
    return lambda path: program.save(path, external_data=False)


def _open_onnx(path: Path) -> Callable[[Tensor], Tensor] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _to_pt2(ranked: nn.Module, images: Tensor, notes: dict[str, str]) -> Callable[[Path], None]:
    program = torch.export.export(ranked, (images,), dynamic_shapes=_ANY_BATCH, strict=False)

    def write(path: Path) -> None:
        with path.open("wb") as stream:  # of a path torch would believe the ending
            torch.export.save(program, stream, extra_files=notes)

    return write


def _open_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as stream:
        return torch.export.load(stream).module()


_ANY_BATCH = ({0: torch.export.Dim("batch", min=1, max=2**20)},)  # torch 2.6 insists on a limit
_KINDS = {".onnx": (_to_onnx, _open_onnx), ".pt2": (_to_pt2, _open_pt2)}
ENDINGS = tuple(_KINDS)
