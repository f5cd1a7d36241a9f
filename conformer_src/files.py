"""Files of weights: written whole or not at all, fetched without loss, opened with care.

Nothing in a file is ever executed. Whatever is wrong with one is said in one sentence, as a
`WeightsError`.
"""

import argparse
import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

CHUNK = 1 << 20
# The published names end in the first digits of the file's SHA-256: name-f6860372.pth
HASH = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")


class WeightsError(ValueError):
    """What is wrong with a file of weights, and what to do."""


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, types, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes `path` in one step, or leaves no trace.

    Raises:
        WeightsError: The folder does not exist, forbids writing, or is full.
    """
    handle, name = None, ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        yield Path(name)
        with open(name, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(name, path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{path} cannot be written ({error}); make room, allow writing, or choose another "
            "folder."
        ) from None
    finally:
        if name and os.path.exists(name):
            os.unlink(name)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Open a safetensors or a torch file and return its content and its notes.

    The content of a torch file may be nested, as training scripts leave it; the notes are those of
    a safetensors file's header. Tensors stay on disk until they are used.

    Raises:
        WeightsError: The file is missing, unreadable, damaged, or holds more than weights.
    """
    if not path.is_file():
        raise WeightsError(
            f"there is no file {path}; give the path of a .pth or .safetensors file."
        )
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise WeightsError(f"{path} cannot be opened ({error.strerror}); allow reading.") from None
    if not start:
        raise WeightsError(f"{path} is empty; fetch it again.")
    if start.lstrip()[:1] == b"<":
        raise WeightsError(
            f"{path} is a web page, not weights: the server answered with an error or a form; open "
            "the address in a browser, and fetch the file itself."
        )
    if start.startswith(b"PK"):
        return _read_torch(path), {}
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise WeightsError(
        f"{path} is neither a safetensors file nor a zip archive as torch.save has written since "
        "version 1.6; if an older torch wrote it, load it there and save it again."
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as stream:
            notes = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except Exception as error:  # the library reports damage in several ways
        raise WeightsError(f"{path} is damaged ({_words(error)}); fetch it again.") from None
    if "sha256" in notes and notes["sha256"] != digest(tensors):
        raise WeightsError(
            f"{path} is damaged: its values are not those that were saved; fetch it again."
        )
    return tensors, notes


def _read_torch(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # compares each part with its checksum
    except Exception as error:  # a damaged archive fails in many ways
        broken = _words(error)
    if broken:
        raise WeightsError(f"{path} is damaged ({broken}); fetch it again.")
    try:
        # The authors' training script stores its options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle.UnpicklingError, and what strange content provokes
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {found[1]}" if found else _words(error)
        raise WeightsError(
            f"{path} holds more than weights and was not opened ({what}); if you trust its source, "
            "load it there and save its state dict alone."
        ) from None


def _words(error: Exception) -> str:
    """Return the first line of an error, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def fetch(url: str, folder: Path | None = None) -> Path:
    """Download a file once, and return where it lies; a download that was cut is continued.

    Files are kept where `torch.hub` keeps its own. If the name holds digits of the file's SHA-256
    (`name-f6860372.pth`), they are compared.

    Raises:
        WeightsError: The address cannot be reached, or another file came than the name promises.
    """
    folder = folder or Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rpartition("/")[2]
    by_hand = f"download {url} elsewhere and put it into {folder}, or give the file's path instead."
    if path.is_file():
        _require_hash(path, path.name, by_hand)
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(4):
            try:
                _continue_download(url, part)
                break
            except (urllib.error.ContentTooShortError, ConnectionError, TimeoutError):
                if attempt == 3:
                    raise
    except (OSError, ValueError) as error:  # URLError is an OSError; ValueError: no such scheme
        raise WeightsError(f"{path.name} cannot be fetched ({_words(error)}); {by_hand}") from None
    try:
        _require_hash(part, path.name, by_hand)
    except WeightsError:
        part.unlink()
        raise
    os.replace(part, path)
    return path


def _continue_download(url: str, part: Path) -> None:
    """Fetch what is missing of a file, with a bar; what arrives stays if the connection is cut."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing
            return
        raise
    with response:
        resumed = response.status == 206
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None
        )
        with part.open("ab" if resumed else "wb") as stream, tqdm(**bar, desc=part.stem) as bar:
            while block := response.read(CHUNK):
                stream.write(block)
                bar.update(len(block))
            have = stream.tell()
    if total is not None and have < total:
        raise urllib.error.ContentTooShortError(f"only {have:,} of {total:,} bytes came", None)


def _require_hash(path: Path, name: str, by_hand: str) -> None:
    """Raise a `WeightsError` unless a file has the SHA-256 that its name promises, if it does."""
    promised = HASH.search(name)
    if promised and not sha256_of(path).startswith(promised[1]):
        raise WeightsError(
            f"{path} is not {name}: its SHA-256 does not start with {promised[1]}; delete it, and "
            f"{by_hand}"
        )
