"""Objects of a memory bank: opening a place for them, reading, writing, listing, deleting."""

import os
from collections.abc import Iterable
from typing import Any

import tensorstore as ts

from jaxlab.errors import BankError


def default_context() -> ts.Context:
    """TensorStore's settings for one bank: what was read last stays, shard indices among it.

    Without the indices a memory costs two range requests instead of one.
    """
    # A place that does not answer is an error after about a minute, not after half an hour.
    retries = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 1 << 26},
            "gcs_request_retries": retries,
            "s3_request_retries": retries,
        }
    )


def open_kvstore(url: str, context: ts.Context) -> Any:
    """The key-value store at ``url``; a plain path is a local directory."""
    try:
        if "://" in url:
            return ts.KvStore.open(url.rstrip("/") + "/", context=context).result()
        path = os.path.abspath(os.path.expanduser(url)) + "/"
        return ts.KvStore.open({"driver": "file", "path": path}, context=context).result()
    except Exception as error:
        raise BankError(f"cannot open {url} as a place for a bank ({reason(error)})") from error


def read_object(kvstore: Any, key: str, url: str, *, unless: bytes | None = None) -> Any:
    """Read one object; the answer's ``state`` is "missing" where there is none.

    It is "unspecified" where the object is of the generation ``unless``, and not read.
    """
    try:
        return kvstore.read(key, if_not_equal=unless).result()
    except Exception as error:
        raise BankError(f"bank {url}: cannot read {key} ({reason(error)})") from error


def write_object(
    kvstore: Any, key: str, content: bytes, *, url: str, if_equal: bytes | None = None
) -> Any:
    """Write one object at once or not at all."""
    try:
        return kvstore.write(key, content, if_equal=if_equal).result()
    except Exception as error:
        raise BankError(
            f"bank {url}: cannot write {key} ({reason(error)}); nothing was added to the bank:"
            " make room or check the permissions, then repeat"
        ) from error


def list_folders(kvstore: Any, folder: str, *, url: str, without: Iterable[str] = ()) -> set[str]:
    """The names directly below ``folder`` (which ends in a slash) that hold at least one object.

    A store lists all objects: those below the names ``without`` are not asked for.
    """
    whole, inner = _range(folder), [_range(f"{folder}{name}/") for name in sorted(without)]
    starts = [whole.inclusive_min, *(each.exclusive_max for each in inner)]
    stops = [*(each.inclusive_min for each in inner), whole.exclusive_max]
    try:
        pending = [
            kvstore.list(ts.KvStore.KeyRange(start, stop))
            for start, stop in zip(starts, stops, strict=True)
        ]
        keys = [key for some in pending for key in some.result()]
    except Exception as error:
        raise BankError(
            f"bank {url}: cannot list {folder} ({reason(error)}): mend the access, then repeat"
        ) from error
    return {key.decode().removeprefix(folder).split("/")[0] for key in keys}


def delete_folder(kvstore: Any, folder: str, *, url: str) -> None:
    """Delete every object below ``folder`` (which ends in a slash)."""
    try:
        kvstore.delete_range(_range(folder)).result()
    except Exception as error:
        raise BankError(f"bank {url}: cannot clear {folder} ({reason(error)})") from error


def delete_object(kvstore: Any, key: str, *, url: str) -> None:
    """Delete one object, if it is there."""
    try:
        kvstore.write(key, None).result()
    except Exception as error:
        raise BankError(f"bank {url}: cannot delete {key} ({reason(error)})") from error


def _range(folder: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(folder, folder[:-1] + chr(ord("/") + 1))


def reason(error: Exception) -> str:
    """The first line of a driver's message, without its dump of the specification."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0].split(" [tensorstore_spec=")[0]
