"""A Ray of this machine alone: nothing of it answers the network, and the machine's other users can neither read its
token nor replace its sockets."""

import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from entprog.errors import UserError
from pipelines.cluster import ray_internals


@contextmanager
def closed() -> Iterator[dict[str, str]]:
    """Gives the arguments that `ray.init` is to start a closed Ray with, inside the block.

    Raises UserError where the token or Ray's folder cannot be kept from other users.
    """
    token()
    # Names of sockets are short, and macOS' own folder for temporary files has a long one.
    place = "/tmp" if sys.platform == "darwin" else tempfile.gettempdir()
    folder = Path(os.environ.get("RAY_TMPDIR") or place, f"entprog-{os.getuid()}")
    _own(folder, 0o700, "name a folder of yours in RAY_TMPDIR")
    with ray_internals.on_loopback():
        yield {"_temp_dir": str(folder / "ray")}  # in a folder of ours: Ray opens its own to everyone


def alone(*, heard: bool) -> AbstractContextManager[None]:
    """A Ray that starts inside the block has those processes alone that work needs, unless a person is to hear of it:
    by a dashboard, or what its processes say."""
    return nullcontext() if heard else ray_internals.quietly()


def token() -> Path | None:
    """Make Ray's token where there is none, for its owner's eyes alone; mend one that others may read.

    Returns its file, or None where Ray reads none (RAY_AUTH_TOKEN is set, or RAY_AUTH_MODE is not `token`).

    Raises UserError where that cannot be done: a file or folder of another owner, or one that cannot be written.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return None
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    advice = "Ray's token is to be yours alone: remove it, or name another file in RAY_AUTH_TOKEN_PATH"
    if not given:
        _own(path.parent, 0o700, advice)
    if not path.exists():
        _make(path, advice)
    _own(path, 0o600, advice)
    return path


def _make(path: Path, advice: str) -> None:
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as scratch:  # mode 0600
            scratch.write(secrets.token_hex(32))
            scratch.flush()
            with suppress(FileExistsError):  # another job was faster: its token stays
                os.link(scratch.name, path)
    except OSError as error:
        raise UserError(f"cannot write Ray's token to {path} ({error.strerror}): {advice}") from None


def _own(path: Path, mode: int, advice: str) -> None:
    """Make a folder that is not there; give a path a mode that shuts others out. Raises UserError where that fails."""
    try:
        if mode & stat.S_IXUSR:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        known = path.stat()
        owners = {path.lstat().st_uid, known.st_uid} - {os.getuid()}  # of a link and of what it leads to
        if owners:
            raise UserError(f"{path} belongs to another user (uid {owners.pop()}): {advice}")
        if stat.S_IMODE(known.st_mode) & 0o077:
            path.chmod(mode)
    except OSError as error:
        raise UserError(f"cannot keep {path} from other users ({error.strerror}): {advice}") from None
