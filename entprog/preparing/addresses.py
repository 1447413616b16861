"""Addresses of sources on other machines: which are read, and which hosts may be asked.

Manifests, links in listings and redirects are written by others. They must not make this machine ask its neighbours (a
router, a cloud's metadata service), nor lead it to hosts that nobody chose.
"""

import functools
import ipaddress
import re
import socket
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from urllib.parse import SplitResult, urlsplit

from entprog.masking import has_credentials, shown
from entprog.preparing import listings
from entprog.preparing.listings import AddressError
from entprog.storage import Place

PROTOCOLS = ("http", "https", "s3", "gs")
"""Those that are read, beside files of this machine."""
WEB = ("http", "https")
_BUCKET = re.compile(r"(anonymous@)?[A-Za-z0-9][A-Za-z0-9._-]*")


Number = ipaddress.IPv4Address | ipaddress.IPv6Address
_HOLDING = tuple(map(ipaddress.ip_network, ("::/96", "64:ff9b::/96")))
"""Networks of version 6 whose numbers end with one of version 4."""


def is_remote(path: str) -> bool:
    """Whether a path is an address on another filesystem than this machine's."""
    return "://" in path and not path.startswith("file://")


def is_web(address: str) -> bool:
    """Whether an address is one of http or https."""
    return address.lower().startswith(("http://", "https://"))


def split(address: str) -> SplitResult:
    """Its parts. Raises AddressError for a malformed one."""
    try:
        parts = urlsplit(address)
        if is_web(address) and not (parts.hostname and (parts.port is None or parts.port)):
            raise AddressError(f"{shown(address)} is malformed (no host)")
    except ValueError as error:
        if isinstance(error, AddressError):
            raise
        # Not in Python's words, which show a password that it has taken for a port.
        raise AddressError(f"{shown(address)} is malformed (its host or port; a '/' in a password is %2F)") from None
    return parts


def host(address: str) -> str:
    """Host of a web address in small letters, empty for any other. Raises AddressError for a malformed one."""
    return _plain(split(address).hostname or "") if is_web(address) else ""


def check(address: str, hosts: Sequence[str] = ()) -> None:
    """Raises AddressError for an address that is not read.

    `hosts`: of the web, those that may be asked although they are on this machine or in its network.
    """
    name, protocol = shown(address), address.partition("://")[0].lower()
    if "::" in (protocol if protocol in WEB else address):  # chains fetch, unpack and cache by rules of their own
        raise AddressError(f"{name}: chained addresses ('::') are not read; give the file's own address")
    if protocol not in PROTOCOLS:
        allowed = ", ".join(("file", *PROTOCOLS))
        raise AddressError(f"{name}: protocol {protocol!r} is not read, only {allowed}")
    split(address)
    if protocol not in WEB:
        if has_credentials(address):
            raise AddressError(f"{name}: give credentials of {protocol}:// in the environment, not in the address")
        # An address chooses neither the endpoint nor the region: credentials would go wherever a manifest says.
        if not _BUCKET.fullmatch(address.partition("://")[2].partition("/")[0]):
            raise AddressError(f"{name} is malformed (no bucket's name)")
        return
    _check_number(host(address), name, hosts)


def filesystem(address: str, hosts: Sequence[str] = (), *, listing: bool = False):
    """(fsspec filesystem, path in it) of an address that passes `check`; over the web it follows a redirect to another
    host only if `hosts` names it (`*.example.org` names several).

    Buckets are read by pyarrow, as checkpoints in them are: credentials, region and endpoint come from the environment.
    listing: it is to list folders of the web, whose pages others write: those that do not end are an AddressError, what
    is not there lies in its `missing`. No folder inside of others is passed over where it cannot be listed.

    Raises AddressError as `check` does, OSError for a bucket that is not there or may not be read.
    """
    check(address, hosts)
    import fsspec

    protocol, _, rest = address.partition("://")
    protocol = protocol.lower()
    if protocol in WEB:
        bounds = listings.Bounds(shown(address)) if listing else None
        client = partial(_client, shown=shown(address), hosts=tuple(hosts), bounds=bounds)
        if listing:
            return listings.pages(client), f"{protocol}://{rest}"
        return fsspec.filesystem("http", get_client=client, skip_instance_cache=True), f"{protocol}://{rest}"
    bucket, _, key = rest.partition("/")
    files, root = _bucket(protocol, bucket)
    return files, f"{root}/{key}" if key else root


@functools.lru_cache(maxsize=64)
def _bucket(protocol: str, bucket: str):
    """(fsspec filesystem, its root) of a bucket; its first use asks where the bucket lies."""
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    class Bucket(ArrowFSWrapper):
        def unstrip_protocol(self, name: str) -> str:
            return f"{protocol}://{name if bucket == root else name.replace(root, bucket, 1)}"

        def ls(self, path: str, detail: bool = False, **options):
            entries = super().ls(path, detail=True, **options)
            if protocol == "gs":  # whose client lists no folder that is one by the names of files alone
                path = self._strip_protocol(path).rstrip("/")
                entries = [entry for entry in entries if entry["name"] != path or entry["type"] != "directory"]
                more = {f"{path}/{name}" for name in Place(system, path).folders()} - {each["name"] for each in entries}
                entries += [{"name": name, "size": None, "type": "directory", "mtime": None} for name in sorted(more)]
            return entries if detail else [entry["name"] for entry in entries]

        def walk(self, path: str, *args, **options):
            # fsspec passes over a folder inside of others that cannot be listed: a smaller dataset, without a word
            return super().walk(path, *args, **{**options, "on_error": "raise"})

    soon = "?retry_limit_seconds=20" if protocol == "gs" else ""  # Google's client tries for a quarter of an hour
    system, root = fs.FileSystem.from_uri(f"{protocol}://{bucket}{soon}")
    return Bucket(system, skip_instance_cache=True), root


def cause(error: BaseException) -> AddressError | None:
    """The AddressError from which a filesystem's own exception came, if any."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, AddressError):
        seen = seen.__cause__ or seen.__context__
    return seen


def is_local(name: str) -> bool:
    """Whether a host, given by number, is on this machine or in a network that the internet does not see."""
    try:
        # As connecting takes it: 127.1, 0177.0.0.1 and 2130706433 are 127.0.0.1.
        text = socket.inet_ntoa(socket.inet_aton(name)) if name.replace(".", "").isdigit() else name.partition("%")[0]
        number = ipaddress.ip_address(text)
    except (OSError, ValueError):
        return False  # a name: told when it is resolved
    return not all(each.is_global for each in _meant(number))


def _meant(
    number: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """A host's number, and those of version 4 that one of version 6 stands for, to which what is sent to it may go."""
    if isinstance(number, ipaddress.IPv4Address):
        return [number]
    if number.ipv4_mapped is not None:
        return [number.ipv4_mapped]
    inside = [ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)] if any(number in net for net in _HOLDING) else []
    return [number, *inside, *filter(None, (number.sixtofour, *(number.teredo or ())))]


def _plain(name: str) -> str:
    return name.lower().strip("[]").rstrip(".")


def _check_number(name: str, shown: str, hosts: Sequence[str]) -> None:
    if is_local(name) and name not in hosts:
        raise AddressError(_not_asked(shown, name, "is an address of this machine or its network"))


def _not_asked(shown: str, name: str, why: str) -> str:
    return f"{shown}: {name} {why}; it is not asked unless prepare.hosts names it"


async def _client(shown: str, hosts: tuple[str, ...], bounds: "listings.Bounds | None", **settings):
    """aiohttp's session, which asks no host that it should not: neither by number, nor by name, nor redirected; and
    takes no more than a listing's bounds allow, or of a file than the range that it asks for."""
    import aiohttp
    import yarl

    class Resolver(aiohttp.ThreadedResolver):
        async def resolve(self, name: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET):
            found = await super().resolve(name, port, family)
            if _plain(name) not in hosts and any(is_local(each["host"]) for each in found):
                why = "is the name of an address of this machine or its network"
                raise AddressError(_not_asked(shown, _plain(name), why))
            return found

    async def started(_session, _context, request) -> None:  # numbers are not resolved; here in their final form
        _check_number(_plain(request.url.raw_host or ""), shown, hosts)
        if bounds is not None:
            bounds.ask(len(request.url.parts))

    async def redirected(_session, _context, request) -> None:
        where = request.response.headers.get("Location") or request.response.headers.get("URI") or ""
        try:
            to = request.url.join(yarl.URL(where))
        except ValueError:
            raise AddressError(f"{shown}: it redirects to a malformed address") from None
        name = _plain(to.raw_host or "")
        _check_number(name, shown, hosts)
        if name != _plain(request.url.raw_host) and not any(fnmatchcase(name, pattern) for pattern in hosts):
            raise AddressError(_not_asked(shown, name, "is another host, to which it redirects"))

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(started)
    trace.on_request_redirect.append(redirected)
    connector = aiohttp.TCPConnector(resolver=Resolver())
    # Nothing is unpacked: an answer of a few bytes could fill the memory.
    settings |= {"headers": {"Accept-Encoding": "identity"}, "auto_decompress": False}
    settings |= {"response_class": _response(shown) if bounds is None else listings.response(bounds)}
    return aiohttp.ClientSession(connector=connector, trace_configs=[trace], **settings)


def _response(shown: str):
    """aiohttp's response, of which no more is read than was asked for, whatever a server sends."""
    import aiohttp

    class Response(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            first, _, last = self.request_info.headers.get("Range", "").removeprefix("bytes=").partition("-")
            if not (first.isdecimal() and last.isdecimal()):
                return await super().read()
            pieces, left = [], int(last) - int(first) + 1
            async for piece in self.content.iter_any():
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    self.close()
                    raise AddressError(f"{shown}: its server sends more than it is asked for")
            return b"".join(pieces)

    return Response
