"""Errors that come from outside of a trial: a disk or a storage that failed. Nothing is lost by them."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from dact.tuning.engine import TuningEngine

Method = TypeVar("Method", bound=Callable[..., Any])


class RunStopped(RuntimeError):
    """A disk or a storage failed; what had finished is kept, and the same call goes on once it works again."""


def explained(method: Method) -> Method:
    """Let a method of the engine say what to do where a disk or a storage fails."""

    @functools.wraps(method)
    def wrapped(self: TuningEngine, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except RunStopped:
            raise
        except Exception as error:
            cause = environment_error(error)
            if cause is None or (cause is error and isinstance(error, ConnectionError)):
                raise  # the latter says it all
            raise RunStopped(_what_to_do(cause, str(self.run_folder), self.describe_storage())) from error

    return wrapped  # type: ignore[return-value]


def _what_to_do(cause: BaseException, folder: str, storage: str) -> str:
    if isinstance(cause, OSError):
        where, what = cause.filename or folder, cause.strerror or str(cause)
        remedies = {errno.ENOSPC: "make room there", errno.EDQUOT: "make room there", errno.EIO: "mend the disk"}
        remedy = remedies.get(cause.errno or 0, "make it writable again")
    else:
        where, what = storage, root_cause(cause)
        remedy = "bring it back (a full disk or missing rights are the usual reasons for a file)"
    return f"{where}: {what}. What had finished is kept: {remedy}, and the same command goes on"


def root_cause(error: BaseException) -> str:
    """The first line of what was first in a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0]


# No space, over the quota, read-only, no rights, a broken disk, a network folder that went away.
OUTSIDE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}


def environment_error(error: BaseException | None) -> BaseException | None:
    """The cause of an error where a disk or a storage failed, None where the error says something of a trial."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    while error is not None:
        if isinstance(error, (StorageInternalError, SQLAlchemyError)):
            return error
        if (
            isinstance(error, ConnectionError) and error.errno is None
        ):  # dact's own; a broken pipe says nothing of these
            return error
        if isinstance(error, OSError) and error.errno in OUTSIDE:
            return error
        error = error.__cause__ or error.__context__
    return None
