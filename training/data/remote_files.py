"""Read files in any store that fsspec supports, and convert its errors to ItemError and UserError."""

import functools
from typing import Any

from clipmill.base.errors import ItemError, UserError

# Names of a file's version in the stores' descriptions.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "generation"),
    *("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "created"),
)


def scheme_of(address: str) -> str:
    return address.split("://")[0]


@functools.lru_cache(maxsize=4096)
def filesystem_of(address: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL and the path in it. Raises UserError if its scheme needs a package."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(f"shards at {scheme_of(address)}:// cannot be read: {error}") from error


def describe(address: str) -> tuple[int, str]:
    """Return a file's size and an identifier of its version. Raises ItemError shard-missing, shard-unreadable."""
    filesystem, path = filesystem_of(address)
    try:
        info = filesystem.info(path)
    except Exception as error:  # every store has its own error classes
        raise as_item_error(error, address) from error
    if not info.get("size"):
        raise ItemError("shard-unreadable", f"{address}: the store does not report its size")
    return int(info["size"]), " ".join(f"{name}={info[name]}" for name in _VERSIONS if info.get(name))


def read_ranges(addresses: list[str], starts: list[int], ends: list[int]) -> list[bytes | ItemError]:
    """Read ranges of files of one store together; a range beyond the file's end gives fewer bytes."""
    filesystem = filesystem_of(addresses[0])[0]
    paths = [filesystem_of(address)[1] for address in addresses]
    try:
        answers = filesystem.cat_ranges(paths, starts, ends, on_error="return")
    except Exception as error:  # as above
        answers = [error] * len(paths)
    results: list[bytes | ItemError] = []
    for address, start, end, answer in zip(addresses, starts, ends, answers, strict=True):
        if isinstance(answer, BaseException):
            results.append(as_item_error(answer, address))
        elif len(answer) > end - start:
            results.append(ItemError("shard-unreadable", f"{address}: the server ignores byte ranges"))
        else:
            results.append(answer)
    return results


def as_item_error(error: BaseException, path: str) -> ItemError:
    """Convert a store's error to an ItemError, transient unless the file is missing."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return ItemError("shard-missing", f"{path} does not exist")
    return ItemError("shard-unreadable", f"{path}: {type(error).__name__}: {error}", transient=True)
