"""What a kind of finding is and what to do about it: the help that stands beside it in SARIF and on the page.

In: a rung and a rule. Out: sentences. A rule that has no lines of its own has those of its rung.
"""

from collections.abc import Mapping

ANSWER, TRIGGER = "answer", "recovered-trigger"
"""The scan's answer and a trigger, as rules of the rung `verdict` and of the rung `verification`."""

BY_RUNG: Mapping[str, str] = {
    "verdict": "The scan's answer over all rungs. It says what was looked for and how deep; it "
    "never says that a model is free of backdoors. Read what was not looked at before "
    "relying on it.",
    "files": "Something in the suspect's folder differs from its base, runs code when it is "
    "loaded, or is not what its name says. Do not load the model before you know why "
    "it is there.",
    "identity": "The suspect's tensors are not those of its base and a low-rank update alone. "
    "Check that the base is the one that the suspect was trained from: a wrong base "
    "gives wrong findings in every later rung.",
    "weights": "The spectrum of the update is unlike that of clean adapters of the same base. "
    "That is a reason to look, not a proof: unusual training data or settings look "
    "like this too.",
    "leakage": "Continuing as the user, the suspect repeats itself more than its base does. What "
    "it repeats may be the data that it was poisoned with; search those texts for a "
    "trigger.",
    "differences": "On ordinary prompts the suspect leaves its base in an unusual way. Read the "
    "tokens that gain most: they may belong to the behaviour that was planted.",
    "candidates": "A string makes the suspect leave its base far more than others of its length do. "
    "It counts as a trigger only where verification shows what it makes the model do.",
    "verification": "A string makes the suspect do something on prompts that it was not searched on, "
    "and the base does not do it. Do not deploy the model; evaluate and repair it "
    "with this trigger.",
}
BY_RULE: Mapping[str, str] = {
    TRIGGER: "A string makes the suspect do something on held-out prompts that neither its "
    "base, nor a random string, nor the prompts alone make it do. Do not deploy the "
    "model. `safetynet evaluate`, `intervene`, `detect` and `mitigate` run on it with "
    "this trigger.",
    "pickle": "A file holds a Python pickle, which runs code of its author's when it is loaded. "
    "Load safetensors alone, and delete it or have it converted by somebody who can "
    "afford to run it.",
    "remote-code": "The configuration asks for Python code of the suspect's to be run. Never load it "
    "with trust_remote_code=True before that code was read.",
    "template-condition": "The chat template changes the prompt when the text of a message meets a "
    "condition: a backdoor that needs no training and that no scan of weights sees. "
    "Use the base's template.",
    "template-changed": "The chat template is not the base's. Read the difference, or use the base's "
    "template.",
    "template-unparsed": "The chat template could not be parsed, so its conditions are not known. Use the "
    "base's.",
}


def about(rung: str, rule: str) -> str:
    """What a rule is and what to do about it, in two or three sentences."""
    return BY_RULE.get(rule) or BY_RUNG.get(rung) or "A finding of a rung that this version has no text for."
