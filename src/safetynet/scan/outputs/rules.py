"""What a kind of finding is and what to do about it: the help that stands beside it in SARIF and on the page.

In: a rung and a rule. Out: sentences. A rule that has no text has that of its family, the word before its
first hyphen, or else that of its rung; so a new rule is never without help.
"""

from collections.abc import Mapping

ANSWER, TRIGGER = "answer", "recovered-trigger"
"""The scan's answer and a trigger, as rules of the rung `verdict` and of the rung `verification`."""

BY_RUNG: Mapping[str, str] = {
    "verdict": "The scan's answer over all rungs. It says what was looked for and how deep; it never "
    "says that a model is free of backdoors. Read what was not looked at before relying on it.",
    "files": "Something in the suspect's folder is not what its base or its name promises. Do not load "
    "the model before you know why it is there.",
    "identity": "What the comparison with the base shows: which tensors changed, and how. Check that the "
    "base is the one that the suspect was trained from: another one gives wrong findings in later rungs.",
    "weights": "The spectrum of the update is unlike that of clean adapters of the same base. That is a "
    "reason to look, not a proof: unusual training data or settings look like this too.",
    "leakage": "Continuing as the user, the suspect repeats itself more than its base does. What it "
    "repeats may be the data that it was poisoned with; search those texts for a trigger.",
    "differences": "On ordinary prompts the suspect leaves its base in an unusual way. Read the tokens "
    "that gain most: they may belong to the behaviour that was planted.",
    "candidates": "A string makes the suspect leave its base far more than others of its length do. It "
    "counts as a trigger only where verification shows what it makes the model do.",
    "verification": "A string makes the suspect do something on prompts that it was not searched on, and "
    "the base does not do it. Do not deploy the model; evaluate and repair it with this trigger.",
}
BY_RULE: Mapping[str, str] = {
    TRIGGER: "A string makes the suspect do something on held-out prompts that neither its base, nor a "
    "random string, nor the prompts alone make it do. Do not deploy the model. `safetynet evaluate`, "
    "`intervene`, `detect` and `mitigate` run on it with this trigger.",
    "pickle": "A file holds a Python pickle, which runs code of its author's when it is loaded. Load "
    "safetensors alone, and delete it or have it converted by somebody who can afford to run it.",
    "remote-code": "The configuration asks for Python code of the suspect's to be run. Never load it with "
    "trust_remote_code=True before that code was read.",
    "code": "The folder holds program code, which no model needs. Read it before anything is loaded.",
    "executable": "The folder holds a program, which no model needs. Delete it.",
    "symlink": "A link leads out of the suspect's folder. It was not followed; do not follow it either.",
    "pointer": "A pointer of Git LFS stands in place of the file. Get the file itself and scan again: what "
    "it holds was not looked at.",
    "damaged": "The file could not be read as what it is. What it holds was not looked at.",
    "unreadable": "The file could not be read. What it holds was not looked at.",
    "template": "The chat template decides what the model is shown of every message. It can change a prompt "
    "without any training, and no scan of weights sees that. Use the base's template.",
    "template-condition": "The chat template changes the prompt when the text of a message meets a "
    "condition: a backdoor that needs no training and that no scan of weights sees. Use the base's template.",
    "tokenizer": "The tokenizer is not the base's, so that the same text can become other tokens. A trigger "
    "can hide there. Use the base's tokenizer unless there is a reason for another one.",
    "adapter": "The adapter's files say something else than they hold, or hold more than a low-rank update. "
    "What is loaded may not be what was published. Compare adapter_config.json with the tensors.",
    "config": "A field of config.json differs from the base's, and changes what the model computes. Use the "
    "base's configuration unless there is a reason for another one.",
    "generation": "generation_config.json changes how every answer is drawn: forced, suppressed or weighted "
    "tokens can plant an answer or hide one. Generate without it.",
}


def about(rung: str, rule: str) -> str:
    """What a rule is and what to do about it, in two or three sentences."""
    family = rule.partition("-")[0]
    rung_text = BY_RUNG.get(rung, "A finding of a rung that this version has no text for.")
    return BY_RULE.get(rule) or BY_RULE.get(family) or rung_text
