"""Secrets that are planted wherever a person may have to give one: none of them is in anything that jobs leave."""

import base64
import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
import yaml

from entprog import config
from entprog.media import assets
from entprog.preparing import ledger
from helpers import servers
from helpers.commands import SETTINGS
from helpers.people import CLIPS

pytestmark = pytest.mark.slow  # a real prepare and a real training
MARK = "hUsh"
"""In every planted secret."""
PASSWORD, SIGNATURE, BUCKET_KEY, SETTING = (f"{MARK}{kind}/9Q+" for kind in ("Password", "Signature", "Key", "Setting"))
SIGNED = f"X-Amz-Signature={SIGNATURE}&x=1"


@contextmanager
def site(pages: dict[str, bytes]):
    """A web site that answers to its password and signature alone: HOST:PORT, and the paths for which it was asked."""
    due = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    given = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = self.path.partition("?")
            right = self.headers["Authorization"] == due and query.replace("%2F", "/") == SIGNED
            found = pages.get(path) if right else None
            if found is not None and self.command == "GET":
                given.append(path)
            self.send_response(200 if found is not None else 404 if right else 403)
            self.send_header("Content-Length", str(len(found or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(found or b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", given
        server.shutdown()


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """(working folder of real jobs, Ray's folder, what they said, the pages that were fetched): clips prepared from a
    signed manifest, whose videos lie on the web and in a bucket, and a training on them with MLflow."""
    import boto3

    place = tmp_path_factory.mktemp("secrets")
    ray_folder = Path(tempfile.mkdtemp(prefix="sec", dir="/tmp"))  # short, as Ray's sockets need it
    pages = {"/cam04.mp4": assets.clip("cam04").read_bytes()}
    with servers.s3() as endpoint, site(pages) as (host, given), pytest.MonkeyPatch.context() as env:
        env.setenv("AWS_SECRET_ACCESS_KEY", BUCKET_KEY)
        env.setenv("AWS_ENDPOINT_URL", endpoint)
        env.setenv("RAY_TMPDIR", str(ray_folder))
        env.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
        env.delenv("RAY_ADDRESS", raising=False)
        bucket = boto3.client("s3", region_name="us-east-1")
        bucket.create_bucket(Bucket="videos")
        bucket.upload_file(str(assets.clip("cam01")), "videos", "some/cam01.mp4")
        web = f"http://me:{quote(PASSWORD, safe='')}@{host}"
        rows = [
            "s3://videos/some/cam01.mp4",
            f"{web}/cam04.mp4?{SIGNED}",
            f"{web}/{'missing' * 30}.mp4?{SIGNED}",
            f"{web}/missing.mp4#{SIGNATURE}",
            f"https://me:{PASSWORD}@no-such-host.invalid/a.mp4?{SIGNED}",
            f"s3://AKIAEXAMPLE:{SIGNATURE}@videos/refused.mp4",
            f"s3://videos/missing.mp4?{SIGNED}",
            f"ftp://me:{PASSWORD}@{host}/a.mp4?{SIGNED}",
        ]
        pages["/m.jsonl"] = "".join(json.dumps({"path": row}) + "\n" for row in rows).encode()
        values = {
            "name": f"of https://me:{SETTING}@host/x",
            "data": {"shards": "shards"},
            "train": {"steps": 4, "held_out_every": 2},
        }
        (place / "mine.yaml").write_text(yaml.safe_dump(config.merge(SETTINGS, values)))
        said = ""
        for job, *words in (
            ("prepare", "--input", f"{web}/m.jsonl?{SIGNED}", "--output", "shards", "--held-out", "cam04"),
            ("train", "--config", "mine.yaml", "--output", "run", "--verbose"),
        ):
            sets = {
                "prepare": [f"data.shape={json.dumps(CLIPS.model_dump())}", "prepare.stride=3"],
                "train": [f"tracking.run_name=run of s3://me:{SETTING}@bucket/x?token={SETTING}"],
            }[job]
            command = [sys.executable, "-m", f"pipelines.{job}", *words, *(f"--set={each}" for each in sets)]
            done = subprocess.run(
                command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400
            )
            said += done.stdout
            assert done.returncode == 0, done.stdout
        (place / "mine.yaml").unlink()
        try:
            yield place, ray_folder, said, given
        finally:
            shutil.rmtree(ray_folder)


def test_the_secrets_were_needed(left):
    place, _, said, given = left
    assert {"/m.jsonl", "/cam04.mp4"} <= {*given}
    rows = ledger.read(place / "shards" / "ledger.parquet")
    reasons = {row["file"]: row["reason"] for row in rows if row["kind"] == "input"}
    assert sorted(reasons.values()) == ["", "", *["bad_address"] * 3, *["unreadable"] * 3], reasons
    assert "s3://videos/some/cam01.mp4" in reasons and not reasons["s3://videos/some/cam01.mp4"]
    assert (place / "run" / "finished.json").exists() and said


def test_none_is_in_what_was_said(left):
    assert MARK not in left[2]


@pytest.mark.parametrize("what", ["shards", "run", "mlflow.db", "", "Ray's logs"])
def test_none_is_in_what_was_left(what, left):
    place, ray_folder, *_ = left
    folder = ray_folder if what == "Ray's logs" else place / what
    files = [path for path in (folder.rglob("*") if folder.is_dir() else [folder]) if path.is_file()]
    assert files
    where = [path for path in files if MARK.encode() in path.read_bytes()]
    for path in files:
        if path.suffix == ".parquet":  # its pages are compressed
            table = pq.read_table(path)
            if MARK in f"{table.drop_columns([n for n in ('video', 'pose') if n in table.column_names]).to_pylist()}":
                where.append(path)
    assert not where
