"""Decode untrusted media in a child process: a crash, a hang or a memory bomb fails one call, never the worker.

The child is started when it is first needed, serves many calls, and is killed with all its own children when a call
exceeds a limit; the next call gets a new child. It is started by exec, never forked from a process with threads, so it
works inside Ray workers and beside CUDA. It imports only what the called functions need.

Memory is limited by RLIMIT_DATA: it counts private writable memory (heap, anonymous maps), which decoders allocate, and
makes the allocation itself fail, before the machine runs out of memory. RLIMIT_AS would also count address space that
is never touched; polling the resident size would be too late for an allocation of gigabytes.

Calls and answers are pickled; the function of a call must be importable from a module.
"""

import errno
import fcntl
import json
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from clipmill.base.errors import ItemError

HEADER = struct.Struct("<Q")
# BLAS and OpenMP would start a thread per core, each with a stack that counts as memory; SVT would print messages.
QUIET = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "SVT_LOG")}
STDERR_TAIL_BYTES = 1500
SIGNS_OF_MEMORY = ("MemoryError", "Memory allocation", "Cannot allocate memory", "bad_alloc", "out of memory")


class Sandbox:
    """Run functions in a child process under limits. Thread-safe: calls wait for one another. A context manager."""

    def __init__(self, memory_bytes: int = 3 * 2**30, file_bytes: int = 20 * 2**30, calls_per_child: int = 200):
        """Set the limits; the child is started by the first call.

        memory_bytes     private memory
        file_bytes       size of the largest file that may be written
        calls_per_child  calls after which the child is replaced, so that memory leaks of decoders do not add up
        """
        self.memory_bytes, self.file_bytes, self.calls_per_child = memory_bytes, file_bytes, calls_per_child
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def call(
        self,
        function: Callable,
        *args: Any,
        timeout_s: float,
        memory_bytes: int | None = None,
        file_bytes: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call a function in the child and return its result.

        Raises the function's own ItemError unchanged, and for other failures ItemError timeout, out-of-memory,
        output-too-large, disk-full, decoder-crash (killed by a signal), internal-error (any other exception; its
        message ends with the traceback).
        """
        limits = (memory_bytes or self.memory_bytes, file_bytes or self.file_bytes)
        request = pickle.dumps((limits, function, args, kwargs), pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if self._child is None or not self._child.fit_for_use(self.calls_per_child):
                self._stop()
                self._child = _Child()
            try:
                answer, *buffers = self._child.ask(request, timeout_s)
                status, value = pickle.loads(answer, buffers=buffers)
            except BaseException:  # also for a keyboard interrupt: the child may be in any state
                self._stop()
                raise
        if status == "raised":
            raise value
        return value

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None:
            self._child.kill()

    def __reduce__(self):  # pickled as its limits, without the child
        return Sandbox, (self.memory_bytes, self.file_bytes, self.calls_per_child)


class _Child:
    """The parent's handle on one child process."""

    def __init__(self):
        requests_read, self.requests = os.pipe()
        self.answers, answers_write = os.pipe()
        lifeline, self.lifeline = os.pipe()
        self.stderr = tempfile.TemporaryFile()
        setup = {"path": sys.path, "fds": [requests_read, answers_write, lifeline]}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(setup)],
            pass_fds=setup["fds"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.stderr,
            start_new_session=True,
            env=os.environ | QUIET,
        )
        for fd in setup["fds"]:
            os.close(fd)
        os.set_blocking(self.requests, False)
        self.num_calls = 0
        self.pid = os.getpid()

    def fit_for_use(self, most_calls: int) -> bool:
        """Return whether the child can take a call; not after a fork: two parents would use one child."""
        return self.pid == os.getpid() and self.num_calls < most_calls and self.process.poll() is None

    def ask(self, request: bytes, timeout_s: float) -> list[bytearray]:
        """Send a request; return the answer's pickle and its buffers. Raises ItemError without an answer."""
        self.num_calls += 1
        deadline = time.monotonic() + timeout_s
        self.stderr.seek(0)  # the child writes through the same file position
        self.stderr.truncate()
        try:
            self._write(HEADER.pack(len(request)) + request, deadline)
            num_parts = self._read_number(deadline)
            return [self._read(self._read_number(deadline), deadline) for _ in range(num_parts)]
        except TimeoutError:
            raise ItemError("timeout", f"not done after {timeout_s:.0f} s") from None
        except (EOFError, BrokenPipeError):
            raise self._post_mortem() from None

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self.requests, select.POLLOUT, deadline)
            view = view[os.write(self.requests, view[:65536]) :]

    def _read_number(self, deadline: float) -> int:
        return HEADER.unpack(self._read(HEADER.size, deadline))[0]

    def _read(self, size: int, deadline: float) -> bytearray:
        data, done = bytearray(size), 0
        while done < size:
            _wait(self.answers, select.POLLIN, deadline)
            num_bytes = os.readv(self.answers, [memoryview(data)[done : done + 2**20]])
            if not num_bytes:
                raise EOFError
            done += num_bytes
        return data

    def _post_mortem(self) -> ItemError:
        """Return the cause of the child's death, guessed from its exit status and the end of its stderr.

        Its peak memory does not help, since the kernel includes that of the parent before the exec.
        """
        self._end(patience_s=5.0)
        code = self.process.wait()
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - STDERR_TAIL_BYTES))
        text = self.stderr.read().decode(errors="replace").strip()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        starved = code == -signal.SIGKILL or any(sign in text for sign in SIGNS_OF_MEMORY)
        return ItemError("out-of-memory" if starved else "decoder-crash", f"{how}. {text}".strip())

    def kill(self) -> None:
        """Kill the child and all its own children."""
        if self.pid == os.getpid() and self.process.returncode is None:
            self._end(patience_s=0.0)
            self.process.wait()
        for fd in (self.requests, self.answers, self.lifeline):
            os.close(fd)
        self.stderr.close()

    def _end(self, patience_s: float) -> None:
        """Kill the process group, after giving the child `patience_s` to die by itself. The caller has to reap it."""
        deadline = time.monotonic() + patience_s
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < deadline and os.waitid(os.P_PID, self.process.pid, ended) is None:
            time.sleep(0.01)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the group has ended already


def _wait(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    left_s = deadline - time.monotonic()
    if left_s <= 0 or not poll.poll(left_s * 1000):  # also when the answer has arrived too late
        raise TimeoutError


# ---- the child ------------------------------------------------------------------------------------------------------

_BOOT = "import json, sys; s = json.loads(sys.argv[1]); sys.path[:] = s['path']; "
_BOOT += "from clipmill.media.sandbox import serve; serve(*s['fds'])"


def serve(requests: int, answers: int, lifeline: int) -> None:
    """Answer requests in the child until the parent closes the pipe."""
    for fd in (requests, answers, lifeline):
        os.set_inheritable(fd, False)
    _die_with_parent(lifeline)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(requests, "rb") as source, open(answers, "wb") as sink:
        while header := source.read(HEADER.size):
            parts = _answer(source.read(HEADER.unpack(header)[0]))
            sink.write(HEADER.pack(len(parts)))
            for part in parts:
                sink.write(HEADER.pack(len(part)))
                sink.write(part)
            sink.flush()
            parts.clear()


def _die_with_parent(lifeline: int) -> None:
    """Let the kernel kill the whole group when the parent's end of the pipe closes, however the parent ended.

    PR_SET_PDEATHSIG would fire when the *thread* that started the child ends; a watching thread would be stopped by a
    decoder that hangs while it holds the interpreter lock.
    """
    if not hasattr(fcntl, "F_SETSIG"):  # not Linux
        threading.Thread(target=lambda: os.read(lifeline, 1) or os.killpg(0, signal.SIGKILL), daemon=True).start()
        return
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    poll = select.poll()  # select() accepts only file descriptors up to 1023
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):  # the parent had ended before the signal was armed
        os.killpg(0, signal.SIGKILL)


def _answer(request: bytes) -> list[bytes | memoryview]:
    """Return the answer as a pickle and, outside of it, its large arrays: pickling would double their memory."""
    try:
        limits, function, args, kwargs = pickle.loads(request)
        _limit(*limits)
        buffers: list[pickle.PickleBuffer] = []
        answer = pickle.dumps(("returned", function(*args, **kwargs)), 5, buffer_callback=buffers.append)
        return [answer, *(buffer.raw() for buffer in buffers)]
    except ItemError as error:
        return [pickle.dumps(("raised", error))]
    except Exception as error:
        return [pickle.dumps(("raised", _item_error(error)))]
    finally:
        _limit(UNLIMITED, UNLIMITED)  # the next request, and what it imports, need not fit in the limits of this one


UNLIMITED = resource.RLIM_INFINITY


def _limit(memory_bytes: int, file_bytes: int) -> None:
    for kind, limit in ((resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_FSIZE, file_bytes)):
        _, most = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            limit = most if limit == UNLIMITED else min(limit, most)
        resource.setrlimit(kind, (limit, most))


def _item_error(error: Exception) -> ItemError:
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return ItemError("out-of-memory", str(error) or "an allocation beyond the limit")
    if number == errno.EFBIG:
        return ItemError("output-too-large", str(error))
    if number in (errno.ENOSPC, errno.EDQUOT):
        return ItemError("disk-full", str(error), transient=True)
    return ItemError("internal-error", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}")
