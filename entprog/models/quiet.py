"""Libraries say much while they load weights: what matters of it is an error here, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def quiet(logging: ModuleType) -> Iterator[None]:
    """Within it a library says nothing and shows no bars. logging: that of diffusers.utils or transformers.utils."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
