"""The cache of tokenised corpora: folders that are whole or absent, whatever is killed and whoever writes beside us.

A folder is written under another name, synced and renamed. Its manifest.json, written last, names the size of every
other file, so that a truncated one is noticed.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

_DRAFT = ".building-"
_STALE = 86_400  # seconds after which a draft that nobody touches belongs to a dead process


def load_manifest(folder: str, fingerprint: str, log: Callable[[str], None]) -> dict | None:
    """None if the folder is absent or does not hold what its manifest says; the latter is told to `log`."""
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as opened:
            manifest = json.load(opened)
        for name, expected in manifest["file_bytes"].items():
            found = os.path.getsize(os.path.join(folder, name))
            if found != expected:
                raise ValueError(f"{name} has {found} bytes instead of {expected}")
        if manifest["fingerprint"] != fingerprint:
            raise ValueError("its fingerprint is another one")
        return manifest
    except FileNotFoundError as error:
        if os.path.lexists(folder):
            log(f"the cached corpus {folder} is damaged ({error.filename} is missing); building it again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log(f"the cached corpus {folder} is damaged ({error}); building it again")
    return None


def write_manifest(folder: str, manifest: dict) -> None:
    """Adds the sizes of all files in `folder`, syncs them, and writes the manifest."""
    names = sorted(os.listdir(folder))
    for name in names:
        sync(os.path.join(folder, name))
    manifest = manifest | {"file_bytes": {name: os.path.getsize(os.path.join(folder, name)) for name in names}}
    with open(file := os.path.join(folder, "manifest.json"), "w", encoding="utf-8") as opened:
        json.dump(manifest, opened, indent=1)
    sync(file)


@contextlib.contextmanager
def building(folder: str, fingerprint: str) -> Iterator[str]:
    """A draft that becomes `folder` at the end of the block. Of several processes the first wins, the others use its.

    Raises OSError: the place cannot be written, or is full.
    """
    cache = os.path.dirname(folder)
    os.makedirs(cache, exist_ok=True)
    _sweep(cache)
    draft = tempfile.mkdtemp(prefix=f"{_DRAFT}{fingerprint}-", dir=cache)
    try:
        yield draft
        os.chmod(draft, 0o755)  # mkdtemp makes folders for one user alone; a cache may be shared
        sync(draft)
        while not _renamed(draft, folder) and not load_manifest(folder, fingerprint, lambda message: None):
            _put_away(folder)
        sync(cache)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _renamed(draft: str, folder: str) -> bool:
    try:
        os.rename(draft, folder)
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # something stands there
            return False
        raise


def _put_away(folder: str) -> None:
    """Removes a damaged folder in one step, so that a whole one that replaces it meanwhile is never half removed."""
    aside = tempfile.mkdtemp(prefix=f"{_DRAFT}damaged-", dir=os.path.dirname(folder))
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.rename(folder, os.path.join(aside, "corpus"))
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def writing(file: str) -> Iterator[str]:
    """A draft that becomes `file`, likewise."""
    descriptor, draft = tempfile.mkstemp(prefix=_DRAFT, dir=os.path.dirname(file))
    os.close(descriptor)
    try:
        yield draft
        os.chmod(draft, 0o644)
        sync(draft)
        os.rename(draft, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(draft)


def sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(cache: str) -> None:
    """Removes what killed processes left half-written long ago."""
    for name in os.listdir(cache):
        path = os.path.join(cache, name)
        if not name.startswith(_DRAFT):
            continue
        with contextlib.suppress(OSError):
            inside = [os.path.join(path, file) for file in os.listdir(path)] if os.path.isdir(path) else []
            if max(os.path.getmtime(file) for file in [path, *inside]) < time.time() - _STALE:
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
