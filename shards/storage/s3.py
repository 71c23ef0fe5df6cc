"""Objects of an S3-compatible store under one prefix: whole reads, whole writes, conditional writes, lists.

What a corpus needs of a store and what stores promise: a PUT is seen whole or not at all, a list and a read that begin
after it see it, and a PUT may be made to fail where the object is there (If-None-Match) or is another one by now
(If-Match). Endpoint, region, credentials, proxies: as every AWS client finds them (environment, ~/.aws/config).
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
from typing import Any, TypeVar
from urllib.parse import urlsplit

from clipmill.base.errors import UserError

Answer = TypeVar("Answer")

SCHEME = "s3://"
ATTEMPTS = 8  # of a request, with pauses that double up to 20 s; AWS_MAX_ATTEMPTS says another number
READ_PAUSES_S = (0.5, 2.0, 8.0)  # before a read that broke off in the middle begins again
PART_BYTES = 64_000_000
MOST_BYTES_AT_ONCE = 1_000_000_000  # larger files go in parts, and appear whole all the same
MOST_COPIED_BYTES = 4_000_000_000  # S3 copies 5 GB at a time, and a shard may be a little larger than asked for
CONNECTIONS = 16
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class Changed(Exception):
    """The object is not, or no more, what a conditional write took it to be."""


@dataclass(frozen=True)
class Object:
    num_bytes: int
    etag: str


@dataclass(frozen=True)
class Held:
    """A small object that was read whole. `age_s`: since it was written, by the store's own clock."""

    data: bytes
    etag: str
    age_s: float


def is_url(corpus: object) -> bool:
    return isinstance(corpus, str) and corpus.startswith(SCHEME)


@dataclass(frozen=True)
class Store:
    """Keys are relative to the prefix. Every method raises UserError where the store refuses or stays unreachable.

    endpoint  the server's URL; None: what the environment of the process says that asks
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
        """Every object whose key begins so, in order of keys."""
        found, more = {}, {}
        while True:
            with self._asking("listed") as client:
                page = client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + prefix, **more)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # what consoles make where people make folders
                    found[self._checked(entry["Key"])] = Object(entry["Size"], entry["ETag"])
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def head(self, key: str) -> Object | None:
        try:
            with self._asking("read") as client:
                answer = client.head_object(**self._at(key))
        except FileNotFoundError:
            return None
        return Object(answer["ContentLength"], answer["ETag"])

    def read(self, key: str) -> Held | None:
        """A small object; None where there is none."""

        def whole() -> tuple[dict[str, Any], bytes]:
            with self._asking("read") as client:
                answer = client.get_object(**self._at(key))
                return answer, answer["Body"].read()

        try:
            answer, data = _till_whole(whole)
        except FileNotFoundError:
            return None
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        written: datetime = answer["LastModified"]
        return Held(data, answer["ETag"], (now - written).total_seconds())

    def fetch(self, key: str, path: Path) -> str:
        """Writes the object's bytes to `path` and returns its ETag. Raises FileNotFoundError."""

        def whole() -> str:
            with self._asking("read") as client, open(path, "wb") as file:
                answer = client.get_object(**self._at(key))
                for chunk in answer["Body"].iter_chunks(1 << 20):
                    file.write(chunk)
            return answer["ETag"]

        return _till_whole(whole)

    def write(self, key: str, data: bytes, *, new: bool = False, instead_of: str | None = None) -> str:
        """The new ETag. Raises Changed where it is there already (`new`), or is not `instead_of` (an ETag) any more."""
        with self._asking("written") as client:
            return client.put_object(**self._at(key), Body=data, **_condition(new, instead_of))["ETag"]

    def send(self, key: str, path: Path, *, new: bool = False, instead_of: str | None = None) -> str:
        """A whole file, as `write`."""
        with self._asking("written") as client, open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size <= MOST_BYTES_AT_ONCE:
                return client.put_object(**self._at(key), Body=file, **_condition(new, instead_of))["ETag"]
            return self._send_parts(client, key, file, _condition(new, instead_of))

    def _send_parts(self, client: Any, key: str, file: Any, condition: dict[str, str]) -> str:
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
        """Inside the store; the new ETag. Raises FileNotFoundError."""
        with self._asking("written") as client:
            source = {"Bucket": self.bucket, "Key": self.prefix + old}
            return client.copy_object(**self._at(new), CopySource=source)["CopyObjectResult"]["ETag"]

    def delete(self, key: str) -> None:
        with self._asking("written") as client:
            client.delete_object(**self._at(key))

    def _checked(self, key: str) -> str:
        """The key from the prefix on. It becomes a path: raises UserError for one that would lead elsewhere."""
        name = key.removeprefix(self.prefix)
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
            raise UserError(f"{self.url}: there is an object {name!r}, which is no file of a corpus: remove it.")
        return name

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    @contextmanager
    def _asking(self, what: str) -> Iterator[Any]:
        """The client; what it raises, after its own attempts, told as ours."""
        client = _client(self.endpoint)
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        try:
            yield client
        except ClientError as error:
            raise self._told(error, what) from error
        except (BotoCoreError, HTTPClientError) as error:
            raise UserError(f"{self.url} cannot be {what}: {error}{_hint(error)}") from error

    def _told(self, error: Any, what: str) -> Exception:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code == "NoSuchBucket":
            return UserError(f"{self.url}: there is no bucket {self.bucket!r}; make it first.")
        if status == 404:
            return FileNotFoundError(f"{self.url} has no such object")
        if status == 412 or code == "ConditionalRequestConflict":
            return Changed(str(error))
        return UserError(f"{self.url} cannot be {what}: {error}. What is committed is safe; the same command goes on.")


def _till_whole(read: Callable[[], Answer]) -> Answer:
    """What `read` returns; again, after a pause, where an answer broke off in its middle: the client asks only once."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    for pause_s in READ_PAUSES_S:
        try:
            return read()
        except UserError as error:
            if not isinstance(error.__cause__, (HTTPClientError, IncompleteReadError)):
                raise
            time.sleep(pause_s)
    return read()


def _condition(new: bool, instead_of: str | None) -> dict[str, str]:
    return {"IfNoneMatch": "*"} if new else {"IfMatch": instead_of} if instead_of else {}


def _hint(error: Exception) -> str:
    if "Credentials" in type(error).__name__:
        return ". Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, here and on every node."
    return ". What is committed is safe; the same command goes on."


def _client(endpoint: str | None) -> Any:
    """One per process, since connections do not outlive a fork. Usable from many threads."""
    return _make_client(endpoint, os.getpid())


@functools.lru_cache(maxsize=4)
def _make_client(endpoint: str | None, pid: int) -> Any:
    try:
        import botocore.config
        import botocore.session
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise UserError("a corpus at s3:// needs further packages: pip install 'clipmill[s3]'.") from error
    retries = {} if os.environ.get("AWS_MAX_ATTEMPTS") else {"total_max_attempts": ATTEMPTS, "mode": "standard"}
    config = botocore.config.Config(
        retries=retries, max_pool_connections=CONNECTIONS, connect_timeout=10, read_timeout=60, tcp_keepalive=True
    )
    session = botocore.session.get_session()
    region = None if session.get_config_variable("region") else "us-east-1"  # servers of one's own have none
    try:
        return session.create_client("s3", endpoint_url=endpoint, config=config, region_name=region)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"the S3 client cannot be made: {error}") from error
