"""A training on the terminal: a bar where there is one, a line now and then where there is none."""

from collections import deque
from typing import Any, Literal

from rich.progress import TextColumn

from entprog.config import Experiment
from pipelines import terminal
from pipelines.training import standing


class Display:
    """Shows what rank 0 posts, while it is open."""

    def __init__(self, experiment: Experiment):
        train = experiment.train
        self.by: Literal["step", "charged_s", "flops"] = (
            "step" if train.steps else "charged_s" if train.seconds else "flops"
        )
        self.total = train.steps or train.seconds or train.flops
        self.elastic, self.most = train.min_workers is not None, train.workers
        self.budgets = {
            entry: budget for name, entry in standing.BUDGETS.items() if (budget := getattr(train, name.split(".")[1]))
        }
        self.recent: deque[dict[str, Any]] = deque(maxlen=standing.RECENT_STEPS)
        """Steps of the workers that train now."""
        self.bar = terminal.progress_bar(TextColumn("{task.fields[eta]}"))
        self.task = self.bar.add_task("starting workers", total=self.total, eta="")

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def line(self, text: str) -> None:
        self.bar.console.print(text)

    def show(self, item: dict[str, Any]) -> None:
        if "workers" in item:
            self.recent.clear()
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
        self.recent.append(step)
        recent = list(self.recent)
        _, left_s = standing.ahead(recent, self.budgets)
        eta = "" if left_s is None else f"ETA {terminal.duration(left_s)}"
        doing = f"stage {step['stage'] + 1} {step['phase']}, {len(step['trained'])} blocks"
        text = f"{doing}, loss {step['loss']:.4f}, {standing.clips_per_s(recent):.3g} clips/s"
        self.bar.update(self.task, completed=step[self.by], description=text, eta=eta)
        if step["held_out_loss"] is not None:
            self.bar.console.print(
                f"step {step['step']:>6}  held-out loss {step['held_out_loss']:.5f}  {text}, "
                f"{terminal.duration(step['charged_s'])} charged{eta and f', {eta}'}"
            )
        if "decision" in step:
            decision = step["decision"]
            known = [e for e in decision["efficiencies"] if e["value"] is not None]
            found = ", ".join(f"m={e['m']}: {e['value']:.3g}" for e in known)
            self.bar.console.print(
                f"stage {decision['stage'] + 1}: trains {len(decision['plan']['trainable'])} blocks "
                f"({decision['reason']}{'; loss drop per cost ' + found if found else ''})"
            )
