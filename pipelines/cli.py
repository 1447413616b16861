"""What every job has in common: its options and settings, its result file, its exit status.

Exit status 0 done, 1 failed at work, 2 wrong arguments or input (one line, no stack trace).
"""

import contextlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

import pipelines
from entprog import config, files, masking, storage
from entprog.errors import UserError
from entprog.names import plain
from entprog.storage import Where
from pipelines import terminal
from pipelines.outputs import claim

W = TypeVar("W", bound=config.Part)
PRESETS = Path(__file__).parent / "presets"
TABLES = Path("out/cei")
"""Where score tables of a Ray of this machine are kept, for every run of a working directory to share."""
BUCKETS = ("s3:/", "gs:/", "gcs:/")


def folder(help: str):
    """An option that names a folder of a job that writes to disks alone."""
    return typer.Option(help=help, callback=_in_no_bucket)


def _in_no_bucket(option: typer.CallbackParam, given: Path | None) -> Path | None:
    if given is not None and str(given).startswith(BUCKETS):
        terminal.complain(
            "error",
            f"--{option.name} {given}: this job alone writes to no bucket: give a folder that all nodes see, and copy "
            "to the bucket what it leaves",
        )
        raise typer.Exit(2)
    return given and files.home(given)


def _that_answers(option: typer.CallbackParam, given: str | None) -> str | None:
    try:
        if given is not None:
            output_of(given, option.name)
    except UserError as error:
        terminal.complain("error", str(error))
        raise typer.Exit(2) from None
    return given


Preset = Annotated[str | None, typer.Option(help=f"Named experiment: {', '.join(config.presets(PRESETS))}.")]
ConfigFile = Annotated[
    list[str] | None, typer.Option("--config", help="YAML file of settings, over the preset, also s3:// or gs://.")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting, over all others.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check all that can be without beginning, print what would be done, do nothing."),
]
Tables = Annotated[
    str | None,
    typer.Option(
        callback=_that_answers,
        help="Where score tables are kept by their key, for every run to share, also s3:// or gs:// "
        f"({TABLES}; on a cluster OUTPUT/cei).",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the libraries' own logs too.")]


def explain_settings(title: str, whole: type, only: str | tuple[str, ...] = "") -> None:
    """A table of what `whole`'s settings mean, or those of them whose names begin with `only`."""
    rows = [row for row in config.explained(whole) if row[0].startswith(only)]
    terminal.show(title, rows, ("name", "default", "meaning"))


def show_settings(title: str, part: config.Part) -> None:
    """A table of the settings that are not at their defaults: all of them would hide what else a dry run says."""
    rows = list(config.changed(part).items())
    terminal.show(
        f"{title}: what differs from the defaults (all settings: --help-settings)", rows, ("setting", "value")
    )


def help_settings(whole: type = config.Experiment, only: str = "", also: Callable[[], None] | None = None):
    """The option `--help-settings` of a job whose settings are `whole`'s, or those of them that begin with `only`.

    It answers before anything else is asked for. also: what else there is to explain.
    """

    def explain(asked: bool) -> None:
        if asked:
            explain_settings("Settings (--set NAME=VALUE)", whole, only)
            if also is not None:
                also()
            raise typer.Exit

    help_text = "Explain every setting, with its default."
    return Annotated[bool, typer.Option("--help-settings", is_eager=True, callback=explain, help=help_text)]


def settings(
    whole: type[W],
    preset: str | None,
    files: Sequence[str | Where] | None,
    pairs: Sequence[str] | None,
    *,
    trains: bool = True,
    **options: Any,
) -> W:
    """The settings that a command line asks for: preset < config files < options < --set.

    whole: what the job's settings are parts of. Preset and files may describe other jobs too: of them only what `whole`
    has counts. trains: whether a run's end must be said. options: nested settings that the job's own options stand for;
    None is what was not given. Raises UserError for any wrong name or value.
    """
    values = config.only(config.read_preset(preset, PRESETS), whole) if preset else {}
    for path in files or []:
        values = config.merge(values, config.only(config.read_yaml(storage.at(path, "settings")), whole))
    values = config.merge(values, _without_none(options))
    values = config.merge(values, config.parse_overrides(pairs or []))
    train = values.get("train", {})
    if not trains and isinstance(train, dict) and not {"steps", "seconds", "flops"} & train.keys():
        values = config.merge(values, {"train": {"steps": 1}})  # an experiment has an end
    return config.build(values, whole)


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _without_none(v) if isinstance(v, dict) else v for k, v in options.items()}
    return {k: v for k, v in nested.items() if v is not None and v != {}}


def output_of(given: str, what: str = "output") -> Where:
    """Where a job leaves what it makes. Raises UserError for an address of no known kind, and one that does not
    answer."""
    where = storage.at(given, what)
    if isinstance(where, Path):
        return where
    try:
        storage.at(storage.quickly(given), what).exists()
    except OSError as error:
        reason = masking.one_line(error)
        raise UserError(
            f"cannot look at {what} {where}: {reason}; look at its name and at the credentials in the environment"
        ) from None
    return where


def run(job: str, output: str | Where | None, work: Callable[[], dict[str, Any]], *, verbose: bool = False) -> None:
    """Do the work; leave `output/result.json` with its figures; end the process with the right exit status.

    Nobody else works in the output meanwhile. `work` claims the output and returns the job's own figures. With `output`
    None (a dry run), or one that was not claimed, nothing is written.
    """
    pipelines.imported()
    with claim.alone():
        _run(job, output, work, verbose=verbose)


def _run(job: str, output: str | Where | None, work: Callable[[], dict[str, Any]], *, verbose: bool) -> None:
    started, made = time.time(), []
    record = {"job": job, "status": "done", "command": command(), "commit": commit()}
    folder = None if isinstance(output, str) else output  # an address is one once it has answered
    try:
        folder = output_of(output) if isinstance(output, str) else output
        made = claim.missing(folder) if folder is not None else []
        record |= work()
        status = 0
    except UserError as error:
        if folder is not None:
            with contextlib.suppress(OSError):  # what was refused is what is said
                claim.release(folder, made)
        terminal.complain("error", str(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:  # which may say where a job goes on
        resumes = " ".join(("the same command resumes", *map(str, stop.args)))
        record |= {"status": "interrupted", "error": f"interrupted (Ctrl-C, or told to stop): {resumes}"}
        status = 1
        terminal.complain("interrupted", resumes)
    except Exception as error:  # failed at work: the reason in one line, the trace in a file
        record |= {"status": "failed", "error": masking.reason(error, most=2000)}
        status = 1
        trace = masking.masked(traceback.format_exc())
        kept = False
        with contextlib.suppress(OSError):  # a bucket may be away, or a disk full
            if folder is not None and claim.is_of(folder, job):
                files.write_text(folder / "error.log", plain(trace, keep="\n\t"))
                kept = True
        if verbose or not kept:
            terminal.errors.print(trace)
        where = f" (trace: {folder / 'error.log'})" if kept else ""
        terminal.complain("failed", masking.cut(record["error"], 300) + where)
    record["seconds"] = round(time.time() - started, 3)
    try:
        if folder is not None and claim.is_of(folder, job):
            files.write_json(folder / "result.json", masking.masked_in(record))
    except OSError as error:
        terminal.complain("failed", f"{folder / 'result.json'} could not be written: {masking.one_line(error)}")
        status = 1
    if status:
        raise typer.Exit(status)


def command() -> str:
    """The command line of this process as a person types it, without the secrets of addresses in it."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    job = (
        ["entprog"]
        if Path(sys.argv[0]).name == "entprog"
        else ["python", *(["-m", main.name] if main else sys.argv[:1])]
    )
    return shlex.join([*job, *map(masking.masked, sys.argv[1:])])


WRITTEN = (":!benchmarks/results", ":!docs")
"""What is no code, as git leaves it out."""


def commit() -> str:
    """Commit of this project's own checkout (with '+' when it has changes, other than results and documents, which
    benchmarks write while they run); else what ENTPROG_COMMIT says, where files
    were copied without git; else the installed version, or `unknown`."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An installed package may lie inside a repository of somebody else's, in a folder that it ignores or not.
        if Path(git("rev-parse", "--show-toplevel")) == root and git("ls-files", f"pipelines/{Path(__file__).name}"):
            return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".", *WRITTEN) else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    if said := os.environ.get("ENTPROG_COMMIT"):
        return said
    try:
        return f"v{importlib.metadata.version('entprog')}"
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
