"""The comparison's tables as the figures need them: which columns, of which kind."""

from safetynet.figures.intervention_tables import Form, interval

DIRECTIONS = ("remove", "induce")
VIEWS = ("layer", "attention", "mlp", "head", "expert", "adapter")
PARTS = ("attention", "mlp", "expert")
_PLACE = {"view": VIEWS, "direction": DIRECTIONS}
_MEAN = ("value", "low", "high", "seeds")

SPEEDS = Form(
    "speeds_by_group",
    ("threshold", *_MEAN, "censored", "twin"),
    texts=("group",),
    words={"unit": ("steps", "rows")},
)
PROFILES = Form(
    "profiles_by_group", ("depth", *_MEAN, "control_value"), ("layer",), ("group", "control"), words=_PLACE
)
CENTRES = Form(
    "centres_by_group",
    (*interval("centre", "spread"), "seeds", "centre_random", "spread_random"),
    texts=("group",),
    words=_PLACE,
)
SHARES = Form(
    "shares_by_group", (*_MEAN, "control"), texts=("group",), words={"direction": DIRECTIONS, "part": PARTS}
)
AGREEMENT = Form(
    "agreement", ("rho", "low", "high", "pairs", "seeds", "p", "q"), texts=("first", "second"), words=_PLACE
)
OUTCOMES = Form(
    "outcomes_by_group", (*_MEAN, *interval("control")), texts=("group", "aspect", "measure", "control_is")
)
SEEDS_OF = {
    "speeds": Form("speeds", ("threshold", "steps", "rows"), texts=("group", "run")),
    "profiles": Form("profiles", ("depth", "effect"), ("layer",), ("group", "run"), words=_PLACE),
    "shares": Form(
        "shares", ("share",), texts=("group", "run"), words={"direction": DIRECTIONS, "part": PARTS}
    ),
}
"""Tables with one line per run, for the faint marks."""
