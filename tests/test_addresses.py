"""Addresses of others: what is asked, what is followed, and what is seen of them."""

import contextlib
import gzip
import http.server
import json
import socket
import struct
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from entprog import config
from entprog.errors import UserError
from entprog.preparing import addresses, attempts, inputs, listings, probing
from helpers import servers

SECRET = "hUshhUsh"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site that leads astray: its port, and the paths that were asked of it."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(f"{self.headers['Host'].partition(':')[0]} {self.path}")
            path = self.path.partition("?")[0]
            port = self.server.server_address[1]
            if path.startswith("/to/"):  # /to/HOST/… redirects there
                host, _, rest = path.removeprefix("/to/").partition("/")
                self.send_response(302)
                self.send_header("Location", f"http://{host}:{port}/{rest}" if host != "file" else f"file:///{rest}")
                self.end_headers()
                return
            pages = {
                "/list/": f"<a href='own.mp4'>x</a> <a href='http://localhost:{port}/far.mp4'>x</a> <a href='/b.mp4'>",
                "/m.jsonl": "\n".join(json.dumps({"path": text}) for text in self.server.rows),
            }
            found = pages.get(path, "video" if path.endswith(".mp4") and "missing" not in path else None)
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "text/html" if path.endswith("/") else "video/mp4")
            self.send_header("Content-Length", str(len(found or "")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write((found or "").encode())

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.rows = asked, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def at(site, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{site.server_address[1]}/{path}"


def probed(path: str, folder: Path, *hosts: str) -> dict:
    """What the first stage makes of an address in a manifest."""
    (folder / "m.jsonl").write_text(json.dumps({"path": path}))
    (row,) = inputs.find(folder / "m.jsonl").rows
    return probing.probe(row, config.Preparation(prepare=config.Prepare(hosts=hosts)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://x/a.mp4", "protocol 'ftp' is not read, only file, http, https, s3, gs"),
        ("nosuch://x/a.mp4", "protocol 'nosuch'"),
        ("memory://a.mp4", "protocol 'memory'"),
        ("sftp://me:hUshhUsh@host/a.mp4", "protocol 'sftp'"),
        ("https://[::1/a.mp4", "malformed"),
        ("https://[::1/", "malformed"),
        ("https:///a.mp4", "malformed (no host)"),
        ("https://host:99999/a.mp4", "malformed"),
        ("https://me:hUshhUsh/9@host/a.mp4", "malformed"),
        ("s3://", "no bucket"),
        ("s3://a*/b.mp4", "no bucket"),
        ("s3://bucket?endpoint_override=10.1.2.3/b.mp4", "no bucket"),
        ("gs:///b.mp4", "no bucket"),
        ("simplecache::https://x/a.mp4", "chained addresses"),
        ("zip://a.mp4::file:///etc/a.zip", "chained addresses"),
        ("http://127.0.0.1/a.mp4", "127.0.0.1 is an address of this machine or its network"),
        ("http://169.254.169.254/latest/a.mp4", "169.254.169.254 is an address of this machine or its network"),
        ("http://10.1.2.3/a.mp4", "unless prepare.hosts names it"),
        ("http://[::1]/a.mp4", "::1 is an address of this machine"),
        ("http://[::ffff:127.0.0.1]/a.mp4", "of this machine or its network"),
        ("http://localhost:9/a.mp4", "localhost is the name of an address of this machine"),
        ("http://2130706433:9/a.mp4", "2130706433 is an address of this machine"),
        ("http://①②⑦.0.0.1:9/a.mp4", "127.0.0.1 is an address of this machine"),
        ("http://127.1:9/a.mp4", "127.1 is an address of this machine"),
        ("http://0177.0.0.1:9/a.mp4", "0177.0.0.1 is an address of this machine"),
        ("http://0x7f.1:9/a.mp4", "of this machine or its network"),
        ("http://LOCALHOST:9/a.mp4", "localhost is the name of an address of this machine"),
    ],
)
def test_a_bad_row_is_a_row_of_the_ledger(path, message, tmp_path):
    row = probed(path, tmp_path)
    assert row["reason"] == "bad_address" and message in row["message"], row
    assert SECRET not in row["message"] + row["file"]


def test_bad_rows_are_counted_beforehand_and_an_input_itself_is_refused(tmp_path):
    (tmp_path / "m.csv").write_text("path\na.mp4\nftp://x/b.mp4\nhttps://[::1/\n")
    found = inputs.find(tmp_path / "m.csv")
    assert len(found.rows) == 3 and "2 addresses of" in found.notes[0]
    for address in (
        "ftp://x/a",
        "https://[::1/",
        f"s3://KEY:{SECRET}@bucket/a.mp4",
        f"https://me:{SECRET}/9@host/a.mp4",
    ):
        with pytest.raises(UserError, match="cannot read input") as error:
            inputs.find(address)
        assert SECRET not in str(error.value)


def test_redirects_are_followed_on_the_same_host_alone_unless_a_setting_says_so(site, tmp_path):
    assert probed(at(site, "to/127.0.0.1/a.mp4"), tmp_path, "127.0.0.1")["reason"] == "corrupt", "it was fetched"
    for path, message in {
        "to/localhost/a.mp4": "localhost is the name of",
        "to/2852039166/a.mp4": "2852039166 is an address of this machine",
        "to/169.254.169.254/a.mp4": "169.254.169.254 is an address of this machine or its network",
        "to/127.0.0.1/to/localhost/a.mp4": "localhost is another host, to which it redirects",
        "to/example.org/a.mp4": "example.org is another host, to which it redirects",
        "to/file/etc/passwd.mp4": "",
    }.items():
        del site.asked[:]
        row = probed(at(site, path), tmp_path, "127.0.0.1")
        assert row["reason"] in ("bad_address", "unreadable") and (not message or row["reason"] == "bad_address"), row
        assert message.split(" ")[0] in row["message"] and not any(
            asked.startswith("localhost") for asked in site.asked
        )
    row = probed(at(site, "to/localhost/a.mp4"), tmp_path, "127.0.0.1", "localhost")
    assert row["reason"] == "corrupt" and row["sha256"]


def test_a_name_of_this_machine_is_not_asked_by_way_of_a_pattern(site, tmp_path):
    row = probed(at(site, "to/localhost/a.mp4"), tmp_path, "127.0.0.1", "*")
    assert row["reason"] == "bad_address"


def test_links_that_lead_elsewhere_are_not_listed(site):
    settings = inputs.trusting(config.Preparation(), at(site, "list/"))
    found = inputs.find(at(site, "list/"), settings.prepare)
    assert [row["file"] for row in found.rows] == ["own.mp4"]


def test_a_manifest_elsewhere_names_no_files_of_this_machine(site, tmp_path):
    (tmp_path / "mine.mp4").write_bytes(b"mine")
    site.rows = [f"file://{tmp_path}/mine.mp4", f"{tmp_path}/mine.mp4", "../../etc/passwd.mp4", "FILE:///etc/x.mp4"]
    address = at(site, "m.jsonl")
    settings = inputs.trusting(config.Preparation(), address)
    rows = inputs.find(address, settings.prepare).rows
    found = [probing.probe(row, settings) for row in rows]
    assert len(found) == 4 and b"mine" not in repr(found).encode().replace(b"mine.mp4", b"")
    assert {row["reason"] for row in found if row["file"].lower().startswith("file://")} == {"bad_address"}
    assert all(row["bytes"] != 4 for row in found)


def test_a_signed_address_is_one_video_and_shows_nothing(site, tmp_path):
    signed = at(site, f"dance.mp4?X-Amz-Signature={SECRET}&name=a*b").replace("http://", f"http://me:{SECRET}@")
    settings = inputs.trusting(config.Preparation(), signed)
    found = inputs.find(signed, settings.prepare)
    assert found.kind == "video" and [row["file"] for row in found.rows] == ["dance.mp4"]
    assert probing.probe(found.rows[0], settings)["reason"] == "corrupt", "it was fetched"
    (row,) = inputs.find(at(site, f"download?id=7&token={SECRET}"), settings.prepare).rows
    assert SECRET not in row["file"]
    for path in (f"missing{'x' * 190}.mp4?sig={SECRET}", f"missing.mp4?sig={SECRET}"):
        row = probed(at(site, path), tmp_path, "127.0.0.1")
        assert row["reason"] == "unreadable" and SECRET not in row["message"] + row["file"]
    with pytest.raises(UserError, match="cannot read input") as error:
        inputs.find(at(site, f"missing{'x' * 190}/?sig={SECRET}").replace("?", "/m.csv?"), settings.prepare)
    assert SECRET not in str(error.value)


def test_a_name_does_not_change_when_its_address_is_signed_anew(tmp_path):
    def names(*queries):
        (tmp_path / "m.txt").write_text("".join(f"https://host/a.mp4?{query}\n" for query in queries))
        return {row["file"] for row in inputs.find(tmp_path / "m.txt").rows}

    assert names("sig=1") == names("sig=2") == {"https://host/a.mp4"}
    two = names("id=1", "id=2")
    assert len(two) == 2 and all(name.startswith("https://host/a.mp4?") and "id=" not in name for name in two)
    with pytest.raises(UserError, match="rows 1 and 2 are both"):
        names("id=1", "id=1")


def test_a_source_has_a_total_time():
    def drips():
        while True:
            time.sleep(0.01)
            yield b"x"

    with pytest.raises(attempts.VideoError) as error:
        for _ in attempts.heartbeats(drips(), stall_s=60, watched=False, work_s=0.1):
            pass
    assert error.value.reason == "too_long"


@pytest.mark.parametrize("protocol", addresses.PROTOCOLS)
def test_what_is_read_passes(protocol):
    addresses.check(f"{protocol}://bucket.example.org/a%20b/c@d.mp4")


@pytest.mark.parametrize(
    ("number", "local"),
    [
        ("64:ff9b::a9fe:a9fe", True),
        ("64:ff9b::808:808", False),
        ("2002:7f00:1::", True),
        ("2002:808:808::", False),
        ("::127.0.0.1", True),
        ("::ffff:10.0.0.1", True),
        ("::ffff:8.8.8.8", False),
        ("2001:0:a9fe:a9fe::1", True),
        ("2606:4700::1111", False),
        ("127.1", True),
        ("²", False),
    ],
)
def test_numbers_of_version_6_that_stand_for_those_of_this_network_are_of_it(number, local):
    assert addresses.is_local(number) is local


@pytest.fixture(scope="module")
def endless():
    """A site whose folders hold folders without end, and one page that unpacks to more than it may: its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            packed = self.path.startswith("/packed")
            page = gzip.compress(b"<p>" + bytes(4 << 20)) if packed else b'<a href="a/">a</a><a href="b.mp4">b</a>'
            page = b'<a href="b.mp4">b</a>' * 1000 if self.path.startswith("/long") else page
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            if packed:
                self.send_header("Content-Encoding", "gzip")
                coded.append(self.headers["Accept-Encoding"])
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_):
            pass

    coded = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", coded
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "bound", "least", "said"),
    [
        ("v/", "MOST_DEPTH", 8, "8 folders in one another"),
        ("v/**", "MOST_DEPTH", 8, "8 folders in one another"),
        ("v/", "MOST_PAGES", 5, "5 pages"),
        ("v/", "MOST_SECONDS", -1.0, "-1 s"),
        ("long/", "MOST_BYTES", 1000, "0 MiB"),
    ],
)
def test_a_listing_that_does_not_end_is_one_line(name, bound, least, said, endless, monkeypatch):
    monkeypatch.setattr(listings, bound, least)
    with pytest.raises(UserError, match=rf"its listing goes on after {said}; give a manifest") as error:
        inputs.find(f"{endless[0]}/{name}", config.Prepare(hosts=("127.0.0.1",)))
    assert "\n" not in str(error.value)


def test_a_listing_is_not_unpacked(endless, monkeypatch):
    monkeypatch.setattr(listings, "MOST_BYTES", 1 << 20)
    assert len(inputs.find(f"{endless[0]}/packed/", config.Prepare(hosts=("127.0.0.1",))).rows) == 1, "no page of links"
    assert set(endless[1]) == {"identity"}


class Generous(servers.Quiet):
    """A file of a megabyte, of which more comes than is asked for."""

    protocol_version = "HTTP/1.1"
    packed: bool

    def do_HEAD(self):  # noqa: N802
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self):  # noqa: N802
        body = gzip.compress(bytes(8 << 20)) if self.packed else bytes(4 << 20)
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-999999/1000000")
        if self.packed:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)


@pytest.mark.parametrize("packed", [True, False])
def test_of_a_file_no_more_is_taken_than_is_asked_for(packed):
    kind = type("Handler", (Generous,), {"packed": packed})
    with servers.answering(kind) as address:
        files, path = addresses.filesystem(f"{address}/a.mp4", ("127.0.0.1",))
        with files.open(path) as stream:
            if packed:
                assert len(stream.read(1_000_000)) < 100_000, "as it was sent"
            else:
                with pytest.raises(addresses.AddressError, match="sends more than it is asked for"):
                    stream.read(1_000_000)


class Folders(servers.Quiet):
    """Folders of the web, and of a bucket, of which one cannot be listed."""

    protocol_version = "HTTP/1.1"
    status = 200
    """Of the folder b; 0: its connection is reset."""

    def do_GET(self):  # noqa: N802
        name, asked = self.path.partition("?")[0].strip("/"), parse_qs(self.path.partition("?")[2])
        prefix = asked.get("prefix", [""])[0]
        status = self.status if "b" in (name[-1:], prefix.strip("/")[-1:]) else 200
        if not status:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        inside = {"": ("<a href='a/'>", "<a href='b/'>", "<a href='0.mp4'>")}.get(name[1:], ("<a href='1.mp4'>",))
        if asked:
            file = f"<Contents><Key>{prefix}1.mp4</Key><Size>1</Size></Contents>"
            folders = "".join(f"<CommonPrefixes><Prefix>v/{each}/</Prefix></CommonPrefixes>" for each in "ab")
            inside = (f"<ListBucketResult><IsTruncated>false</IsTruncated>{file}", folders if prefix == "v/" else "")
            inside = (*inside, "</ListBucketResult>")
        body = "".join(inside).encode() if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/xml" if asked else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815


@pytest.mark.parametrize("pattern", ["", "**/*.mp4"])
def test_a_folder_that_cannot_be_listed_makes_no_smaller_dataset(pattern, monkeypatch):
    with servers.answering(Folders) as address:
        monkeypatch.setattr(Folders, "status", 0)
        with pytest.raises(UserError, match=rf"cannot read input .*{address}/v/b: Client"):
            inputs.find(f"{address}/v/{pattern}", config.Prepare(hosts=("127.0.0.1",)))
        monkeypatch.setattr(Folders, "status", 404)  # no failure: a link that leads nowhere
        found = inputs.find(f"{address}/v/{pattern}", config.Prepare(hosts=("127.0.0.1",)))
        assert [row["file"] for row in found.rows] == ["0.mp4", "a/1.mp4"]
        assert found.notes == (f"1 folders there were not found ({address}/v/b)",)


@pytest.mark.parametrize("pattern", ["", "**/*.mp4"])
def test_a_buckets_folder_that_cannot_be_listed_makes_no_smaller_dataset(pattern, monkeypatch):
    with servers.answering(Folders) as address:
        for name, value in {**servers.CREDENTIALS, "AWS_ENDPOINT_URL": address, "AWS_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        addresses._bucket.cache_clear()
        found = inputs.find(f"s3://data/v/{pattern}")
        assert [row["file"] for row in found.rows] == ["1.mp4", "a/1.mp4", "b/1.mp4"]
        monkeypatch.setattr(Folders, "status", 403)
        with pytest.raises(UserError, match=r"cannot read input .* key 'v/b/' in bucket 'data'"):
            inputs.find(f"s3://data/v/{pattern}")
        addresses._bucket.cache_clear()
