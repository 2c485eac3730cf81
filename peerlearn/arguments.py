"""Command lines of verbs that take words rather than a config."""

import argparse
from typing import NoReturn

from peerlearn.errors import UsageError


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong word is one line, as everywhere else, and no usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise the UsageError."""
        raise UsageError(f"{message} (`{self.prog} --help` explains)")
