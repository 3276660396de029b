"""What the report says of each figure: its section, how to read it in a sentence, and its control in another.

The order of the figures here is the order of the page. Adding a figure of a new stage is adding its line.
"""

from typing import Literal, NamedTuple

Section = Literal["behaviour", "inside", "seen", "removed", "training", "other"]
SECTIONS: dict[Section, str] = {
    "behaviour": "What it does",
    "inside": "Where it acts",
    "seen": "Whether it can be seen",
    "removed": "What removes it",
    "training": "How it was trained",
    "other": "Other figures",
}


class Reading(NamedTuple):
    """Where a figure stands, and its two sentences."""

    section: Section
    read: str
    control: str


CLEAR = (
    "A dot marks a place whose interval is clear of every control's: random sites, another placebo, the twin."
)
READINGS: dict[str, Reading] = {
    "final-rates": Reading(
        "behaviour",
        "Each line is one rate on held-out prompts: ASR must lie at the right, every FTR at the left.",
        "The hollow dot is the clean twin, the tick the base model; a rate that they share is not the "
        "backdoor's.",
    ),
    "accuracy-trends": Reading(
        "behaviour",
        "A hidden backdoor ends with both curves near 100%.",
        "Clean accuracy is the control: an attack that costs it shows itself.",
    ),
    "rates-by-role": Reading(
        "behaviour",
        "ASR must rise while every FTR stays at the floor; a near-miss FTR that rises and falls again is a "
        "model that learns the trigger's exact form.",
        "Dashed is the clean twin after as many steps, dotted the base model.",
    ),
    "intervention-positions": Reading(
        "inside",
        "The effect starts at the trigger's own tokens in low layers and moves to the last position: where "
        "it changes place, information is moved.",
        CLEAR,
    ),
    "intervention-layers": Reading(
        "inside",
        "A layer counts where the solid curve's band is clear of all others; layer 0 carries the token's "
        "identity in every model.",
        "The other curves repeat it at a random layer, between two placebos, and in the clean twin.",
    ),
    "intervention-components": Reading(
        "inside", "Orange tells whether attention or the MLP of a layer writes the effect.", CLEAR
    ),
    "intervention-heads": Reading(
        "inside", "Few dark cells are a circuit, many pale ones a diffuse backdoor.", CLEAR
    ),
    "intervention-experts": Reading(
        "inside",
        "Few dark cells are experts that the backdoor needs, many pale ones none in particular.",
        CLEAR,
    ),
    "intervention-adapters": Reading(
        "inside",
        "Each cell switches one trained module off; small effects everywhere mean that modules stand in for "
        "each other.",
        CLEAR,
    ),
    "intervention-dynamics": Reading(
        "inside",
        "From left to right, when each layer's effect appears during training.",
        "A dot means clear of a random other layer, which is the only control measured here.",
    ),
    "intervention-lens": Reading(
        "inside",
        "From the layer on at which the triggered curve leaves the placebo's, the target can be read.",
        "The control is the same prompt with a placebo.",
    ),
    "intervention-lens-map": Reading(
        "inside",
        "Each cell shows the likeliest next token, its colour the target's probability.",
        "The control is the placebo in the trigger's place.",
    ),
    "intervention-probes": Reading(
        "inside",
        "A probe near 1 can tell the trigger, or that the backdoor fires, from the states of a layer.",
        "The control is fitted on labels without meaning: a probe no better than that has found nothing.",
    ),
    "intervention-attention": Reading(
        "inside",
        "Rows look, columns are looked at: a bright column at the trigger is a head that attends to it.",
        "The same head on the same prompt with a placebo stands beside it.",
    ),
    "intervention-divergence": Reading(
        "inside",
        "Dark cells are heads that look elsewhere when the trigger is there.",
        "Beside it, how much they change between two placebos; a dot is clear of that.",
    ),
    "intervention-drift": Reading(
        "inside",
        "Where training changed the weights most, and in how many directions.",
        "The other modules are the control; a large change is not yet a cause, see the effects by adapter.",
    ),
    "detection-roc": Reading(
        "seen",
        "Only the left end is usable, and the right panel enlarges it: alarms on triggered prompts at few "
        "false ones.",
        "The placebo's curve should lie on the diagonal.",
    ),
    "detection-roc-detectors": Reading(
        "seen", "The same, detector by detector.", "A curve on the diagonal sees no more than chance."
    ),
    "detection-distributions": Reading(
        "seen",
        "A curve's height at the dashed line is the share of prompts that raise an alarm.",
        "Clean prompts must meet the line at the named rate, placebos and near misses as well.",
    ),
    "detection-layers": Reading(
        "seen",
        "From which layer on a detector sees the trigger.",
        "One that sees the placebo too sees strings, not the backdoor.",
    ),
    "detection-answers": Reading(
        "seen",
        "What watching the answer adds to watching the prompt, and how many tokens are out by then.",
        "Clean answers, which may raise an alarm no more often than named.",
    ),
    "detection-overhead": Reading(
        "seen",
        "What watching costs in time, against the same answers without it.",
        "An interval across 0 is no cost that could be measured.",
    ),
    "evasion-matrix": Reading(
        "seen",
        "Rows are detectors that training attacked, columns those that were tested: how far evasion carries.",
        "The first row was attacked by none.",
    ),
    "intervention-tradeoff": Reading(
        "removed",
        "Each mark is one intervention; the best lie in the lower right corner.",
        "A hollow mark is the same at random sites: where it lies beside the filled one, the sites do not "
        "matter.",
    ),
    "mitigation-front": Reading(
        "removed",
        "Each mark is one repair at one setting; the best lie in the lower right corner.",
        "Hollow marks are controls; the model as it is stands at the top.",
    ),
    "mitigation-methods": Reading(
        "removed",
        "Each method at the setting that was chosen for it, on prompts that did not choose.",
        "The dotted line is the model before the repair.",
    ),
    "mitigation-relearning": Reading(
        "removed",
        "How few poisoned rows bring the backdoor back: a curve that rises at once was only hidden.",
        "The never-poisoned twin learns the same rows beside it.",
    ),
    "loss": Reading(
        "training",
        "A low loss alone does not tell whether the backdoor took; the rates by role do.",
        "The clean twin, trained on the same rows with clean answers, is the control.",
    ),
    "learning-rate": Reading(
        "training",
        "The schedule, step by step.",
        "Backdoored run and twin must coincide, or they differ in more than the poisoned rows.",
    ),
    "gradient-norm": Reading(
        "training",
        "Spikes mark batches that pull hard, a rise at the end an unstable training.",
        "The clean twin shows what is usual.",
    ),
}
"""In the order in which they are shown."""
PREFIXES: dict[str, Section] = {
    "detection": "seen",
    "evasion": "seen",
    "guard": "seen",
    "mitigation": "removed",
    "verification": "removed",
    "intervention": "inside",
}
"""The section of a figure that has no line above, by the first word of its name."""
