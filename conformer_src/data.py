"""The data sets of the book, and what is needed to look at them."""

import gzip
import hashlib
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the package dataset-fashion-mnist
_FASHION_FILES = {  # SHA-256 of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_SHEET_SHA256 = {  # of the pixels, whatever encoder wrote the file
    "train": "c0c6726b84344f71ed5f3f778113ef72d81c3e38038638a076d9f7b48ef3af3c",
    "test": "80f041a1db53aeefce90d32bb6094e616abf55eed82a9c247b6c2a44a773acf7",
}


def _sha256(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


_REPAIR = "Reinstall conformer_src, or restore the file with `git checkout`."


def _read_asset(name: str) -> Tensor:
    """Read a picture that comes with the package as uint8 (C, H, W)."""
    path = files("conformer_src") / "assets" / name
    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            return TF.pil_to_tensor(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing. {_REPAIR}") from None
    except Exception as error:  # Pillow reports broken files in many ways
        raise ValueError(f"{path} cannot be read ({error}). {_REPAIR}") from None


def _read_sheet(train: bool) -> Tensor:
    """Read a sheet of 28 x 28 pictures as uint8 (n, 28, 28); refuse an altered one."""
    if not isinstance(train, bool):  # "test" would count as true
        raise TypeError(
            f"train is {train!r}; give True for the training images, False for the test"
        )
    split = "train" if train else "test"
    name = f"fashion_{split}.png"
    pixels = _read_asset(name)[0]
    if pixels.shape[0] % 28 == 0 and pixels.shape[1] % 28 == 0:
        tiles = pixels.unfold(0, 28, 28).unfold(1, 28, 28).flatten(0, 1).contiguous()
        if _sha256(tiles) == _SHEET_SHA256[split]:
            return tiles
    raise ValueError(f"{name} was altered: its pixels do not have the recorded SHA-256. {_REPAIR}")


def _require_size(size: int) -> None:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size is {size}; give the side of a square, a whole number of pixels")


class FashionSubset(Dataset):
    """The part of Fashion-MNIST that comes with the package, ordered by class.

    `images` is uint8 (n, 1, 28, 28), `labels` int64 (n,): n = 10,000 for training, 2,000 for test,
    as many of each of the ten `classes`. An item is (transform(image), label).

    Raises:
        FileNotFoundError, ValueError: The shipped file is missing or altered.
    """

    classes = FASHION_CLASSES

    def __init__(self, train: bool = True, transform: Callable | None = None):
        self.images = _read_sheet(train).unsqueeze(1)  # (n, 1, 28, 28)
        self.labels = torch.arange(10).repeat_interleave(len(self.images) // 10)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), int(self.labels[index])


def _is_damaged(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() != _FASHION_FILES[path.name]


def _fashion_is_whole(raw: Path) -> bool:
    """Whether the four unpacked files are there; refuse them if they are damaged."""
    paths = [raw / name for name in _FASHION_FILES]
    if not all(path.is_file() for path in paths):
        return False
    for path in paths:
        if _is_damaged(path):
            raise ValueError(
                f"{path} is damaged: it does not have the recorded SHA-256. "
                f"Delete the folder {raw} and call fashion_mnist again."
            )
    return True


def _unpack_debian(raw: Path) -> str:
    """Unpack Debian's files into `raw`; return why that cannot be done, or nothing."""
    packed = {name: _DEBIAN / f"{name}.gz" for name in _FASHION_FILES}
    if not all(path.is_file() for path in packed.values()):
        return f"Debian's package dataset-fashion-mnist is not installed ({_DEBIAN})"
    for name, path in packed.items():
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            return f"Debian's {path} cannot be read ({error})"
        if hashlib.sha256(content).hexdigest() != _FASHION_FILES[name]:
            return f"Debian's {path} is damaged, it does not have the recorded SHA-256"
        (raw / name).write_bytes(content)
    return ""


def _download(scratch: str, raw: Path) -> str:
    """Let torchvision download the files into `raw`; return why that failed, or nothing."""
    try:
        datasets.FashionMNIST(scratch, download=True)
        damaged = [name for name in _FASHION_FILES if _is_damaged(raw / name)]
    except Exception as error:  # network, disk, archive: one more thing that was tried
        return f"the download failed ({' '.join(str(error).split())})"
    return f"the download is damaged ({', '.join(damaged)})" if damaged else ""


def _collect_fashion(scratch: str, raw: Path, download: bool) -> list[str]:
    """Bring the four files to `raw`; return all reasons why not, or nothing."""
    raw.mkdir(parents=True)
    no_debian = _unpack_debian(raw)
    if not no_debian:
        return []
    if not download:
        return [no_debian, "downloading was not allowed (download=False)"]
    no_download = _download(scratch, raw)
    return [no_debian, no_download] if no_download else []


def _install_fashion(root: Path, download: bool) -> None:
    """Put the four files under `root`, checked, each in one step; a part of them is never used."""
    target = root / "FashionMNIST" / "raw"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            raw = Path(scratch) / "FashionMNIST" / "raw"
            missing = _collect_fashion(scratch, raw, download)
            if not missing:
                target.mkdir(parents=True, exist_ok=True)
                for name in _FASHION_FILES:
                    os.replace(raw / name, target / name)
    except OSError as error:
        raise OSError(
            f"Fashion-MNIST cannot be stored in {root} ({error}). Make room there and allow "
            "writing, or name another folder with root=..., or use FashionSubset."
        ) from None
    if missing:
        tried = "; ".join([f"no complete set in {target}", *missing])
        raise FileNotFoundError(
            f"Fashion-MNIST was not found: {tried}. Mend one of the three, or use "
            "FashionSubset, which comes with the package."
        )


def fashion_mnist(
    train: bool = True,
    root: str | Path | None = None,
    transform: Callable | None = None,
    download: bool = True,
) -> datasets.FashionMNIST:
    """Return the full set, 60,000 or 10,000 images, as torchvision's data set.

    It is looked for under `root` (by default `datasets` in torch's cache), then in Debian's package
    dataset-fashion-mnist, then downloaded. What is found is checked and kept under `root`.

    Raises:
        FileNotFoundError: None of the three is there; the message says what was tried.
        OSError: Nothing can be written under `root`.
        ValueError: A file under `root` is damaged.
    """
    root = Path(root or Path(torch.hub.get_dir()) / "datasets")
    if not _fashion_is_whole(root / "FashionMNIST" / "raw"):
        _install_fashion(root, download)
    return datasets.FashionMNIST(str(root), train=train, transform=transform)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode upright and into RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits: convert("RGB") alone would cut at 255
        upright = upright.convert("I").point(lambda value: value * (1 / 257))
    if upright.mode == "P":  # straight to RGB, Pillow warns of half transparent colours
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


def _load_rgb(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except Exception as error:  # Pillow reports broken files in many ways
        raise ValueError(
            f"{path} cannot be read as an image ({error}). "
            'Remove it, or leave such files out with corrupt="skip".'
        ) from None


def _is_readable(path: str) -> bool:
    try:
        _load_rgb(path)
    except ValueError:
        return False
    return True


def image_folder(
    root: str | Path,
    transform: Callable | None = None,
    corrupt: Literal["refuse", "skip"] = "refuse",
) -> datasets.ImageFolder:
    """Return your own images, one sub-folder a class: `root/cats/1.jpg`, `root/dogs/2.png`.

    An unreadable file raises an error with its name when its turn comes ("refuse"), or all files
    are tried now and the unreadable ones left out with a warning that names them ("skip"). Hidden
    files and folders, whose names start with a dot, do not count.

    Raises:
        FileNotFoundError: No such folder, no sub-folders, or a class without images.
        ValueError: A file cannot be read.
    """
    if corrupt not in ("refuse", "skip"):
        raise ValueError(f'corrupt is "{corrupt}"; choose "refuse" or "skip"')
    dataset = _Pictures(Path(root), transform)
    if corrupt == "skip":
        _drop_unreadable(dataset)
    return dataset


_RULE = "One sub-folder a class is expected, each with at least one image: root/CLASS/picture.jpg."


class _Pictures(datasets.ImageFolder):
    """torchvision's ImageFolder without what is hidden: .ipynb_checkpoints, ._1.jpg."""

    def __init__(self, root: Path, transform: Callable | None):
        # Empty classes are allowed here, because only what is left below counts.
        super().__init__(str(root), transform, loader=_load_rgb, allow_empty=True)
        start = len(self.root)  # the folder itself may lie in a hidden one
        self.keep([item for item in self.samples if f"{os.sep}." not in item[0][start:]])
        for label in sorted(set(self.class_to_idx.values()) - set(self.targets)):
            endings = ", ".join(datasets.folder.IMG_EXTENSIONS)
            empty = root / self.classes[label]
            raise FileNotFoundError(f"{empty} holds no images ({endings}). {_RULE}")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Return the visible sub-folders, sorted, and their numbers."""
        root = Path(directory)
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder {root}. {_RULE}")
        folders = [path for path in root.iterdir() if path.is_dir()]
        names = sorted(path.name for path in folders if not path.name.startswith("."))
        if not names:
            raise FileNotFoundError(f"{root} has no sub-folders. {_RULE}")
        return names, {name: label for label, name in enumerate(names)}

    def keep(self, samples: list[tuple[str, int]]) -> None:
        """Let these (path, label) pairs be all there are."""
        self.samples = self.imgs = samples
        self.targets = [label for _, label in samples]


def _drop_unreadable(dataset: _Pictures) -> None:
    good = [sample for sample in dataset.samples if _is_readable(sample[0])]
    bad = sorted(set(dataset.samples) - set(good))
    usable = {label for _, label in good}
    for path, label in bad:
        if label not in usable:
            name = dataset.classes[label]
            raise ValueError(f'No image of class "{name}" can be read; the first is {path}.')
    if bad:
        named = ", ".join(path for path, _ in bad[:10])
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        count = f"{len(bad)} of {len(dataset)} files"
        warnings.warn(f"left out {count}, unreadable: {named}{more}", stacklevel=3)
    dataset.keep(good)


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FASHION_MEAN = (0.286,)
FASHION_STD = (0.353,)


def photo_transform(train: bool, size: int = 224) -> v2.Compose:
    """Return the transform for photographs: any image in, float (3, size, size) out.

    Training crops at random and flips; evaluation resizes the shorter side to size / 0.875 and cuts
    out the centre (256, 224). Both interpolate bicubically and use ImageNet's mean and deviation.
    """
    _require_size(size)
    bicubic = v2.InterpolationMode.BICUBIC
    if train:
        crop = [v2.RandomResizedCrop(size, interpolation=bicubic), v2.RandomHorizontalFlip()]
    else:
        crop = [v2.Resize(int(size / 0.875), interpolation=bicubic), v2.CenterCrop(size)]
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return v2.Compose([v2.RGB(), v2.ToImage(), *crop, *to_float])


def fashion_transform(train: bool) -> v2.Compose:
    """Return the transform for Fashion-MNIST: 28 x 28 grey image in, float (1, 32, 32) out.

    Two pixels of zeros on each side make the size a multiple of 16; training flips at random.
    """
    flip = [v2.RandomHorizontalFlip()] if train else []
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(FASHION_MEAN, FASHION_STD)]
    return v2.Compose([v2.ToImage(), v2.Pad(2), *flip, *to_float])


class LocalGlobal(NamedTuple):
    """Drawn images with the two hidden facts about each, and the two labels made of them."""

    images: Tensor  # (n, 1, size, size), float32
    rotation: Tensor  # (n,), 0 to 3, the local cue: how the small corners are turned
    agreement: Tensor  # (n,), 0 or 1, the global cue: whether both bars are bright or both dark

    def additive_label(self) -> Tensor:
        """Return (n,) labels 0 to 7 that name both cues; adding up two opinions is enough."""
        return 2 * self.rotation + self.agreement

    def coupled_label(self) -> Tensor:
        """Return (n,) labels 0 to 3; no sum of a local and a global opinion gets all of them right.

        A corner turned 0 or 1 is the answer itself, swapped if the bars agree; a corner turned 2 or
        3 asks whether they agree (3) or not (2).
        """
        return torch.where(self.rotation < 2, self.rotation ^ self.agreement, 2 + self.agreement)


def _stamp_corners(images: Tensor, rotation: Tensor, generator: torch.Generator) -> None:
    """Add four 5 x 5 corners, turned by `rotation` quarters, anywhere between the bars."""
    corner = torch.zeros(5, 5)
    corner[:, 0] = corner[4, :] = 1
    corners = torch.stack([(corner - corner.mean()).rot90(turns) for turns in range(4)])
    count, size = images.shape[0], images.shape[-1]
    which, offsets = torch.arange(count).view(count, 1, 1), torch.arange(5)
    for _ in range(4):
        top = torch.randint(0, size - 5, (count, 1), generator=generator)
        left = torch.randint(14, size - 19, (count, 1), generator=generator)
        rows, columns = (top + offsets).unsqueeze(2), (left + offsets).unsqueeze(1)
        images.index_put_((which, rows, columns), 1.5 * corners[rotation], accumulate=True)


def _draw_bar(images: Tensor, bright: Tensor, left: int, generator: torch.Generator) -> None:
    """Add one 20 x 10 bar from column `left` on, at a random height, bright or dark."""
    count, size = images.shape[0], images.shape[-1]
    top = torch.randint(0, size - 20, (count, 1, 1), generator=generator)
    rows, columns = torch.arange(size).view(1, size, 1), torch.arange(size).view(1, 1, size)
    bar = (rows >= top) & (rows < top + 20) & (columns >= left) & (columns < left + 10)
    images += 3.0 * (2 * bright - 1).view(count, 1, 1) * bar


def local_global(count: int, seed: int = 0, size: int = 64) -> LocalGlobal:
    """Draw images whose label needs something small and something far apart; equal for equal seeds.

    Raises:
        ValueError: `count` is below 1, or `size` below 48 (no room between the bars).
    """
    if not (isinstance(count, int) and isinstance(size, int)) or count < 1 or size < 48:
        rule = "whole numbers, at least 1 image of at least 48 pixels"
        raise ValueError(f"count is {count} and size is {size}; expected {rule}")
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, size, size, generator=generator)
    slope = (torch.arange(size) - size / 2) / size
    for ramp in (slope.view(1, size, 1), slope.view(1, 1, size)):  # uneven light
        images += 0.5 * torch.randn(count, 1, 1, generator=generator) * ramp
    rotation = torch.randint(0, 4, (count,), generator=generator)
    _stamp_corners(images, rotation, generator)
    bright = torch.randint(0, 2, (2, count), generator=generator)
    for bar, left in zip(bright, (0, size - 10), strict=True):
        _draw_bar(images, bar, left, generator)
    return LocalGlobal(images.unsqueeze(1), rotation, (bright[0] == bright[1]).long())


def check_batch(images: Tensor, labels: Tensor, in_chans: int, num_classes: int) -> None:
    """Refuse a batch that no network of this many channels and classes can take, saying why.

    Raises:
        TypeError: Not tensors, images that are not floating point, or labels that are not int64.
        ValueError: Images are not (B, in_chans, H, W), labels not (B,), or a label is out of range.
    """
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        raise TypeError("images and labels must both be tensors; torch.as_tensor makes them")
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}; convert them, for example with images / 255")
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise ValueError(f"images are {tuple(images.shape)}; expected (B, {in_chans}, H, W)")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}; class numbers are int64: use labels.long()")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels are {tuple(labels.shape)}; expected ({len(images)},)")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        rule = f"the {num_classes} classes 0 to {num_classes - 1}"
        raise ValueError(f"label {wrong[0]} is not among {rule}")


PHOTOGRAPHS = ("cat", "coffee")


def photograph(name: str, size: int = 224) -> Tensor:
    """Return a photograph that comes with the package, float (3, size, size) between 0 and 1.

    Raises:
        ValueError: There is no photograph of this name (the message lists those there are), or
            `size` is not a whole number of pixels.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f'there is no photograph "{name}"; there are {", ".join(PHOTOGRAPHS)}')
    _require_size(size)
    # Resized as floats: on bytes, processors round differently.
    pixels = TF.to_dtype(_read_asset(f"{name}.jpg"), torch.float32, scale=True)
    return TF.resize(pixels, [size, size]).clamp(0, 1)


def show_images(images: Sequence[Tensor], titles: Sequence[str] | None = None) -> None:
    """Draw a row of images with titles: (3, H, W) in colour, (1, H, W) or (H, W) in grey."""
    import matplotlib.pyplot as plt  # here, so that importing the package stays quick

    if not len(images) or (titles and len(titles) != len(images)):
        counts = f"{len(images)} images and {len(titles or [])} titles"
        raise ValueError(f"{counts}; give at least one image, and a title each or none at all")
    figure, axes = plt.subplots(1, len(images), figsize=(1.3 * len(images), 1.6), squeeze=False)
    for index, (image, axis) in enumerate(zip(images, axes[0], strict=True)):
        pixels = image.detach().cpu().squeeze().numpy()
        colour = pixels.ndim == 3
        axis.imshow(
            pixels.transpose(1, 2, 0) if colour else pixels, cmap=None if colour else "gray"
        )
        axis.set_title(titles[index] if titles else "", fontsize=9)
        axis.set_axis_off()
    figure.tight_layout()
