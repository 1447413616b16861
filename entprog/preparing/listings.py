"""Listings of folders on the web: pages that others write, which may link to ever more pages, or never end."""

import time

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
