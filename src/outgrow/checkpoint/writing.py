"""Writes laid-out files: copies as byte ranges inside the kernel, several at a time, while computed tensors are made one by one."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Collection, Generator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outgrow.checkpoint.layout import Shard, bytes_of
from outgrow.checkpoint.safetensors_file import DTYPE_BYTES, Stored
from outgrow.errors import OutgrowError

THREADS = 2  # files written at once; a file takes one writer at a time
SPARE_FILES = 24  # open for other reasons
_RANGE = 1 << 26  # bytes that are asked for at once
_FLUSH_SECONDS = 0.1
_BLOCK = 1 << 20  # bytes that pass through this process where the kernel cannot copy by itself
_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
Progress = Callable[[int, int], None]


def write_shards(directory: Path, shards: list[Shard], progress: Progress) -> None:
    """Writes every file of a layout and forces it to the disk; the bytes do not depend on threads or order."""
    total = sum(shard.bytes for shard in shards)
    done = 0
    lock, stopped = threading.Lock(), threading.Event()

    def report(count: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise InterruptedError("another file failed")
        with lock:
            done += count
            progress(done, total)

    if len(shards) > (most := resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES):
        raise OutgrowError(f"{len(shards):,} weight files are more than the {most:,} that may be open at once; raise --max-shard-size")
    files = {shard.name: os.open(directory / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666) for shard in shards}
    try:
        with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(1) as writer, _flushing(files.values()):
            jobs: list[Future[None]] = []
            writing: Future[None] | None = None  # rows that are cast and written while the next ones are made
            try:
                for shard in shards:
                    os.truncate(files[shard.name], shard.bytes)
                    _write_at(files[shard.name], memoryview(shard.header), 0)
                    jobs.append(pool.submit(_copy_all, shard, files[shard.name], report))
                for shard in shards:
                    for name in shard.entries.keys() - shard.copied.keys():
                        entry = shard.entries[name]
                        place = entry.begin
                        for rows in shard.compute(name):
                            if writing:
                                writing.result()
                            writing = writer.submit(_write_rows, files[shard.name], rows, entry.dtype, name, place)
                            place += rows.numel() * DTYPE_BYTES[entry.dtype]
                        report(entry.bytes)
                if writing:
                    writing.result()
                for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    job.result()
            except BaseException:
                stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for file in files.values():
            os.fsync(file)
    finally:
        for file in files.values():
            os.close(file)


def copy_range(stored: Stored, offset: int, count: int, file: int, place: int) -> None:
    """Copies bytes of a stored tensor to a place in an open file; they are never decoded."""
    source = os.open(stored.path, os.O_RDONLY)
    try:
        begin = stored.entry.begin + offset
        while count:
            copied = _copy_some(source, begin, count, file, place)
            if not copied:
                raise OutgrowError(f"'{stored.path}' became shorter while it was read")
            begin, place, count = begin + copied, place + copied, count - copied
    finally:
        os.close(source)


@contextmanager
def _flushing(files: Collection[int]) -> Generator[None, None, None]:
    """Sends what is written on to the disk all the while and gives its memory back, so that the last flush has little left."""
    stop = threading.Event()

    def flush() -> None:
        while not stop.wait(_FLUSH_SECONDS):
            for file in files:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=flush)
    try:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            thread.start()
        yield
    finally:
        stop.set()
        if thread.ident:
            thread.join()


def _copy_all(shard: Shard, file: int, report: Callable[[int], None]) -> None:
    """What a file copies from the source, in its order."""
    for name, stored in shard.copied.items():
        entry = shard.entries[name]
        for offset in range(0, entry.bytes, _RANGE):
            count = min(_RANGE, entry.bytes - offset)
            copy_range(stored, offset, count, file, entry.begin + offset)
            report(count)


def _copy_some(source: int, begin: int, count: int, file: int, place: int) -> int:
    """Copies up to `count` bytes and says how many: inside the kernel where it can, through this process otherwise."""
    try:
        return os.copy_file_range(source, file, count, begin, place)
    except (OSError, AttributeError) as error:  # other file systems, older kernels, other systems than Linux
        if isinstance(error, OSError) and error.errno not in _CANNOT:
            raise
        return os.pwrite(file, os.pread(source, min(count, _BLOCK), begin), place)


def _write_rows(file: int, rows: Any, dtype: str, name: str, place: int) -> None:
    _write_at(file, memoryview(bytes_of(rows, dtype, name)).cast("B"), place)


def _write_at(file: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(file, data[:_RANGE], place)
        data, place = data[written:], place + written
