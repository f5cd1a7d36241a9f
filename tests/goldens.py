"""The golden files, read once: what the authors' code computes, by the name of the file."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"
GOLDENS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def with_digest(name: str) -> list[str]:
    """Return the files that hold a digest of this name."""
    return [stem for stem, golden in GOLDENS.items() if name in golden.get("digests", {})]
