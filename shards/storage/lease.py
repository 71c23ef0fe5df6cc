"""The lock of a corpus in a store: one object that names its holder, written by conditional PUTs alone.

1. Taking it is a PUT that fails where the object is there; taking it over from somebody who has let it go, or who gave
   no sign of life for STALE_S, one that fails where the object has changed since it was read. So of two who try, one
   has it.
2. Its holder writes it again every BEAT_S (a PUT in place of its own last one). Ages are the store's: its clock says
   when the object was written and what time it is, so clocks that differ do no harm.
3. A holder that could not do so for FENCED_S, or that finds another's name in it, writes nothing more: it asks before
   everything it writes or removes. One request that was sent in the last moment may still arrive late. Of
   what workers commit (who look, too, whose the lock is) the same names hold the same rows; a manifest is written only
   in place of the one that the holder knew; a shard that is put in place twice is the same shard, since shards follow
   from what is committed.
4. Letting it go is a PUT, too, not a DELETE, which stores do not make conditional.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipmill.base.errors import UserError
from clipmill.base.file_lock import process_has_ended
from shards.storage.s3 import Changed, Held, Store

KEY = ".clipmill/lock.json"
BEAT_S = 15.0
FENCED_S = 90.0
STALE_S = 120.0


class StoreLock:
    """Of one corpus, for one process; `take` and `release` come in turn."""

    def __init__(self, store: Store):
        self.store = store
        self.token = uuid.uuid4().hex
        self.since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        self._etag, self._beaten_at, self._lost = "", 0.0, ""
        self._beating = threading.Lock()  # one PUT at a time
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Raises UserError that names the holder."""
        while self._thread is None:
            began_at, held = _now(), self.store.read(KEY)
            holder = _holder_of(held)
            if held and holder.get("token") != self.token and _is_alive(held, holder):
                raise UserError(_refusal(self.store, held, holder))
            with suppress(Changed):  # somebody else was quicker: look again
                self._write(began_at, new=held is None, instead_of=held.etag if held else None)
                self._require_conditions()
                self._thread = threading.Thread(target=self._beat_on, name="clipmill-lock", daemon=True)
                self._thread.start()

    def check(self, at_once: bool = False) -> None:
        """Raises UserError unless the lock is ours for a while to come. `at_once`: the store is asked in any case."""
        if not self._lost and (at_once or _now() - self._beaten_at > FENCED_S):
            self._beat()
        if self._lost or _now() - self._beaten_at > FENCED_S:
            raise UserError(
                f"{self.store.url}: the lock was lost ({self._lost or 'the store did not answer in time'}), so nothing "
                "more is written. What is committed is safe; the same command goes on from here."
            )

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with self._beating, suppress(Changed, UserError):  # another one's by now, or stale in a while
            if not self._lost:
                self._write(_now(), instead_of=self._etag, free=True)

    def _require_conditions(self) -> None:
        """Raises UserError for a store that takes conditions and passes over them: two would have the lock."""
        for condition in ({"new": True}, {"instead_of": '"00000000000000000000000000000000"'}):
            try:
                self._write(_now(), **condition)
            except Changed:
                continue
            raise UserError(f"{self.store.url}: this store ignores conditional writes, on which one writer rests.")

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_S) and not self._lost:
            self._beat()

    def _beat(self) -> None:
        began_at = _now()
        with self._beating:
            try:
                self._write(began_at, instead_of=self._etag)
            except Changed:
                self._look_who_changed_it(began_at)
            except UserError:
                return  # unreachable for now: `check` counts the time

    def _look_who_changed_it(self, began_at: float) -> None:
        """Ourselves, where the answer to a PUT was lost and the client asked again."""
        try:
            held = self.store.read(KEY)
        except UserError:
            return
        holder = _holder_of(held)
        if held and holder.get("token") == self.token:
            self._etag, self._beaten_at = held.etag, began_at
        else:
            self._lost = f"{_named(holder)} took it over" if holder else "it was removed"

    def _write(self, began_at: float, *, new: bool = False, instead_of: str | None = None, free: bool = False) -> None:
        said = {"token": self.token, "pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
        said |= {"since": self.since, "beat": uuid.uuid4().hex, "free": free}
        self._etag = self.store.write(KEY, json.dumps(said).encode(), new=new, instead_of=instead_of)
        self._beaten_at = began_at


def token_in(store: Store) -> str:
    """Of who holds the lock, or held it last; "" where nobody can be made out."""
    return _holder_of(store.read(KEY)).get("token", "")


def is_held(store: Store) -> bool:
    held = store.read(KEY)
    return held is not None and _is_alive(held, _holder_of(held))


def _holder_of(held: Held | None) -> dict[str, Any]:
    """What the lock says; {} where there is none or it cannot be understood, which only its age ends."""
    with suppress(ValueError):
        said = json.loads(held.data) if held else {}
        return said if isinstance(said, dict) else {}
    return {}


def _is_alive(held: Held, holder: dict[str, Any]) -> bool:
    if holder.get("free") or held.age_s >= STALE_S:
        return False
    here = _machine()
    return not (here and holder.get("machine") == here and process_has_ended(holder["pid"]))


def _refusal(store: Store, held: Held, holder: dict[str, Any]) -> str:
    return (
        f"{store.url} is being written by {_named(holder)}. Wait for it or stop it; reading is fine. It gave its last "
        f"sign of life {held.age_s:,.0f} s ago; {STALE_S:,.0f} s after its last it counts as dead."
    )


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _machine() -> str:
    """Tells whose process ids are ours: names of hosts repeat among containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {socket.gethostname()}"
    except OSError:
        return ""  # nobody's: then only time tells


def _now() -> float:
    """Goes on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
