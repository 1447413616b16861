"""Listings of folders on the web: pages that others write, which may link to ever more pages, or never end."""

import time

from entprog.masking import reason, shown

MOST_PAGES = 20_000
MOST_BYTES = 256 << 20
"""Of all pages of a listing together,"""
MOST_SECONDS = 900.0
"""for which it may take so long,"""
MOST_DEPTH = 64
"""and whose addresses have so many parts."""


class AddressError(ValueError):
    """An address that is not read. The message says why, and holds no secret."""


class Bounds:
    """What is left of a listing's bounds. shown: its address, without secrets."""

    def __init__(self, shown: str):
        self.shown, self.pages, self.bytes, self.end_s = shown, 0, 0, time.monotonic() + MOST_SECONDS

    def ask(self, depth: int) -> None:
        """Count a page that is asked for. Raises AddressError where there is to be none."""
        self.pages += 1
        if self.pages > MOST_PAGES:
            self._refuse(f"{MOST_PAGES} pages")
        if depth > MOST_DEPTH:
            self._refuse(f"{MOST_DEPTH} folders in one another")
        self._look_at_time()

    def read(self, more: int) -> None:
        """Count bytes of a page. Raises AddressError where there are too many."""
        self.bytes += more
        if self.bytes > MOST_BYTES:
            self._refuse(f"{MOST_BYTES >> 20} MiB")
        self._look_at_time()

    def _look_at_time(self) -> None:
        if time.monotonic() > self.end_s:
            self._refuse(f"{MOST_SECONDS:.0f} s")

    def _refuse(self, bound: str) -> None:
        raise AddressError(f"{self.shown}: its listing goes on after {bound}; give a manifest, or a folder in it")


def pages(client):
    """fsspec's filesystem of the web, to list folders with, which asks by `client`.

    A server that fails must not make a smaller dataset: a folder that cannot be listed is an OSError, where fsspec
    passes over those inside of others. A folder that is not there, as of a link that leads nowhere, is put down in
    `missing`.
    """
    from fsspec.implementations.http import HTTPFileSystem

    class Pages(HTTPFileSystem):
        def __init__(self, **options):
            super().__init__(**options)
            self.missing: list[str] = []

        async def _walk(self, path: str, *args, **options):
            def failed(error: OSError) -> None:
                if not isinstance(error, FileNotFoundError):
                    raise OSError(f"{shown(path)}: {reason(error, path)}") from error
                self.missing.append(path)

            async for found in super()._walk(path, *args, **{**options, "on_error": failed}):
                yield found

    return Pages(get_client=client, skip_instance_cache=True)


def response(bounds: Bounds):
    """aiohttp's response, of which no more is read than the bounds allow."""
    import aiohttp

    class Response(aiohttp.ClientResponse):
        async def text(self, encoding: str | None = None, errors: str = "strict") -> str:
            pieces = []
            async for piece in self.content.iter_any():
                bounds.read(len(piece))
                pieces.append(piece)
            return b"".join(pieces).decode(encoding or self.charset or "utf-8", errors)

    return Response
