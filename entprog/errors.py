"""What a person's mistake raises, and what looks like one and may mend itself."""


class UserError(ValueError):
    """Wrong input or arguments. The message is one line: what was wrong, what was given, what to do.

    Every job prints it without a stack trace and exits with status 2.
    """


class UnreachableError(UserError):
    """A disk, bucket, hub or MLflow that does not answer, or not to us. A command that has not begun is refused; work
    that has is tried again."""


class LastingError(RuntimeError):
    """What ended the work, and would end another try of it too: a loss that is no number, a device without room."""


def install(extra: str) -> str:
    """How an extra of this package is installed, which no index has, in words for a message."""
    return f"pip install '.[{extra}]' in the checkout, or pip install 'WHEEL[{extra}]'"
