"""Models on the Hugging Face Hub: find a model by its id, and publish a folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from dact.files import CONFIG_NAME
from dact.model_card import CARD_NAME, is_written_by_dact

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/NAME
OPTIONS = {"revision", "token", "cache_dir", "local_files_only"}  # of a download
# Only data files are downloaded; pickles and code are not.
NEEDED = ["*.json", "*.safetensors", "*.onnx", "*.txt", "*.model", "*.codes"]


def local_folder(name: str | Path, *, revision: str | None = None, **options: Any) -> Path:
    """Return the folder `name`, or download the repository with this id and return its folder.

    A run's folder stands for its ``final/model`` after ``dact tune``, its ``model`` after ``dact
    fit``. An existing folder takes precedence. The cache is used if the Hub cannot be reached. The
    environment variables of huggingface_hub apply, such as ``HF_HUB_OFFLINE``.

    Args:
        name: Folder, or Hub id ``"OWNER/NAME"``.
        revision: Branch, tag or commit on the Hub.
        **options: `OPTIONS` of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: If `name` is a Hub id that is neither on the Hub nor in the cache.
    """
    if isinstance(name, Path) or Path(name).exists() or not HUB_ID.fullmatch(name):
        path = Path(name).expanduser()
        places = (path, path / "final" / "model", path / "model")
        return next((one for one in places if (one / CONFIG_NAME).is_file()), path)
    try:
        folder = snapshot_download(name, revision=revision, **options, allow_patterns=NEEDED)
    except OSError as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the Hub gives no such model: {error}"
        ) from error
    return Path(folder)


def publish(
    save: Callable[..., None],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Publish a model folder as one commit, and return its address.

    The repository is created if needed. A hand-written model card on the Hub is kept.

    Args:
        save: Function that writes the files into a folder, called as ``save(folder, repo_id=…)``.
        repo_id: Hub id ``"OWNER/NAME"``, or ``"NAME"`` for the account of the token.
        token: Access token; the stored login if left out.
        private: Whether a new repository is private.
        revision: Branch to publish to, which is created if needed; ``main`` if left out.
    """
    api = HfApi(token=token, library_name="dact")
    with TemporaryDirectory() as folder:
        # Save first, so that nothing is created for a model that cannot be saved.
        save(folder, repo_id=repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kept = [CARD_NAME] if _has_own_card(api, repo_id, revision) else None
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            ignore_patterns=kept,
        )
    return str(commit.commit_url)


def _has_own_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Return whether the repository has a hand-written model card."""
    try:
        card = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return False
    return not is_written_by_dact(Path(card))
