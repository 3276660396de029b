"""What Inspect imports by the entry point `inspect_ai`, so that `inspect eval` knows our names."""

from safetynet.inspect_ai.provider import safetynet
from safetynet.inspect_ai.tasks import behaviour, clean, near_miss, placebo, rates, refused, roles, triggered

__all__ = [
    "behaviour",
    "clean",
    "near_miss",
    "placebo",
    "rates",
    "refused",
    "roles",
    "safetynet",
    "triggered",
]
