"""The storage of a run's studies: how it is opened, and how its errors differ from those of a
trial."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import warnings
from pathlib import Path

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError, SQLAlchemyError


class RunStopped(RuntimeError):
    """A worker process ended because a disk or a storage failed."""


def environment_error(error: BaseException | None) -> BaseException | None:
    """Return the cause of an error if a disk or a storage failed; None if the error is that of a
    trial.

    A missing file and a broken pipe are errors of a trial's code; other system errors are not.
    """
    for cause in _chain(error):
        if isinstance(cause, (RunStopped, StorageInternalError, SQLAlchemyError)):
            return cause
        if isinstance(cause, OSError) and not isinstance(
            cause, (FileNotFoundError, BrokenPipeError)
        ):
            return cause
    return None


def stopped_by(error: BaseException) -> BaseException | None:
    """Return the failure of a disk or a storage that ended a run; None if the error's own message
    says what to do."""
    return (
        None
        if isinstance(error, (ValueError, TypeError, LookupError))
        else environment_error(error)
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and all its causes and contexts. In some libraries the chain has a cycle."""
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and not any(one is other for other in found):
            found.append(one)
            waiting += [one.__context__, one.__cause__]
    return found


def root_cause(error: BaseException) -> str:
    """Return the first line of the first error in a chain."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    return (str(error) or type(error).__name__).splitlines()[0]


def describe_storage(address: str | BaseStorage | None, folder: Path) -> str:
    """Return where the studies are, for messages: a file, or an address without user and
    password."""
    if isinstance(address, BaseStorage):
        return f"the storage ({type(address).__name__})"
    if address is None:
        return str(folder / "studies.db")
    return re.sub("//.*@", "//…@", address)


def open_storage(address: str | BaseStorage | None, folder: Path) -> BaseStorage:
    """Return the storage of the studies: an sqlite file in `folder` unless an address says
    otherwise.

    Raises:
        ConnectionError: If it cannot be opened.
        ValueError: If it is a corrupted sqlite file.
    """
    if isinstance(address, BaseStorage):
        return address
    folder.mkdir(parents=True, exist_ok=True)
    where = describe_storage(address, folder)
    try:
        # A URL object, since a question mark in a path would end an address.
        url = (
            URL.create("sqlite", database=str(folder / "studies.db"))
            if address is None
            else make_url(address)
        )
    except ArgumentError as error:
        raise _cannot_be_opened(where, error) from error
    if url.drivername in (
        "postgres",
        "postgresql",
    ):  # the default driver depends on the version of SQLAlchemy
        url = url.set(drivername="postgresql+psycopg")
    sqlite = url.drivername.startswith("sqlite")
    if sqlite and url.database:
        _check_sqlite(Path(url.database))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats, used on purpose
            return RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": {"timeout": 60}}
                if sqlite
                else {"pool_pre_ping": True},
                heartbeat_interval=30,
                grace_period=120,
            )
    except Exception as error:  # SQLAlchemy and its drivers raise many kinds
        raise _cannot_be_opened(where, error) from error


def _cannot_be_opened(where: str, error: BaseException) -> ConnectionError:
    return ConnectionError(
        f"the storage {where} cannot be opened: {root_cause(error)}. Expected an address such as sqlite:///FILE or "
        "postgresql://USER@HOST/DATABASE"
    )


def _check_sqlite(file: Path) -> None:
    if not file.is_file() or file.stat().st_size == 0:
        return
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=60)) as connection:
            verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
    except (
        sqlite3.OperationalError
    ) as error:  # its content may be fine: a lock, a full disk, missing rights
        raise ConnectionError(f"{file} cannot be read: {error}") from error
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        raise corrupted(str(file), verdict)


def corrupted(where: str, what: object) -> ValueError:
    """Return the error for a storage whose content cannot be right."""
    return ValueError(
        f"{where} is corrupted ({what}): restore an intact copy, or start again under another run_tag"
    )


def is_unreachable(error: BaseException | None) -> bool:
    """Return whether a storage could not be reached; its content may be intact."""
    return any(
        isinstance(cause, (OperationalError, InterfaceError, ConnectionError))
        for cause in _chain(error)
    )
