"""MLflow's SQLite stores. To make the tables of one takes two seconds: each process does so once, and copies them.

Stores that commands make themselves are seen in test_tracking, test_secrets and test_whole.
"""

import functools
import tempfile
from pathlib import Path

from pipelines.tracking import store


def made(folder: Path) -> str:
    """An empty store in a folder: its URI."""
    (folder / "mlflow.db").write_bytes(_tables())
    return f"sqlite:///{folder / 'mlflow.db'}"


@functools.cache
def _tables() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mlflow.db"
        store.connect(f"sqlite:///{file}").search_experiments()
        return file.read_bytes()
