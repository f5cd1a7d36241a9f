"""Models in a folder or on the Hugging Face Hub: what `Conformer` inherits to come and go."""

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformer_src.files import WeightsError, read_file, written_whole
from conformer_src.inputs import InputConfig

if TYPE_CHECKING:
    from conformer_src.conformer import Conformer

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class HubMethods:
    """The habits of the Hub: `from_pretrained`, `save_pretrained`, `push_to_hub`.

    A folder and a repository hold the same two files, `model.safetensors` and `config.json`.
    """

    # What is known of a model beside its config; it travels with the weights.
    classes: tuple[str, ...] | None = None  # their names
    input: InputConfig | None = None  # how images are made ready

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, **changes: object
    ) -> "Conformer":
        """Build a model from a folder, or from a repository of the Hub.

        Args:
            source: a folder, or the name of a repository, such as "someone/conformer".
            revision: a branch, tag or commit of the repository.
            changes: replace fields of the config; heads for other `num_classes` start fresh.

        Raises:
            WeightsError: A file is missing, cannot be fetched, or does not fit.
        """
        # Weights come from a later chapter than the network: import them when they are needed.
        from conformer_src.conformer import _require_fields
        from conformer_src.weights import (
            _classes_from,
            _input_from,
            find_config,
            find_state_dict,
            load_weights,
        )

        _require_fields(changes)
        config_file, weights_file = (_find(source, name, revision) for name in (CONFIG, WEIGHTS))
        content, notes = read_file(weights_file)
        state = find_state_dict(content)
        config = find_config(state, {"config": _read_text(config_file)})
        if "config" in notes and find_config(state, notes) != config:
            raise WeightsError(f"{CONFIG} and the header of {WEIGHTS} disagree; save both again.")
        classes = _classes_from(notes, config.num_classes)
        ready = _input_from(notes, config.in_chans)
        model = load_weights(cls(replace(config, **changes)), state)
        model.input = ready
        if model.config.num_classes == config.num_classes:
            model.classes = classes
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json` into a folder, which is made if needed.

        Raises:
            WeightsError: A file cannot be written.
        """
        from conformer_src.weights import save_weights

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WeightsError(f"{folder} cannot be made ({error.strerror}).") from None
        save_weights(self, folder / WEIGHTS)
        with written_whole(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, message: str = "Upload the model"
    ) -> str:
        """Upload the two files to a repository, which is made if needed; return its address.

        You must be logged in: `hf auth login`.

        Raises:
            WeightsError: The Hub cannot be reached, or refuses.
        """
        hub = _hub()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = hub.HfApi()
            made = _asked(api.create_repo, repo_id, private=private, exist_ok=True)
            _asked(
                api.upload_folder,
                repo_id=made.repo_id,
                folder_path=folder,
                commit_message=message,
            )
        return str(made)


def _find(source: str | Path, name: str, revision: str | None) -> Path:
    """Return where a file of a folder lies, or of a repository after it was fetched."""
    if Path(source).is_dir():
        path = Path(source) / name
        if not path.is_file():
            raise WeightsError(f"there is no {name} in {source}; write it with save_pretrained.")
        return path
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise WeightsError(
            f"there is no folder {source}, and a repository is called account/name; give either."
        )
    return Path(_asked(_hub().hf_hub_download, source, name, revision=revision))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); fetch it again.") from None


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise WeightsError(
            "the Hub needs a package that is not installed: python -m pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _asked(function: Callable, *arguments: object, **options: object) -> Any:
    """Return what the Hub answers; whatever it raises becomes one sentence."""
    try:
        return function(*arguments, **options)
    except Exception as error:  # its own, the disk's, and those of the library it calls through
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        words = lines[0] if lines else type(error).__name__
        raise WeightsError(f"the Hub did not do it ({words[:200].rstrip('.')}).") from None
