"""A real MLflow server that can be stopped and started; S3, and a machine's metadata service, as AWS has them."""

import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager


class Server:
    """A real MLflow server on loopback over the store, started and killed."""

    def __init__(self, uri, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1",
            "--port", str(self.port), "--workers", "1",
        ]  # fmt: skip
        self.log, self.process = log, None

    def start(self):
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        env.pop("MLFLOW_TRACKING_URI", None)
        self.process = subprocess.Popen(
            self.command, env=env, cwd=self.log.parent, stdout=self.log.open("w"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def wait(self):
        """Until it answers."""
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def s3():
    """Amazon's S3 on loopback, empty: its address, with credentials for it in the environment. Any are taken."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ |= CREDENTIALS
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def address(endpoint, folder):
    """A folder (BUCKET/FOLDER) of an S3 on loopback."""
    return (
        f"s3://{folder}?scheme=http&endpoint_override={endpoint.removeprefix('http://')}&region=us-east-1"
        "&allow_bucket_creation=true"
    )


@contextmanager
def gs(bucket):
    """Google's Cloud Storage on loopback with one empty bucket: what makes the address of a folder in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--in-memory", "--default-bucket", bucket]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        options = f"scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=5"
        yield lambda folder: f"gs://anonymous@{bucket}/{folder}?{options}"
    finally:
        server.kill()
        server.wait()


def _wait_for(port):
    """Until something listens there."""
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def answering(handler):
    """A server on loopback: its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def refusing():
    """An S3 on loopback that answers nothing but that it may not be asked: its address."""

    class Refusing(Quiet):
        def do_GET(self):
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    with answering(Refusing) as address:
        yield address


@contextmanager
def counting(endpoint):
    """What reads from an S3 at another address on loopback, and writes nothing there; the bytes of objects that were
    read so far, in a list of numbers."""
    read = []

    class Between(Quiet):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked = http.client.HTTPConnection(endpoint.removeprefix("http://"))
            asked.request(self.command, self.path, headers=dict(self.headers))
            answer = asked.getresponse()
            body = answer.read()
            if self.command == "GET" and "?" not in self.path:  # else a listing
                read.append(len(body))
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            asked.close()

        def do_PUT(self):
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")  # whatever is in the request stays unread
            self.end_headers()

        do_HEAD, do_POST = do_GET, do_PUT  # noqa: N815

    with answering(Between) as address:
        yield address, read


@contextmanager
def metadata(action, quiet=2):
    """A spot machine's metadata service, which answers to session tokens alone: its address. The first `quiet` looks
    find no notice, later ones that `action` is due."""
    looks = []

    class Service(Quiet):
        def do_PUT(self):
            right = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self._answer(200 if right else 400, "a-token")

        def do_GET(self):
            if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                return self._answer(401, "")
            looks.append(self.path)
            due = self.path == "/latest/meta-data/spot/instance-action" and len(looks) > quiet
            return self._answer(200 if due else 404, json.dumps({"action": action, "time": "2026-01-01T00:00:00Z"}))

        def _answer(self, status, text):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

    with answering(Service) as address:
        yield f"{address}/latest"
