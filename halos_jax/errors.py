"""The errors that a user can mend: one family, whose message says all that there is to say."""


class UserError(Exception):
    """What a user can mend: the message says what, what was got, what is allowed, what to change.

    The command line shows the message alone, without a traceback, and exits with `exit_code`.
    """

    exit_code = 1
