"""Writes laid-out files, several at a time: copies as byte ranges inside the kernel, computed tensors a few rows after another."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from outgrow.checkpoint.layout import Shard, bytes_of
from outgrow.checkpoint.safetensors_file import Stored
from outgrow.errors import OutgrowError
from outgrow.files import write_at

THREADS = 2  # files copied at once; a file takes one writer at a time
MAKERS = 4  # threads of arithmetic at most; each holds about 30 MB: a few pieces of a million numbers
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

    def make(todo: Iterator[tuple[Shard, str, slice]]) -> None:
        """Makes a piece after another of what other threads take from too."""
        while not stopped.is_set():
            with lock:
                piece = next(todo, None)
            if piece is None:
                return
            _make(*piece, files[piece[0].name], report)

    if len(shards) > (most := resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES):
        raise OutgrowError(f"{len(shards):,} weight files are more than the {most:,} that may be open at once; raise --max-shard-size")
    files = {shard.name: os.open(directory / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666) for shard in shards}
    try:
        with ThreadPoolExecutor(THREADS) as pool, _arithmetic(shards) as (makers, count), _flushing(files.values()):
            try:
                jobs: list[Future[None]] = []
                for shard in shards:
                    os.truncate(files[shard.name], shard.bytes)
                    write_at(files[shard.name], memoryview(shard.header), 0)
                    jobs.append(pool.submit(_copy_all, shard, files[shard.name], report))
                # Those that need all of a source are made one at a time: memory should not hold two.
                jobs.append(makers.submit(make, _to_make(shards, apart=False)))
                apart = _to_make(shards, apart=True)
                jobs += [makers.submit(make, apart) for _ in range(count)]
                for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    job.result()
            except BaseException:
                stopped.set()
                for workers in (pool, makers):
                    workers.shutdown(wait=False, cancel_futures=True)
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
        if copied := os.copy_file_range(source, file, count, begin, place):  # some file systems give up before the end
            return copied
    except (OSError, AttributeError) as error:  # other file systems, older kernels, other systems than Linux
        if isinstance(error, OSError) and error.errno not in _CANNOT:
            raise
    return os.pwrite(file, os.pread(source, min(count, _BLOCK), begin), place)


def _to_make(shards: Collection[Shard], apart: bool) -> Iterator[tuple[Shard, str, slice]]:
    """The pieces of all tensors that are not copied: of those that read some rows of a source for some of theirs, or of the others."""
    made = ((shard, name) for shard in shards for name in shard.entries if name not in shard.copied)
    return ((shard, name, rows) for shard, name in made if shard.grown.reads_apart(name) == apart for rows in shard.grown.pieces(name))


@contextmanager
def _arithmetic(shards: Collection[Shard]) -> Generator[tuple[ThreadPoolExecutor, int], None, None]:
    """Threads that make tensors, a piece each, and one more; their number; inside one, torch has no threads of its own."""
    count = min(MAKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(count + 1) as makers:
        if all(shard.copied.keys() == shard.entries.keys() for shard in shards):
            yield makers, count  # idle, and torch is not needed
            return
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield makers, count
        finally:
            torch.set_num_threads(before)


def _make(shard: Shard, name: str, rows: slice, file: int, report: Callable[[int], None]) -> None:
    """Makes some rows of a tensor and writes them where they belong."""
    entry = shard.entries[name]
    data = memoryview(bytes_of(shard.compute(name, rows), entry.dtype, name)).cast("B")
    before = entry.bytes // entry.shape[0] * rows.start if rows.start else 0
    write_at(file, data, entry.begin + before)
    report(len(data))
