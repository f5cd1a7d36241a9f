"""Build the HTML of the book from the stored outputs; a warning is an error.

    python tools/build_book.py

Needs only the dependency group `book`. The API pages are read from the source text, without torch.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
COMMAND = ["jupyter-book", "build", ".", "-W", "-n", "--keep-going", "--quiet"]


def main() -> int:
    """Run Jupyter Book, drop what no reader needs, say where the book is."""
    program = Path(sys.executable).with_name(COMMAND[0])
    if not program.exists() and not shutil.which(COMMAND[0]):
        sys.exit("jupyter-book is missing; install it with: python -m pip install --group book")
    command = [str(program) if program.exists() else COMMAND[0], *COMMAND[1:]]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        print("The book was not built: mend the warnings above.", file=sys.stderr)
        return status
    for path in HTML.rglob("*.map"):  # for debugging the theme's scripts: a third of the size
        path.unlink()
    size = sum(path.stat().st_size for path in HTML.rglob("*") if path.is_file())
    print(f"The book ({size / 1e6:.1f} MB) is at {(HTML / 'index.html').as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
