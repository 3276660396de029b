"""`python -m safetynet`, which is what torchrun and `accelerate launch -m` start."""

from safetynet.cli import main

main()
