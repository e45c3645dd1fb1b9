"""Which errors may pass by themselves, and that such an error ends a run with a code that is started again."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import sys

import pytest

from mvptr_ds import train
from mvptr_ds.errors import CheckpointError, DataError, PassingError, PreflightError, may_pass, portable
from mvptr_ds.preflight.checks import conclude
from mvptr_ds.preflight.rank_checks import ERROR, Finding, on_each


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/shard-000000.tar")


def raised_from(cause: BaseException) -> DataError:
    try:
        raise DataError("cannot open the index") from cause
    except DataError as error:
        return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *((os_error(number), True) for number in (errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)),
        *((os_error(number), True) for number in (errno.ENOTCONN, errno.EHOSTUNREACH, errno.ENFILE, errno.ENOMEM)),
        *((os_error(number), False) for number in (errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOTDIR)),
        *((os_error(number), False) for number in (errno.ENOSPC, errno.EDQUOT, errno.EPERM, errno.EMFILE)),
        (TimeoutError(), True),
        (ConnectionError("x: 4 tries failed; the last: HTTP 503"), True),
        (OSError("no file named config.json"), False),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), True),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), False),
        (DataError("byte 512: damaged header"), False),
        (PassingError("9 samples in a row"), True),
        (raised_from(os_error(errno.ESTALE)), True),
        (raised_from(os_error(errno.ENOENT)), False),
        (ValueError("train.batch_size"), False),
    ],
    ids=repr,
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) == passes
    # another rank raises it without its cause
    assert may_pass(pickle.loads(pickle.dumps(portable(error)))) == passes


def test_a_run_ends_with_the_code_of_its_error(monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    codes = []
    errors = (
        os_error(errno.ESTALE), raised_from(os_error(errno.EIO)), PassingError("now"),
        os_error(errno.ENOENT), os_error(errno.ENOSPC), DataError("cut"), CheckpointError("damaged"),
    )  # fmt: skip
    for error in errors:

        def run(*_: object, raised: Exception = error) -> int:
            raise raised

        monkeypatch.setattr(train, "run", run)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        codes.append(train.main())
    assert codes == [1, 1, 1, 2, 2, 2, 2]


def test_preflight_tells_what_may_pass_from_what_has_to_be_mended() -> None:
    def look(number: int) -> list[Finding]:
        def check() -> list[Finding]:
            raise os_error(number)

        return on_each("shards", check)

    stale, missing = look(errno.ESTALE), look(errno.ENOENT)
    for findings, passes in ((stale, True), (missing, False), (stale + missing, False)):
        assert all(finding.level == ERROR for finding in findings)
        with pytest.raises(PreflightError) as error:
            conclude(findings, show_all=False)
        assert may_pass(error.value) == passes
