"""A run on disk: its name, its folders, its lock, and the winners of its studies."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dact import signals
from dact.files import write_text
from dact.submodels import SubmodelConfig
from dact.tuning.stages import LAMBDA_REG, SUBMODELS, TRAINING, Stage


@dataclass(frozen=True)
class Winners:
    """The winners of a run's studies; None where a study has no winner yet.

    Args:
        classifier_config: Arguments of the classifier's `SubmodelConfig`.
        confidence_config: Arguments of the confidence's `SubmodelConfig`.
        external_config: Arguments of the model and the data by name, and ``num_epochs``.
        lambda_reg: λ.
    """

    classifier_config: dict[str, Any] | None = None
    confidence_config: dict[str, Any] | None = None
    external_config: dict[str, Any] | None = None
    lambda_reg: float | None = None

    def before(self, stage: Stage) -> Winners:
        """Return only the winners of the studies before `stage`."""
        if stage is SUBMODELS:
            return Winners()
        if stage is TRAINING:
            return Winners(self.classifier_config, self.confidence_config)
        return dataclasses.replace(self, lambda_reg=None)

    def settings(self) -> dict[str, Any]:
        """Return the chosen arguments of model and data as plain values, and ``num_epochs``."""
        settings: dict[str, Any] = {}
        if self.classifier_config is not None:
            settings |= {"classifier": self.classifier_config, "confidence": self.confidence_config}
        settings |= self.external_config or {}
        return settings if self.lambda_reg is None else {**settings, "lambda_reg": self.lambda_reg}

    def missing(self) -> list[str]:
        """Return which winners are missing, each with the method that finds it."""
        methods = (SUBMODELS.method, SUBMODELS.method, TRAINING.method, LAMBDA_REG.method)
        names = [field.name for field in dataclasses.fields(self)]
        return [
            f"{name} ({by})"
            for name, by in zip(names, methods, strict=True)
            if getattr(self, name) is None
        ]


WINNERS = tuple(field.name for field in dataclasses.fields(Winners))


@dataclass(frozen=True)
class Run:
    """A tuning run.

    Args:
        tag: Name of the run.
        log_dir: Folder that holds all runs.

    Raises:
        ValueError: If the tag is not a plain name, and could lead out of the log folder.
    """

    tag: str
    log_dir: Path

    def __post_init__(self) -> None:
        if (
            not isinstance(self.tag, str)
            or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", self.tag)
            or ".." in self.tag
        ):
            raise ValueError(
                f"run_tag must be a name of letters, digits, '.', '_' and '-', got {self.tag!r}: it names a folder in "
                "log_dir"
            )

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.log_dir / self.tag

    @property
    def final(self) -> Path:
        """The folder of the final fit."""
        return self.folder / "final"

    def study_name(self, stage: Stage) -> str:
        """Return the name of a stage's study."""
        return f"{self.tag}/{stage.name}"

    def trial_folder(self, stage: Stage, number: int, own: str = "") -> Path:
        """Return the folder in which a trial logs; `own` is the folder for a study of the user's
        own."""
        return self.folder / own / stage.name / f"trial_{number:04d}"

    def pictures(self, stage: Stage) -> Path:
        """Return the folder of a study's pictures."""
        return self.folder / stage.name / "study"

    @property
    def runner_up(self) -> Path:
        """The file with the second choice of λ, which the confirmation tries as well."""
        return self.folder / LAMBDA_REG.name / "runner_up.json"

    def set_aside(self, stage: Stage) -> None:
        """Rename the folder of a stage whose trials ran under other winners, since new trials start
        again at 0."""
        folder = self.folder / stage.name
        number = next(
            n
            for n in itertools.count(1)
            if not folder.with_name(f"{stage.name}.outdated_{n}").exists()
        )
        if folder.is_dir():
            os.replace(folder, folder.with_name(f"{stage.name}.outdated_{number}"))

    @contextlib.contextmanager
    def locked(
        self, waiting: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> Iterator[None]:
        """Hold the lock of the run, which one process at a time can hold, on all hosts that share
        the folder.

        The operating system releases the lock when its holder dies. Do not nest.

        Args:
            waiting: Function that returns a context, such as a status line, which is entered while
                waiting.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", poll_interval=0.05)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with waiting():
                while not lock.is_locked:
                    signals.check()
                    with contextlib.suppress(Timeout):
                        lock.acquire(timeout=0.5)
        try:
            yield
        finally:
            lock.release()

    def winners(self) -> Winners:
        """Return the winners that are on disk.

        Raises:
            ValueError: If a file is corrupted; the message names it.
        """
        return Winners(**{name: _read(self.folder / f"{name}.yaml", name) for name in WINNERS})

    def save(self, winners: Mapping[str, Any]) -> bool:
        """Write the winners of a study, and return whether they differ from the earlier ones.

        Winners of later studies, which ran under the earlier ones, are then removed.
        """
        files = {name: self.folder / f"{name}.yaml" for name in WINNERS}
        texts = {
            name: yaml.safe_dump(
                value if isinstance(value, dict) else {name: value}, sort_keys=False
            )
            for name, value in winners.items()
        }
        before = {
            name: files[name].read_text() if files[name].is_file() else None for name in texts
        }
        if before != texts:
            replaced = [name for name in texts if texts[name] != before[name]]
            for name in [*WINNERS[max(map(WINNERS.index, winners)) + 1 :], *replaced]:
                files[name].unlink(
                    missing_ok=True
                )  # all of them first, so that a kill in between leaves no mixture
        for name, text in texts.items():
            if text != before[name]:
                write_text(files[name], text)
        return before != texts


def _read(path: Path, name: str) -> Any:
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text())
        if name == "lambda_reg":
            return float(content["lambda_reg"])
        if name != "external_config":
            SubmodelConfig(**content)
        return dict(content)
    except (yaml.YAMLError, TypeError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is corrupted ({' '.join(str(error).split())[:100]}): delete it, and its study writes it again"
        ) from error
