"""The one exception a person's mistake raises."""


class UserError(ValueError):
    """Wrong input or arguments. The message is one line: what was wrong, what was given, what to do.

    Every job prints it without a stack trace and exits with status 2.
    """
