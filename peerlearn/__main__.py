"""`python -m peerlearn`, also under torchrun and accelerate launch."""

import sys

from peerlearn.cli import main

sys.exit(main())
