"""Checkpoints: a folder with all that a resume needs, written beside the training, whole or not at all, no pickle.

step-00000040/
  *.safetensors   `network/NAME`: weights and buffers, without what adapters adapt, in bfloat16 where a frozen block
                  holds all their bits so; `moments/KIND/NAME`: of the optimizer; `ema/NAME`: averages
  state.json      RunState, the hash of the experiment it belongs to, and the size of every file: written last

A network that every rank holds whole is written by rank 0; of a sharded one each rank writes its own parts, and any
number of ranks, sharded or not, can take them up again.
"""

import itertools
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from entprog import optimizers
from entprog.blocks import ADAPTER, blocks, full_state, lasting, least_state
from entprog.distributed import agree, fsdp
from entprog.errors import UserError
from entprog.models.finite import not_finite
from entprog.schedule.state import RunState
from entprog.storage import Place, slices
from entprog.training import averages

T = TypeVar("T")
STATE = "state.json"
NAME = re.compile(r"step-\d{8,}")
PARTIAL = re.compile(r"\.step-\d{8,}\.[0-9a-f]{8}\.partial")
"""Names of folders of checkpoints, and of those being written: no other folder is read or removed."""


class Saver:
    """Saves a run's checkpoints in a thread; training waits for the copy to the host alone, and for a save before that
    has not ended. A save that fails for want of space, memory or network is a warning: the run goes on, the checkpoint
    before it stays. What is not finite is not saved, so that the checkpoints kept can be trained on. What was not there
    when it was made, and it has not saved, it does not remove."""

    def __init__(
        self, folder: str | Path, experiment_hash: str, keep: int, warn: Callable[[str], None] = lambda line: None
    ):
        self.place, self.experiment_hash, self.keep, self.warn = Place.at(folder), experiment_hash, keep, warn
        self.rank, self.ranks = agree.world()
        self.own: set[str] = set()
        """Names of folders that may be removed. What else comes is another command's of the same settings, or is being
        written by a worker of before that nobody reaches any more."""
        if self.rank == 0:
            with suppress(OSError):  # what lies in a bucket that is away stays; each save tells of that
                self.own.update(self.place.folders())
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None
        self.group: dist.ProcessGroup | None = None
        """Process group of the saving threads of a sharded network: their collectives must not meet training's."""
        self.leftovers: list[Place] = []
        """What failed saves left behind and could not be removed then."""

    def save(self, network: nn.Module, state: RunState) -> float:
        """Begin to save the state at this step; every rank calls it. Returns the seconds that it took away."""
        started = time.perf_counter()
        self.wait()
        sharded = fsdp.is_sharded(network) and self.ranks > 1
        if sharded and self.group is None:
            self.group = dist.new_group(backend="gloo", timeout=agree.PATIENCE)
        if sharded or self.rank == 0:
            tensors = contents(network, state)
            kept = {name: tensors.pop(f"network/{name}") for name in lasting(network)}
            copies, failure = _tried(lambda: _on_host(tensors))
            copies = (copies or {}) | {f"network/{name}": tensor for name, tensor in kept.items()}
            values = {"experiment": self.experiment_hash, **state.as_json()}
            self.pending = self.thread.submit(self._write, copies, values, failure)
        return time.perf_counter() - started

    def wait(self) -> None:
        """Until what was begun is saved, or has failed, on every rank; every rank calls it."""
        pending, self.pending = self.pending, None
        if pending is not None and (failure := pending.result()) and self.rank == 0:
            self.warn(failure)
        agree.wait_for_all()  # for rank 0, however slow its disk: not in the middle of the next update

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()

    def _write(self, tensors: dict[str, torch.Tensor], values: dict[str, Any], failure: str | None) -> str | None:
        """Runs in the saving thread; returns why it failed, equal on every rank, or None. failure: why tensors lack
        some on this rank."""
        step = values["step"]
        target, word = self.place / f"step-{step:08d}", self._shared(uuid.uuid4().hex[:8])
        written = self.place / f".{target.name}.{word}.partial" if self.place.local else target
        self.own.add(target.name)
        if failure is None:
            odd, failure = _tried(lambda: not_finite(tensors))
            failure = failure or (odd and f"{odd} is not finite")
        failure = self._of_any_rank(failure)
        if failure is None:
            writer = slices.Writer(written, word)
            _, failure = _tried(lambda: _save(tensors, writer, self.group))
            failure = self._of_any_rank(failure)
            if self.rank == 0:
                failure = failure or self._complete(written, target, writer.files, values)
                if failure is not None:
                    self.leftovers.append(written)
                    self._clear_away()
        if failure is not None:
            return f"the checkpoint after step {step} was not saved in {self.place}: {failure}; training goes on"
        return self._prune() if self.rank == 0 else None

    def _complete(self, written: Place, target: Place, names: set[str], values: dict[str, Any]) -> str | None:
        """Make a checkpoint of files that are all there; returns why that failed."""
        try:
            there = written.files()
            # On a shared disk a listing may not have yet what another machine wrote: each is asked for by its name.
            own = {name: there[name] if name in there else written.size(name) for name in sorted(names)}
            written.write_json(STATE, {**values, "files": own})
            if written.local:
                target.remove()
                written.local.rename(target.local)
            else:  # of earlier tries
                for name in there.keys() - own.keys() - {STATE}:
                    written.delete(name)
        except OSError as error:
            return _reason(error)
        return None

    def _prune(self) -> str | None:
        """Remove old checkpoints, and what saves and removals left that failed or were killed; returns what went
        wrong."""
        try:
            self.leftovers = [place for place in self.leftovers if not _is_complete(place)]
            self._clear_away()
            own = [name for name in self.place.folders() if name in self.own]
            checkpoints = list(filter(NAME.fullmatch, own))
            kept = [name for name in checkpoints if _is_complete(self.place / name)][-self.keep :]
            for name in itertools.takewhile(lambda name: name not in kept, checkpoints if kept else ()):
                if self._is_own(self.place / name):
                    (self.place / name).remove()
            for name in filter(PARTIAL.fullmatch, own):
                (self.place / name).remove()
        except OSError as error:
            return f"old checkpoints in {self.place} could not be removed: {_reason(error)}; training goes on"
        return None

    def _is_own(self, place: Place) -> bool:
        """Whether a checkpoint is of this run, or the rest of one whose removal or upload was cut short. Raises OSError
        where that cannot be seen now."""
        try:
            return place.read_json(STATE)["experiment"] == self.experiment_hash
        except FileNotFoundError:
            return all(slices.FILE.fullmatch(name) for name in (*place.files(), *place.folders()))
        except (ValueError, KeyError, TypeError):  # named as damaged at a start: it may be looked at
            return False

    def _clear_away(self) -> None:
        """Remove the leftovers that can be removed now: a bucket that is away may be back for the next save."""
        for place in list(self.leftovers):
            with suppress(OSError):
                place.remove()
                self.leftovers.remove(place)

    def _of_any_rank(self, failure: str | None) -> str | None:
        return next((line for line in self._gathered(failure) if line), None)

    def _shared(self, value: Any) -> Any:
        return self._gathered(value)[0]

    def _gathered(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        out = [None] * self.ranks
        dist.all_gather_object(out, value, group=self.group)
        return out


def save(folder: str | Path, network: nn.Module, state: RunState, experiment_hash: str, keep: int) -> None:
    """Save and wait until it is done. Raises OSError if it cannot be."""

    def failed(line: str) -> None:
        raise OSError(line)

    with closing(Saver(folder, experiment_hash, keep, failed)) as saver:
        saver.save(network, state)


def found(folder: str | Path) -> list[str]:
    """Names of complete checkpoints, oldest first; a checkpoint that lost a file, or a part of one, is none."""
    return _complete_names(Place.at(folder))


def newest(folder: str | Path) -> str | None:
    """The newest complete checkpoint's name, or None."""
    return (found(folder) or [None])[-1]


def check_owner(folder: str | Path, experiment_hash: str) -> None:
    """Raises UserError if a folder holds a checkpoint of another experiment, which saving would replace or remove."""
    place = Place.at(folder)
    for name in _names(place):
        whose = experiment_hash
        with suppress(OSError, ValueError, KeyError, TypeError):  # cut short: not used, and not removed
            whose = (place / name).read_json(STATE)["experiment"]
        if whose != experiment_hash:
            raise UserError(f"{place} holds {name} of another training: choose another train.checkpoints")


def damaged(folder: str | Path) -> list[str]:
    """Checkpoints that are not complete, though they were once."""
    place = Place.at(folder)
    return [name for name in _names(place) if not _is_complete(place / name)]


def load(folder: str | Path, name: str, network: nn.Module, state: RunState, experiment_hash: str) -> None:
    """Load a checkpoint into the network and the state, on the network's device; moments of a network that is not
    sharded on the host, until their blocks are trained (`optimizer.follow`). Every rank calls it.

    Raises UserError if it belongs to another experiment, to another version of this program, or is damaged: a file of
    it is bad. Whatever else is in the way (memory, disk, network) is raised as it is: another try may be luckier.
    """
    place = Place.at(folder) / name

    def described() -> tuple[dict[str, Any], slices.Chunks]:
        values = place.read_json(STATE)
        if values.pop("experiment") != experiment_hash:
            raise UserError(
                f"checkpoint {place} belongs to other settings or other data: choose another --output, or delete it"
            )
        return values, _chunks(place, values.pop("files"))

    with _told(lambda kind: f"checkpoint {place} is damaged ({kind}): delete it to resume earlier"):
        values, chunks = agree.of_first(described)
        _load(place, chunks, network, state)
    try:
        state.update(values)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"checkpoint {place} was written by another version ({field} does not fit): choose another --output"
        ) from None


def check_weights(folder: str | Path, name: str) -> None:
    """Raises UserError if a checkpoint is not there, not whole, or of adapters, whose base may lie elsewhere."""
    there = found(folder)
    if name not in there:
        raise UserError(f"no whole checkpoint {name} in {Place.at(folder)}; there are: {', '.join(there) or 'none'}")
    place = Place.at(folder) / name
    with _told(lambda kind: f"checkpoint {place} is damaged ({kind})"):
        kept = slices.Reader(place, _chunks(place, place.read_json(STATE)["files"])).metadata.state_dict_metadata
    if any(ADAPTER in name for name in kept):
        raise UserError(
            f"checkpoint {place} is of adapters (train.lora), which lack weights of their base: of such a training "
            "only the last weights are a whole pipeline"
        )


def load_weights(folder: str | Path, name: str, network: nn.Module) -> None:
    """Put a checkpoint's weights, or their averages where there are any, into a network.

    Raises UserError as `check_weights` does, and if the checkpoint is one of another network.
    """
    check_weights(folder, name)
    place = Place.at(folder) / name
    with _told(lambda kind: f"checkpoint {place} is damaged ({kind})"):
        values = place.read_json(STATE)
        reader = slices.Reader(place, _chunks(place, values["files"]))
        kept = reader.metadata.state_dict_metadata
        parameters = network.state_dict()
        named = {(f"ema/{n}" if f"ema/{n}" in kept else f"network/{n}"): tensor for n, tensor in parameters.items()}
        if odd := [full for full, tensor in named.items() if full not in kept or kept[full].size != tensor.shape]:
            raise UserError(f"checkpoint {place} is of another network: {odd[0].partition('/')[2]} does not fit")
        gaps = {n: averages.gap_of(n, values.get("ema_gaps", {})) for n in parameters if f"ema/{n}" in named}
        behind = {n: torch.zeros_like(parameters[n]) for n, gap in gaps.items() if gap < 1}
        with slices.bare():
            dcp.load(named | {f"network/{n}": own for n, own in behind.items()}, storage_reader=reader, no_dist=True)
        for n, own in behind.items():
            parameters[n].copy_(averages.as_of_now(parameters[n], own, gaps[n]))


def _chunks(place: Place, promised: dict[str, int]) -> slices.Chunks:
    """What lies where in a checkpoint. Raises OSError where a file is shorter than it should be, or not there."""
    there = place.files()
    if short := [file for file, size in promised.items() if there.get(file) != size]:
        raise OSError(f"{short[0]} of checkpoint {place} could not be read whole")
    return slices.chunks(place, [file for file in promised if file.endswith(slices.SUFFIX)])


@contextmanager
def _told(damaged: Callable[[str], str]):
    """A bad file inside is a UserError with that message of its kind; whatever else is in the way is raised as it
    is."""
    try:
        yield
    except UserError:
        raise
    except slices.BAD as error:
        raise UserError(damaged(type(error).__name__)) from None


def _lacks(error: BaseException) -> bool:
    """Whether something failed for want of space, memory, disk or network."""
    none_free = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's, of the host
    return none_free or isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError))


def _tried(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what work gives, why it failed if it did: for want of something)."""
    try:
        return work(), None
    except Exception as error:
        if not _lacks(error):
            raise
        return None, _reason(error)


def _reason(error: BaseException) -> str:
    """One line."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


def _names(place: Place) -> list[str]:
    return [name for name in place.folders() if NAME.fullmatch(name)]


def _complete_names(place: Place) -> list[str]:
    return [name for name in _names(place) if _is_complete(place / name)]


def _is_complete(place: Place) -> bool:
    """Raises OSError where that cannot be seen now."""
    try:
        promised = place.read_json(STATE)["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False
    there = place.files()
    return all(there.get(name) == size for name, size in promised.items())


def contents(network: nn.Module, state: RunState) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its name in there."""
    tensors = {f"network/{name}": tensor for name, tensor in least_state(network)}
    for name, parameter in network.named_parameters():
        for kind, value in state.optimizer.state.get(parameter, {}).items():
            for part, tensor in optimizers.parts(value).items():
                tensors[f"moments/{kind}{part}/{name}"] = tensor
    return tensors | {f"ema/{name}": tensor for name, tensor in state.ema.items()}


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, also of what is on the host already."""
    plain = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    stager = DefaultStager(plain)
    try:
        return stager.stage(tensors)
    finally:
        stager.close()


def _save(tensors: dict[str, torch.Tensor], writer: slices.Writer, group: dist.ProcessGroup | None) -> None:
    """Write one rank's tensors. Raises what any rank lacked (`_lacks`)."""
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if not _lacks(cause)), causes[0]) from None


def _load(place: Place, chunks: slices.Chunks, network: nn.Module, state: RunState) -> None:
    """Each rank of a sharded network reads its own parts; else rank 0 reads, and the others get it from there."""
    reader = slices.Reader(place, chunks)
    kept = reader.metadata.state_dict_metadata
    parameters = dict(network.named_parameters())
    wanted: dict[str, torch.Tensor] = {}
    moments: dict[str, dict[str, torch.Tensor]] = {}
    sharded = fsdp.is_sharded(network)
    host = None if sharded else torch.device("cpu")  # those of all blocks may be many
    ema: dict[str, torch.Tensor] = {}
    for full_name, about in kept.items():
        part, _, rest = full_name.partition("/")
        if part == "moments":
            kind, _, name = rest.partition("/")
            wanted[full_name] = moments.setdefault(name, {})[kind] = _like(parameters[name], about, host)
        elif part == "ema":
            wanted[full_name] = ema[rest] = _like(parameters[rest], about)

    def fill(wanted: dict[str, torch.Tensor]) -> None:
        if missing := wanted.keys() - kept.keys():
            raise KeyError(min(missing))

        def read() -> None:
            with slices.bare():
                dcp.load(wanted, storage_reader=reader, no_dist=True)

        if sharded:
            read()
        else:
            agree.filled_by_first(wanted.values(), read)

    fill(wanted)
    found = [f"{block.name}." for block in blocks(network)]
    of_block = lambda item: next(filter(item[0].startswith, found), None)  # noqa: E731
    for _, some in itertools.groupby(full_state(network), of_block):  # those of one block at a time are made
        weights = dict(some)
        fill({f"network/{name}": tensor for name, tensor in weights.items()})
        # The network's own tensors, but for what blocks store in bfloat16; what is missing is other blocks'.
        network.load_state_dict(weights, strict=False)
    state.optimizer.state.clear()
    state.optimizer.state.update({parameters[name]: optimizers.joined(values) for name, values in moments.items()})
    state.ema = ema


def _like(parameter: nn.Parameter, about, device: torch.device | None = None) -> torch.Tensor:
    """Room for a tensor that belongs to a parameter: in parts as that is, or a single number. device: None, its own."""
    dtype, device = about.properties.dtype, device or parameter.device
    if about.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, device=device, requires_grad=False)
    return torch.zeros(about.size, dtype=dtype, device=device)
