"""Objects of an S3-compatible store under one prefix: whole reads, whole writes, conditional writes, lists.

A corpus requires a store in which readers see a PUT whole or not at all, a list or read that begins after a PUT sees
it, and a PUT can be made to fail if the object exists (If-None-Match) or has changed (If-Match). Endpoint, region,
credentials and proxies are found as by every AWS client (environment, ~/.aws/config).

The client is botocore: obstore (tried at 0.12) does not show the Date header, by which the lock is aged by the store's
own clock, reads no AWS profile, has no conditions for multipart uploads, and lists only whole path segments.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from clipmill.base.errors import UserError

Answer = TypeVar("Answer")

SCHEME = "s3://"
ATTEMPTS = 8  # per request, with pauses that double up to 20 s; AWS_MAX_ATTEMPTS overrides it
READ_PAUSES_S = (0.5, 2.0, 8.0)  # before a read that broke off in the middle is started again
PART_BYTES = 64_000_000
MOST_BYTES_AT_ONCE = 1_000_000_000  # larger files are uploaded in parts; they appear whole all the same
MOST_COPIED_BYTES = 4_000_000_000  # S3 copies at most 5 GB, and a shard may exceed its setting a little
CONNECTIONS = 16
_CONTINUE = "Committed work is safe; run the same command again to continue."
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class Changed(Exception):
    """The condition of a write does not hold: the object exists already, or is another version than expected."""


@dataclass(frozen=True)
class Object:
    num_bytes: int
    etag: str


@dataclass(frozen=True)
class SmallObject:
    """A small object that was read whole. `age_s`: seconds since it was written, by the store's own clock."""

    data: bytes
    etag: str
    age_s: float


def is_url(corpus: object) -> bool:
    """Return whether a corpus is named by the URL of a store."""
    return isinstance(corpus, str) and corpus.startswith(SCHEME)


@dataclass(frozen=True)
class Store:
    """One prefix of a bucket. Keys are relative to it.

    Every method raises UserError when the store refuses a request or stays unreachable.

    endpoint  the server's URL; None: the one that each process finds in its environment
    """

    bucket: str
    prefix: str  # "" or ends with a slash
    endpoint: str | None = None

    @classmethod
    def of(cls, url: str) -> "Store":
        parts = urlsplit(url)
        prefix = parts.path.strip("/")
        if not parts.netloc or not prefix or parts.query or parts.fragment:
            raise UserError(f"--corpus {url}: write it as s3://BUCKET/PREFIX.")
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
        return cls(parts.netloc, f"{prefix}/", endpoint)

    @property
    def url(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix.rstrip('/')}"

    def list(self, prefix: str = "") -> dict[str, Object]:
        """Return key → object for the keys that begin with a prefix, in order of keys."""
        found, more = {}, {}
        while True:
            with self._asking("listed") as client:
                page = client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + prefix, **more)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # empty objects that web consoles create for folders
                    name = entry["Key"].removeprefix(self.prefix)
                    # As a path, such a name would lead out of the mirror.
                    if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
                        raise UserError(f"{self.url}: the object {name!r} does not belong to a corpus: remove it.")
                    found[name] = Object(entry["Size"], entry["ETag"])
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def head(self, key: str) -> Object | None:
        """Return an object's size and ETag, None if it does not exist."""
        try:
            with self._asking("read") as client:
                answer = client.head_object(**self._at(key))
        except FileNotFoundError:
            return None
        return Object(answer["ContentLength"], answer["ETag"])

    def read(self, key: str) -> SmallObject | None:
        """Read a small object whole; None if it does not exist."""

        def whole() -> tuple[dict[str, Any], bytes]:
            with self._asking("read") as client:
                answer = client.get_object(**self._at(key))
                return answer, answer["Body"].read()

        try:
            answer, data = _retry_broken(whole)
        except FileNotFoundError:
            return None
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        written: datetime = answer["LastModified"]
        return SmallObject(data, answer["ETag"], (now - written).total_seconds())

    def download(self, key: str, path: Path) -> str:
        """Write an object's bytes to `path` and return its ETag. Raises FileNotFoundError."""

        def whole() -> str:
            with self._asking("read") as client, open(path, "wb") as file:
                answer = client.get_object(**self._at(key))
                for chunk in answer["Body"].iter_chunks(1 << 20):
                    file.write(chunk)
            return answer["ETag"]

        return _retry_broken(whole)

    def write(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        """Write an object and return its new ETag.

        if_none_match  only if the object does not exist
        if_match       only if the object still has this ETag
        Raises Changed when the condition does not hold.
        """
        with self._asking("written") as client:
            return client.put_object(**self._at(key), Body=data, **_condition(if_none_match, if_match))["ETag"]

    def upload(self, key: str, path: Path, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        """Write a file of any size as an object; see `write`."""
        condition = _condition(if_none_match, if_match)
        with self._asking("written") as client, open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size <= MOST_BYTES_AT_ONCE:
                return client.put_object(**self._at(key), Body=file, **condition)["ETag"]
            return self._upload_parts(client, key, file, condition)

    def _upload_parts(self, client: Any, key: str, file: IO[bytes], condition: dict[str, str]) -> str:
        upload = client.create_multipart_upload(**self._at(key))["UploadId"]
        try:
            parts = []
            while data := file.read(PART_BYTES):
                number = len(parts) + 1
                answer = client.upload_part(**self._at(key), UploadId=upload, PartNumber=number, Body=data)
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            whole = {"MultipartUpload": {"Parts": parts}, "UploadId": upload}
            return client.complete_multipart_upload(**self._at(key), **whole, **condition)["ETag"]
        except BaseException:
            client.abort_multipart_upload(**self._at(key), UploadId=upload)
            raise

    def copy(self, old: str, new: str) -> str:
        """Copy an object inside the store and return the ETag of the copy. Raises FileNotFoundError."""
        with self._asking("written") as client:
            source = {"Bucket": self.bucket, "Key": self.prefix + old}
            return client.copy_object(**self._at(new), CopySource=source)["CopyObjectResult"]["ETag"]

    def delete(self, key: str) -> None:
        with self._asking("written") as client:
            client.delete_object(**self._at(key))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    @contextmanager
    def _asking(self, what: str) -> Iterator[Any]:
        """Yield the client; convert errors that remain after its own retries. `what` completes "cannot be …"."""
        client = _make_client(self.endpoint, os.getpid())  # connections do not survive a fork
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        try:
            yield client
        except ClientError as error:
            raise self._as_ours(error, what) from error
        except (BotoCoreError, HTTPClientError) as error:
            hint = _CONTINUE
            if "Credentials" in type(error).__name__:
                hint = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, here and on every node."
            raise UserError(f"{self.url} cannot be {what}: {error}. {hint}") from error

    def _as_ours(self, error: Any, what: str) -> Exception:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code == "NoSuchBucket":
            return UserError(f"{self.url}: the bucket {self.bucket!r} does not exist; create it first.")
        if status == 404:
            return FileNotFoundError(f"{self.url}: the object does not exist")
        if status == 412 or code == "ConditionalRequestConflict":
            return Changed(str(error))
        return UserError(f"{self.url} cannot be {what}: {error}. {_CONTINUE}")


def _retry_broken(read: Callable[[], Answer]) -> Answer:
    """Call `read`; repeat it after a pause if the answer breaks off, which the client does not retry."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    for pause_s in READ_PAUSES_S:
        try:
            return read()
        except UserError as error:
            if not isinstance(error.__cause__, (HTTPClientError, IncompleteReadError)):
                raise
            time.sleep(pause_s)
    return read()


def _condition(if_none_match: bool, if_match: str | None) -> dict[str, str]:
    return {"IfNoneMatch": "*"} if if_none_match else {"IfMatch": if_match} if if_match else {}


@functools.lru_cache(maxsize=4)
def _make_client(endpoint: str | None, pid: int) -> Any:
    """Return the client of the process `pid`; threads may share it."""
    try:
        import botocore.config
        import botocore.session
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise UserError("a corpus at s3:// needs additional packages: pip install 'clipmill[s3]'.") from error
    retries = {} if os.environ.get("AWS_MAX_ATTEMPTS") else {"total_max_attempts": ATTEMPTS, "mode": "standard"}
    config = botocore.config.Config(
        retries=retries, max_pool_connections=CONNECTIONS, connect_timeout=10, read_timeout=60, tcp_keepalive=True
    )
    session = botocore.session.get_session()
    region = None if session.get_config_variable("region") else "us-east-1"  # self-hosted servers have none
    try:
        return session.create_client("s3", endpoint_url=endpoint, config=config, region_name=region)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"the S3 client cannot be created: {error}") from error
