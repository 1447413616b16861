"""Cluster files by Ray's own checks, what a local Ray listens on, and the train job submitted to a real head node."""

import contextlib
import copy
import http.server
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import psutil
import pytest
import ray
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient
from typer.testing import CliRunner

from entprog import config
from entprog.training import checkpoint
from helpers import servers
from helpers.commands import SETTINGS
from helpers.people import two_people
from pipelines import cli, train
from pipelines.cluster import spot
from pipelines.tracking.tracker import Tracker

ROOT = Path(__file__).parents[1]
CLUSTERS = ("cluster.yaml", "cluster-gcp.yaml")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def read(name):
    """The first document of a file."""
    return next(yaml.safe_load_all((ROOT / name).read_text()))


def beside(kind):
    """The document of kuberay.yaml of a kind."""
    (found,) = [each for each in yaml.safe_load_all((ROOT / "kuberay.yaml").read_text()) if each["kind"] == kind]
    return found


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


def with_p5():
    """cluster.yaml with the node type that it offers in comments in place of `gpu`."""
    lines = (ROOT / "cluster.yaml").read_text().splitlines()
    first = lines.index("  # gpu:")
    block = itertools.takewhile(lambda line: line.startswith("  # "), lines[first:])
    values = read("cluster.yaml")
    values["available_node_types"] |= yaml.safe_load("\n".join(line[4:] for line in block))
    return values


def test_the_larger_machines_in_comments_are_ones_that_ray_takes():
    from ray.autoscaler._private.aws.config import _configure_subnets_and_groups_from_network_interfaces
    from ray.autoscaler._private.util import prepare_config, validate_config

    values = with_p5()
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(values, schema)
    validate_config(prepare_config(copy.deepcopy(values)))
    node = values["available_node_types"]["gpu"]["node_config"]
    assert node["InstanceType"].startswith("p5") and node["Placement"]["GroupName"]
    filled = _configure_subnets_and_groups_from_network_interfaces(node)
    assert set(filled["SecurityGroupIds"]) == {"sg-REPLACE"}
    assert all(card["InterfaceType"] == "efa" for card in node["NetworkInterfaces"])


@pytest.mark.parametrize("values", [read("cluster.yaml"), with_p5()], ids=["as it is", "with p5"])
def test_every_machine_of_aws_answers_for_its_role_only_to_sessions(values):
    for kind in values["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert kind["node_config"]["IamInstanceProfile"]["Name"].startswith("entprog-")


@pytest.mark.parametrize("own", [True, False], ids=["a group of one's own", "a group that Ray makes"])
def test_ssh_is_open_to_nobody_but_where_ray_makes_the_group(own, monkeypatch):
    """What Ray makes of cluster.yaml's groups, on an Amazon of this process; the second case is why we have our own."""
    import boto3
    import moto
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws import utils

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    utils.resource_cache.cache_clear()
    with moto.mock_aws():
        values = read("cluster.yaml")
        ec2 = boto3.client("ec2", region_name=values["provider"]["region"])
        (vpc,) = ec2.describe_vpcs()["Vpcs"]
        mine = ec2.create_security_group(GroupName="entprog", Description="x", VpcId=vpc["VpcId"])["GroupId"]
        for rule in own_rules(mine):
            ec2.authorize_security_group_ingress(GroupId=mine, IpPermissions=[rule])
        for kind in values["available_node_types"].values():
            if own:
                assert kind["node_config"]["SecurityGroupIds"] == ["sg-REPLACE"]
                kind["node_config"]["SecurityGroupIds"] = [mine]
            else:
                del kind["node_config"]["SecurityGroupIds"]
        values = aws._configure_security_group(aws._configure_subnet(values))
        used = {
            group
            for kind in values["available_node_types"].values()
            for group in kind["node_config"]["SecurityGroupIds"]
        }
        rules = [
            rule
            for group in ec2.describe_security_groups(GroupIds=[*used])["SecurityGroups"]
            for rule in group["IpPermissions"]
        ]
    utils.resource_cache.cache_clear()
    assert (used == {mine}) == own
    ranges = {(rule.get("FromPort"), each["CidrIp"]) for rule in rules for each in rule["IpRanges"]}
    assert ranges == ({(22, "203.0.113.0/24")} if own else {(22, "0.0.0.0/0")})
    between = [pair["GroupId"] for rule in rules if rule["IpProtocol"] == "-1" for pair in rule["UserIdGroupPairs"]]
    assert between == [*used], "the nodes reach each other"


def own_rules(group):
    """The inbound rules that docs/cluster.md's commands make."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    commands = re.findall(r"aws ec2 authorize-security-group-ingress (.*)", text)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert given.pop("--group-id") == "$GROUP"
        if given.get("--source-group") == "$GROUP":
            assert given == {"--protocol": "-1", "--source-group": "$GROUP"}
            yield {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        else:
            port = int(given["--port"])
            yield {
                "IpProtocol": given["--protocol"],
                "FromPort": port,
                "ToPort": port,
                "IpRanges": [{"CidrIp": given["--cidr"]}],
            }


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
    # Workers that the GPU group can hold.
    pairs = [after for option, after in itertools.pairwise(entrypoint()) if option == "--set"]
    experiment = cli.settings(config.Experiment, "demo", None, pairs, data={"shards": "x"})
    (gpu,) = [group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu"]
    (container,) = gpu["template"]["spec"]["containers"]
    assert experiment.train.workers <= container["resources"]["limits"]["nvidia.com/gpu"] * gpu["maxReplicas"]


def entrypoint():
    return shlex.split(read("kuberay.yaml")["spec"]["entrypoint"])


def test_the_rayjobs_command_is_one_that_would_run(shards, tmp_path):
    """With what docs/cluster.md asks for in /shared: shards, and its example of settings, of a network and clips that
    are here."""
    assert entrypoint()[:3] == ["python", "-m", "pipelines.train"]
    (tmp_path / "shards").symlink_to(shards)
    (example,) = re.findall(r"```yaml\n(model:.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    (tmp_path / "train.yaml").write_text(example)
    given = cli.settings(config.Experiment, None, [str(tmp_path / "train.yaml")], entrypoint()[10::2])
    assert given.model.base.startswith("/shared/") and given.train.parallel == "fsdp"
    here = {"model": {"base": None, "init": SETTINGS["model"]["init"], "vae": "none"}, "data": SETTINGS["data"]}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config.merge(yaml.safe_load(example), here)))
    words = [word.replace("/shared", str(tmp_path)) for word in entrypoint()[3:]]
    done = CliRunner().invoke(train.app, [*words, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run").exists()
    (tmp_path / "train.yaml").unlink()
    assert CliRunner().invoke(train.app, [*words, "--dry-run"]).exit_code == 2


def pods():
    """Every pod template of the RayJob by its name."""
    spec = read("kuberay.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], **{each["groupName"]: each for each in cluster["workerGroupSpecs"]}}
    alone = {"submitter": spec["submitterPodTemplate"], "mlflow": beside("Deployment")["spec"]["template"]}
    return alone | {name: group["template"] for name, group in groups.items()}


@pytest.mark.parametrize("name", pods())
def test_a_pod_can_do_little(name):
    pod = pods()[name]["spec"]
    person = pod["securityContext"]
    assert person["runAsNonRoot"] and person["runAsUser"] > 0
    assert person["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] == (name == "head"), "the autoscaler alone speaks to Kubernetes"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    writable = {volume["name"] for volume in pod["volumes"] if not volume.keys() & {"hostPath"}}
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        closed = container["securityContext"]
        assert closed["allowPrivilegeEscalation"] is False and closed["readOnlyRootFilesystem"] is True
        assert closed["capabilities"] == {"drop": ["ALL"]} and not closed.get("privileged")
    for container in pod["containers"]:
        places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert places["/tmp"] in writable
        env = {each["name"]: each["value"] for each in container["env"]}
        paths = [value for name, value in env.items() if not name.startswith("MLFLOW_")]
        assert env["HOME"] == "/tmp" and all(value.startswith(("/tmp", "/shared")) for value in paths)
        assert not [name for name in env if "TOKEN" in name], "the operator gives it"


def test_pods_hear_each_other_and_the_operator_alone():
    policy = beside("NetworkPolicy")
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    spec = policy["spec"]
    mine = spec["podSelector"]["matchLabels"]
    assert all(mine.items() <= pod["metadata"]["labels"].items() for pod in pods().values())
    assert spec["policyTypes"] == ["Ingress"]
    among, operator = spec["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": mine}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    (who,) = operator["from"]
    assert who["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}


HERE = "$(hostname -I | cut -d' ' -f1)"
"""In a shell on the head: its address inside the network."""


def mlflow_server(name):
    """(the line of a shell that starts MLflow's server, the address of it that jobs are given)."""
    if name in CLUSTERS:
        _, server, start = read(name)["head_start_ray_commands"]
        return server, re.search(r" MLFLOW_TRACKING_URI=(http:.*) RAY_AUTH_MODE=token ray start ", start)[1]
    (container,) = pods()["mlflow"]["spec"]["containers"]
    of_rays = [pod["spec"]["containers"][0]["env"] for name, pod in pods().items() if name != "mlflow"]
    (address,) = {each["value"] for env in of_rays for each in env if each["name"] == "MLFLOW_TRACKING_URI"}
    return container["command"][-1], address


@pytest.mark.parametrize("name", [*CLUSTERS, "kuberay.yaml"])
def test_every_cluster_starts_mlflows_server_inside_its_network_and_gives_it_to_jobs(name):
    from mlflow import cli as of_mlflow  # with all of its server, which other files do not need

    line, address = mlflow_server(name)
    words = shlex.split(line.replace(HERE, "HEAD").split("mlflow server")[1].split(">")[0])
    options = of_mlflow.server.make_context("server", words).params
    assert options["backend_store_uri"].startswith("sqlite:////shared/mlflow/")
    assert options["artifacts_destination"].startswith("/shared/mlflow/") and options["serve_artifacts"]
    assert options["workers"] == "1", "one process writes to the file"
    host = address.removeprefix("http://").removesuffix(f":{options['port']}")
    allowed = options["allowed_hosts"].split(",")  # whatever the address, not private ones alone as by default
    assert allowed == [f"{host.replace(HERE, 'HEAD')}:{options['port']}", f"localhost:{options['port']}"]
    if name in CLUSTERS:
        assert (options["host"], host) == ("HEAD", HERE) and line.rstrip().endswith("&")
        return
    service, pod = beside("Service"), pods()["mlflow"]
    assert host == service["metadata"]["name"] and service["spec"]["type"] == "ClusterIP"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() > beside("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items()
    assert beside("Deployment")["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (before,) = pods()["submitter"]["spec"]["initContainers"]
    assert f"{address}/health" in before["command"][-1], "no job begins before it answers"


def test_the_rayjob_begins_once_mlflow_answers_and_not_before(tmp_path):
    """The command that waits for it, where there is no program but those of the image that it calls."""
    for program in ("bash", "sleep"):
        (tmp_path / program).symlink_to(shutil.which(program))
    (tmp_path / "python").symlink_to(sys.executable)
    (before,) = pods()["submitter"]["spec"]["initContainers"]
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(503 if len(asked) == 1 else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _, address = mlflow_server("kuberay.yaml")
        command = before["command"][-1].replace(address, f"http://127.0.0.1:{server.server_port}")
        done = subprocess.run([*before["command"][:-1], command], env={"PATH": str(tmp_path)}, timeout=60)
        server.shutdown()
    assert done.returncode == 0 and asked == ["/health", "/health"]


def commands(name):
    """What a file has a shell of the image do."""
    text = (ROOT / name).read_text()
    if name == "Dockerfile":
        return re.findall(r"^RUN ((?:.*\\\n)*.*)", text, re.M)
    if name == "kuberay.yaml":
        inside = [
            container
            for pod in pods().values()
            for container in [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]
        ]
        hooks = [each["lifecycle"]["preStop"]["exec"]["command"] for each in inside if "lifecycle" in each]
        shells = [each["command"] for each in inside if "command" in each]
        return [read(name)["spec"]["entrypoint"], *(command[-1] for command in [*shells, *hooks])]
    return [*read(name)["head_start_ray_commands"], *read(name)["worker_start_ray_commands"]]


def programs(command):
    """What a line of a shell calls, without the shell's own words."""
    command = re.sub(r"(\w+=)?\$\((.*?)\)", r"; \2 ;", re.sub(r'"[^"]*"', "TEXT", command).replace("\\\n", " "))
    for call in re.split(r";|&&|\|\|?|(?<!>)&(?!\d)", command):
        words = re.sub(r"^(\s*(if|then|else|until|while|do|exec|nohup|\w+=\S*)(\s|$))*", "", call.strip()).split()
        if words and not words[0].startswith(("-", "/", ":", "<", ">")):
            yield words[0]


SHELL = {"[", "cd", "done", "fi", "ulimit"}
DEBIAN = {"apt-get", "cut", "hostname", "mkdir", "rm", "sleep", "tar", "./efa_installer.sh"}
"""What every image has that is built on Debian's or Ubuntu's, and what an archive brings."""
PYTHON = {"python", "pip", "ray", "mlflow"}


@pytest.mark.parametrize("name", [*CLUSTERS, "kuberay.yaml", "Dockerfile"])
def test_no_file_calls_a_program_that_the_image_lacks(name):
    """Ray's image has no curl, no wget and no jq."""
    (line,) = [each for each in commands("Dockerfile") if "apt-get install" in each]
    installed = re.search(r"apt-get install ((?:[\w-]+ ?)+)", line)[1].split()
    called = {program for command in commands(name) for program in programs(command)}
    assert "ray" in called or name in ("Dockerfile", "kuberay.yaml")
    assert called <= {*SHELL, *DEBIAN, *PYTHON, *installed}, called
    assert set(programs('a=1 until curl --fail x; do sleep 2; done && X=$(wget "y") ls')) >= {"curl", "wget", "ls"}


def test_who_may_reach_mlflow_on_google_is_said_with_the_rules_that_close_it():
    text = (ROOT / "docs" / "cluster.md").read_text()
    emails = {
        account["email"].replace("REPLACE", "PROJECT")
        for kind in read("cluster-gcp.yaml")["available_node_types"].values()
        for account in kind["node_config"]["serviceAccounts"]
    }
    assert set(re.search(r"^NODES=(.*)", text, re.M)[1].split(",")) == emails
    rules = dict(re.findall(r"firewall-rules create (\S+) ((?:.*\\\n)*.*)", text))
    nodes, others = (shlex.split(rule.replace("\\\n", " ")) for rule in rules.values())
    nodes, others = (dict(word.removeprefix("--").split("=") for word in rule) for rule in (nodes, others))
    assert (nodes["action"], others["action"]) == ("ALLOW", "DENY") and int(nodes["priority"]) < int(others["priority"])
    assert nodes["source-service-accounts"] == nodes["target-service-accounts"] == others["target-service-accounts"]
    assert "Google's default network" in (ROOT / "SECURITY.md").read_text()


@pytest.mark.slow
def test_mlflows_server_of_the_rayjob_answers_its_own_names_and_keeps_all_on_the_shared_disk(tmp_path, monkeypatch):
    line, address = mlflow_server("kuberay.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    name = address.removeprefix("http://").replace("5000", port)
    changed = {"/shared": str(tmp_path), "0.0.0.0": "127.0.0.1", "5000": port}
    for before, after in changed.items():
        line = line.replace(before, after)
    given = pods()["mlflow"]["spec"]["containers"][0]["env"]
    env = {**os.environ, **{each["name"]: each["value"] for each in given}}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://localhost:{port}")
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(["bash", "-c", line], env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            assert time.monotonic() < deadline and server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        (tmp_path / "chart.txt").write_text("a chart")
        run = Tracker.start(tmp_path, "entprog", "x", params={"seed": 1}, tags={})
        run.artifact(tmp_path / "chart.txt")
        run.end("FINISHED")
        (kept,) = (tmp_path / "mlflow" / "artifacts").rglob("chart.txt")
        assert kept.read_text() == "a chart" and (tmp_path / "mlflow" / "mlflow.db").exists()

        def status(host):
            ask = urllib.request.Request(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0")
            ask.add_header("Host", host)
            try:
                return urllib.request.urlopen(ask).status
            except urllib.error.HTTPError as error:
                return error.code

        assert (status(name), status("elsewhere.example.org")) == (200, 403)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_the_image_holds_what_was_tested_and_nothing_else():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    (base,) = [line.removeprefix("ARG BASE=") for line in lines if line.startswith("ARG BASE=")]
    assert "FROM ${BASE}" in lines and re.search(rf":{re.escape(ray.__version__)}-py3\d+", base)
    assert any("--require-hashes --requirement requirements.lock" in line for line in lines)
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    assert locked["ray"] == ray.__version__ and {"peft", "torchao", "ai-edge-litert"} <= locked.keys()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[2:-1] if name != "."]
    copied += ["pyproject.toml", "README.md", "LICENSE"]  # what the package is built from
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    inside = {name for name in tracked if in_the_image(name)}
    assert inside == {*copied, *(n for n in tracked if n.split("/")[0] in ("entprog", "pipelines", "tune_spaces"))}
    for name in (".env", ".git/config", "out/run/model/x.safetensors", "mlflow.db", "videos/me.mp4", ".ray/auth_token",
                 "entprog/__pycache__/x.pyc", "pipelines/a/__pycache__/x.pyc", "pipelines/x.pyc"):  # fmt: skip
        assert not in_the_image(name), name


def in_the_image(name):
    """Whether .dockerignore lets a file through: the last line that fits a path, or one of its folders, decides."""
    inside = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            paths = [name, *(str(each) for each in Path(name).parents)][:-1]
            tails = [pattern, pattern.removeprefix("**/")]
            if any(fnmatch(path, each) or (pattern.startswith("**/") and fnmatch(Path(path).name, tails[1]))
                   for path in paths for each in tails):  # fmt: skip
                inside = line.startswith("!")
    return inside


@pytest.mark.parametrize("name", [*CLUSTERS, "kuberay.yaml", "Dockerfile", "docs/cluster.md"])
def test_images_are_named_by_their_version(name):
    text = (ROOT / name).read_text()
    assert ":latest" not in text
    versions = set(re.findall(r"/entprog:([\w.-]+)", text))
    assert versions == {VERSION}


def test_documents_name_settings_and_files_that_exist():
    text = (ROOT / "docs" / "cluster.md").read_text()
    known = {name for name, *_ in config.settings_help()}
    named = set(re.findall(r"\b(?:train|data|model|schedule)\.[a-z_]+", text)) - {"train.py", "train.yaml"}
    assert named and named <= known, named - known
    for name in re.findall(r"`([\w-]+\.yaml)`", text):
        assert (ROOT / name).exists() or name in ("mine.yaml", "best.yaml")


ONE_AFTER_ANOTHER = "test_faults.test_a_run_survives_one_loss_after_another"
ELASTIC = "test_faults.test_elastic_two_workers_one_and_two_again"
STRAINED = "test_train.test_a_full_object_store_and_a_tracking_server_away"
TESTED = {
    "a worker, or its node, dies": ("test_train.test_sigkill_of_the_worker_resumes_to_the_bit", ONE_AFTER_ANOTHER),
    "there are not enough machines yet": ("test_faults.test_a_run_begins_on_a_cluster_that_has_no_nodes_yet",),
    "fewer machines are left": (ONE_AFTER_ANOTHER, ELASTIC),
    "machines come back, with `train.min_workers`": (ELASTIC,),
    "SIGTERM to a worker": (ONE_AFTER_ANOTHER,),
    "Ray drains a worker's node": ("test_faults.test_a_machine_that_is_taken_back_is_left_with_a_checkpoint",),
    "SIGTERM to the job": ("test_deployment.test_a_submitted_job_is_followed_stopped_with_a_checkpoint_and_resumed",),
    "the trainer's controller dies": (ONE_AFTER_ANOTHER,),
    "the driver or the head dies": ("test_train.test_sigkill_of_the_driver_then_the_same_command",),
    "the disk is full": (ONE_AFTER_ANOTHER, "test_checkpoint.test_a_full_disk_is_told_and_the_run_goes_on"),
    "the bucket of checkpoints, or of the output, is away": (
        "test_checkpoint.test_a_bucket_that_is_away_is_told_and_training_goes_on",
        "test_checkpoint.test_what_a_bucket_does_not_take_leaves_the_checkpoint_before",
        "test_bucket_runs.test_a_log_that_a_bucket_does_not_take_is_a_warning_once_and_an_error_at_the_end",
    ),
    "a checkpoint was cut short": (
        "test_checkpoint.test_a_checkpoint_cut_short_is_not_used_the_one_before_is",
        "test_worker.test_a_checkpoint_cut_short_is_named_and_the_one_before_is_taken_up",
    ),
    "a checkpoint cannot be read": (
        "test_checkpoint.test_a_good_checkpoint_is_not_called_damaged_for_want_of_memory",
        ONE_AFTER_ANOTHER,
        "test_checkpoint.test_a_bucket_that_is_away_is_told_and_training_goes_on",
    ),
    "a loss or gradient is not finite": (
        "test_training.test_an_update_that_is_not_finite_changes_nothing_and_is_counted",
        "test_distributed.test_all_ranks_skip_an_update_that_is_not_finite_on_one",
        "test_faults.test_a_run_whose_losses_are_lost_fails_with_its_step_named",
    ),
    "weights are not finite": (
        "test_checkpoint.test_what_is_not_finite_is_not_saved_and_takes_no_good_checkpoints_place",
        "test_worker.test_a_network_that_is_not_finite_is_no_result",
    ),
    "a preview runs out of memory on a worker": (
        "test_sharded_previews.test_a_preview_that_fails_on_one_rank_is_a_warning_and_training_computes_the_same",
    ),
    "a node that decodes dies": (
        "test_faults.test_clips_are_decoded_away_from_who_trains_and_by_others_when_those_nodes_die",
        "test_faults.test_a_run_decodes_where_its_cluster_has_cpus_and_comes_to_the_same",
    ),
    "MLflow does not answer": (STRAINED,),
    "Ray's object store is full": (STRAINED,),
    "nothing is heard of the workers": ("test_train.test_that_nothing_is_heard_of_workers_is_told",),
    "a machine is slower than the others": ("test_train.test_a_straggler_is_named_and_every_step_has_its_spread",),
}
"""How the rows of docs/cluster.md's "When machines fail" begin, and the tests that do just that."""


def test_every_failure_that_the_document_speaks_of_has_its_test_or_says_that_it_has_none():
    text = (ROOT / "docs" / "cluster.md").read_text()
    section = text.split("## When machines fail")[1].split("\n## ")[0]
    rows = [line.removeprefix("| ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(TESTED)
    for row, (begins, tests) in zip(rows, TESTED.items(), strict=True):
        assert row.startswith(begins)
        assert tests or "not tested" in row, row
        for file, name in (test.split(".") for test in tests):
            assert f"\ndef {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), name


def test_a_spot_machine_hears_its_notice():
    with servers.metadata("terminate", quiet=2) as address:
        assert [spot.notice(address) for _ in range(3)] == [None, None, "terminate"]
    with pytest.raises(OSError):
        spot.notice(address)  # nobody answers: the watcher goes on looking


def test_every_spot_machine_watches_and_every_training_pod_has_time_to_leave():
    values = read("cluster.yaml")
    assert "python -m pipelines.cluster.spot" in " ".join(values["worker_start_ray_commands"])
    for name in ("gpu", "decode"):
        pod = pods()[name]["spec"]
        (container,) = pod["containers"]
        words = container["lifecycle"]["preStop"]["exec"]["command"]
        leaving = int(re.search(r"python -m pipelines\.cluster\.spot --leaving (\d+)", words[-1])[1])
        assert leaving + 10 <= pod["terminationGracePeriodSeconds"], "Kubernetes would kill it before"
        assert words[-1].endswith("ray stop"), "as KubeRay's own hook, whose place it takes"


# ---- a job on a head node ----


class Head:
    """A head node as `ray start --head` makes it, on loopback, guarded by a token."""

    def __init__(self, folder):
        # The agent's port too: with another Ray on this machine its usual one is taken, and jobs then find no agent.
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            for each in (one, two, three):
                each.bind(("127.0.0.1", 0))
            self.port, self.dashboard, agent = (each.getsockname()[1] for each in (one, two, three))
        self.place = Path(tempfile.mkdtemp(prefix="head-"))  # a short name, for Ray's sockets
        token = folder / "token"
        self.token = "a-token-of-this-test-alone-" + "0" * 16
        token.write_text(self.token)
        token.chmod(0o600)
        base = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = base | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{base['PATH']}",  # as in an activated environment
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_JOB_STOP_WAIT_TIME_S": "100",
            # A job asks there for its head's address, and would be given that of another Ray which starts meanwhile.
            "RAY_TMPDIR": str(self.place),
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
        """MLflow's store is in the environment of the head alone."""
        return subprocess.run(
            [self.ray, "job", *arguments],
            env={name: value for name, value in self.env.items() if name != "MLFLOW_TRACKING_URI"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
            **options,
        )

    def ready(self):
        """Until it takes jobs. Returns its client, which asks what the commands ask, without their start of seconds."""
        deadline = time.monotonic() + 120
        while True:
            try:
                client = JobSubmissionClient(
                    self.env["RAY_API_SERVER_ADDRESS"], headers={"Authorization": f"Bearer {self.token}"}
                )
                client.list_jobs()
                return client
            except (RuntimeError, OSError) as error:  # not there yet, or not yet answering
                assert time.monotonic() < deadline and self.process.poll() is None, error
                time.sleep(0.5)

    def end(self):
        everything = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # `--block` waits for processes that end one by one
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.place, ignore_errors=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, local_ray):
    return two_people(tmp_path_factory)


def test_a_local_ray_listens_on_this_machine_alone(shards):
    """With a dashboard, and after it has worked."""
    found = {(c.laddr.ip, "driver") for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found |= {(c.laddr.ip, process.name()) for c in process.net_connections("inet") if c.status == "LISTEN"}
    names = {name for _, name in found}
    assert {"driver", "gcs_server", "raylet"} <= names and len(names) >= 5, names
    assert {ip for ip, _ in found} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found


@pytest.fixture(scope="module")
def head(tmp_path_factory, shards):
    head = Head(tmp_path_factory.mktemp("head"))
    try:
        head.client = head.ready()
        yield head
    finally:
        head.end()


@pytest.mark.slow
def test_a_job_is_refused_without_the_token(head):
    wrong = head.env | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "b" * 40}
    tried = subprocess.run([head.ray, "job", "list"], env=wrong, capture_output=True, text=True)
    assert tried.returncode != 0


@pytest.mark.slow
def test_a_submitted_job_is_followed_stopped_with_a_checkpoint_and_resumed(head, shards, tmp_path):
    # So many steps that the job is stopped before its last one, and nothing but steps.
    settings = config.merge(SETTINGS, {"train": {"steps": 200, "checkpoint_every": 2000, "held_out_every": 200}})
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
    assert head.client.stop_job("one")  # `ray job stop`, at once
    while head.client.get_job_status("one") not in (JobStatus.STOPPED, JobStatus.SUCCEEDED, JobStatus.FAILED):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["status"] == "interrupted"
    run = json.loads((tmp_path / "run" / "mlflow_run.json").read_text())
    assert run["uri"] == head.env["MLFLOW_TRACKING_URI"], "a job has it from the head's Ray"
    (saved,) = checkpoint.found(tmp_path / "run" / "checkpoints")
    step = int(saved.removeprefix("step-"))
    assert 5 <= step < 200 and record["error"].endswith(f"the same command resumes after step {step}")
    again = head.job("submit", "--submission-id", "two", "--working-dir", ".", "--", *command)  # waits, follows its log
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"Resumed from the checkpoint after step {step}" in again.stdout and "held-out loss" in again.stdout
    assert "Traceback" not in again.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
