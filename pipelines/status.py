"""Status: a training's folder → where it stands, on the terminal.

python -m pipelines.status out/run --follow
"""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from entprog.errors import UserError
from pipelines import cli
from pipelines.training import standing

app = cli.app("Show where a training stands, from its files alone: while it runs, or after.")


@app.command()
def main(
    output: Annotated[Path, typer.Argument(help="The --output of a train command.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the training ends, or Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks with --follow.")] = 2.0,
) -> None:
    """Show step, time left, losses, trained blocks, where time goes and what went wrong. Changes nothing."""
    try:
        seen = standing.read(output)
        if not follow:
            cli.console.print(_table(output, seen))
            return
        with Live(_table(output, seen), console=cli.console, auto_refresh=False) as live:
            while seen.state in ("running", "silent"):
                time.sleep(every_s)
                seen = standing.read(output)
                live.update(_table(output, seen), refresh=True)
    except UserError as error:
        cli.complain("error", str(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _table(output: Path, seen: standing.Standing) -> Table:
    table = Table(title=str(output), title_justify="left", show_header=False)
    for row in standing.rows(seen):
        table.add_row(*row)
    return table


if __name__ == "__main__":
    app()
