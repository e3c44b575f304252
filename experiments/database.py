"""The database behind a ledger: how it is opened, and what goes wrong there said in one line.

On a server Optuna locks a trial's row. On SQLite it reads, then writes, and two workers can both read
"waiting"; so here every SQLite transaction takes the write lock when it begins.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from experiments.configs import RunError
from experiments.patience import Passing, patiently

try:
    import optuna
    import sqlalchemy.event
    import sqlalchemy.exc
except ImportError as error:
    raise RunError(
        f"a ledger needs optuna ({error}): pip install 'gradient-noise-scale[experiments]', or run without "
        "one: python -m experiments.sweep --jsonl IN.jsonl OUT.jsonl"
    ) from error

LOCKED = (
    10  # seconds that SQLite itself waits for a lock; no signal is heard meanwhile, and `patiently` goes on
)
T = TypeVar("T")


class LedgerError(RunError):
    """The database cannot be used: none, or not there."""


class LedgerBusy(LedgerError, Passing):
    """The database does not answer now: locked by another program, full, or its server is away."""


class Database:
    """One process's way to a database.

    Args:
        url: of the database.
        patient: wait for one that does not answer now, see `experiments.patience`.

    Raises:
        LedgerError: it cannot be opened.
    """

    def __init__(self, url: str, *, patient: bool = True) -> None:
        self.url, self.patient = url, patient
        self._opened = False
        self.storage = self.ask(lambda: _storage(url))

    def opened(self) -> None:
        """Note that it has answered: one that stops answering may come back."""
        self._opened = True

    def ask(self, work: Callable[[], T], patient: bool = True) -> T:
        """Do one thing to the database, again if need be; what goes wrong there is said in one line."""
        if patient and self.patient:
            return patiently(lambda: self._once(work))
        return self._once(work)

    def _once(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            cause = error.__cause__ or error
            said = str(getattr(cause, "orig", None) or cause).partition("\n")[0]
            if _passes(self.url, cause, said, self._opened):
                raise LedgerBusy(f"{self.url}: the ledger does not answer: {said}") from error
            raise LedgerError(f"{self.url}: the ledger cannot be used: {said}") from error
        except ImportError as error:
            raise LedgerError(
                f"{self.url}: Python has no driver for this kind of database: {error}"
            ) from error
        except RuntimeError as error:  # Optuna's word for a schema of another version
            if "version" not in str(error):
                raise
            raise RunError(f"{self.url}: made by another version of Optuna: {error}") from error


@contextmanager
def opening(url: str) -> Generator[None, None, None]:
    """Let one process at a time make or fill a SQLite ledger."""
    if not url.startswith("sqlite:///"):
        yield
        return
    path = Path(url.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _passes(url: str, cause: BaseException, said: str, opened: bool) -> bool:
    """Whether a database that did not answer may do so in a while.

    Args:
        url: of the database.
        cause: what it raised.
        said: its words.
        opened: it has answered before; a server that never has is rather not there.
    """
    if url.startswith("sqlite"):
        return any(word in said for word in ("locked", "busy", "disk is full", "disk I/O"))
    kinds = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.TimeoutError)
    return opened and (isinstance(cause, kinds) or getattr(cause, "connection_invalidated", False))


def _storage(url: str) -> optuna.storages.RDBStorage:
    """Open a database; on SQLite every transaction takes the write lock when it begins."""
    if not url.startswith("sqlite"):
        return optuna.storages.RDBStorage(url)
    storage = optuna.storages.RDBStorage(url, {"connect_args": {"timeout": LOCKED}})

    def manual(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # or the driver begins late, at the first write
        # No wait for the disk at each commit. A power cut may take back the last few, which `settle` makes
        # good: rows are on the disk, and claims of another boot lapse.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.remove_session()
    storage.engine.dispose()  # connections of before
    sqlalchemy.event.listen(storage.engine, "connect", manual)
    sqlalchemy.event.listen(storage.engine, "begin", begin)
    return storage
