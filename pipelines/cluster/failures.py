"""What went wrong inside Ray, without Ray's traces around it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from entprog.data.latents import DamagedLatentsError
from entprog.data.shards import DamagedShardError
from entprog.errors import UserError

OURS = (DamagedShardError, DamagedLatentsError, UserError)


@contextmanager
def plainly() -> Iterator[None]:
    """An error of ours that a task or an actor raised is raised as itself; every other as it comes."""
    try:
        yield
    except Exception as error:
        found = ours(error)
        if found is None:
            raise
        raise found from None


def ours(error: BaseException) -> UserError | None:
    """The error of ours inside one of Ray's. Pickling drops the cause: only its text, one line, comes across."""
    if isinstance(error, UserError):
        return error
    for kind in OURS:
        if found := re.search(rf"\b{kind.__name__}: (.+)", str(error)):
            return kind(found[1])
    return None


def reason(error: BaseException) -> str:
    """The line that names the cause, out of Ray's nested traces."""
    text = "\n".join(map(str, of_workers(error))) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].rsplit(".", 1)[-1].endswith(("Error", "Exception"))]
    return (named or lines or [type(error).__name__])[-1]


def of_workers(error: BaseException | None) -> list[BaseException]:
    """What each of the workers that failed has raised, where an error of Ray Train's says so."""
    return list((getattr(error, "worker_failures", None) or {}).values())


def lacks_memory(error: BaseException) -> bool:
    """Whether the device of a worker had no room. (A process that Ray ends, since its machine has none, may not be to
    blame.)"""
    import torch  # here: tasks that read clips need none

    return any(isinstance(each, torch.OutOfMemoryError) for each in of_workers(error))
