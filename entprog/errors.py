"""The one exception a person's mistake raises."""


class UserError(ValueError):
    """Wrong input or arguments. The message is one line: what was wrong, what was given, what to do.

    Every job prints it without a stack trace and exits with status 2.
    """


def install(extra: str) -> str:
    """How an extra of this package is installed, which no index has, in words for a message."""
    return f"pip install '.[{extra}]' in the checkout, or pip install 'WHEEL[{extra}]'"
