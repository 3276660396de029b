"""`python -m safetynet`, which is what torchrun and `accelerate launch -m` start."""

import os
import sys
from pathlib import Path

from safetynet.cli.app import main
from safetynet.run import parallel

if __name__ == "__main__":
    if not parallel.is_first():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # the first process speaks for all
    main()
