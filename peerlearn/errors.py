"""The errors a user can cause and mend, which the command line prints as one line; and exit codes."""

DONE, FAILURE, USAGE, SAVED_RUN_AGAIN = 0, 1, 2, 75


class UserError(Exception):
    """A file, a key or a state the user can mend. The message names it and the fix; exit code 1."""


class UsageError(UserError):
    """A command line or a config that cannot be read. Exit code 2."""


class SaidByMainError(UserError):
    """A failure that the main rank reports; the other ranks end by it in silence. Exit code 1."""
