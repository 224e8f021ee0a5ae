"""Models on the Hugging Face Hub: find the one that an id names, and publish a folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    errors,
    hf_hub_download,
    snapshot_download,
)

from dact.files import read_json
from dact.model_card import CARD_NAME, is_written_by_dact

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/NAME
# Only data is downloaded. Other files of a repository, such as pickles and code, are not.
NEEDED = ["*.json", "*.safetensors", "*.onnx", "*.txt", "*.model", "*.codes"]


class Publication(TypedDict, total=False):
    """Options for publishing a model. Each of them may be left out.

    Args:
        token: Access token; the stored login if left out.
        private: Whether a new repository is private; the default of the account if left out.
        revision: Branch to publish to, which is created if needed; ``main`` if left out.
        commit_message: Message of the commit.
        create_pr: Whether to open a pull request instead of changing the branch.
    """

    token: str | bool | None
    private: bool | None
    revision: str | None
    commit_message: str
    create_pr: bool


def local_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder that `name` stands for, downloaded from the Hub if it is the id of a
    repository.

    An existing folder of that name takes precedence, as in transformers. Cached files are not
    downloaded again, and the cache is used if the Hub cannot be reached. The environment variables
    of huggingface_hub apply, such as ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``
    and ``HF_HUB_ETAG_TIMEOUT``.

    Args:
        name: Folder, or Hub id ``"OWNER/NAME"``. A `Path`, and a string that cannot be a Hub id, is
            always a folder.
        revision: Branch, tag or commit on the Hub; ``main`` if left out.
        token: Access token; the stored login if left out. ``False`` sends none.
        cache_dir: Folder of the cache; that of huggingface_hub if left out.
        local_files_only: Whether to look only in the cache.

    Raises:
        FileNotFoundError: If `name` is a Hub id that neither the Hub nor the cache has; the message
            says why.
    """
    if isinstance(name, Path) or Path(name).exists() or not HUB_ID.fullmatch(name):
        return Path(name).expanduser()
    fault = (
        None if local_files_only else _ask(HfApi(token=token, library_name="dact"), name, revision)
    )
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only or fault is not None,
            allow_patterns=NEEDED,
            library_name="dact",
        )
    except Exception as error:  # the library and its HTTP client raise many kinds
        if getattr(error, "errno", None) is not None:  # of this machine, such as a full disk
            raise
        wanted = name if revision is None else f"{name} at revision {revision}"
        raise FileNotFoundError(
            f"there is no folder {name}, and no model {wanted} on the Hub: {_reason(fault or error)}"
        ) from (fault or error)
    return Path(folder)


def folder_of_dact(source: str, local_files_only: bool) -> Path | None:
    """Return the folder of a model that dact saved, here or on the Hub; None if `source` is
    something else."""
    config = Path(source, "config.json")
    if not config.parent.is_dir():
        if not HUB_ID.fullmatch(source):
            return None
        try:
            config = Path(
                hf_hub_download(
                    source, config.name, local_files_only=local_files_only, library_name="dact"
                )
            )
        except Exception:  # as above; whoever loads it otherwise says why it is not there
            return None
    content = read_json(config) if config.is_file() else None
    if not isinstance(content, dict) or not str(content.get("format")).startswith("dact/"):
        return None
    return local_folder(source, local_files_only=local_files_only)


def out_of_reach(pretrained: str) -> bool:
    """Return whether `pretrained` is a Hub id and the Hub does not answer in time.

    Then only the cache should be used: on a network that drops packets, transformers would wait
    forever."""
    fault = (
        None if Path(pretrained).is_dir() else _ask(HfApi(library_name="dact"), pretrained, None)
    )
    return fault is not None and not isinstance(fault, errors.HfHubHTTPError)


def publish(save: Callable[..., None], repo_id: str, options: Publication) -> str:
    """Publish a model folder as one commit, so that nobody downloads half of it; the repository is
    created if needed.

    A model card that was written by hand on the Hub is kept.

    Args:
        save: Function that writes the files into a folder, given as ``save(folder, repo_id=…)``.
        repo_id: Hub id ``"OWNER/NAME"``, or ``"NAME"`` for the account of the token.
        options: Options of the publication.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        TypeError: If there is no such option.
        OSError: If the Hub cannot be reached or refuses; the message says why.
    """
    if unknown := sorted(options.keys() - Publication.__annotations__.keys()):
        known = ", ".join(Publication.__annotations__)
        raise TypeError(f"push_to_hub has no option {', '.join(unknown)}: expected some of {known}")
    api, revision = HfApi(token=options.get("token"), library_name="dact"), options.get("revision")
    with TemporaryDirectory() as directory:
        folder = Path(directory, "model")
        save(
            folder, repo_id=repo_id
        )  # first, so that nothing is created for a model that cannot be saved
        try:
            fault = _ask(api, repo_id, None)
            if fault is not None and not isinstance(fault, errors.HfHubHTTPError):
                raise fault
            full_id = api.create_repo(
                repo_id, private=options.get("private"), exist_ok=True
            ).repo_id
            if full_id != repo_id:  # the card has the name of the account
                repo_id = full_id
                save(folder, repo_id=repo_id)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            keeps_card = _has_own_card(api, repo_id, revision, Path(directory, "cache"))
        except Exception as error:  # as above
            raise OSError(f"{repo_id} cannot be published on the Hub: {_reason(error)}") from error
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        additions = [
            CommitOperationAdd(n, path)
            for n, path in files.items()
            if n != CARD_NAME or not keeps_card
        ]
        try:
            commit = api.create_commit(
                repo_id,
                additions,
                commit_message=options.get("commit_message", "Publish a model of dact"),
                revision=revision,
                create_pr=options.get("create_pr", False),
            )
        except Exception as error:  # as above
            raise OSError(f"{repo_id} cannot be published on the Hub: {_reason(error)}") from error
    return str(commit.pr_url or commit.commit_url)


def _ask(api: HfApi, repo_id: str, revision: str | None) -> Exception | None:
    """Return the error with which the Hub answers a request for a repository, None if the
    repository is there.

    Unlike the other calls, this one has a time limit: on a network that drops packets they would
    wait forever."""
    try:
        api.model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # as above
        return error
    return None


def _has_own_card(api: HfApi, repo_id: str, revision: str | None, cache: Path) -> bool:
    try:
        card = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, cache_dir=cache)
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
        return False
    return not is_written_by_dact(Path(card))


def _reason(error: Exception) -> str:
    """Return one line that says why a download or an upload failed."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE), and the cache does not have it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the cache does not have it, or not all of it"
    if isinstance(error, errors.GatedRepoError):
        return "access to it is restricted: ask for it on its page, and log in with `hf auth login` or pass token="
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "there is no such repository, or this token may not see it: check the name, and log in with "
            "`hf auth login` or pass token="
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, (errors.HfHubHTTPError, ValueError, OSError)):
        return said[0]
    return f"the Hub cannot be reached ({said[0]})"
