"""How a training step scales, by a model of few constants: for any number of workers, ways to share and networks.

    step(N) = compute + the wait for the slowest of N + exposed communication + waiting for data + checkpoints
    the slowest of N   = compute · spread · sqrt(2 ln N)                              (independent normal steps)
    ring(b, n)         = (n - 1) / n · b / bandwidth                                  (all-gather, or reduce-scatter)
    waiting for data   = max(0, clips of a worker / decode rate - compute)

    ddp                all-reduce of the trained gradients: 2 · ring(trained, N), after the backward pass
    fsdp               ring(gathered, N) in the forward pass; ring(gathered again + trained, N) in the backward pass,
                       of which every weight's rows are filled up to a multiple of N
    hsdp               as fsdp among the GPUs of a node; then 2 · ring(trained / GPUs of a node, nodes) between nodes

What overlaps is exposed where it takes longer than the pass beside it, and always for one of its parts: the first that
is gathered, the last that is reduced. `in_code` says whether the code does that today. `ddp` sends a bucket of
gradients as soon as the backward pass has its last one (`entprog.distributed.reducing`); without overlap is what it did
before. `fsdp` is torch's `fully_shard`, block by block, which on GPUs gathers the next block and reduces the last one
beside the computing. How far either hides on a GPU nobody has measured here. Shards inside a node with replicas across
nodes (HSDP) are `train.replicas`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from entprog import models
from entprog.blocks import HALF, Block, blocks, layer_weights, unfreeze
from entprog.cost import counting
from entprog.distributed.reducing import BUCKET_BYTES
from entprog.scoring.split import Costs

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SCHEDULES = ("full", "entprog")
QUARTER = 0.25
"""Share of the blocks that Ent-Prog's plan trains, spread over depth, residual backward."""
NODE = 8
"""GPUs of a node."""
Parallel = Literal["ddp", "fsdp", "hsdp"]


@dataclass(frozen=True)
class Constants:
    """Constants of one kind of machine and network: seconds, bytes, and rates per second."""

    compute_s: dict[str, float]
    """Schedule → forward, backward and update of one worker's batch."""
    forward_s: float
    """Of one worker's batch."""
    forward_bytes: dict[int, int]
    """Ranks that hold a copy in parts → bytes that are brought together for a forward pass."""
    backward_bytes: dict[str, dict[int, int]]
    """Schedule → the same of a backward pass, and what its gradients in float32 are reduced from."""
    reduced_bytes: dict[str, int]
    """Schedule → gradient bytes all-reduced in an update: of trained parameters only."""
    parts: int
    """Parts that weights in parts are gathered, and their gradients reduced in."""
    bucket_bytes: int
    """What of gradients is all-reduced at once."""
    bandwidth: float
    """Bytes a second between nodes, of each worker, in a ring."""
    latency_s: float
    inside_bandwidth: float
    """Bytes a second between the workers of a node, of each, in a ring."""
    decode_rate: float
    """Clips a second for each worker's share of the CPUs."""
    clips: int
    """Clips of one worker in an update."""
    blocked_s: float
    """Seconds for which a checkpoint blocks training."""
    steps_between_checkpoints: int
    spread: float
    """Standard deviation of a step over its mean, on one worker."""


@dataclass(frozen=True)
class Arrangement:
    """How workers share an update."""

    parallel: Parallel
    overlaps: bool
    in_code: bool


TODAY = Arrangement("ddp", overlaps=True, in_code=True)
ARRANGEMENTS = (
    TODAY,
    Arrangement("ddp", overlaps=False, in_code=False),
    Arrangement("fsdp", overlaps=True, in_code=True),
    Arrangement("hsdp", overlaps=True, in_code=True),
)
NETWORKS: dict[str, dict[str, float]] = {
    # 100 Gbit/s for each GPU; 30 µs for a message from host to host over TCP. Both assumed.
    "100 Gbit/s": {"bandwidth": 12.5e9, "latency_s": 30e-6},
    # AWS names 3,200 Gbit/s of EFA for a p5.48xlarge (aws.amazon.com/ec2/instance-types/p5), 50 GB/s for each of its
    # eight H100s. Assumed: four fifths of that in a ring, and 15 µs for a message.
    "EFA, 400 Gbit/s": {"bandwidth": 0.8 * 50e9, "latency_s": 15e-6},
}


def _ring(size: float, workers: float, bandwidth: float) -> float:
    """Seconds of an all-gather or a reduce-scatter."""
    return (workers - 1) / workers * size / bandwidth if workers > 1 else 0.0


def messages(constants: Constants, schedule: str, parallel: Parallel) -> int:
    """How many there are of each kind of communication."""
    return constants.parts if parallel != "ddp" else -(-constants.reduced_bytes[schedule] // constants.bucket_bytes)


def wire(constants: Constants, schedule: str, workers: int, parallel: Parallel) -> tuple[float, float]:
    """Seconds of communication in the forward and in the backward pass, or after it."""
    trained = constants.reduced_bytes[schedule]
    wait = constants.latency_s * math.log2(workers) * messages(constants, schedule, parallel)
    if parallel == "ddp":
        return 0.0, 2 * _ring(trained, workers, constants.bandwidth) + wait
    if parallel == "fsdp":
        ahead, back = constants.forward_bytes[workers], constants.backward_bytes[schedule][workers]
        return (
            _ring(ahead, workers, constants.bandwidth) + wait,
            _ring(back, workers, constants.bandwidth) + 2 * wait,
        )
    node = min(NODE, workers)
    ahead, back = constants.forward_bytes[node], constants.backward_bytes[schedule][node]
    between = 2 * _ring(trained / node, workers / node, constants.bandwidth) + wait
    return _ring(ahead, node, constants.inside_bandwidth), _ring(back, node, constants.inside_bandwidth) + between


def predicted(constants: Constants, schedule: str, workers: int, arrangement: Arrangement = TODAY) -> dict[str, float]:
    """Seconds of one update, by part."""
    compute = constants.compute_s[schedule]
    slowest = compute * constants.spread * math.sqrt(2 * math.log(workers)) if workers > 1 else 0.0
    ahead, back = wire(constants, schedule, workers, arrangement.parallel) if workers > 1 else (0.0, 0.0)
    exposed = ahead + back
    if arrangement.overlaps:
        backward = compute - constants.forward_s
        one = exposed / messages(constants, schedule, arrangement.parallel)
        exposed = max(0.0, ahead - constants.forward_s) + max(one, back - backward)
    wait = max(0.0, constants.clips / constants.decode_rate - compute)
    holders = {"ddp": 1, "fsdp": workers, "hsdp": min(NODE, workers)}[arrangement.parallel]
    save = constants.blocked_s / constants.steps_between_checkpoints / holders
    return {"compute_s": compute, "slowest_s": slowest, "exposed_s": exposed, "wait_s": wait, "checkpoint_s": save}


def rows(constants: Constants, arrangement: Arrangement, counts: Sequence[int], about: dict[str, Any]) -> list[dict]:
    """A figure for each schedule and number of workers."""
    out = []
    for schedule in constants.compute_s:
        one = sum(predicted(constants, schedule, 1).values())
        for workers in counts:
            parts = predicted(constants, schedule, workers, arrangement)
            step = sum(parts.values())
            rate = workers * constants.clips / step
            row = {"gpus": workers, "schedule": schedule, **vars(arrangement), "samples_per_s": rate}
            row |= {"efficiency": one / step, "measured": False, "step_s": step, **parts}
            out.append(row | {"wire_s": sum(wire(constants, schedule, workers, arrangement.parallel)), **about})
    return out


def plan(network, found, outside, schedule: str) -> list[torch.nn.Parameter]:
    """Put a schedule's typical plan in force; the trained parameters."""
    names = [block.name for block in found]
    if schedule == "full":
        return unfreeze(network, found, names, outside)
    every = round(1 / QUARTER)
    return unfreeze(network, found, names[every - 1 :: every], outside, "residual")


def gathered(network: nn.Module, found: Sequence[Block], ranks: int) -> dict[str, int]:
    """Bytes that ranks which hold parts of a network bring together for a pass under bfloat16 autocast, without
    adapters: of each block, and under "" of what lies outside them, norms of blocks among that
    (`entprog.distributed.fsdp.shard`)."""
    rounded = {block.name: [weight for _, weight in layer_weights(block.module)] for block in found}
    halved = {weight for weights in rounded.values() for weight in weights}
    out = {name: _filled(weights, ranks) * HALF.itemsize for name, weights in rounded.items()}
    return out | {"": 4 * _filled((p for p in network.parameters() if p not in halved), ranks)}


def _filled(weights: Iterable[torch.Tensor], ranks: int) -> int:
    """Numbers of weights whose rows are filled up until every rank has as many."""
    return sum(-(-len(weight) // ranks) * ranks * weight[0].numel() for weight in weights)


# ---- networks on GPUs, counted without their weights ----

WAN = {"text_dim": 4096, "freq_dim": 256}
WAN_1_3B = {**WAN, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {**WAN, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
H200_STEP_S = 0.2880
"""Full training's step in benchmarks/results/step_cost_h200.json: WAN_1_3B, two clips of 3,200 tokens, bfloat16."""
H200_LATENTS = (2, 16, 8, 40, 40)
"""Of those clips."""


def counted(sizes: dict[str, int], latents: Sequence[int], schedule: str) -> dict[str, Any]:
    """FLOPs of a plan's forward and whole step, of each block's forward, and bytes; on the real class."""
    models.family("wan")  # its blocks are known from then on
    with torch.device("meta"):
        network = WanTransformer3DModel(**sizes)
    found = blocks(network)
    names = tuple(f"{block.name}." for block in found)
    outside = [p for name, p in network.named_parameters() if not name.startswith(names)]
    trained = plan(network, found, outside, schedule)
    chosen = [block.name for block in found if any(p.requires_grad for p in block.module.parameters())]
    whole = {ranks: gathered(network, found, ranks) for ranks in GPUS}
    marks: list[int] = []
    with counting.flop_counter() as counter:
        for block in found:
            block.module.register_forward_pre_hook(lambda *_: marks.append(counter.get_total_flops()))
            block.module.register_forward_hook(lambda *_: marks.append(counter.get_total_flops()))
        noisy = torch.zeros(*latents, device="meta")
        text = torch.zeros(latents[0], 512, 4096, device="meta")
        out = network(noisy, torch.zeros(latents[0], device="meta"), text, return_dict=False)[0].sum()
        forward = counter.get_total_flops()
        out.backward()
    own = tuple(end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True))
    return {
        "forward": forward,
        "step": counter.get_total_flops(),
        "costs": Costs(own, forward - sum(own)),
        "trained_bytes": sum(p.nbytes for p in trained),
        "forward_bytes": {ranks: sum(each.values()) for ranks, each in whole.items()},
        "backward_bytes": {
            ranks: sum(each[name] for name in ("", *chosen)) + 4 * _filled(trained, ranks)
            for ranks, each in whole.items()
        },
        "weight_bytes": sum(p.nbytes for p in network.parameters()),
    }


def h200_rate() -> float:
    """FLOP/s of full training that an H200 was measured at."""
    return counted(WAN_1_3B, H200_LATENTS, "full")["step"] / H200_STEP_S


def gpus(network: str) -> tuple[Constants, dict[str, str]]:
    """Wan 2.1 1.3B, 17 frames of 832x480 as latents, one clip a GPU, and where each constant comes from."""
    found = {schedule: counted(WAN_1_3B, (1, 16, 5, 60, 104), schedule) for schedule in SCHEDULES}
    rate, full = h200_rate(), found["full"]
    constants = Constants(
        compute_s={schedule: each["step"] / rate for schedule, each in found.items()},
        forward_s=full["forward"] / rate,
        forward_bytes=full["forward_bytes"],
        backward_bytes={schedule: each["backward_bytes"] for schedule, each in found.items()},
        reduced_bytes={schedule: each["trained_bytes"] for schedule, each in found.items()},
        parts=len(full["costs"].blocks) + 1,
        bucket_bytes=BUCKET_BYTES,
        **NETWORKS[network],
        inside_bandwidth=0.8 * 450e9,
        decode_rate=6.0,
        clips=1,
        blocked_s=3 * full["weight_bytes"] / 12e9,
        steps_between_checkpoints=500,
        spread=0.02,
    )
    flops = {schedule: each["step"] for schedule, each in found.items()}
    sources = {
        "compute_s": f"counted FLOPs {flops} over {rate:.3g} FLOP/s, measured: full training on an H200",
        "forward_s": f"counted FLOPs {full['forward']} over the same",
        "forward_bytes": "counted: linear layers of blocks in bfloat16, the rest in float32",
        "backward_bytes": "counted: those of trained blocks and outside blocks; float32 gradients of what is trained",
        "reduced_bytes": "counted: float32 gradients of trained parameters",
        "parts": "counted: blocks, and what lies outside them",
        "bucket_bytes": "setting",
        "bandwidth": f"assumed: {network} for each GPU",
        "latency_s": "assumed",
        "inside_bandwidth": "assumed: four fifths of 450 GB/s, an H100's NVLink in one direction",
        "decode_rate": "assumed: 12 CPUs a GPU at two clips of 17 frames of 832x480 a second for every four",
        "clips": "setting",
        "blocked_s": f"assumed 12 GB/s to the host, {3 * full['weight_bytes']} bytes of weights and moments counted",
        "steps_between_checkpoints": "setting",
        "spread": "assumed",
    }
    return constants, sources
