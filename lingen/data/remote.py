"""Pieces of files at ``https://``, ``http://`` and ``s3://``: one request each; retries are up to the caller."""

import fnmatch
import hashlib
import os
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from lingen.recipe.errors import RecipeError

FIRST_LOOK = 1 << 16
"""Bytes that are read to learn the size of a file; one that is not longer is known by them."""


class SourceError(OSError):
    """A piece that could not be read; the message begins with a reason and names the place."""

    def __init__(self, message: str, *, missing: bool = False, retries: int = 0):
        super().__init__(message)
        self.missing = missing
        """There is no such file."""
        self.retries = retries
        """Attempts after the first one."""


Stat = tuple[int, str]
"""Bytes of a remote file, and its version, which changes when the file does; empty where the server does not tell."""


class Passing(Exception):
    """A failure that is worth another attempt."""


def is_remote(location: str) -> bool:
    """An address of a server, not a path."""
    return location.partition("://")[0] in ("http", "https", "s3")


def read_remote(location: str, offset: int, length: int, timeout: float) -> bytes:
    """`length` bytes from `offset` on; fewer where the file ends before. SourceError where it cannot be read (no such
    file, no permission, a server that serves no pieces), Passing where it could not be read this time."""
    if location.startswith("s3://"):
        span = f"bytes={offset}-{offset + length - 1}"
        reply = _ask(location, timeout, "get_object", Range=span)
        data, told = reply["Body"], reply["ContentRange"]
    else:
        data, headers = _get(location, offset, length, timeout)
        told = headers.get("Content-Range", "")
    end = told.rpartition("/")[2]  # of ``bytes 0-9/100``: fewer bytes are right only where the file ends
    wanted = min(length, int(end) - offset) if end.isdigit() else length
    if len(data) < wanted:
        raise Passing(f"{len(data)} of {wanted} bytes came")
    return data


def stat_remote(location: str, timeout: float) -> Stat:
    """What is known of a file without reading it; errors as for `read_remote`."""
    if location.startswith("s3://"):
        reply = _ask(location, timeout, "head_object")
        return int(reply["ContentLength"]), reply["ETag"]
    data, headers = _get(location, 0, FIRST_LOOK, timeout)
    end = headers.get("Content-Range", "").rpartition("/")[2]
    if not end.isdigit():
        raise SourceError(f"unreadable shard: {location}: the server does not tell its size")
    version = headers.get("ETag", "") + headers.get("Last-Modified", "")
    if not version and len(data) == int(end):
        version = hashlib.sha256(data).hexdigest()
    return int(end), version


@cache
def _pool(process: int, proxy: str | None) -> Any:
    """Connections of this process; those of a parent cannot be shared."""
    return urllib3.ProxyManager(proxy, maxsize=32) if proxy else urllib3.PoolManager(maxsize=32)


def _get(url: str, offset: int, length: int, timeout: float) -> tuple[bytes, Mapping[str, str]]:
    """A piece, and the headers that came with it. Of a reply that is no piece nothing is read."""
    parts = urlsplit(url)
    proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
    once = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5)
    try:
        reply = _pool(os.getpid(), proxy).request(
            "GET", url, headers=headers, timeout=timeout, retries=once, preload_content=False
        )
        if reply.status == 206:
            return reply.read(), reply.headers
        reply.close()
    except urllib3.exceptions.LocationValueError as error:
        raise SourceError(f"unreadable shard: '{url}' is no address: {error}") from error
    except urllib3.exceptions.HTTPError as error:
        raise Passing(str(error)) from error
    if reply.status == 416:  # the file is not longer than `offset`
        return b"", reply.headers
    raise _refusal(url, reply.status)


def _refusal(url: str, status: int) -> Exception:
    if status in (408, 425, 429) or status >= 500:
        return Passing(f"the server answers {status}")
    if status in (401, 403):
        return SourceError(f"unreadable shard: {url}: no permission ({status}); sign the address, or open it up")
    if status < 400:
        return SourceError(f"unreadable shard: {url}: the server ignores byte ranges; use one that serves them")
    message = f"unreadable shard: {url}: the server answers {status}; is the address right?"
    return SourceError(message, missing=status == 404)


@cache
def _client(process: int, timeout: float) -> Any:
    """boto3's client of this process: region, credentials and AWS_ENDPOINT_URL as boto3 finds them."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise RecipeError("s3:// needs boto3; install it with: pip install boto3") from error
    once = {"total_max_attempts": 1}
    settings = Config(connect_timeout=timeout, read_timeout=timeout, retries=once, max_pool_connections=32)
    return boto3.session.Session().client("s3", config=settings)


def _ask(location: str, timeout: float, call: str, **arguments: Any) -> Any:
    """One request about an object, or a list of those with a `Prefix`; errors as for `read_remote`."""
    from botocore import exceptions

    bucket, _, key = location.removeprefix("s3://").partition("/")  # a key may hold # and ?
    about = arguments if "Prefix" in arguments else {"Key": key, **arguments}
    try:
        reply = getattr(_client(os.getpid(), timeout), call)(Bucket=bucket, **about)
        return {**reply, "Body": reply["Body"].read()} if "Body" in reply else reply
    except exceptions.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(error.response.get("Error", {}).get("Code", status))
        if code == "InvalidRange":
            return {"Body": b"", "ContentRange": "bytes */0"}  # as a server of https says that nothing is there
        if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "RequestTimeTooSkewed"):
            raise Passing(f"S3 answers {code}") from error
        cure = "check the bucket and the key" if status == 404 else "check the credentials and their rights"
        raise SourceError(f"unreadable shard: {location}: S3 answers {code}; {cure}", missing=status == 404) from error
    except (exceptions.NoCredentialsError, exceptions.NoRegionError, exceptions.PartialCredentialsError) as error:
        raise SourceError(f"unreadable shard: {location}: {error}; set AWS_PROFILE or AWS_ACCESS_KEY_ID") from error
    except exceptions.ParamValidationError as error:
        raise SourceError(f"unreadable shard: {location}: {' '.join(str(error).split())}") from error
    except (exceptions.BotoCoreError, exceptions.HTTPClientError) as error:
        raise Passing(str(error)) from error


def list_s3(pattern: str, timeout: float) -> list[str]:
    """The objects that a pattern with ``*``, ``?`` or ``[...]`` in its key stands for; errors as for `read_remote`."""
    bucket, _, key = pattern.removeprefix("s3://").partition("/")
    prefix = key[: min(key.find(sign) for sign in "*?[" if sign in key)]
    found: list[str] = []
    more: dict[str, str] = {}
    while True:
        reply = _ask(pattern, timeout, "list_objects_v2", Prefix=prefix, **more)
        found += [one["Key"] for one in reply.get("Contents", []) if fnmatch.fnmatchcase(one["Key"], key)]
        if not reply.get("IsTruncated"):
            return [f"s3://{bucket}/{name}" for name in found]
        more = {"ContinuationToken": reply["NextContinuationToken"]}
