"""A run on disk: one folder, whose manifest holds the configuration and the finished steps."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dact.files import file_digest, read_json, write_json, write_text
from dact.tuning.settings import WINNERS
from dact.tuning.stages import STAGES, Stage

STEPS = (*(stage.name for stage in STAGES), "confirmation", "final")  # each depends on those before


@dataclass(frozen=True)
class Run:
    """A tuning run, whose tag names its folder in the log folder."""

    tag: str
    log_dir: Path

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", self.tag) or ".." in self.tag:
            raise ValueError(
                f"run_tag must be a name of letters, digits, '.', '_' and '-', got {self.tag!r}: "
                "it names a folder in log_dir"
            )

    @property
    def folder(self) -> Path:
        return self.log_dir / self.tag

    @property
    def final(self) -> Path:
        return self.folder / "final"

    @property
    def manifest(self) -> Path:
        return self.folder / "run.json"

    def study_name(self, stage: Stage) -> str:
        """Return the name of a stage's study."""
        return f"{self.tag}/{stage.name}"

    def trial_folder(self, stage: Stage, number: int, own: str = "") -> Path:
        """Return the folder in which a trial logs; `own` is the folder of a custom study."""
        return self.folder / own / stage.name / f"trial_{number:04d}"

    @contextlib.contextmanager
    def opened(self, configuration: Mapping[str, Any]) -> Iterator[None]:
        """Hold the lock of the run, and compare its configuration with the one it began with.

        Raises:
            ValueError: If another process holds the lock, or the configuration differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / ".lock", timeout=0).acquire()
        except Timeout:
            raise ValueError(
                f"another process works on run {self.tag!r} in {self.log_dir}: wait until it ends, "
                "or give another run_tag"
            ) from None
        with lock:
            if not self.manifest.is_file():
                write_json(self.manifest, {"configuration": configuration, "steps": {}})
            for name, then, now in differences(self._read()["configuration"], configuration):
                before, after = (textwrap.shorten(repr(one), 60) for one in (then, now))
                raise ValueError(
                    f"run {self.tag!r} began with another {name} ({before}, now {after}): "
                    "restore that value, or give another run_tag"
                )
            yield

    def step(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the stored result of a step; if there is none, call `function` and store its
        result."""
        if (stored := self.result(name)) is not None:
            return stored
        result = function(*arguments)
        self.store(name, result)
        return result

    def result(self, name: str) -> Any:
        """Return the stored result of a step, None if it is not done."""
        return self._read()["steps"].get(name)

    def store(self, name: str, result: Any) -> None:
        """Store the result of a step, as plain data."""
        content = self._read()
        content["steps"][name] = result
        write_json(self.manifest, content)

    def drop_after(self, name: str) -> None:
        """Drop the results of the steps after `name`, so that they run again."""
        for folder in ("refit", "final"):
            self.set_aside(folder)
        content = self._read()
        for later in STEPS[STEPS.index(name) + 1 :]:
            content["steps"].pop(later, None)
        write_json(self.manifest, content)

    def set_aside(self, name: str) -> None:
        """Rename a folder of the run whose content belongs to other winners."""
        folder = self.folder / name
        numbered = (folder.with_name(f"{name}.outdated_{n}") for n in itertools.count(1))
        if folder.is_dir():
            os.replace(folder, next(other for other in numbered if not other.exists()))

    def _read(self) -> dict[str, Any]:
        return read_json(self.manifest)

    def winners(self, before: Stage | None = None) -> dict[str, Any]:
        """Return the winners of the studies, or of those before a stage; None if missing."""
        found: dict[str, Any] = dict.fromkeys(WINNERS)
        for stage in STAGES[: None if before is None else STAGES.index(before)]:
            found |= (self.result(stage.name) or {}).get("winners", {})
        return found

    def save(self, stage: Stage, winners: Mapping[str, Any], limits: Any) -> None:
        """Store the winners of a study, also as YAML files, and its `limits`: number of trials and
        seconds. New winners drop the later steps."""
        before = self.result(stage.name)
        if before is None or before["winners"] != winners:
            self.drop_after(stage.name)
        for name, value in winners.items():
            content = value if isinstance(value, Mapping) else {name: value}
            write_text(self.folder / f"{name}.yaml", yaml.safe_dump(content, sort_keys=False))
        self.store(stage.name, {"winners": winners, "limits": limits})


def differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted names at which two trees of dicts differ, with both values."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in {**then, **now}:
            yield from differences(then.get(key), now.get(key), f"{name}.{key}".removeprefix("."))
    elif then != now:
        yield name, then, now


def digests_of(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return size and SHA-256 of a datamodule's existing files, by path."""
    paths = [Path(file) for file in files.values() if file and Path(file).is_file()]
    return {str(path): [path.stat().st_size, file_digest(path)] for path in paths}
