"""TorchScript in a process of its own that can open nothing: neither files nor connections, whatever the program tries.

A TorchScript file is a program, and torch's operators write files and map them into memory. The process reads the file,
lowers the number of files that it may have open to those that it has, for good, and only then loads the program. It
works on the CPU: a GPU's libraries open files whenever they like.
"""

import io
import os
import struct
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from entprog.errors import UserError
from entprog.masking import one_line

MAX_BYTES = 1 << 26
"""Of one answer."""


class Judge:
    """A TorchScript network that judges clips in its own process."""

    def __init__(self, path: Path):
        """Raises UserError if it cannot be loaded, or not be kept from opening files on this system."""
        words = [sys.executable, "-m", "entprog.quality.confined", str(path), str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._path = path
        weakref.finalize(self, self._process.kill)
        self._answer()

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        """Its features, float32 [rows, D], of a clip float32 [1, 3, F, H, W]. Raises UserError where it fails."""
        with suppress(BrokenPipeError):  # `_answer` says why
            _send(self._process.stdin, b"+", _bytes(clip.float().cpu().numpy()))
        return torch.from_numpy(_array(self._answer()).astype(np.float32)).reshape(1, -1)

    def _answer(self) -> bytes:
        kind, content = _receive(self._process.stdout, MAX_BYTES)
        if kind != b"+":
            self._process.kill()
            message = one_line(content.decode(errors="replace"), most=160) if kind else "its process ended"
            raise UserError(f"evaluate.i3d: {self._path} cannot be used: {message}")
        return content


def _send(pipe, kind: bytes, content: bytes) -> None:
    pipe.write(kind + struct.pack("<q", len(content)) + content)
    pipe.flush()


def _receive(pipe, most: int) -> tuple[bytes, bytes]:
    """(kind, content) of a message, both empty at the end of what there is."""
    head = pipe.read(9)
    if len(head) < 9:
        return b"", b""
    (length,) = struct.unpack("<q", head[1:])
    if not 0 <= length <= most:
        return b"", b""
    return head[:1], pipe.read(length)


def _bytes(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


# ---- in the process ----


def confine(used: int) -> None:
    """From now on this process opens nothing: of the files that it may have, `used` ones, all are open.

    Raises ImportError or NotImplementedError on a system that knows no such limit.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))
    with suppress(OSError):
        os.close(os.open(os.devnull, os.O_RDONLY))
        raise NotImplementedError("this system does not keep a process from opening files")


def main(path: str, threads: str) -> None:
    """Load the program, then answer every clip with its features until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # where the program prints
    try:
        content = io.BytesIO(Path(path).read_bytes())
        torch.set_num_threads(int(threads))
        _array(_bytes(np.zeros(1)))  # imports what it needs while that can be opened
        confine(answers.fileno() + 1)
        script = torch.jit.load(content, map_location="cpu").eval()
        _send(answers, b"+", b"")
        while content := _receive(sys.stdin.buffer, sys.maxsize)[1]:
            clip = torch.from_numpy(_array(content))
            with torch.no_grad():
                features = script(clip, rescale=False, resize=False, return_features=True)
            _send(answers, b"+", _bytes(features.float().numpy()))
    except Exception as error:  # whatever a program raises
        _send(answers, b"-", f"{type(error).__name__}: {error}".encode(errors="replace"))


if __name__ == "__main__":
    main(*sys.argv[1:])
