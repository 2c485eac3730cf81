"""How a launcher starts a certain copy of the program, and the variables by which they tell each other something."""

import sys
from pathlib import Path

# A launcher that listens already where the ranks are to meet names its socket here for rank 0, and -1 for the others.
MEETING_SOCKET = "PEERLEARN_MEETING_SOCKET"
# A launcher names a file here, in which a command that fails writes whose fault it is: USERS or MACHINES.
FAULT_FILE = "PEERLEARN_FAULT_FILE"
USERS, MACHINES = "user", "machine"
_LAUNCH = (
    "import runpy, sys; code = sys.argv.pop(1); sys.argv.pop(0); sys.path.insert(0, code); "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def module_words(home: Path, module: str) -> list[str]:
    """The words that run a module of the program in the folder ``home``; the module's own words follow them.

    PYTHONPATH could not name a folder whose path has a colon, as that of a run with a time in its name.
    """
    # -P: no module of the working directory takes the place of one of the program.
    return [sys.executable, "-u", "-P", "-c", _LAUNCH, str(home), module]
