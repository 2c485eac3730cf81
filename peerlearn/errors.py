"""Errors that a user can cause and mend, and exit codes. The command line prints such an error as one line."""

DONE, FAILURE, USAGE, SAVED_RUN_AGAIN = 0, 1, 2, 75

EXIT_CODES = {
    DONE: "The work is done.",
    FAILURE: "The work has failed. One line on stderr says what to mend.",
    USAGE: "The command line or a config cannot be read. One line names the word or the key.",
    SAVED_RUN_AGAIN: "The work was told to stop and has saved. The same command goes on with it.",
}


class UserError(Exception):
    """A file, a key or a state that the user can mend. The message names it and the fix. Exit code 1."""


class UsageError(UserError):
    """A command line or a config that cannot be read. Exit code 2."""


class SavedError(UserError):
    """The work was asked to stop and has saved: the same command goes on with it. Exit code 75."""


class CrashError(UserError):
    """A failure of the machine or of a library, which another start of the same command may not meet. Exit code 1."""


class SaidByMainError(UserError):
    """A failure that the main rank reports. The other ranks raise it and print nothing. Exit code 1."""


class NotThereYetError(UserError):
    """A checkpoint is missing that a job before this one may be about to write. All else was checked. Exit code 1."""
