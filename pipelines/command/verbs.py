"""The command `entprog VERB …`, which does what `python -m pipelines.VERB …` does.

Only the verb asked for is imported: help must not wait for torch and Ray.
"""

import importlib
import importlib.metadata
import sys

import pipelines

VERBS = {
    "demo": "All of it on real clips, small, in minutes: to see it once.",
    "prepare": "Cut videos of people into shards of clips with pose, ready for training.",
    "score": "Score the blocks of a network by Conditional Entropy Inflation: to look at them first.",
    "train": "Fine-tune on prepared clips: progressively, by Ent-Prog's search or plainly, on a machine or a cluster.",
    "status": "Show where a training stands: steps, time left, losses, where time goes.",
    "tune": "Search for settings: many trainings at equal seconds, the best ones with their uncertainty.",
    "generate": "Generate clips from a checkpoint, a reference image and a motion.",
    "evaluate": "Judge what a checkpoint generates against the truth.",
    "adapter": "Merge a low-rank adapter into its base, or extract one (adapter merge, adapter extract).",
    "publish": "Put a trained pipeline where others find it: a folder, a bucket, a hub.",
    "compare": "Compare training runs: what reaches the target loss sooner, beyond seed noise?",
}
"""In the order of their use."""


def main() -> None:
    """Run the verb that the command line names. An unknown one ends with status 2."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("--help", "-h", "help"):
        print(usage())
        return
    if verb == "--version":
        print(f"entprog {importlib.metadata.version('entprog')}")
        return
    if verb not in VERBS:
        from entprog.config import close_to

        print(f"error: no verb {verb!r}{close_to(verb, VERBS)}; there are: {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    with pipelines.importing():
        job = importlib.import_module(f"pipelines.{verb}")
    job.app(args=rest, prog_name=f"entprog {verb}")


def usage() -> str:
    """What `entprog --help` says."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {meaning}" for verb, meaning in VERBS.items())
    return (
        "Usage: entprog VERB [OPTIONS]\n\n"
        f"Entropy-guided prioritized progressive fine-tuning of human-video diffusion models, on Ray.\n\n{verbs}\n\n"
        "entprog VERB --help explains a verb's options; where it has settings --help-settings explains those. All but\n"
        "status take --dry-run, which checks what it can and does nothing. entprog --version says which one this is."
    )
