"""The base class of all errors that a user can fix."""


class UserError(Exception):
    """An error that a user can fix; its message says what, got, allowed, and what to change.

    The command line shows the message without a traceback and exits with `exit_code`.
    """

    exit_code = 1
