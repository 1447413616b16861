"""Status: a training's folder → where it stands, on the terminal.

python -m pipelines.status out/run --follow
"""

import time
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

import pipelines
from entprog.errors import UserError
from entprog.masking import reason
from entprog.storage import Where
from pipelines import cli, terminal
from pipelines.command import usage
from pipelines.training import standing

app = usage.app("Show where a training stands, from its files alone: while it runs, or after.")


@app.command()
def main(
    output: Annotated[str, typer.Argument(help="The --output of a train command, also s3:// or gs://.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the training ends, or Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks with --follow.")] = 2.0,
) -> None:
    """Show step, time left, losses, trained blocks, where time goes and what went wrong. Changes nothing."""
    pipelines.imported()
    try:
        where = cli.output_of(output)
        state, table = _look(where)
        if not follow:
            terminal.console.print(table)
            return
        with Live(table, console=terminal.console, auto_refresh=False) as live:
            while state in ("running", "silent"):
                time.sleep(every_s)
                try:
                    state, table = _look(where)
                except OSError as error:  # may pass: what was seen last stays
                    table.caption = f"cannot be read at the moment, tried again: {reason(error)}"
                live.update(table, refresh=True)
    except UserError as error:
        terminal.complain("error", str(error))
        raise typer.Exit(2) from None
    except OSError as error:
        why = "does its disk, or the bucket, answer, and may you read it?"
        terminal.complain("error", f"the training in {where} cannot be read: {reason(error)}; {why}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _look(output: Where) -> tuple[str, Table]:
    """(state, what is shown). Raises UserError for a folder that is no training's, or whose files are damaged; OSError
    where they cannot be read."""
    try:
        seen = standing.read(output)
        rows = standing.rows(seen)
    except (UserError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"cannot read the training in {output}: a file there is damaged ({reason(error)})") from None
    table = Table(title=str(output), title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return seen.state, table


if __name__ == "__main__":
    app()
