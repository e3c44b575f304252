"""The database behind a ledger: which silence is waited out."""

import pytest

pytest.importorskip("optuna")
import sqlalchemy.exc

from experiments import database


@pytest.mark.parametrize(
    "url, opened, passes",
    [
        ("sqlite:///x", False, False),  # gone, or no database: sqlite says so at once
        ("postgresql://x/y", False, False),  # a server that never answered: rather a wrong name
        ("postgresql://x/y", True, True),  # one that restarts
    ],
)
def test_only_what_may_come_back_is_waited_for(url, opened, passes):
    error = sqlalchemy.exc.OperationalError("SELECT", {}, Exception("no such table, or no connection"))
    assert database._passes(url, error, str(error.orig), opened) is passes
    for said in ("database is locked", "database or disk is full", "disk I/O error"):
        assert database._passes("sqlite:///x", error, said, opened)
