"""Rebuild the shipped Fashion-MNIST subset from the full set.

Takes the first 1,000 training and the first 200 test images of each of the ten classes, in the
order of the full set, and writes two sheets of 28 x 28 pictures, one class after the other:

    conformer_src/assets/fashion_train.png   100 columns, 100 rows, 10 rows a class
    conformer_src/assets/fashion_test.png     40 columns,  50 rows,  5 rows a class

The package checks the SHA-256 of the pixels, not of the file, so a rebuilt sheet is the same data
whatever version of the PNG encoder wrote it.

    python tools/make_fashion_subset.py [--root DIR] [--check]
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from conformer_src import data

ASSETS = Path(data.__file__).parent / "assets"
SHEETS = {"train": (1000, 100), "test": (200, 40)}  # images a class, columns


def subset(split: str, root: Path | None) -> torch.Tensor:
    """Return the split's images, uint8 (n, 28, 28), ordered by class."""
    full = data.fashion_mnist(train=split == "train", root=root)
    count, _ = SHEETS[split]
    chosen = [torch.nonzero(full.targets == label).flatten()[:count] for label in range(10)]
    return full.data[torch.cat(chosen)]


def main() -> None:
    """Write the sheets, or only compare them with the full set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="where the full set is, or is to be put")
    parser.add_argument("--check", action="store_true", help="compare with the shipped sheets")
    arguments = parser.parse_args()
    for split, (_, columns) in SHEETS.items():
        images = subset(split, arguments.root)
        if arguments.check:
            shipped = data.FashionSubset(train=split == "train").images[:, 0]
            same = torch.equal(images, shipped)
            print(f"{split}: {len(images):,} images, {'equal' if same else 'NOT EQUAL'}")
            if not same:
                raise SystemExit(1)
            continue
        rows = len(images) // columns
        sheet = images.view(rows, columns, 28, 28).transpose(1, 2).reshape(rows * 28, columns * 28)
        path = ASSETS / f"fashion_{split}.png"
        scratch = path.with_suffix(".part")
        Image.fromarray(sheet.numpy()).save(scratch, "png", optimize=True)
        scratch.rename(path)
        print(f"{path.name}: {path.stat().st_size:,} bytes, pixels SHA-256 {data._sha256(images)}")


if __name__ == "__main__":
    main()
