"""What a user can cause and mend: every error whose message is for them, and which of them may pass by themselves.

Entries and tools catch `USER_ERRORS`, print the message alone and end with `exit_code`. All else is a fault of this
package and keeps its traceback.
"""

from __future__ import annotations

import errno
import pickle
import socket

EXIT_PASSING = 1  # the same command may do better later
EXIT_USER = 2  # something has to be mended first


class DataError(ValueError):
    """Something is wrong with the user's data; the message says what, where and what to do."""

    passes = False  # whether it may pass by itself (`may_pass`)


class PassingError(DataError):
    """Storage or network failed in a way that may pass by itself: the same command may do better later."""

    passes = True


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; the message says which, why, and what to do."""


class StorageError(OSError):
    """A checkpoint cannot be read or written for a reason that may pass by itself: start the run again."""

    passes = True


class RunLockError(ValueError):
    """Another start trains in this run folder; the message says which, and what to do."""


class PreflightError(ValueError):
    """Findings that no run can go on with; the message lists all of them."""

    passes = False  # whether all of them may pass by themselves


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


# a ValueError names a setting or an argument, an OSError a file or a network: those above are among them, but one
USER_ERRORS = (ValueError, OSError, TrainingError)

_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECANCELED", "ECOMM", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EDEADLK", "EHOSTDOWN",
        "EHOSTUNREACH", "EINPROGRESS", "EINTR", "EIO", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENFILE", "ENOBUFS",
        "ENOLCK", "ENOLINK", "ENOMEM", "ENOTCONN", "EPIPE", "EPROTO", "EREMOTEIO", "ESHUTDOWN", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
)  # fmt: skip


def may_pass(error: BaseException) -> bool:
    """Returns whether an error, or its cause, is of the moment: storage or network that fails now.

    What is missing, forbidden, full or over a quota waits for somebody to mend it, and so does all that names no
    number of an error.
    """
    if getattr(error, "passes", False):
        return True
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, OSError) and (error.errno in _PASSING or isinstance(error, (ConnectionError, TimeoutError))):
        return True
    return error.__cause__ is not None and may_pass(error.__cause__)


def exit_code(error: BaseException) -> int:
    """Returns what a command ends with after a user's error: 1 where it may pass by itself, else 2."""
    return EXIT_PASSING if may_pass(error) else EXIT_USER


def portable(error: BaseException) -> BaseException:
    """Returns the error, or one that says the same where it cannot be sent to another process.

    The cause of an error is not sent along with it. Where the cause is what may pass by itself, the error is marked.
    """
    if may_pass(error):
        error.__dict__["passes"] = True
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its own constructor or contents raise
        if isinstance(error, DataError):
            return PassingError(str(error)) if may_pass(error) else DataError(str(error))
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
