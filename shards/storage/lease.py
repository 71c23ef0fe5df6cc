"""The lock of a corpus in a store: one object that names its owner, written by conditional PUTs alone.

1. The lock is taken by a PUT that fails if the object exists. It is taken over from an owner that released it, or that
   has not renewed it for STALE_S, by a PUT that fails if the object has changed since it was read. So of two processes
   that try, only one succeeds.
2. The owner renews it every BEAT_S by a PUT that replaces its own last one. The age of a lock is computed by the
   store's clock, from the time of writing and the time of the answer, so clocks that differ do no harm.
3. An owner that could not renew it for FENCED_S, or that finds another owner in it, writes nothing more: it checks the
   lock before everything it writes or removes. One request that was sent at the last moment may still arrive late; it
   does no harm: commits of workers (which check the owner, too) have the same rows under the same names, a manifest
   replaces only the one that its writer knew, and a shard that is put in place twice is the same shard, since shards
   follow from what is committed.
4. The lock is released by a PUT, too, because stores offer no conditions for a DELETE.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from clipmill.base.errors import UserError
from clipmill.base.file_lock import is_this_system, process_has_ended, system_name
from shards.storage.s3 import Changed, SmallObject, Store

KEY = ".clipmill/lock.json"
BEAT_S = 15.0
FENCED_S = 90.0
STALE_S = 120.0


class StoreLock:
    """The lock of one corpus, for one process; call `take` and `release` in turn."""

    def __init__(self, store: Store):
        self.store = store
        self.token = uuid.uuid4().hex
        self.since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        self._etag, self._beaten_at, self._lost = "", 0.0, ""
        self._beating = threading.Lock()  # one PUT at a time
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lock and begin to renew it. Raises UserError that names the owner if another process has it."""
        while self._thread is None:
            began_at, found = _now(), self.store.read(KEY)
            owner = _owner_in(found)
            if found and owner.get("token") != self.token and _is_alive(found, owner):
                raise UserError(
                    f"{self.store.url} is being written by {_describe(owner)}. Wait for it or stop it; reading is "
                    f"possible. It was last seen {found.age_s:,.0f} s ago; it counts as dead after {STALE_S:,.0f} s."
                )
            with suppress(Changed):  # another process was quicker: try again
                self._write(began_at, if_none_match=found is None, if_match=found.etag if found else None)
                self._require_conditional_writes()
                self._thread = threading.Thread(target=self._keep_renewing, name="clipmill-lock", daemon=True)
                self._thread.start()

    def check(self, at_once: bool = False) -> None:
        """Raise UserError unless the lock is ours for some time to come. `at_once`: ask the store in any case."""
        if not self._lost and (at_once or _now() - self._beaten_at > FENCED_S):
            self._renew()
        if self._lost or _now() - self._beaten_at > FENCED_S:
            raise UserError(
                f"{self.store.url}: the lock was lost ({self._lost or 'the store did not answer in time'}), so this "
                "command stops writing. Committed work is safe; run the same command again to continue."
            )

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with self._beating, suppress(Changed, UserError):  # another process has it already, or it is soon stale
            if not self._lost:
                self._write(_now(), if_match=self._etag, free=True)

    def _require_conditional_writes(self) -> None:
        """Raise UserError for a store that accepts conditions and ignores them: two processes would get the lock."""
        for condition in ({"if_none_match": True}, {"if_match": '"00000000000000000000000000000000"'}):
            try:
                self._write(_now(), **condition)
            except Changed:
                continue
            raise UserError(
                f"{self.store.url}: this store does not support conditional writes, so a single writer cannot be "
                "guaranteed. Use a store or a server version that does."
            )

    def _keep_renewing(self) -> None:
        while not self._ended.wait(BEAT_S) and not self._lost:
            self._renew()

    def _renew(self) -> None:
        began_at = _now()
        with self._beating:
            try:
                self._write(began_at, if_match=self._etag)
            except Changed:
                self._accept_own_write(began_at)
            except UserError:
                return  # the store may answer later: `check` watches the time

    def _accept_own_write(self, began_at: float) -> None:
        """Keep the lock if this process changed it: a client whose PUT got no answer sends it again."""
        try:
            found = self.store.read(KEY)
        except UserError:
            return
        owner = _owner_in(found)
        if found and owner.get("token") == self.token:
            self._etag, self._beaten_at = found.etag, began_at
        else:
            self._lost = f"{_describe(owner)} took it over" if owner else "it was removed"

    def _write(
        self, began_at: float, *, if_none_match: bool = False, if_match: str | None = None, free: bool = False
    ) -> None:
        content = {"token": self.token, "pid": os.getpid(), "host": socket.gethostname(), "machine": system_name()}
        content |= {"since": self.since, "beat": uuid.uuid4().hex, "free": free}
        data = json.dumps(content).encode()
        self._etag = self.store.write(KEY, data, if_none_match=if_none_match, if_match=if_match)
        self._beaten_at = began_at


def token_in(store: Store) -> str:
    """Return the token of the process that holds the lock or held it last; "" when the lock cannot be read."""
    return _owner_in(store.read(KEY)).get("token", "")


def is_held(store: Store) -> bool:
    """Return whether a process that counts as alive holds the lock."""
    found = store.read(KEY)
    return found is not None and _is_alive(found, _owner_in(found))


def _owner_in(found: SmallObject | None) -> dict[str, Any]:
    """Return the owner's entry in the lock; {} without a lock, and for an unreadable one, which ends by age alone."""
    with suppress(ValueError):
        content = json.loads(found.data) if found else {}
        return content if isinstance(content, dict) else {}
    return {}


def _is_alive(found: SmallObject, owner: dict[str, Any]) -> bool:
    if owner.get("free") or found.age_s >= STALE_S:
        return False
    return not (is_this_system(owner.get("machine", "")) and process_has_ended(owner["pid"]))


def _describe(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"


def _now() -> float:
    """Return seconds of a clock that continues while the machine sleeps, if the system has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
