"""Cluster files by Ray's own checks, and the train job submitted to a real head node with a token."""

import contextlib
import copy
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import psutil
import pytest
import ray
import yaml

from entprog import config
from entprog.training import checkpoint
from helpers.commands import SETTINGS
from helpers.people import two_people
from pipelines import cli

ROOT = Path(__file__).parents[1]
CLUSTERS = ("cluster.yaml", "cluster-gcp.yaml")


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_files_pass_rays_own_checks(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read(name), schema)
    validate_config(prepare_config(copy.deepcopy(read(name))))


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_files_are_closed_to_others_and_cheap_when_idle(name):
    values = read(name)
    types = values["available_node_types"]
    assert types[values["head_node_type"]]["resources"] == {"CPU": 0}, "the head neither trains nor decodes"
    workers = [each for kind, each in types.items() if kind != values["head_node_type"]]
    assert all(each["min_workers"] == 0 for each in workers)
    assert sum(each["max_workers"] for each in workers) <= values["max_workers"]
    assert values["file_mounts"]["/home/ray/.ray/auth_token"]
    starts = [*values["head_start_ray_commands"], *values["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in " ".join(values["head_start_ray_commands"])
    assert "0.0.0.0" not in (ROOT / name).read_text()


def test_the_rayjob_asks_for_what_its_pods_have():
    values = read("kuberay.yaml")
    assert (values["apiVersion"], values["kind"]) == ("ray.io/v1", "RayJob")
    cluster = values["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__ and cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    claims = set()
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert mounts == volumes.keys()
        claims.add(volumes["shared"]["persistentVolumeClaim"]["claimName"])
    assert len(claims) == 1
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # The entrypoint is a command of ours that its own parser takes, with workers that the GPU group can hold.
    command = shlex.split(values["spec"]["entrypoint"])
    assert command[:3] == ["python", "-m", "pipelines.train"]
    pairs = [after for option, after in itertools.pairwise(command) if option == "--set"]
    experiment = cli.settings(config.Experiment, "demo", None, pairs, data={"shards": "x"})
    (gpu,) = [group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu"]
    (container,) = gpu["template"]["spec"]["containers"]
    assert experiment.train.workers <= container["resources"]["limits"]["nvidia.com/gpu"] * gpu["maxReplicas"]


def test_the_image_holds_what_was_tested():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    (base,) = [line for line in lines if line.startswith("FROM ")]
    assert re.search(rf":{re.escape(ray.__version__)}-py3\d+", base)
    for line in lines:
        if line.startswith("COPY "):
            for name in line.split()[2:-1]:
                assert (ROOT / name).exists(), name


def test_documents_name_settings_and_files_that_exist():
    text = (ROOT / "docs" / "cluster.md").read_text()
    known = {name for name, *_ in config.settings_help()}
    named = set(re.findall(r"\b(?:train|data|model|schedule)\.[a-z_]+", text)) - {"train.py"}
    assert named and named <= known, named - known
    for name in re.findall(r"`([\w-]+\.yaml)`", text):
        assert (ROOT / name).exists() or name == "mine.yaml"


# ---- a job on a head node ----


class Head:
    """A head node as `ray start --head` makes it, on loopback, guarded by a token."""

    def __init__(self, folder):
        # The agent's port too: with another Ray on this machine its usual one is taken, and jobs then find no agent.
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            for each in (one, two, three):
                each.bind(("127.0.0.1", 0))
            self.port, self.dashboard, agent = (each.getsockname()[1] for each in (one, two, three))
        token = folder / "token"
        token.write_text("a-token-of-this-test-alone-" + "0" * 16)
        token.chmod(0o600)
        base = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = base | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{base['PATH']}",  # as in an activated environment
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_JOB_STOP_WAIT_TIME_S": "100",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        }
        self.log = (folder / "head.log").open("w")
        self.process = subprocess.Popen(
            [
                self.ray, "start", "--head", "--block", f"--port={self.port}", "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard}", f"--dashboard-agent-listen-port={agent}", "--num-cpus=4",
                f"--object-store-memory={200 * 2**20}",
                "--disable-usage-stats",
            ],
            env=self.env, stdout=self.log, stderr=self.log, start_new_session=True,
        )  # fmt: skip

    ray = str(Path(sys.executable).parent / "ray")

    def job(self, *arguments, **options):
        return subprocess.run(
            [self.ray, "job", *arguments],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
            **options,
        )

    def ready(self):
        deadline = time.monotonic() + 120
        while (tried := self.job("list")).returncode:
            assert time.monotonic() < deadline and self.process.poll() is None, tried.stderr
            time.sleep(0.5)

    def end(self):
        everything = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    with cli.ray_cluster(4):
        return two_people(tmp_path_factory)


@pytest.fixture(scope="module")
def head(tmp_path_factory, shards):
    head = Head(tmp_path_factory.mktemp("head"))
    try:
        head.ready()
        yield head
    finally:
        head.end()


def test_a_job_is_refused_without_the_token(head):
    wrong = head.env | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "b" * 40}
    tried = subprocess.run([head.ray, "job", "list"], env=wrong, capture_output=True, text=True)
    assert tried.returncode != 0


def test_a_submitted_job_is_followed_stopped_with_a_checkpoint_and_resumed(head, shards, tmp_path):
    settings = config.merge(SETTINGS, {"train": {"steps": 1000, "checkpoint_every": 2000}})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    command = [
        "python", "-m", "pipelines.train", "--config", str(tmp_path / "mine.yaml"), "--shards", str(shards), "--output",
        str(tmp_path / "run"),
    ]  # fmt: skip
    submitted = head.job("submit", "--submission-id", "one", "--no-wait", "--working-dir", ".", "--", *command)
    assert submitted.returncode == 0, submitted.stderr
    steps = tmp_path / "run" / "steps.jsonl"
    deadline = time.monotonic() + 200
    while not steps.exists() or len(steps.read_bytes().splitlines()) < 5:
        assert time.monotonic() < deadline, head.job("logs", "one").stdout
        time.sleep(0.05)
    assert head.job("stop", "one").returncode == 0
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["status"] == "interrupted"
    (saved,) = checkpoint.found(tmp_path / "run" / "checkpoints")
    step = int(saved.removeprefix("step-"))
    assert 5 <= step < 1000
    again = head.job("submit", "--submission-id", "two", "--working-dir", ".", "--", *command)  # waits, follows its log
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"Resumed from the checkpoint after step {step}" in again.stdout and "held-out loss" in again.stdout
    assert "Traceback" not in again.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
