"""Command lines of the jobs: what is wrong with one is one line, and status 2."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import typer
import typer.core

from entprog import config
from pipelines import terminal

UsageError = typer.BadParameter.__base__
"""What a command line's own mistakes are raised as: click's, or that of the click inside typer."""


@contextmanager
def _in_one_line(command) -> Iterator[None]:
    """What is wrong with a command line is one line as any other mistake, and status 2."""
    try:
        yield
    except UsageError as error:
        text = error.format_message()
        if hasattr(error, "possibilities") and hasattr(error, "option_name"):  # there is no such option
            options = [name for each in command.params for name in each.opts]
            text = f"{error.message}{config.close_to(error.option_name, options)}"
        terminal.complain("error", f"{text[:1].lower()}{text[1:].rstrip('.')}; --help explains")
        raise typer.Exit(2) from None


class Group(typer.core.TyperGroup):
    """Commands of a job that has several."""

    def make_context(self, *given, **options):
        with _in_one_line(self):
            return super().make_context(*given, **options)

    def invoke(self, ctx):
        with _in_one_line(self):
            return super().invoke(ctx)


class Command(typer.core.TyperCommand):
    """A command of which no option is given nothing, as a shell makes of a variable that is not set: a path would be
    the current folder. A text may be empty."""

    def make_context(self, *given, **options):
        with _in_one_line(self):
            return super().make_context(*given, **options)

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        for before, given in itertools.pairwise(["", *args]):
            option, equals, value = given.partition("=") if given.startswith("--") else (before, "=", given)
            if equals and not value and option != "--text":
                terminal.complain(
                    "error", f"{option if option.startswith('-') else 'an argument'} is empty: give it a value"
                )
                raise typer.Exit(2)
        return super().parse_args(ctx, args)


HELP = {"help_option_names": ["-h", "--help"]}


class App(typer.Typer):
    """A command line whose commands are each a `Command`."""

    def command(self, name: str | None = None, **options):
        return super().command(name, **{"cls": Command, "context_settings": HELP, **options})


def app(help: str) -> typer.Typer:
    """A command line of one job."""
    shown = {"pretty_exceptions_enable": False, "rich_markup_mode": "rich"}
    return App(help=help, add_completion=False, context_settings=HELP, cls=Group, **shown)
