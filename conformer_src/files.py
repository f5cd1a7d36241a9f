"""Files of weights: written whole or not at all, fetched without loss, opened with care.

Nothing in a file is ever executed. Whatever is wrong with one is said in one sentence, as a
`WeightsError`.
"""

import argparse
import errno
import hashlib
import http.client
import json
import os
import re
import secrets
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHUNK = 1 << 20
TRIES = 3  # to fetch a file, without a byte more than before
TIMEOUT = 30  # seconds
# The published names end in the first digits of the file's SHA-256: name-f6860372.pth
HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
# What the connection did, and not the address or the disk.
CUT = (
    urllib.error.ContentTooShortError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WeightsError(ValueError):
    """What is wrong with a file of weights, and what to do."""


def sha256_of(path: str | Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """Return the SHA-256 of texts and of named tensors: names, types, shapes and values."""
    total = hashlib.sha256("\n".join(texts).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(_bytes_of(tensor))
    return total.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, to read and to write."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def provenance() -> str:
    """Return what writes a file: this package and torch, with their versions."""
    from conformer_src import __version__

    return f"conformer_src {__version__}, torch {torch.__version__}"


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes `path` in one step, or leaves no trace.

    Raises:
        WeightsError: The folder does not exist, forbids writing, or is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield temporary
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # what torch and safetensors raise
        raise WeightsError(
            f"{path} cannot be written ({_words(error)}); make room, allow writing, or choose "
            "another folder that exists."
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Open a safetensors or a torch file and return its content and its notes.

    The content of a torch file may be nested, as training scripts leave it; the notes are those of
    a safetensors file's header. All tensors are in memory: the file may change afterwards.

    Raises:
        WeightsError: The file is missing, unreadable, damaged, or holds more than weights.
    """
    path = Path(path)
    kind = _kind(path, path)
    return _read_safetensors(path) if kind == "safetensors" else (_read_torch(path), {})


def _kind(path: Path, name: object) -> str:
    """Return "torch" or "safetensors", by how a file begins; `name` is what to call it."""
    try:
        if not path.is_file():
            raise WeightsError(
                f"there is no file {name}; give the path of a .pth or .safetensors file."
            )
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise WeightsError(f"{name} cannot be opened ({_words(error)}); allow reading.") from None
    if not start:
        raise WeightsError(f"{name} is empty; fetch it again.")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise WeightsError(
            f"{name} is a web page, not weights: the server answered with an error or a form; open "
            "the address in a browser, and fetch the file itself."
        )
    if start.startswith(b"PK"):
        return "torch"
    if start[8:9] == b"{":
        return "safetensors"
    raise WeightsError(
        f"{name} is neither a safetensors file nor a zip archive as torch.save has written since "
        "version 1.6; if an older torch wrote it, load it there and save it again."
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    try:
        # The library checks the header. It maps the file into memory, where each page that is read
        # would be counted a second time: so read the numbers past it.
        with safe_open(path, framework="pt") as stream, path.open("rb") as numbers:
            notes, size = stream.metadata() or {}, int.from_bytes(numbers.read(8), "little")
            header = json.loads(numbers.read(size))
            for name in stream.keys():  # noqa: SIM118
                tensors[name] = torch.empty_like(stream.get_tensor(name))
                numbers.seek(8 + size + header[name]["data_offsets"][0])
                numbers.readinto(_bytes_of(tensors[name]))
    except Exception as error:  # the library reports damage in several ways
        raise WeightsError(f"{path} is damaged ({_words(error)}); fetch it again.") from None
    ours = "sha256" in notes or "package" in notes
    texts = [notes[key] for key in ("config", "classes", "input") if key in notes]
    if ours and notes.get("sha256") != digest(tensors, *texts):
        raise WeightsError(
            f"{path} is damaged: its values are not those that were saved; fetch it again."
        )
    return tensors, notes


def _read_torch(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # compares each part with its checksum
            # torch.save never compresses, so that no file is larger in memory than on the disk.
            if any(part.compress_type for part in archive.infolist()):
                broken = "its parts are compressed"
    except Exception as error:  # a damaged archive fails in many ways
        broken = _words(error)
    if broken:
        raise WeightsError(f"{path} is damaged ({broken}); fetch it again.")
    try:
        # A stream, because of a path torch would believe the ending. The authors' training script
        # stores its options beside the weights.
        with path.open("rb") as stream, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle.UnpicklingError, and what strange content provokes
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {found[1]}" if found else _words(error)
        raise WeightsError(
            f"{path} holds more than weights and was not opened ({what}); if you trust its source, "
            "load it there and save its state dict alone."
        ) from None


def _words(error: BaseException) -> str:
    """Return what an error says in one line, or its kind."""
    reason = getattr(error, "reason", None)  # what is behind an error of urllib
    if isinstance(reason, BaseException):
        return _words(reason)
    said = getattr(error, "strerror", None) or str(error)
    lines = [line.strip().rstrip(".") for line in str(said).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


def fetch(url: str, folder: str | Path | None = None) -> Path:
    """Download a file once, and return where it lies; a download that was cut is continued.

    Files are kept where `torch.hub` keeps its own. If the name holds digits of the file's SHA-256
    (`name-f6860372.pth`), they are compared, and the next call continues what was cut. Other files
    get a name that belongs to their address alone. Where several processes ask for one file, one
    fetches it and the others wait.

    Raises:
        WeightsError: The address cannot be reached, or another file came than the name promises.
    """
    parts = urllib.parse.urlsplit(url)
    name = urllib.parse.unquote(parts.path).rpartition("/")[2]
    if parts.scheme not in ("http", "https") or not parts.netloc or not name:
        raise WeightsError(f"{url} is no address of a file; it looks like https://host/name.pth.")
    folder = Path(folder or Path(torch.hub.get_dir()) / "checkpoints")
    if not HASH.search(name):
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    path = folder / name
    by_hand = f"download {url} elsewhere and save it as {path}, or give the path of your file."
    if os.path.isfile(path):  # False too where the folder must not be looked into
        _require_hash(path, path, by_hand)
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One process at a time: else one could rename what another is still writing.
        with FileLock(folder / f".{name}.lock"):
            if not os.path.isfile(path):  # another process may have fetched it meanwhile
                _fetch_alone(url, path, by_hand)
    except (OSError, *CUT) as error:
        raise WeightsError(f"{name} cannot be fetched ({_words(error)}); {by_hand}") from None
    return path


def _fetch_alone(url: str, path: Path, by_hand: str) -> None:
    """Download a file beside its place, look at it, and put it there."""
    part = path.with_name(f"{path.name}.part")
    certain = HASH.search(path.name) is not None
    keep = False
    try:
        if not certain:  # parts of two versions could be joined
            part.unlink(missing_ok=True)
        _download(url, part, path.name)
        _kind(part, f"what came from {url}")
        _require_hash(part, f"what came from {url}", by_hand)
        os.replace(part, path)
    except (KeyboardInterrupt, OSError, *CUT) as error:
        keep = certain and getattr(error, "errno", None) not in DISK_FULL
        raise
    finally:
        if not keep:
            with suppress(OSError):
                part.unlink()


def _download(url: str, part: Path, name: str) -> None:
    """Fetch a file, however often the connection is cut, as long as each time some of it comes."""
    certain = HASH.search(name) is not None
    old, failures = _size(part), 0
    while True:
        before = _size(part)
        try:
            _continue_download(url, part, name)
            break
        except CUT:
            failures = 0 if certain and _size(part) > before else failures + 1
            if failures == TRIES:
                raise
            if not certain:
                part.unlink(missing_ok=True)
    if old and part.is_file() and not _has_promised_hash(part, name):
        part.unlink()  # what lay there was no part of this file
        _download(url, part, name)


def _continue_download(url: str, part: Path, name: str) -> None:
    """Fetch what is missing of a file, with a bar; what arrives stays if the connection is cut."""
    from tqdm.auto import tqdm

    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # there is nothing after what we have
            return
        raise
    part.touch()
    with response, part.open("r+b") as stream:
        # Never emptied: from a server without ranges, only more than ever before is progress.
        have = stream.seek(have if response.status == 206 else 0)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        with tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=name, disable=None
        ) as bar:
            while block := response.read(CHUNK):
                stream.write(block)
                bar.update(len(block))
        if total is not None and stream.tell() < total:
            words = f"the connection was cut after {stream.tell():,} of {total:,} bytes"
            raise urllib.error.ContentTooShortError(words, None)
        stream.truncate()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _has_promised_hash(path: Path, name: str) -> bool:
    """Say whether a file has the SHA-256 that the name promises, if it promises one."""
    promised = HASH.search(name)
    return promised is None or sha256_of(path).startswith(promised[1])


def _require_hash(path: Path, called: object, by_hand: str) -> None:
    """Raise a `WeightsError` unless a file has the SHA-256 that its name promises."""
    name = path.name.removesuffix(".part")
    if not _has_promised_hash(path, name):
        raise WeightsError(
            f"{called} is another file than its name promises: its SHA-256 does not start with "
            f"{HASH.search(name)[1]}; delete it, and {by_hand}"
        )
