"""Scaling out: BatchNorm over all processes, parameters shared out, data in shards.

Images in a folder become shards, and shards feed the same loop as a folder does::

    write_shards("imagenet/train", "shards/train")
    images = open_shards("shards/train", transform)
    for loss in fit(trainer, images):
        ...

A shard is a tar file of encoded images in a random order, as the `webdataset` package defines it:
it is read from its start to its end, which disks and networks do best.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice, takewhile
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from conformer_src.data import _to_rgb, image_folder
from conformer_src.files import sha256_of, written_whole
from conformer_src.recipes import Recipe
from conformer_src.training import Batch, SeededSamples, _part_size, steps_per_epoch


def process_count() -> int:
    """Return how many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, which each of them gets.

    A value enters the sums of all processes, so its gradient is the sum of theirs. (torch's own
    differentiable all-reduce is deprecated.)
    """

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        """Return the sum; every process must call this."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """Return the sum of the gradients."""
        return SumOverProcesses.apply(gradient)


def joint_statistics(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance (C,) of maps (B, C, H, W) over all processes, and their count.

    One message carries all: from each process its count, and per channel the sum and the sum of
    squares, in 64 bits, because the variance is a small difference of two large numbers.
    """
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
    variance, mean = variance.double(), mean.double()
    count = mean.new_tensor([maps.numel() / maps.shape[1]])
    own = torch.cat([count, count * mean, count * (variance + mean**2)])
    count, total, squares = SumOverProcesses.apply(own).split([1, len(mean), len(mean)])
    mean = total / count
    variance = (squares / count - mean**2).clamp(min=0)  # never below, by rounding
    return mean.to(maps.dtype), variance.to(maps.dtype), count


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose batch is that of all processes; torch's `SyncBatchNorm` refuses the CPU.

    In eval mode, and with one process, it is `nn.BatchNorm2d`.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise maps (B, C, H, W), each process its own."""
        if not self.training or process_count() == 1:
            return super().forward(maps)
        precise = maps.to(self.weight.dtype)  # autocast gives 16 bits
        mean, variance, count = joint_statistics(precise)
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * (count / (count - 1)).to(variance.dtype)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        scaled = (precise - mean[:, None, None]) * scale[:, None, None]
        return (scaled + self.bias[:, None, None]).to(maps.dtype)


def synchronize_norms(model: nn.Module) -> nn.Module:
    """Let each BatchNorm of a model see the batches of all processes; state dicts stay the same.

    On a GPU it is torch's `SyncBatchNorm`, so move the model there first.
    """
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for part in model.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SyncedBatchNorm2d
    return model


def shard_parameters(model: nn.Module) -> nn.Module:
    """Share out a model's parameters among all processes (FSDP); each holds a part of each.

    A block's parameters are put together before it runs and freed afterwards. Build the
    `Accelerator` and move the model to its device first; the model is changed in place. A process
    that is alone keeps it as it is.
    """
    if process_count() == 1:
        return model
    mesh = init_device_mesh(next(model.parameters()).device.type, (process_count(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


_LIST = "shards.json"  # the shards of a folder, their sizes and checksums, and the classes


def write_shards(
    images: ImageFolder | str | Path, folder: str | Path, size: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Write images into shards of about `size`, in a random order, each file byte for byte.

    What was interrupted goes on: shards that are there stay. Returns `folder`, `shards`, `total`.

    Raises:
        ValueError: An image cannot be read, or the folder holds something else.
        WeightsError: A shard cannot be written, for example because the disk is full.
    """
    images, folder = _require_images(images, size), Path(folder)
    order = list(range(len(images)))
    Random(f"{seed}").shuffle(order)
    parts = -(-len(order) // size)
    edges = [part * len(order) // parts for part in range(parts + 1)]
    plan = _planned(images, folder, {"parts": parts, "seed": seed})
    with tqdm(total=len(order), desc="shards", unit=" images", leave=False, disable=None) as bar:
        for part, places in enumerate(map(order.__getitem__, map(slice, edges, edges[1:]))):
            if part >= len(plan["shards"]):
                plan["shards"].append(_write_shard(images, folder, part, edges[part], places))
                _write_list(plan, folder)
            bar.update(len(places))
    return {"folder": str(folder), "shards": parts, "total": len(order)}


def _require_images(images: ImageFolder | str | Path, size: int) -> ImageFolder:
    """Return a data set of files, if it is one and its shards can be so large."""
    if type(size) is not int or size < 1:
        raise ValueError(f"size must be a whole number of at least 1, not {size!r}.")
    if isinstance(images, str | Path):
        return image_folder(images)
    if not hasattr(images, "samples"):
        kind = type(images).__name__
        raise ValueError(f"{kind} has no files to copy; give a folder or an ImageFolder.")
    return images


def _planned(images: ImageFolder, folder: Path, choices: dict[str, int]) -> dict[str, Any]:
    """Return what the list of shards says so far: those that an earlier call has written."""
    _webdataset()
    known = "\n".join(f"{label} {_name(images, path)}" for path, label in images.samples)
    digest = hashlib.sha256(known.encode(errors="surrogateescape")).hexdigest()
    plan = {"classes": list(images.classes), "total": len(images), "images": digest, **choices}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _LIST).is_file():
        found = _read_list(str(folder))
        done = takewhile(lambda shard: (folder / shard["name"]).is_file(), found.pop("shards"))
        if found != plan:
            raise ValueError(
                f"{folder} holds shards of other images, or of another size or seed; give a new "
                "folder, or delete this one."
            )
        for left in folder.glob(".*.part"):
            left.unlink(missing_ok=True)
        return {**plan, "shards": list(done)}
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder for the shards.")
    _write_list({**plan, "shards": []}, folder)
    return {**plan, "shards": []}


def _name(images: ImageFolder, path: str) -> str:
    """Return how an image is called in the shards: by its path inside the folder."""
    return Path(path).relative_to(images.root).as_posix()


def _write_list(plan: dict[str, Any], folder: Path) -> None:
    with written_whole(folder / _LIST) as temporary:
        temporary.write_text(json.dumps(plan, indent=1), encoding="utf-8")


def _write_shard(
    images: ImageFolder, folder: Path, part: int, first: int, places: Sequence[int]
) -> dict[str, Any]:
    """Write a shard, and return its line in the list; its images are numbered from `first`."""
    path, tar_writer = folder / f"{part:06}.tar", _webdataset().TarWriter
    with written_whole(path) as temporary:
        # Neither time nor user stand in it: the same images make the same bytes.
        with temporary.open("wb") as stream, tar_writer(stream, encoder=False, mtime=0) as writer:
            for number, place in enumerate(places, first):
                files = _encoded(images, *images.samples[place])
                writer.write({"__key__": f"{number:09}", **files})
        return {"name": path.name, "samples": len(places), "sha256": sha256_of(temporary)}


def _encoded(images: ImageFolder, path: str, label: int) -> dict[str, bytes]:
    """Return the files of a sample by their endings: the image, its class, its name."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
    _decode(content, path)  # an image that cannot be read would stop each epoch
    name = _name(images, path).encode(errors="surrogateescape")
    return {Path(path).suffix[1:].lower() or "image": content, "cls": b"%d" % label, "txt": name}


def _decode(content: bytes, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _to_rgb(image)
    except Exception as error:  # Pillow reports broken files in many ways
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be read as an image ({reason}).") from None


def _webdataset() -> ModuleType:
    """Return the package that reads and writes shards.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import webdataset
    except ImportError:
        raise ValueError("shards need a package more; install it: pip install webdataset") from None
    return webdataset


def _read(address: str) -> bytes:
    """Return the bytes of a file, or of what webdataset can fetch."""
    if "://" in address:
        with _webdataset().gopen(address) as stream:
            return stream.read()
    return Path(address).read_bytes()


def _read_list(folder: str) -> dict[str, Any]:
    """Return the list of the shards in a folder."""
    address = f"{folder}/{_LIST}"
    try:
        plan = json.loads(_read(address))
        if plan["total"] < sum(shard["samples"] for shard in plan["shards"]):
            raise ValueError
    except OSError as error:
        reason = error.strerror or "it was not fetched"
        raise ValueError(
            f"{address} cannot be read ({reason}); write the shards with: conformer shards"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{address} is damaged; copy or write the shards again.") from None
    return plan


def open_shards(folder: str | Path, transform: Callable | None = None) -> "ShardedImages":
    """Open a folder of shards, or its address on the web.

    Raises:
        ValueError: There are no shards, or not all of them were written.
    """
    _webdataset()
    plan = _read_list(str(folder))
    images = ShardedImages(str(folder), plan["shards"], plan["classes"], transform)
    if len(images) < plan["total"]:
        raise ValueError(
            f"{folder} holds {len(images)} of {plan['total']} images, because writing was "
            "interrupted; run the same conformer shards again, and it goes on."
        )
    return images


def read_shard(address: str, checksum: str) -> list[tuple[bytes, int, str]]:
    """Return (encoded image, label, name) of all images of a shard, read from start to end.

    Raises:
        ValueError: The shard is missing or damaged.
    """
    try:
        content = _read(address)
    except OSError as error:
        reason = error.strerror or "it was not fetched"
        raise ValueError(f"the shard {address} cannot be read ({reason}); put it back.") from None
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(f"the shard {address} is damaged; copy or write it again.")
    tars = _webdataset().tariterators
    members = tars.tar_file_expander([{"url": address, "stream": io.BytesIO(content)}])
    samples = []
    for sample in tars.group_by_keys(members):
        [ending] = [key for key in sample if key[0] != "_" and key not in ("cls", "txt")]
        name = sample["txt"].decode(errors="surrogateescape")
        samples.append((sample[ending], int(sample["cls"]), name))
    return samples


def deal_shards(shards: int, streams: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffle the shards for an epoch and deal them to streams; each is read by one process.

    Raises:
        ValueError: There are fewer shards than streams.
    """
    if shards < streams:
        raise ValueError(
            f"{shards} shards cannot feed {streams} streams (processes x workers); give fewer "
            "--workers, or write smaller shards with: conformer shards --size"
        )
    order = list(range(shards))
    Random(f"{seed} {epoch}").shuffle(order)
    return [order[stream::streams] for stream in range(streams)]


Key = tuple[tuple[int, int], int]  # (number of the shard, place in it), seed of the sample


def stream_keys(
    sizes: Sequence[int], own: Sequence[int], recipe: Recipe, epoch: int, skip: int = 0
) -> Iterator[Key]:
    """Yield a stream's keys in an epoch, without end: after its last shard the first comes again.

    The images of a shard are shuffled. What is skipped is counted, not read.
    """
    for lap in count():
        for shard in own:
            if skip >= sizes[shard]:
                skip -= sizes[shard]
                continue
            draw = Random(f"{recipe.seed} {epoch} {lap} {shard}")
            places = list(range(sizes[shard]))
            draw.shuffle(places)
            keys = [((shard, place), draw.getrandbits(31)) for place in places]
            yield from keys[skip:]
            skip = 0


def share_streams(
    sizes: Sequence[int], recipe: Recipe, start: int, accelerator: Accelerator
) -> Iterator[list[Key]]:
    """Yield the keys of this process's parts of all batches from step `start` to the run's end.

    Part after part comes from one stream after the other, and torch's loader hands part after part
    to one worker after the other: so a worker reads one stream. With other numbers of processes or
    workers a run goes on at the same step, but in that epoch some images come twice, others wait.
    """
    workers, processes = max(1, recipe.workers), accelerator.num_processes
    size = _part_size(recipe, processes)
    parts = steps_per_epoch(sum(sizes), recipe) * recipe.accumulate
    first, begin = divmod(start * recipe.accumulate, parts)
    for epoch in range(first, recipe.epochs):
        dealt = deal_shards(len(sizes), workers * processes, recipe.seed, epoch)
        streams = [
            stream_keys(sizes, own, recipe, epoch, len(range(worker, begin, workers)) * size)
            for worker, own in enumerate(dealt[accelerator.process_index :: processes])
        ]
        for part in range(begin, parts):
            yield list(islice(streams[part % workers], size))
        begin = 0


class _Shards(Dataset):
    """Images by (number of the shard, place in it); the shard that was read last is kept."""

    def __init__(
        self,
        folder: str,
        shards: Sequence[dict[str, Any]],
        classes: Sequence[str],
        transform: Callable | None,
    ) -> None:
        self.folder, self.shards, self.classes = folder, shards, classes
        self.transform, self.sizes = transform, [shard["samples"] for shard in shards]
        self.kept = -1, []

    def __len__(self) -> int:
        return sum(self.sizes)

    def sample(self, index: tuple[int, int]) -> tuple[bytes, int, str]:
        """Return an encoded image, its label and its name."""
        number, place = index
        if self.kept[0] != number:
            shard = self.shards[number]
            self.kept = -1, []  # make room first
            self.kept = number, read_shard(f"{self.folder}/{shard['name']}", shard["sha256"])
        return self.kept[1][place]

    def __getitem__(self, index: tuple[int, int]) -> tuple[Any, int]:
        content, label, name = self.sample(index)
        image = _decode(content, f"{name} in {self.folder}/{self.shards[index[0]]['name']}")
        return self.transform(image) if self.transform else image, label


class _SeededShards(SeededSamples):
    """The same with a seed for each image, and with the names that the images had as files."""

    def __getitem__(self, key: Key) -> tuple[Any, int, str]:
        image, label, _ = super().__getitem__(key)
        return image, label, self.dataset.sample(key[0])[2]


class ShardedImages(_Shards):
    """Images in shards, which `fit` and `evaluate` read one shard after the other."""

    def load_batches(
        self, recipe: Recipe, start: int, accelerator: Accelerator
    ) -> Iterator[Sequence[Batch]]:
        """Yield this process's share of each batch from step `start` on, in parts."""
        keys = share_streams(self.sizes, recipe, start, accelerator)
        pin = accelerator.device.type == "cuda"
        loader = DataLoader(
            _SeededShards(self), batch_sampler=keys, num_workers=recipe.workers, pin_memory=pin
        )
        yield from zip(*[iter(loader)] * recipe.accumulate, strict=True)

    def evaluation_batches(
        self, accelerator: Accelerator, size: int, workers: int
    ) -> tuple[DataLoader, list[int]]:
        """Return the batches that this process computes, each from one shard, and their numbers."""
        processes, own = accelerator.num_processes, accelerator.process_index
        numbers, keys = _evaluation_share(self.sizes, size, own, processes, workers)
        return DataLoader(_SeededShards(self), batch_sampler=keys, num_workers=workers), numbers


def _evaluation_share(
    sizes: Sequence[int], size: int, process: int, processes: int, workers: int
) -> tuple[list[int], list[list[Key]]]:
    """Return the numbers and the keys of the batches that a process evaluates.

    Each process has shards of its own; all get equally many batches, the last one again if needed.
    """
    cut = [[(n, begin) for begin in range(0, images, size)] for n, images in enumerate(sizes)]
    numbers = {batch: number for number, batch in enumerate(chain(*cut))}
    dealt = [cut[first::processes] or cut[:1] for first in range(processes)]
    most = max(sum(map(len, shards)) for shards in dealt)
    batches = list(_in_turn(dealt[process], max(1, workers)))
    batches += batches[-1:] * (most - len(batches))
    keys = [
        [((shard, place), 0) for place in range(begin, min(begin + size, sizes[shard]))]
        for shard, begin in batches
    ]
    return [numbers[batch] for batch in batches], keys


def _in_turn(shards: Sequence[list], workers: int) -> Iterator[tuple[int, int]]:
    """Yield the batches of as many shards as there are workers in turn, so that each reads one."""
    for first in range(0, len(shards), workers):
        group = shards[first : first + workers]
        even = len(group) == workers and len(set(map(len, group))) == 1
        yield from chain.from_iterable(zip(*group, strict=True) if even else group)
