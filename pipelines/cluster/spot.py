"""Tells Ray that this machine is about to be taken away, so that the run saves a checkpoint and goes on elsewhere.

python -m pipelines.cluster.spot                 beside Ray on a spot machine of AWS: until its notice (cluster.yaml)
python -m pipelines.cluster.spot --leaving 90    before a pod ends: until its workers have gone (kuberay.yaml)

Both drain the node: Ray places nothing new on it, and the run's board (`message_board`) tells the workers.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

METADATA = "http://169.254.169.254/latest"
"""AWS's metadata service, which answers this machine alone."""
EVERY_S = 5.0
"""Between looks at it, as AWS advises."""
NOTICE_S = 115
"""From the notice to the machine's end: two minutes, less what a look may be late."""


def notice(metadata: str = METADATA) -> str | None:
    """What AWS is about to do with this spot machine (`terminate`, `stop`, …); None while there is nothing.

    Raises OSError where the service does not answer.
    """
    ask = urllib.request.Request(
        f"{metadata}/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with urllib.request.urlopen(ask, timeout=2) as answer:
        token = answer.read(1000).decode()
    ask = urllib.request.Request(
        f"{metadata}/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with urllib.request.urlopen(ask, timeout=2) as answer:
            return str(json.loads(answer.read(1000))["action"])
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise


def drain(seconds: int, why: str, *options: str) -> None:
    """Tell Ray that this node ends in so many seconds. options: of `ray drain-node`, for another node than this one.

    Raises subprocess.CalledProcessError where Ray refuses.
    """
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", why, "--deadline-remaining-seconds", str(seconds), *options]
    subprocess.run(command, check=True)


def watch(metadata: str = METADATA, *options: str, every_s: float = EVERY_S) -> None:
    """Wait for AWS's notice, then drain the node."""
    while True:
        with contextlib.suppress(OSError):  # busy: the next look will tell
            if action := notice(metadata):
                return drain(NOTICE_S, f"AWS: {action}", *options)
        time.sleep(every_s)


def leave(seconds: int, *options: str) -> None:
    """Drain the node, and wait for its workers to end, so many seconds at most."""
    until = time.monotonic() + seconds
    drain(seconds, "its pod ends", *options)
    while time.monotonic() < until and _workers():
        time.sleep(0.5)


def _workers() -> bool:
    """Whether a training worker runs on this machine."""
    processes = (process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"]))
    return any("RayTrainWorker" in " ".join(words) for words in processes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.cluster.spot", description=__doc__.splitlines()[0])
    parser.add_argument("--leaving", type=int, metavar="SECONDS", help="this machine ends in so many seconds")
    leaving = parser.parse_args(arguments).leaving
    watch() if leaving is None else leave(leaving)


if __name__ == "__main__":
    main()
