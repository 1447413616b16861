"""What replay saves: scoring by Conditional Entropy Inflation with recorded blocks, against L + 1 whole forwards.

    python -m benchmarks.cei_cost                        # 12 and 18 blocks, small, on the CPU; < 2 minutes on two cores
    python -m benchmarks.cei_cost --device cuda          # Wan 1.3B's width in bfloat16

Torch and diffusers alone: no Ray. Both arms do all that scoring does (draws, passes, estimators, loss increase, FLOP
count) and run in turns. Leaves benchmarks/results/cei_cost.json (on a GPU: cei_cost_gpu.json).
"""

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks import common
from entprog import config, models
from entprog.blocks import blocks
from entprog.data.clips import Latents
from entprog.scoring import cei
from pipelines import terminal
from pipelines.command import usage

app = usage.app("Time and FLOPs of CEI scoring: replay against the naive pass.")

SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 384, "text_dim": 16, "freq_dim": 64}
LARGE = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096, "freq_dim": 256}
"""Width of Wan 1.3B."""
CHANNELS = 3
"""Channels of the clips: pixels, no VAE."""
SHOWN = {
    "blocks": "blocks",
    "draws": "draws",
    "replay_over_naive_flops": "FLOPs",
    "replay_over_naive_time": "time",
    "replay_over_naive_cpu_time": "CPU time",
    "replay_s": "replay s",
    "naive_s": "naive s",
    "equal_scores": "equal scores",
}
"""Figures on the terminal."""


@app.command()
def main(
    layers: Annotated[list[int] | None, typer.Option(help="Numbers of blocks. Default: 12 18 (GPU: 12 30).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")] = None,
    draws: Annotated[int, typer.Option(min=4, help="Draws of each of two conditions.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of each arm, interleaved.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch's CPU threads. Default: torch's own choice.")
    ] = None,
) -> None:
    """Score a Wan transformer with new weights both ways; print and keep the ratios."""
    device = device or common.default_device()
    if threads:
        torch.set_num_threads(threads)
    layers = layers or ([12, 30] if device == "cuda" else [12, 18])
    figures, path = [], None
    for number in layers:  # each is kept as it comes
        figures.append(figures_of(number, draws, repeats, device))
        name = "cei_cost_gpu" if device == "cuda" else "cei_cost"
        path = common.write(name, figures, device=device, repeats=repeats)
    common.show("CEI scoring, replay over naive", [{SHOWN[name]: row[name] for name in SHOWN} for row in figures])
    terminal.console.print(f"Wrote {path}")


def figures_of(layers: int, draws: int, repeats: int, device: str) -> dict[str, Any]:
    """One network's figures; time ratios are medians over rounds, with the smallest and largest."""
    on_gpu = device == "cuda"
    settings = config.Model(
        init={**(LARGE if on_gpu else SMALL), "out_channels": CHANNELS, "num_layers": layers, "patch_size": [1, 2, 2]},
        vae="none",
        dtype="bfloat16" if on_gpu else "float32",
    )
    with torch.device(device):  # new weights are drawn where they are used
        denoiser = models.family("wan").load(settings, device, seed=0)
    found = blocks(denoiser.network)
    size = (6, 40, 40) if on_gpu else (2, 16, 16)
    clean = torch.randn(2, CHANNELS, *size, generator=torch.Generator().manual_seed(0)).to(device)
    conditions = [Latents(clean, dict.fromkeys(denoiser.conditions, clean), torch.arange(2))]
    priority = config.Priority(conditions=2, draws=draws)
    tables = {}

    def score(arm: str) -> None:
        tables[arm] = cei.cei(denoiser, found, conditions, priority, replay=arm == "replay")

    measured = common.interleaved({arm: partial(score, arm) for arm in ("replay", "naive")}, repeats, device)
    time, smallest, largest = common.ratio(measured["replay"], measured["naive"])
    cpu_time, *_ = common.ratio(measured["replay"], measured["naive"], "cpu_seconds")
    replay, naive = tables["replay"], tables["naive"]
    return {
        "blocks": layers,
        "parameters": sum(p.numel() for p in denoiser.network.parameters()),
        "dtype": settings.dtype,
        "tokens": clean[0, 0].numel() // 4,
        "draws": replay.conditions * replay.draws,
        "replay_over_naive_flops": replay.flops / naive.flops,
        "replay_over_naive_time": time,
        "time_ratio_smallest": smallest,
        "time_ratio_largest": largest,
        "replay_over_naive_cpu_time": cpu_time,
        "replay_s": measured["replay"].median_s,
        "naive_s": measured["naive"].median_s,
        "equal_scores": [asdict(b) for b in replay.blocks] == [asdict(b) for b in naive.blocks],
    }


if __name__ == "__main__":
    app()
