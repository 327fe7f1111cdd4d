"""Objects on remote storage, read as ranges of bytes: over HTTP, from the hub, and from all that fsspec knows.

Storage that fails is asked again. Addresses may hold secrets (a password, the token of a signed query), which nothing that is
said of them does.
"""

import contextlib
import errno
import random
import re
import ssl
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from engine.errors import UserError, first_line, system_number

PAUSES = (0.1, 0.5, 2.0, 5.0, 15.0)  # seconds before an object that could not be read is asked for again
CONNECTIONS = 64  # requests of a process at a time
TIMEOUT = 30.0  # seconds without a byte
_LONGEST_PAUSE = 60  # seconds that a server may ask for
_REDIRECTIONS = 6
_PIECE, _PIECE_TIMEOUT = 2**24, 300.0  # bytes asked of fsspec at a time, and seconds that these may take
_CHUNK = 2**20  # bytes taken from a connection at a time
_PROGRESS = 2**20  # bytes, or a quarter of those that are left, after which a connection that breaks counts as the first one
_PASSING = (408, 425, 429)  # and all from 500 on: statuses that may be other ones in a second
_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "ProfileNotFound",
    "TokenRetrievalError",
)
GIVE_CREDENTIALS = "give credentials that may read it"
NOT_THERE = "look at the address, or put the whole directory there"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # of this package, that read such addresses
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]*@)?([^/?#]*)([^?#]*)(.*)", re.IGNORECASE | re.DOTALL)
MEND_THE_STORAGE = "look at the storage and the network, and start the same again"


class StorageError(UserError):
    """An object that could not be read."""


class _Final(Exception):
    """What will be answered again however often it is asked: what is wrong, and the remedy."""


class _Later(OSError):
    """What may be answered otherwise after so many seconds, by what the server says."""

    def __init__(self, said: str, seconds: int) -> None:
        super().__init__(said)
        self.seconds = min(seconds, _LONGEST_PAUSE)


def is_remote(place: str) -> bool:
    """Whether a directory is an address, and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*(::.*)?://", place, re.IGNORECASE | re.DOTALL) is not None


def shown(address: str) -> str:
    """An address as it may be printed and written down: without a password, and without a query, which may hold a token."""
    scheme, user, host, path, _ = _parts(address)
    if _ambiguous(address):
        return f"{address.partition(':')[0]}://..."
    if user:
        user = "" if scheme.lower() in ("http", "https") else f"{user[:-1].split(':')[0]}@"  # a token may stand there alone
    return f"{scheme}://{user}{host}{path.rstrip('/')}"


def below(place: str, name: str) -> str:
    """The directory `name` within a directory, by path or address; what follows an address's path stays behind it."""
    if not is_remote(place):
        return str(Path(place) / name)
    scheme, user, host, path, rest = _parts(place)
    return f"{scheme}://{user}{host}{path.rstrip('/')}/{name}{rest}"


def _parts(address: str) -> list[str]:
    """Scheme, user (with the @ after it), host, path and the rest of an address."""
    found = _ADDRESS.fullmatch(address)
    return [part or "" for part in found.groups()] if found else ["", "", "", address, ""]


def _ambiguous(address: str) -> str | None:
    """Why the parts of an address, of which one may be a password, cannot be told from each other."""
    if "::" in re.sub(r"\[[^]]*\]", "", address):  # which an IPv6 address has within brackets
        return "is an address within another; give that of a directory alone"
    _, user, host, path, _ = _parts(address)
    port = host.rpartition("]")[2].partition(":")[2]
    if (port and not port.isdecimal()) or ("@" in path and (port or ":" in user)):
        return "cannot be read; write / ? # @ of a user or a password as %2F %3F %23 %40"
    return None


class Storage:
    """A directory of objects at an address; used by any number of threads.

    Raises:
        UserError: nothing here reads such addresses.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._closed = threading.Event()
        self._reader: _Http | _Fsspec
        if why := _ambiguous(address):
            raise UserError(f"{shown(address)}: {why}")
        try:
            if re.match("https?:", address, re.IGNORECASE):
                parts = urlsplit(address)
                self._reader = _Http(lambda name: urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}")), {})
            elif re.match("hf:", address, re.IGNORECASE):
                self._reader = _from_hub(address)
            else:
                self._reader = _Fsspec(address)
        except UserError:
            raise
        except ImportError as error:
            remedy = f"; install the extra `{extra}`" if (extra := _EXTRAS.get(address.partition(":")[0].lower())) else ""
            raise UserError(f"{shown(address)}: cannot be opened: {self._masked(first_line(error))}{remedy}") from None
        except Exception as error:  # libraries raise anything
            raise UserError(
                f"{shown(address)}: cannot be opened: {self._masked(first_line(error)).rstrip('.')}; look at the address "
                "(http, https, s3, gs, hf or another that fsspec knows)"
            ) from None

    def close(self) -> None:
        """Nothing is read any more, and nobody waits for what was to be."""
        self._closed.set()

    def named(self, name: str) -> str:
        """An object, as messages name it; or the directory, without a name."""
        return f"{shown(self.address)}/{name}".rstrip("/")

    def size(self, name: str) -> int:
        """Bytes of an object.

        Raises:
            StorageError: it is not there, or cannot be read.
        """
        (size,) = self._persistently(name, "", lambda: [self._reader.size(name)])
        return int(size)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, exclusive, of an object.

        Raises:
            StorageError: it cannot be read.
        """
        return b"".join(self.pieces(name, start, end))

    def pieces(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """The same piece by piece. What breaks off goes on where it broke off.

        Raises:
            StorageError: it cannot be read: which range of which object, why, and what to do.
        """
        position = since = start

        def go_on() -> Iterator[bytes]:
            nonlocal position
            for piece in self._reader.pieces(name, position, end, start):
                self._check_open(name)
                position += len(piece)
                yield piece
            if position != end:
                if (size := self._reader.size(name)) < end:
                    raise _Final(f"is {size} bytes long", NOT_THERE)
                raise EOFError(f"ended after {position - start} bytes")

        def came_on() -> bool:
            nonlocal since
            enough = position > since and position - since >= min(_PROGRESS, (end - since) // 4)
            since = position if enough else since
            return enough

        yield from self._persistently(name, f", bytes {start} to {end}", go_on, came_on)

    def _persistently(
        self, name: str, which: str, ask: Callable[[], Iterable[Any]], came_on: Callable[[], bool] = bool
    ) -> Iterator[Any]:
        """What `ask` gives; it is called again after a pause where storage may do better then.

        What becomes of it outside is not the storage's: an exception there does not come in here.

        Args:
            came_on: whether it got so far since it was asked that this counts as the first try.
        """
        pauses = list(PAUSES)
        while True:
            remedy, at_least = MEND_THE_STORAGE, 0
            self._check_open(name)
            try:
                yield from ask()
                return
            except StorageError:
                raise
            except _Final as error:
                problem, remedy = error.args
                pauses = []
            except Exception as error:  # every library has its own
                if isinstance(error, MemoryError) or system_number(error) == errno.ENOMEM:
                    raise
                problem = self._masked(_cause(error))
                at_least = error.seconds if isinstance(error, _Later) else 0
                if type(error).__name__ in _CREDENTIALS:
                    pauses, remedy = [], GIVE_CREDENTIALS
                elif came_on():
                    pauses = list(PAUSES)
                elif not pauses:
                    problem += f", {len(PAUSES) + 1} times"
            if not pauses:
                passing = remedy == MEND_THE_STORAGE
                raise StorageError(f"{self.named(name)}{which}: {problem}; {remedy}", alone=True, passing=passing)
            self._closed.wait(max(pauses.pop(0) * random.uniform(0.5, 1.5), at_least))

    def _check_open(self, name: str) -> None:
        if self._closed.is_set():
            raise StorageError(f"{self.named(name)}: closed", alone=True)

    def _masked(self, said: str) -> str:
        """What a library says, which may quote the address."""
        _, user, _, _, rest = _parts(self.address)
        for secret in (rest, rest[1:], user, user[:-1].partition(":")[2]):
            for form in (secret, unquote(secret)):
                said = said.replace(form, "...") if form else said
        return re.sub(r"([?&][\w.-]+=)[^\s&'\"]+", r"\1...", re.sub(r"//[^/@\s]+@", "//", said))


def _cause(error: Exception) -> str:
    """What went wrong, without what urllib3 was about to do."""
    reason = getattr(error, "reason", None)
    error = reason if isinstance(reason, Exception) else error
    named = isinstance(error, OSError) or len(error.args) < 2
    return re.sub(r"^HTTPS?Connection(Pool)?\(.*?\): ", "", first_line(error) if named else str(error.args[0]))


class _Http:
    """Objects of a server, which need not list them.

    fsspec's own file system for HTTP needs a package that is not installed with it, and does not compare what it was given with
    what it asked for.

    Args:
        url: of an object by name.
        headers: beside those of every request.
    """

    def __init__(self, url: Callable[[str], str], headers: dict[str, str]) -> None:
        import certifi
        import urllib3

        parts = urlsplit(url(""))
        if not parts.hostname:
            raise ValueError("it names no host")
        self.url, self.headers = url, {"Accept-Encoding": "identity"} | headers
        self.headers |= _credentials("Authorization", parts)
        context = ssl.create_default_context()
        context.load_verify_locations(certifi.where())  # beside the system's, which may have none
        options: dict[str, Any] = {
            "maxsize": CONNECTIONS, "block": True, "ssl_context": context, "timeout": urllib3.Timeout(TIMEOUT),
            "retries": False,
        }  # fmt: skip
        proxy = _proxy_for(parts)
        if proxy is None:
            self.pool = urllib3.PoolManager(**options)
        else:
            address = f"{proxy.scheme}://{proxy.netloc.rpartition('@')[2]}"
            self.pool = urllib3.ProxyManager(address, proxy_headers=_credentials("Proxy-Authorization", proxy), **options)

    def size(self, name: str) -> int:
        with self._asked(name, 0, 1) as response:
            total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
            if not total.isdecimal():
                raise _Final("the server does not say how long it is", "serve it as a file")
            return int(total)

    def pieces(self, name: str, position: int, end: int, start: int) -> Iterator[bytes]:
        """From `position` on, of a range that begins at `start`."""
        if position == end:
            return
        with self._asked(name, position, end) as response:
            skip = 0
            if response.status == 200:
                # Of a whole object that broke off, what is there already is read once more, but no object is read for a row.
                if start > 0:
                    raise _Final("the server gives no ranges of it", "keep whole shards with --shards_cache")
                skip = position
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {position}-"):
                raise ValueError("the server gave another range")
            for piece in response.stream(_CHUNK, decode_content=False):
                piece, skip = piece[skip:], max(skip - len(piece), 0)
                piece = piece[: end - position]
                position += len(piece)
                if piece:
                    yield piece
                if position == end:
                    return

    @contextlib.contextmanager
    def _asked(self, name: str, start: int, end: int) -> Iterator[Any]:
        """The server's answer to a question for a range."""
        parts = urlsplit(self.url(name))
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        response = self._answer(url, self.headers | {"Range": f"bytes={start}-{end - 1}"})
        try:
            said = f"{response.status} {response.reason or ''}".strip()
            if response.status in (401, 403):
                raise _Final(said, GIVE_CREDENTIALS)
            if response.status in (404, 410):
                raise _Final(said, NOT_THERE)
            if response.status in _PASSING or response.status >= 500:
                seconds = response.headers.get("Retry-After", "")
                raise _Later(said, int(seconds) if seconds.isdecimal() else 0)
            if response.status == 416:
                raise _Final("it ends before that", NOT_THERE)
            if response.status not in (200, 206):
                raise _Final(said, "give an address that answers with the object")
            if (encoding := response.headers.get("Content-Encoding", "identity")) not in ("identity", "aws-chunked"):
                raise _Final(f"the server sends it as {encoding}, unasked", "have it serve these files as they are")
            yield response
        finally:
            response.close()  # which is kept open where all was read
            response.release_conn()

    def _answer(self, url: str, headers: dict[str, str]) -> Any:
        """What a server says in the end, where others may have been named before. What these say beside that is not read."""
        for _ in range(_REDIRECTIONS):
            response = self.pool.request("GET", url, headers=headers, preload_content=False, redirect=False)
            if not (target := response.get_redirect_location()):
                return response
            response.close()
            response.release_conn()
            before, url = url, urljoin(url, target)
            if urlsplit(before).netloc != urlsplit(url).netloc:
                headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        raise _Final(f"redirected {_REDIRECTIONS} times", "give the address of the directory itself")


def _credentials(header: str, parts: SplitResult) -> dict[str, str]:
    """What says the user and the password of an address."""
    if parts.username is None:
        return {}
    given = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: f"Basic {b64encode(given.encode()).decode()}"}


def _proxy_for(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for an address.

    Raises:
        UserError: it is none over HTTP.
    """
    named = urllib.request.getproxies()
    scheme = next((scheme for scheme in (parts.scheme, "all") if named.get(scheme)), None)
    if scheme is None or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxy = urlsplit(named[scheme] if "://" in named[scheme] else f"http://{named[scheme]}")
    with contextlib.suppress(ValueError):
        if proxy.scheme in ("http", "https") and proxy.hostname and proxy.port != 0:
            return proxy
    raise UserError(
        f"{scheme}_proxy: no proxy over HTTP, which alone is used; set it to http://host:port, or no_proxy to {parts.hostname}"
    )


def _from_hub(address: str) -> _Http:
    """A folder of a repository on the hub, as it is now, whose files are read over HTTP: one question for each range."""
    from huggingface_hub import HfApi, HfFileSystem, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    files = HfFileSystem()
    place: Any = files.resolve_path(address)

    if not hasattr(place, "bucket_id"):
        api = HfApi(files.endpoint, token=files.token)
        revision = api.repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha

    def url(name: str) -> str:
        if hasattr(place, "bucket_id"):
            return f"{files.endpoint}/buckets/{place.bucket_id}/resolve/{quote(f'{place.path}/{name}'.lstrip('/'))}"
        path = f"{place.path_in_repo}/{name}".lstrip("/")
        return hf_hub_url(place.repo_id, path, repo_type=place.repo_type, revision=revision, endpoint=files.endpoint)

    return _Http(url, build_hf_headers())


class _Fsspec:
    """Objects of whatever fsspec knows."""

    def __init__(self, address: str) -> None:
        import fsspec

        self.files, path = fsspec.core.url_to_fs(address)
        self.path = path.rstrip("/")
        self.limit = {"timeout": _PIECE_TIMEOUT} if isinstance(self.files, fsspec.asyn.AsyncFileSystem) else {}

    def size(self, name: str) -> int:
        with self._asked():
            return int(self.files.info(f"{self.path}/{name}", **self.limit)["size"])

    def pieces(self, name: str, position: int, end: int, start: int) -> Iterator[bytes]:
        while position < end:
            stop = min(position + _PIECE, end)
            with self._asked():
                piece = self.files.cat_file(f"{self.path}/{name}", start=position, end=stop, **self.limit)
            if not piece:
                return
            if len(piece) > stop - position:
                raise _Final("the storage gives no ranges of it", "keep whole shards on a disk")
            yield piece
            position += len(piece)

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError):
            raise _Final("no such object", NOT_THERE) from None
        except PermissionError as error:
            raise _Final(f"not permitted ({first_line(error)})", GIVE_CREDENTIALS) from None
        except NotImplementedError:
            raise _Final("the storage gives no ranges of it", "keep whole shards on a disk") from None
