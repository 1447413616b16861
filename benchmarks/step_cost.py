"""What a step of each plan costs, measured: against full training, the counted limit and the cost model.

    python -m benchmarks.step_cost --threads 1           # 12 small blocks on the CPU; minutes
    python -m benchmarks.step_cost --device cuda         # Wan 1.3B's width and depth, bfloat16 autocast, fp8, profile

Torch and diffusers alone: no Ray. A step is forward, backward, clipping and AdamW on one batch. All plans under one
setting of checkpointing and compile run in turns with full training under the same setting, and are measured against
it. Leaves benchmarks/results/step_cost_cpu.json or step_cost_gpu.json, and with --profile step_cost_…_profile.txt:
where the time of full training's step and of the smallest residual plan's goes, operator by operator.

Memory is the allocator's peak on a GPU and counted (`entprog.cost.counting`) on a CPU. Rows in fp8 are residual plans,
whose frozen blocks alone run in it; their counted limit is that of full precision, which they may pass.
"""

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn
from torch.profiler import ProfilerActivity

from benchmarks import common
from entprog import config, models
from entprog.blocks import blocks, fp8
from entprog.config import Backward
from entprog.data.clips import Latents
from entprog.diffusion import losses
from entprog.errors import UserError
from entprog.schedule import plans
from entprog.schedule.freezing import Freeze
from entprog.schedule.plans import Plan
from entprog.schedule.prices import Prices
from entprog.training import optimizer
from pipelines import terminal
from pipelines.command import usage

app = usage.app("Time, FLOPs and peak memory of a training step, plan by plan.")

SMALL = {"attention_head_dim": 64, "text_dim": 16, "freq_dim": 64}
LARGE = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
"""Sizes of Wan 1.3B."""
CHANNELS = 3
"""Channels of the clips: pixels of 2 x 2 to a token, no VAE."""
FRACTIONS = (0.25, 0.5, 0.75)
"""m/L of the plans beside full training."""
FULL = "full"
MODEL = "cost model"
"""The arm that measures the cost model: every round anew, so that what drifts meets forecast and step alike."""
Position = Literal["scattered", "last"]
SHOWN = {
    "speedup": "speed-up",
    "speedup_limit": "limit",
    "flops_ratio": "FLOPs",
    "memory_ratio": "memory",
    "predicted_over_measured_time": "time*",
    "predicted_over_measured_memory": "memory*",
    "note": "note",
}
"""Figures on the terminal; *: predicted over measured."""


@app.command()
def main(
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks. Default: 12 (GPU: 30).")] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, of 64 (GPU: 128) each. Default: 4 (GPU: 12).")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip. Default: 8 (GPU: 5).")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Its height, 2 to a token. Default: 16 (GPU: 64).")] = None,
    width: Annotated[int | None, typer.Option(min=16, help="Its width. Default: 16 (GPU: 40).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Clips of a step. Default: 1 (GPU: 2).")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each plan, interleaved.")] = 5,
    set_position: Annotated[
        Position, typer.Option(help="Trained blocks: spread evenly over depth, the first among them, or the last ones.")
    ] = "scattered",
    outside: Annotated[
        Literal["always", "conditions", "never"] | None,
        typer.Option(
            help="Parameters outside blocks, as schedule.outside. Default: always; for the last blocks never."
        ),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Rows with torch.compile too. Default: on a GPU."),
    ] = None,
    fp8_rows: Annotated[
        bool | None,
        typer.Option("--fp8/--no-fp8", help="Rows with frozen blocks in fp8 too. Default: on a GPU that has it."),
    ] = None,
    profile: Annotated[
        bool | None, typer.Option("--profile/--no-profile", help="Write the profile too. Default: on a GPU.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch's CPU threads. Default: torch's own choice.")
    ] = None,
) -> None:
    """Train a Wan transformer with new weights under every plan; print and keep what a step costs."""
    device = device or common.default_device()
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here: --device cpu")
    if threads:
        torch.set_num_threads(threads)
    layers, heads = layers or (30 if on_gpu else 12), heads or (12 if on_gpu else 4)
    shape = {"frames": frames or (5 if on_gpu else 8), "height": height or (64 if on_gpu else 16)}
    shape["width"] = width or (40 if on_gpu else 16)
    if fp8_rows is None:
        fp8_rows = on_gpu and torch.cuda.get_device_capability(device) >= fp8.CAPABILITY
    half = on_gpu or fp8_rows
    try:
        if fp8_rows:
            fp8.check_installed()
        experiment = config.build(
            {
                "model": {
                    "init": network_of(layers, heads, on_gpu),
                    "vae": "none",
                    "dtype": "bfloat16" if half else "float32",
                },
                "data": {"shape": shape, "batch_size": batch_size or (2 if on_gpu else 1)},
                "train": {"steps": 1, "learning_rate": 1e-5},
                "schedule": {"outside": outside or ("never" if set_position == "last" else "always")},
            }
        )
    except UserError as error:
        raise typer.BadParameter(str(error)) from None
    bench = Bench(experiment, set_position, device)
    if compiled is None:
        compiled = on_gpu
    # Compiled ones last: blocks stay compiled.
    settings = [
        Setting(checkpointing=checkpointing, compile=compile_, fp8=low)
        for compile_ in [False, True][: 1 + compiled]
        for checkpointing in (False, True)
        for low in [False, True][: 1 + fp8_rows]
    ]
    if profile is None:
        profile = on_gpu
    figures, profiles, path = [], [], None
    for setting in settings:  # each is kept as it comes: a later one may end badly
        figures += bench.figures(setting, repeats)
        path = common.write("step_cost_gpu" if on_gpu else "step_cost_cpu", figures, device=device, repeats=repeats)
        if profile:
            profiles += bench.profiles(setting)
            path.with_name(f"{path.stem}_profile.txt").write_text("\n\n".join(profiles) + "\n")
    common.show(
        "A step of each plan over full training's (ckpt: checkpointing; *: predicted over measured)",
        [{"plan": label(row["plan"])} | {SHOWN[name]: shown(row[name]) for name in SHOWN} for row in figures],
    )
    terminal.console.print(f"Wrote {path}{', and the profile beside it' if profile else ''}")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all plans of some rows have in common."""

    checkpointing: bool
    compile: bool
    fp8: bool
    """Frozen blocks of residual plans in fp8; the only plans beside full training then."""

    def of(self, experiment: config.Experiment) -> config.Experiment:
        """The experiment under this setting."""
        model = {"gradient_checkpointing": self.checkpointing, "compile_blocks": self.compile}
        schedule = {"backward": ["exact", "residual"], **({"frozen_precision": "fp8"} if self.fp8 else {})}
        return config.build(config.merge(experiment.model_dump(), {"model": model, "schedule": schedule}))

    def __str__(self) -> str:
        return ", ".join(f"{name} {'on' if on else 'off'}" for name, on in asdict(self).items())


def network_of(layers: int, heads: int, on_gpu: bool) -> dict[str, Any]:
    """A Wan transformer's configuration."""
    sizes = LARGE if on_gpu else SMALL
    inner = heads * sizes["attention_head_dim"]
    # Wan 1.3B: 8960 of 1536.
    feed_forward = {"ffn_dim": inner * 35 // 6 if on_gpu else 4 * inner, "cross_attn_norm": True}
    return {
        **sizes, **feed_forward, "num_attention_heads": heads, "num_layers": layers, "out_channels": CHANNELS,
        "patch_size": [1, 2, 2],
    }  # fmt: skip


def shown(value: Any) -> Any:
    """What a table says: three digits, or a dash where a row has no figure."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else value


SHORT = {"checkpointing": "ckpt", "compile": "comp", "fp8": "fp8"}


def label(plan: dict[str, Any]) -> str:
    """A plan in words, settings that are on after it."""
    on = [short for name, short in SHORT.items() if plan[name]]
    return " ".join([f"{plan['m']}/{plan['L']} {plan['backward']}", *on])


class Bench:
    """One network and its optimizer, trained under one plan after another."""

    def __init__(
        self,
        experiment: config.Experiment,
        position: Position,
        device: str,
        fractions: Sequence[float] = FRACTIONS,
        prepare: Callable[[nn.Module], None] = lambda network: None,
    ):
        """fractions: m/L of the plans beside full training; prepare: as `load` takes it."""
        self.experiment = experiment
        self.position = position
        self.fractions = fractions
        self.device = torch.device(device)
        with self.device:  # new weights are drawn where they are used: a CPU takes half a minute for a billion
            self.denoiser = models.family(experiment.model.family).load(experiment.model, device, 0, prepare)
        self.found = blocks(self.denoiser.network)
        self.names = [block.name for block in self.found]
        self.optimizer = optimizer.adamw(self.denoiser.network, experiment.train)
        shape, clips = self.denoiser.latent_shape(experiment.data.shape), experiment.data.batch_size
        generator = torch.Generator().manual_seed(0)
        clean = torch.randn(clips, *shape, generator=generator, dtype=torch.float32).to(device)
        self.batch = Latents(clean, dict.fromkeys(self.denoiser.conditions, clean), torch.arange(clips))

    def plans(self, backwards: Sequence[Backward]) -> dict[str, Plan]:
        """Full training and the others, each by a name; those first, smallest first."""
        shape = self.experiment.data.shape
        out = {FULL: plans.full(self.names, shape)}
        for fraction in self.fractions:
            chosen = trained(self.names, plans.count(fraction, len(self.names)), self.position)
            for backward in backwards:
                plan = plans.of_set(chosen, self.names, backward, shape)
                if plan not in out.values():
                    out[f"{len(chosen)} {backward}"] = plan
        return out

    def figures(self, setting: Setting, repeats: int, only: Collection[str] = ()) -> list[dict[str, Any]]:
        """Every plan's row under one setting; one that runs out of memory says so, the others go on.

        only: names of the plans that are run; none: all of them.
        """
        experiment = setting.of(self.experiment)
        by_flops = config.build(config.merge(experiment.model_dump(), {"schedule": {"clock": "flops"}}))
        terminal.console.print(f"Steps with {setting} …")
        freeze = Freeze(self.denoiser, self.found, experiment)
        prices, flops = (Prices(self.denoiser, self.found, self.batch, freeze, e, {}) for e in (experiment, by_flops))
        flops.counts = prices.counts
        known = self.plans(("residual",) if setting.fp8 else ("exact", "residual"))
        known = {name: plan for name, plan in known.items() if not only or name in only}
        failed: dict[str, str] = {}
        uncounted: dict[str, str] = {}
        foreseen = {}
        forecasts: list[dict[str, float]] = []
        for name, plan in known.items():
            with self.guarded(name, uncounted):
                foreseen[name] = self.foreseen(plan, prices, flops)

        def forecast() -> None:
            prices.models.clear()
            with self.guarded(MODEL, failed):
                forecasts.append({name: prices.step(plan) for name, plan in known.items()})

        measured = common.interleaved(
            {MODEL: forecast} | {name: partial(self.turn, name, failed) for name in known},
            repeats,
            self.device,
            warm_up=0,
            prepare=lambda name: name == MODEL or self.prepare(name, known[name], freeze, failed),
        )
        rows = []
        for name, plan in known.items():
            row = self.blank(plan, setting) | foreseen.get(name, {})
            if name not in failed:
                row |= compared(row, measured[name], None if FULL in failed else measured.get(FULL))
                if MODEL not in failed:
                    row |= foretold([each[name] for each in forecasts], measured[name].seconds)
            rows.append(row)
        named = dict(zip(known, rows, strict=True))
        whole = named.get(FULL, {})
        for name, row in named.items():
            row["memory_ratio"] = over(row["memory_bytes"], whole.get("memory_bytes"))
            row["flops_ratio"] = over(row["flops"], whole.get("flops"))
            row["note"] = failed.get(name) or ("counting ran out of memory" if name in uncounted else "")
        if setting.fp8:  # full training has no frozen blocks: it is a row of the setting without fp8
            named.pop(FULL, None)
        return sorted(named.values(), key=lambda row: row is whole)

    def profiles(self, setting: Setting) -> list[str]:
        """Where the time of one step goes: of full training, and of the smallest residual plan."""
        freeze = Freeze(self.denoiser, self.found, setting.of(self.experiment))
        known, failed, out = self.plans(("residual",)), {}, []
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
        for name in [FULL, next(name for name in known if name != FULL)][setting.fp8 :]:
            self.prepare(name, known[name], freeze, failed)
            if name in failed:
                out.append(f"{name}, {setting}, {failed[name]}")
                continue
            with torch.profiler.profile(activities=activities) as profiler:
                self.turn(name, failed)
            order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)
            out.append(f"{name}, {setting}{', ' + failed[name] if name in failed else ''}\n{table}")
        return out

    def prepare(self, name: str, plan: Plan, freeze: Freeze, failed: dict[str, str]) -> None:
        """Put a plan in force, no moments but its own beside it, and run a step that is not timed: the timed one owes
        nothing to what ran before."""
        if name in failed:
            return
        freeze.put(plan)
        self.trained = freeze.trained
        optimizer.follow(self.optimizer, self.trained, "drop")
        self.turn(name, failed)

    def turn(self, name: str, failed: dict[str, str]) -> None:
        """One update under the plan in force."""
        if name in failed:
            return
        with self.guarded(name, failed):
            losses.training_loss(self.denoiser, self.batch, self.experiment.train).backward()
            nn.utils.clip_grad_norm_([p for p in self.trained if p.grad is not None], 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def guarded(self, name: str, failed: dict[str, str]) -> Iterator[None]:
        """Notes a plan that runs out of memory."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed[name] = "out of memory"
            terminal.complain("out of memory", f"{name}: left out (try a smaller clip: --frames, --height, --width)")
        if name in failed:
            self.optimizer.zero_grad(set_to_none=True)
            optimizer.follow(self.optimizer, (), "drop")  # moments may be there in part: the next step would miss them
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def blank(self, plan: Plan, setting: Setting) -> dict[str, Any]:
        """What a row says before anything is measured."""
        parameters = sum(p.numel() for p in self.denoiser.network.parameters())
        size = self.denoiser.network.config
        return {
            "model": f"Wan, {len(self.names)} blocks x {size.num_attention_heads * size.attention_head_dim}",
            "parameters": parameters,
            "dtype": self.experiment.model.dtype,
            "tokens": self.batch.clean[:, 0].numel() // 4,
            "clips": len(self.batch.position),
            "plan": {
                "m": plan.m,
                "L": len(self.names),
                "backward": plan.backward,
                **asdict(setting),
            },
            "trained": list(plan.trainable),
            "outside": self.experiment.outside,
            "speedup": None,
            "speedup_limit": self.limit(plan, setting.checkpointing),
            "speedup_smallest": None,
            "speedup_largest": None,
            "speedup_cpu_time": None,
            "step_s": None,
            "step_s_fastest": None,
            "step_s_slowest": None,
            "flops": None,
            "flops_ratio": None,
            "tflops_per_s": None,
            "memory_bytes": None,
            "memory_ratio": None,
            "predicted_s": None,
            "predicted_memory_bytes": None,
            "predicted_over_measured_time": None,
            "predicted_over_measured_time_smallest": None,
            "predicted_over_measured_time_largest": None,
            "predicted_over_measured_memory": None,
            "predicted_over_counted_flops": None,
            "note": "",
        }

    def foreseen(self, plan: Plan, prices: Prices, flops: Prices) -> dict[str, Any]:
        """The cost model's word on memory and FLOPs, and what is counted on the network."""
        counted = prices.counted(plan).step_flops(self.experiment.data.batch_size)
        on_gpu = self.device.type == "cuda"
        return {
            "flops": counted,
            "memory_bytes": None if on_gpu else prices.counted(plan).memory_bytes(self.experiment.data.batch_size),
            "predicted_memory_bytes": prices.memory(plan),
            "predicted_over_counted_flops": flops.model(plan.shape).step(plan.trainable, plan.backward) / counted,
        }

    def limit(self, plan: Plan, checkpointing: bool) -> float:
        """Counted bound of the speed-up, blocks alone, each pass of a block F (method.md §5).

        Forward; gradient to activations of what it crosses; gradient to weights; and with checkpointing one more
        forward of every block with a backward pass.
        """
        share = plan.m / len(self.names)
        if plan.backward == "residual":
            crossed = share
        elif self.experiment.outside == "never":
            crossed = 1 - self.names.index(plan.trainable[0]) / len(self.names)
        else:
            crossed = 1.0
        again = crossed if checkpointing else 0.0
        return (4 if checkpointing else 3) / (1 + crossed + share + again)


def compared(row: dict[str, Any], measured: common.Measured, whole: common.Measured | None) -> dict[str, Any]:
    """A plan's steps against what `row` counts and full training's steps (None: it ran out of memory)."""
    memory = measured.peak_bytes or row["memory_bytes"]
    fastest, slowest = measured.spread_s
    out = {
        "step_s": measured.median_s,
        "step_s_fastest": fastest,
        "step_s_slowest": slowest,
        "tflops_per_s": over(row["flops"], 1e12 * measured.median_s),
        "memory_bytes": memory,
        "predicted_over_measured_memory": over(row["predicted_memory_bytes"], memory),
    }
    if whole is not None:
        names = ("speedup", "speedup_smallest", "speedup_largest")
        out |= dict(zip(names, common.ratio(whole, measured), strict=True))
        out["speedup_cpu_time"] = common.ratio(whole, measured, "cpu_seconds")[0]
    return out


def foretold(forecasts: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """The cost model's seconds against the step of the same round: median, smallest, largest."""
    ratios = [forecast / measured for forecast, measured in zip(forecasts, seconds, strict=True)]
    return {
        "predicted_s": statistics.median(forecasts),
        "predicted_over_measured_time": statistics.median(ratios),
        "predicted_over_measured_time_smallest": min(ratios),
        "predicted_over_measured_time_largest": max(ratios),
    }


def trained(names: Sequence[str], m: int, position: Position) -> list[str]:
    """m of the blocks."""
    return list(names[-m:]) if position == "last" else [names[i * len(names) // m] for i in range(m)]


def is_out_of_memory(error: Exception) -> bool:
    """A GPU's allocator, the CPU's, or Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole


if __name__ == "__main__":
    app()
