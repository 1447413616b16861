"""How training scales: measured for 1 and 2 workers here, predicted for 8 to 1,024 GPUs by a model of few constants.

python -m benchmarks.scaling

    step(N) = compute + exposed all-reduce + waiting for data + checkpoint / steps between checkpoints
    compute            = updates' FLOPs of one worker / FLOP/s                        (+ the wait for the slowest of N)
    all-reduce         = 2 (N - 1) / N · bytes of trained parameters / bandwidth + latency · log2 N      (ring)
    waiting for data   = max(0, clips of a worker / decode rate - compute)
    the slowest of N   = compute · spread · sqrt(2 ln N)                              (independent normal steps)

The model is fitted to one worker and to the all-reduce alone; that it foresees the step of two workers is its check.
For GPUs the FLOPs and bytes are counted on Wan 2.1's 1.3B network without its weights; what no machine here can measure
is written as `assumed` beside the number. Search and scoring are not in the model.
"""

import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from diffusers import WanTransformer3DModel

from benchmarks import common
from entprog import config, models
from entprog.blocks import blocks, unfreeze
from entprog.cost import counting
from entprog.data.clips import Latents
from entprog.diffusion import losses
from entprog.distributed.reducing import Reducer
from entprog.training import checkpoint
from entprog.training.fit import start

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
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
QUARTER = 0.25
"""Share of the blocks that Ent-Prog's plan trains, spread over depth, residual backward."""


@dataclass(frozen=True)
class Constants:
    """Constants of one kind of machine and network: seconds, bytes, and rates per second."""

    compute_s: dict[str, float]
    """Schedule → forward, backward and update of one worker's batch."""
    reduced_bytes: dict[str, int]
    """Schedule → gradient bytes all-reduced in an update: of trained parameters only."""
    bandwidth: float
    """Bytes a second of an all-reduce, as each worker sees it (algorithm bandwidth over 2 (N - 1) / N)."""
    latency_s: float
    decode_rate: float
    """Clips a second for each worker's share of the CPUs."""
    clips: int
    """Clips of one worker in an update."""
    blocked_s: float
    """Seconds for which a checkpoint blocks training."""
    steps_between_checkpoints: int
    spread: float
    """Standard deviation of a step over its mean, on one worker."""


def predicted(constants: Constants, schedule: str, workers: int) -> dict[str, float]:
    """Seconds of one update, by part."""
    compute = constants.compute_s[schedule]
    slowest = compute * constants.spread * math.sqrt(2 * math.log(workers)) if workers > 1 else 0.0
    wire = 2 * (workers - 1) / workers * constants.reduced_bytes[schedule] / constants.bandwidth
    reduce = wire + constants.latency_s * math.log2(workers)
    wait = max(0.0, constants.clips / constants.decode_rate - compute)
    save = constants.blocked_s / constants.steps_between_checkpoints
    return {"compute_s": compute, "slowest_s": slowest, "all_reduce_s": reduce, "wait_s": wait, "checkpoint_s": save}


def rows(constants: Constants, counts: Sequence[int], about: dict) -> list[dict]:
    out = []
    for schedule in constants.compute_s:
        one = sum(predicted(constants, schedule, 1).values())
        for workers in counts:
            parts = predicted(constants, schedule, workers)
            step = sum(parts.values())
            rate = workers * constants.clips / step
            row = {"gpus": workers, "schedule": schedule, "samples_per_s": rate, "efficiency": one / step}
            out.append(row | {"measured": False, "step_s": step, **parts, **about})
    return out


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
        self.trained = plan(self.denoiser.network, self.found, outside, schedule)
        self.reducer = Reducer(self.trained)
        clips, shape = self.experiment.data.batch_size, self.denoiser.latent_shape(self.experiment.data.shape)
        noise = torch.randn(clips, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        conditions = {name: noise.roll(1, -1) for name in self.experiment.model.conditions}
        self.batch = Latents(noise, conditions, torch.arange(clips, device=device))

    def compute(self) -> None:
        losses.training_loss(self.denoiser, self.batch, self.experiment.train).backward()

    def update(self) -> None:
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)

    def step(self) -> tuple[float, float]:
        """(seconds of computing, of the all-reduce)."""
        started = time.perf_counter()
        self.compute()
        computed = time.perf_counter()
        self.reducer.finish()
        reduced = time.perf_counter()
        self.update()
        return computed - started + time.perf_counter() - reduced, reduced - computed


def plan(network, found, outside, schedule: str) -> list[torch.nn.Parameter]:
    """Put a schedule's typical plan in force; the trained parameters."""
    names = [block.name for block in found]
    if schedule == "full":
        return unfreeze(network, found, names, outside)
    every = round(1 / QUARTER)
    return unfreeze(network, found, names[every - 1 :: every], outside, "residual")


SCHEDULES = ("full", "entprog")


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
        "reduced_bytes": "counted: gradients of trained parameters",
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


# ---- foreseen for GPUs ----


def gpus() -> tuple[Constants, dict[str, str]]:
    """Wan 2.1 1.3B, 17 frames of 832x480 as latents, one clip a GPU: counted on the real class without its weights."""
    models.family("wan")  # its blocks are known from then on
    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, text_dim=4096, freq_dim=256
        )
    found = blocks(network)
    outside_names = {f"{block.name}." for block in found}
    outside = [p for name, p in network.named_parameters() if not name.startswith(tuple(outside_names))]
    flops, trained_bytes = {}, {}

    def loss() -> torch.Tensor:
        latents = torch.zeros(1, 16, 5, 60, 104, device="meta")
        text = torch.zeros(1, 512, 4096, device="meta")
        return network(latents, torch.zeros(1, device="meta"), text, return_dict=False)[0].sum()

    for schedule in SCHEDULES:
        trained = plan(network, found, outside, schedule)
        with counting.flop_counter() as counter:
            loss().backward()
        flops[schedule] = counter.get_total_flops()
        trained_bytes[schedule] = sum(p.nbytes for p in trained)
        network.zero_grad(set_to_none=True)
    rate = 0.4 * 312e12
    weights = sum(p.nbytes for p in network.parameters())
    constants = Constants(
        compute_s={schedule: count / rate for schedule, count in flops.items()},
        reduced_bytes=trained_bytes,
        bandwidth=12.5e9,
        latency_s=30e-6,
        decode_rate=6.0,
        clips=1,
        blocked_s=3 * weights / 12e9,
        steps_between_checkpoints=500,
        spread=0.02,
    )
    sources = {
        "compute_s": f"counted FLOPs {flops} over an assumed 0.4 · 312 TFLOP/s (A100, bf16)",
        "reduced_bytes": "counted: float32 gradients of trained parameters",
        "bandwidth": "assumed: 100 Gbit/s for each GPU between nodes, not overlapped with the backward pass",
        "latency_s": "assumed",
        "decode_rate": "assumed: 12 CPUs a GPU at two clips of 17 frames of 832x480 a second for every four",
        "clips": "setting",
        "blocked_s": f"assumed 12 GB/s to the host, {3 * weights} bytes of weights and moments counted",
        "steps_between_checkpoints": "setting",
        "spread": "assumed",
    }
    return constants, sources


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    repeats: Annotated[int, typer.Option(help="Timed steps of each arm and turn.")] = 15,
    turns: Annotated[int, typer.Option(help="Turns of each number of workers.")] = 2,
) -> None:
    """Measure 1 and 2 workers, check the model against them, predict 8 to 1,024 GPUs; writes results/scaling.json."""
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
            foreseen = predicted(constants, schedule, workers)
            # What no step here does: wait for data, save.
            foreseen_s = foreseen["compute_s"] + foreseen["all_reduce_s"] + foreseen["slowest_s"]
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
    wan, wan_sources = gpus()
    figures += rows(wan, GPUS, {"machine": "A100 as assumed, Wan 2.1 1.3B, one clip a GPU"})
    common.write("scaling", figures, device="cpu", repeats=turns * repeats, more={
        "constants": [
            {"machine": machine["machine"], "values": dataclasses.asdict(constants), "from": sources},
            {"machine": "A100 as assumed", "values": dataclasses.asdict(wan), "from": wan_sources},
        ],
        "model": __doc__,
        "cores": os.cpu_count(),
    })  # fmt: skip
    columns = ("gpus", "schedule", "samples_per_s", "efficiency", "measured", "step_s")
    common.show("Scaling", [{column: figure[column] for column in columns} for figure in figures])


if __name__ == "__main__":
    app()
