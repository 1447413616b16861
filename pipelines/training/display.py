"""A training on the terminal: a bar where there is one, a line now and then where there is none."""

import time
from typing import Any, Literal

from entprog.config import Experiment
from pipelines import terminal


class Display:
    """Shows what rank 0 posts, while it is open."""

    def __init__(self, experiment: Experiment):
        train = experiment.train
        self.by: Literal["step", "charged_s", "flops"] = (
            "step" if train.steps else "charged_s" if train.seconds else "flops"
        )
        self.total = train.steps or train.seconds or train.flops
        self.elastic, self.most = train.min_workers is not None, train.workers
        self.blocks = 0
        self.clips, self.since, self.begun = 0, time.time(), 0.0
        """Since the first step heard of."""
        self.bar = terminal.progress_bar()
        self.task = self.bar.add_task("starting workers", total=self.total)

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def line(self, text: str) -> None:
        self.bar.console.print(text)

    def show(self, item: dict[str, Any]) -> None:
        if "scored" in item:
            self.bar.update(self.task, description=f"scoring blocks: condition {item['scored']}/{item['of']}")
        elif "texts" in item:
            self.bar.update(self.task, description=f"encoding texts: {item['texts']}/{item['of']}")
        elif "workers" in item and self.elastic:
            self.bar.console.print(f"Workers: {item['workers']} of {self.most}.")
        elif "resumed" in item:
            self.bar.console.print(f"Resumed from the checkpoint after step {item['resumed']}.")
        elif "decoding" in item:
            self.bar.console.print(f"Clips are decoded {item['decoding']}.")
        elif "waiting" in item:
            self.bar.console.print(item["waiting"])
        elif "warning" in item:
            self.bar.console.print(f"warning: {item['warning']}")
        elif "step" in item:
            self._step(item["step"])

    def _step(self, step: dict[str, Any]) -> None:
        if self.clips == 0:
            self.since, self.begun = time.time(), step[self.by]
        self.clips += step["clips"]
        elapsed = time.time() - self.since
        rate = (self.clips - step["clips"]) / elapsed if elapsed else 0.0
        done = step[self.by] - self.begun
        eta = f", ETA {max(elapsed * (self.total - step[self.by]) / done, 0):.0f} s" if done else ""
        doing = f"stage {step['stage'] + 1} {step['phase']}, {len(step['trained'])} blocks"
        text = f"{doing}, loss {step['loss']:.4f}, {rate:.1f} clips/s"
        self.bar.update(self.task, completed=step[self.by], description=text)
        if step["held_out_loss"] is not None:
            self.bar.console.print(
                f"step {step['step']:>6}  held-out loss {step['held_out_loss']:.5f}  {text}  "
                f"{step['charged_s']:.0f} s charged{eta}"
            )
        if "decision" in step:
            decision = step["decision"]
            known = [e for e in decision["efficiencies"] if e["value"] is not None]
            found = ", ".join(f"m={e['m']}: {e['value']:.3g}" for e in known)
            self.bar.console.print(
                f"stage {decision['stage'] + 1}: trains {len(decision['plan']['trainable'])} blocks "
                f"({decision['reason']}{'; loss drop per cost ' + found if found else ''})"
            )
