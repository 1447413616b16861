"""How training scales: measured for 1 and 2 workers here, predicted for 8 to 1,024 GPUs; scoring and search simulated.

    python -m benchmarks.scaling

A model of a step (`scaling_forecast`) is fitted to one worker and to the all-reduce alone; that it foresees the step of
two workers is its check. That of scoring (`scaling_search`) is fitted to one forward pass; its check is what scoring
takes one and two workers. For GPUs FLOPs and bytes are counted on Wan 2.1's networks without their weights, and FLOPs
divided by the rate that an H200 was measured at; what no machine here can measure is written as `assumed` beside the
number.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer

from benchmarks import common
from benchmarks import scaling_forecast as forecast
from benchmarks import scaling_search as simulated
from benchmarks.scaling_forecast import GPUS, SCHEDULES, Constants
from entprog import config, models
from entprog.blocks import blocks
from entprog.config import Priority
from entprog.data.clips import Latents
from entprog.diffusion import losses
from entprog.distributed.reducing import BUCKET_BYTES, Reducer
from entprog.scoring import cei
from entprog.training import checkpoint
from entprog.training.fit import start

SETTINGS = {
    "model": {
        "init": {
            "patch_size": [1, 8, 8], "num_attention_heads": 4, "attention_head_dim": 32, "out_channels": 3,
            "text_dim": 8, "freq_dim": 32, "ffn_dim": 512, "num_layers": 12, "rope_max_seq_len": 64,
        },
        "vae": "none",
    },
    "data": {"shape": {"frames": 8, "height": 96, "width": 64, "fps": 12}, "batch_size": 2},
    "train": {"steps": 1},
}  # fmt: skip
SCORED = Priority(conditions=3, draws=4)
"""What is scored here: two workers share the second condition."""


# ---- measured here ----


class Worker:
    """One worker's network and batch under a plan."""

    def __init__(self, schedule: str, settings: Mapping[str, Any] = SETTINGS, device: str = "cpu"):
        self.experiment = config.build(settings)
        self.denoiser = models.family("wan").load(self.experiment.model, device, 0)
        self.found = blocks(self.denoiser.network)
        self.state = start(self.denoiser.network, self.experiment)
        groups = self.denoiser.outside()
        outside = [parameter for group in groups.values() for parameter in group]
        self.trained = forecast.plan(self.denoiser.network, self.found, outside, schedule)
        self.reducer = Reducer(self.trained)
        clips, shape = self.experiment.data.batch_size, self.denoiser.latent_shape(self.experiment.data.shape)
        noise = torch.randn(clips, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        conditions = {name: noise.roll(1, -1) for name in self.experiment.model.conditions}
        self.batch = Latents(noise, conditions, torch.arange(clips, device=device))

    def forward(self) -> float:
        """Seconds of a forward pass."""
        t = torch.full((len(self.batch.position),), 0.5)
        started = time.perf_counter()
        with torch.no_grad():
            self.denoiser.predict(self.batch.clean, t, self.batch.conditions)
        return time.perf_counter() - started

    def scoring(self) -> float:
        """Seconds of a scoring, slowest worker."""
        return cei.cei(self.denoiser, self.found, self.conditions(), SCORED).seconds

    def conditions(self) -> list[Latents]:
        """As many batches as the scoring takes."""
        return [self.batch] * -(-SCORED.conditions // len(self.batch.position))

    def compute(self) -> None:
        losses.training_loss(self.denoiser, self.batch, self.experiment.train).backward()

    def update(self) -> None:
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)

    def step(self) -> tuple[float, float]:
        """(seconds of computing, of what is left of the all-reduce then)."""
        started = time.perf_counter()
        self.reducer.begin()
        self.compute()
        computed = time.perf_counter()
        self.reducer.finish()
        reduced = time.perf_counter()
        self.update()
        return computed - started + time.perf_counter() - reduced, reduced - computed


def _rank(rank: int, world: int, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(f"{folder}/store{world}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    workers = {schedule: Worker(schedule) for schedule in SCHEDULES}
    times = {schedule: [] for schedule in SCHEDULES}
    for number in range(repeats + 1):
        for schedule, worker in workers.items():
            started = time.perf_counter()
            compute, reduce = worker.step()
            if number:
                times[schedule].append((time.perf_counter() - started, compute, reduce))
    found = {"times": times, "bytes": {s: sum(p.nbytes for p in w.trained) for s, w in workers.items()}}
    scored = workers["full"]
    found |= {"forward": [scored.forward() for _ in range(repeats + 1)][1:], "scoring": [scored.scoring()]}
    if world > 1:
        found["all_reduce"] = _all_reduce(repeats)
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _all_reduce(repeats: int) -> dict[str, list[float]]:
    """Bytes → seconds of an all-reduce with nothing else going on."""
    out = {}
    for size in (1 << 10, 1 << 24):
        flat, seconds = torch.zeros(size // 4), []
        for _ in range(repeats + 1):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(flat)
            seconds.append(time.perf_counter() - started)
        out[size] = seconds[1:]
    return out


def measured(repeats: int, turns: int) -> dict[int, dict]:
    """Workers → what they measured; each number of workers in turn, several times over, so that drift meets both."""
    found: dict[int, dict] = {}
    for _ in range(turns):
        for world in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(_rank, args=(world, folder, repeats), nprocs=world, start_method="spawn")
                new = json.loads(Path(folder, f"{world}.json").read_text())
            if world not in found:
                found[world] = new
                continue
            for schedule in SCHEDULES:
                found[world]["times"][schedule] += new["times"][schedule]
            for name in ("forward", "scoring"):
                found[world][name] += new[name]
            for size, seconds in new.get("all_reduce", {}).items():
                found[world]["all_reduce"][size] += seconds
    return found


def decode_rate(repeats: int) -> float:
    """Clips a second on one core, of the settings' shape and encoded as shards hold them; a real video's frames."""
    from entprog.media import assets, h264, video

    shape = config.build(SETTINGS).data.shape
    times = [frame / shape.fps for frame in range(shape.frames)]
    frames, _ = video.read_frames(assets.clip("cam01"), times, size=(shape.height, shape.width))
    data = h264.encode(frames, shape.fps)
    rates = []
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(20):
            h264.decode_yuv(data)
        rates.append(20 / (time.process_time() - started))
    return statistics.median(rates)


def blocked(repeats: int) -> tuple[float, int]:
    """(seconds that a checkpoint takes away, its bytes), full training."""
    worker = Worker("full")
    worker.step()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(folder, "benchmark", keep=1)
        for _ in range(repeats):
            seconds.append(saver.save(worker.denoiser.network, worker.state))
            saver.wait()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        saver.close()
    return statistics.median(seconds), size


def here(found: dict[int, dict], repeats: int) -> tuple[Constants, dict[str, str]]:
    """The constants of this machine, and where each comes from."""
    one = found[1]["times"]
    compute = {schedule: statistics.median(compute for _, compute, _ in one[schedule]) for schedule in SCHEDULES}
    spreads = [_spread([step for step, _, _ in one[schedule]]) for schedule in SCHEDULES]
    alone = {int(size): statistics.median(seconds) for size, seconds in found[2]["all_reduce"].items()}
    small, large = min(alone), max(alone)
    saved_s, saved_bytes = blocked(repeats)
    constants = Constants(
        compute_s=compute,
        reduced_bytes=found[1]["bytes"],
        forward_s=statistics.median(found[1]["forward"]),
        forward_bytes={},
        backward_bytes={},
        parts=1,
        bucket_bytes=BUCKET_BYTES,
        inside_bandwidth=(large - small) / max(alone[large] - alone[small], 1e-9),
        bandwidth=(large - small) / max(alone[large] - alone[small], 1e-9),
        latency_s=alone[small],
        decode_rate=decode_rate(repeats),
        clips=SETTINGS["data"]["batch_size"],
        blocked_s=saved_s,
        steps_between_checkpoints=500,
        spread=statistics.mean(spreads),
    )
    sources = {
        "compute_s": "measured: one worker's median",
        "forward_s": "measured: one worker's median",
        "forward_bytes": "setting: no weights in parts are measured here",
        "backward_bytes": "setting: the same",
        "reduced_bytes": "counted: gradients of trained parameters",
        "parts": "setting",
        "bucket_bytes": "setting",
        "inside_bandwidth": "measured: as bandwidth",
        "bandwidth": "measured: all-reduce of 16 MiB alone, two gloo workers",
        "latency_s": "measured: all-reduce of 1 KiB alone, two gloo workers",
        "decode_rate": "measured: CPU seconds of decoding a real clip of the settings' shape, one core",
        "clips": "setting",
        "blocked_s": f"measured: copy of {saved_bytes} bytes to the host, the rest is written by a thread",
        "steps_between_checkpoints": "setting",
        "spread": "measured: one worker's steps (median absolute deviation · 1.48)",
    }
    return constants, sources


def _spread(values: Sequence[float]) -> float:
    """Standard deviation over the mean, from the median absolute deviation: a shared machine has wild outliers."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values) / middle


def scorings(found: dict[int, dict], forward_s: float) -> list[dict]:
    """What the scorings of one and of two workers took, and what the simulation says of them; forward_s: of a batch."""
    worker = Worker("full")
    passes = cei.counted(worker.denoiser, worker.found, worker.batch.part(slice(0, 1)), SCORED, 0, config.Timesteps())
    clips = len(worker.batch.position)
    network = simulated.Network("as measured here", passes.costs, forward_s / clips, worker.batch.clean[0].numel())
    out = []
    for workers, each in found.items():
        seconds = statistics.median(each["scoring"])
        foreseen = max(simulated.busy(network, SCORED, clips, workers))
        out.append(
            {
                "gpus": workers, "network": network.name, "measured": True, "wall_s": seconds, "predicted_s": foreseen,
                "scoring": f"{SCORED.draws} draws of {SCORED.conditions} clips",
                "predicted_over_measured": foreseen / seconds,
            }
        )  # fmt: skip
    return out


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    repeats: Annotated[int, typer.Option(help="Timed steps of each arm and turn.")] = 15,
    turns: Annotated[int, typer.Option(help="Turns of each number of workers.")] = 2,
) -> None:
    """Measure 1 and 2 workers, check the models against them, predict 8 to 1,024 GPUs; writes results/scaling.json."""
    torch.set_num_threads(1)
    found = measured(repeats, turns)
    constants, sources = here(found, repeats)
    machine = {"machine": "this CPU, one core a worker"}
    figures = []
    for schedule in SCHEDULES:
        base = statistics.median(step for step, _, _ in found[1]["times"][schedule])
        for workers in (1, 2):
            times = found[workers]["times"][schedule]
            steps = [step for step, _, _ in times]
            middle = statistics.median(steps)
            foreseen = forecast.predicted(constants, schedule, workers)
            # What no step here does: wait for data, save.
            foreseen_s = foreseen["compute_s"] + foreseen["exposed_s"] + foreseen["slowest_s"]
            figures.append(
                {
                    "gpus": workers, "schedule": schedule, "samples_per_s": workers * constants.clips / middle,
                    "efficiency": base / middle, "measured": True, "step_s": middle,
                    "step_s_spread": [min(steps), max(steps)],
                    "compute_s": statistics.median(compute for _, compute, _ in times),
                    "all_reduce_s": statistics.median(reduce for _, _, reduce in times),
                    "predicted_step_s": foreseen_s, "predicted_over_measured": foreseen_s / middle,
                    **machine,
                }
            )  # fmt: skip
    described = [{"machine": machine["machine"], "values": dataclasses.asdict(constants), "from": sources}]
    searches = []
    for network in forecast.NETWORKS:
        about = {"machine": f"H100 as an H200 was measured, Wan 2.1 1.3B, one clip a GPU, {network}"}
        wan, wan_sources = forecast.gpus(network)
        for arrangement in forecast.ARRANGEMENTS:
            figures += forecast.rows(wan, arrangement, GPUS, about)
        searches += simulated.search(wan, GPUS, about)
        described.append(about | {"values": dataclasses.asdict(wan), "from": wan_sources})
    scored = scorings(found, constants.forward_s)
    for network in simulated.networks():
        for name, priority in simulated.PRIORITIES.items():
            scored += simulated.scoring(network, name, priority, GPUS)
    common.write("scaling", figures, device="cpu", repeats=turns * repeats, more={
        "scoring": scored,
        "search": searches,
        "timeout_s": simulated.TIMEOUT_S,
        "constants": described,
        "model": "\n".join(module.__doc__ for module in (forecast, simulated)),
        "cores": os.cpu_count(),
    })  # fmt: skip
    columns = ("gpus", "schedule", "parallel", "overlaps", "samples_per_s", "efficiency", "measured", "step_s")
    common.show("Scaling", [{column: figure.get(column, "") for column in columns} for figure in figures])
    columns = ("gpus", "network", "scoring", "wall_s", "idle_share", "longest_wait_s", "by_conditions_s")
    common.show("Scoring", [{column: figure.get(column, "") for column in columns} for figure in scored])
    columns = ("gpus", "wall_s", "idle_share", "longest_wait_s")
    common.show("A stage's search", [{column: figure[column] for column in columns} for figure in searches])


if __name__ == "__main__":
    app()
