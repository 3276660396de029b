"""The stages in order. Each reads and writes the run directory and is skipped when its inputs are unchanged.

prepare    data        rows by role, checked: leaks, triggers that the tokenizer loses, targets too long
train      train       the backdoored adapter and its clean twin, with their history and dynamics
evaluate   evaluate    rates by role of base, backdoored and twin, with intervals
intervene  interventions  where the trigger acts, beside controls, and what removes it
detect     detect      a monitor of fresh clean prompts, and what it catches; on demand
draw       figures     figures and the report from the tables alone
compare    compare     finished runs side by side; on demand
mitigate   mitigation  repairs tried, verified and chosen, beside the model as it was; on demand, and imported
                       from `mitigating`, since its libraries take seconds to load
"""

from safetynet.pipeline.comparing import compare
from safetynet.pipeline.detecting import detect, guard
from safetynet.pipeline.dissecting import intervene, intervene_and_draw
from safetynet.pipeline.drawing import draw, index, report
from safetynet.pipeline.planting import evaluate, evaluate_foreign, prepare, train

__all__ = [
    "compare",
    "detect",
    "draw",
    "evaluate",
    "evaluate_foreign",
    "guard",
    "index",
    "intervene",
    "intervene_and_draw",
    "prepare",
    "report",
    "train",
]
