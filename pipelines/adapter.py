"""Adapter: merge a low-rank adapter into its base, or extract one out of two networks.

python -m pipelines.adapter merge --adapter out/run/adapter --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output out/merged
python -m pipelines.adapter extract --before out/base --after out/run/model --rank 16 --output out/adapter
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from entprog import storage
from entprog.errors import UserError
from entprog.masking import bare
from pipelines import cli, terminal
from pipelines.command import usage
from pipelines.outputs import claim

app = usage.app("Low-rank adapters: merge one into its base, or extract one out of what training changed.")


class Expert(StrEnum):
    """Which of a base's two networks."""

    high = "high"
    low = "low"


@app.command()
def merge(
    adapter: Annotated[
        str, typer.Option(help="Folder of an adapter, or a file in diffusers' or ComfyUI's keys, also s3:// or gs://.")
    ],
    base: Annotated[
        str, typer.Option(help="The base that it was trained on: a folder, also s3:// or gs://, or a hub name.")
    ],
    output: Annotated[str, typer.Option(help="Folder of the merged pipeline, new or empty, also s3:// or gs://.")],
    family: Annotated[
        str | None, typer.Option(help="Model family of the base, where the adapter does not say.")
    ] = None,
    expert: Annotated[
        Expert | None, typer.Option(help="Which of the base's two networks it is for, where the adapter does not say.")
    ] = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
) -> None:
    """Add the adapter to the base's weights: a pipeline that needs no adapter any more."""

    def work() -> dict[str, Any]:
        from entprog import config, models
        from entprog.models import adapters, experts, finite, folders

        identity = {"merge": adapter, "base": base, **({"expert": str(expert)} if expert else {})}
        folder = cli.output_of(output)
        claim.check(folder, "adapter", identity)
        found = adapters.read(adapter, "--adapter")
        root = folders.locate(base, "--base")
        saved, said = folders.saved(root), found.about.get("expert")
        if expert and said and expert != said:
            raise UserError(
                f"--expert: {bare(adapter)} was trained for the {said} expert, given {expert}: leave it out"
            )
        about = {**saved, **found.about} if found.about else saved
        shape, dtype = about.get("shape"), _dtype(found.about) or _dtype(saved)
        chosen = config.Model(
            family=family or about.get("family", "wan"), base=base, adapter=adapter,
            expert=str(expert) if expert else said,
            conditions=tuple(about.get("conditions", ())),
        )  # fmt: skip
        kind = models.family(chosen.family)
        if not chosen.expert and kind.DENOISER.EXPERTS and experts.are_in(root, saved):
            raise UserError(
                f"--expert: {bare(base)} has two networks, and {bare(adapter)} does not say which one it is for: give "
                "--expert high or --expert low"
            )
        if not about:
            chosen = chosen.model_copy(update={"conditions": _own_conditions(kind, chosen)})
        kind.inspect(chosen)
        parts = f"{len(found.pairs)} layers and {len(found.outside)} whole weights"
        if dry_run:
            terminal.console.print(f"Would merge {parts} of {bare(adapter)} into {bare(base)}, and write {folder}.")
            return {}
        claim.take(folder, "adapter", identity)
        merged = kind.load(chosen)
        if name := finite.not_finite(merged.network.state_dict()):
            raise UserError(f"--base: {bare(base)} with {bare(adapter)} is no trained network: {name} is not finite")
        with storage.scratch_for(folder / "model", last=folders.ABOUT) as scratch:
            merged.save(scratch, shape=config.ClipShape(**shape) if shape else None, **dtype)
        terminal.console.print(f"Merged {parts} of {bare(adapter)} into {bare(base)}: {folder / 'model'}")
        if not dtype:
            terminal.console.print(
                "Neither says which type it was trained under, so that it is sampled in float32: "
                "generate.dtype=bfloat16 takes half of the memory."
            )
        return {"model": str(folder / "model"), "layers": len(found.pairs), "whole_weights": len(found.outside)}

    cli.run("adapter", None if dry_run else output, work, verbose=verbose)


@app.command()
def extract(
    before: Annotated[str, typer.Option(help="The base: a folder, also s3:// or gs://, or a hub name.")],
    after: Annotated[
        str, typer.Option(help="Folder that pipelines.train wrote (its output, or model/ in it), also s3:// or gs://.")
    ],
    output: Annotated[str, typer.Option(help="Folder of the adapter, new or empty, also s3:// or gs://.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    expert: Annotated[
        Expert | None, typer.Option(help="Which of two networks, where there are two: the one trained last.")
    ] = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
) -> None:
    """What training added to a base, as an adapter: the best approximation of that rank, layer by layer."""

    def work() -> dict[str, Any]:
        from entprog import config, models
        from entprog.blocks import blocks
        from entprog.models import adapters, experts, finite, folders

        identity = {"before": before, "after": after, "rank": rank, **({"expert": str(expert)} if expert else {})}
        folder = cli.output_of(output)
        claim.check(folder, "adapter", identity)
        root = folders.locate(after, "--after")
        saved = folders.saved(root)
        if not saved:
            raise UserError(f"--after: {bare(after)} was not written by pipelines.train (it has no entprog.json)")
        family, conditions = saved["family"], tuple(saved["conditions"])
        kind = models.family(family)
        kept = {"family": family, "conditions": conditions, "expert": str(expert) if expert else saved.get("expert")}
        kept |= {name: saved.get(name) for name in ("skeleton", "last_frame", "first_frame")}
        more = {name: saved[name] for name in ("points", "native", "texts", "shape") if saved.get(name)} | _dtype(saved)
        sides = [config.Model(base=name, **kept) for name in (before, str(root))]
        sources = [kind.inspect(side) for side in sides]
        for option, source in zip(("--before", "--after"), sources, strict=True):
            finite.check(source.part, option)
        if len({sum(source.splits) for source in sources}) > 1:
            raise UserError(
                f"--after: {bare(after)} was trained by an earlier version, which gave networks of {bare(before)} "
                "other input channels than this one: extract by that version, or train it anew"
            )
        if extracted := kept["expert"]:
            other = experts.OTHER[extracted]
            terminal.console.print(f"Of the {extracted} expert. What changed in the other one: --expert {other}.")
        if dry_run:
            terminal.console.print(
                f"Would extract an adapter of rank {rank} out of {bare(after)} over {bare(before)} into {folder}."
            )
            return {}
        claim.take(folder, "adapter", identity)
        base, tuned = (kind.load(side) for side in sides)
        about = {name: value for name, value in kept.items() if value is not None} | {"base": before} | more
        found, lost = adapters.extract(base.network, tuned.network, blocks(tuned.network), rank, about)
        if not found.pairs:
            raise UserError(
                f"--after: no linear layer of {bare(after)} differs from {bare(before)}'s: there is nothing to adapt"
            )
        with storage.scratch_for(folder / "adapter", last=adapters.ABOUT) as scratch:
            adapters.write(scratch, found, tuned.PART)
            tuned.save_text(scratch)
        terminal.console.print(
            f"Extracted {len(found.pairs)} layers at rank {rank}, without {lost:.1%} of their change; "
            f"{len(found.outside)} other weights that changed are whole beside them: {folder / 'adapter'}"
        )
        whole = len(found.outside)
        return {"adapter": str(folder / "adapter"), "layers": len(found.pairs), "whole_weights": whole, "lost": lost}

    cli.run("adapter", None if dry_run else output, work, verbose=verbose)


def _dtype(about: Mapping[str, Any]) -> dict[str, str]:
    """{"dtype": the autocast type of training}, as an adapter's or a saved network's record has it; {} where none."""
    known = about.get("dtype") or about.get("provenance", {}).get("dtype")
    return {"dtype": known} if known else {}


def _own_conditions(kind: Any, chosen: Any) -> tuple[str, ...]:
    """Conditions that a base of others has already. chosen: settings that name it and its expert."""
    from entprog.models import inputs, vaes
    from entprog.models.reference_frame import ReferenceFrameDenoiser

    both = chosen.model_copy(update={"conditions": inputs.CONDITIONS, "adapter": None})
    source = kind.inspect(both, weights=False)
    family, channels = kind.DENOISER, 3 if source.vae is None else vaes.channels(source.vae)
    if issubclass(family, ReferenceFrameDenoiser):  # beside the clip, in places of their own
        return source.conditions
    return family.own_conditions(source.network.config, channels)


if __name__ == "__main__":
    app()
