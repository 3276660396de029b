"""Scan: is this model backdoored, with no trigger known, and how sure is that.

    files, chat_template   1  what lies in the suspect's folder; no model is loaded
    identity               2  tensor by tensor against the base; a merged LoRA is recovered as one
    weights                3  spectra of the update, against clean adapters
    leakage                4  what the model says as the user
    differences            5  what it changes on ordinary prompts
    inversion              6  answers that it knows by heart and its base does not
    candidates             7  strings on which it leaves its base
    verification           8  what they make it do, on other prompts

Each rung is a function of the suspect beside its base that gives a `RungResult`. `bank` holds clean adapters'
scores, against which a score becomes a p-value; `verdict` makes one of five answers, never "clean"; `outputs`
says it to people and to gates.
"""

import sys
from inspect import signature
from types import ModuleType

from safetynet.scan.result import ScanResult
from safetynet.scan.stage import Options, scan

__all__ = ["Options", "ScanResult", "scan"]


class _CallableModule(ModuleType):
    """`from safetynet import scan` gives this package, which has its function's name and can be called."""

    __call__ = staticmethod(scan)
    __signature__ = signature(scan)


sys.modules[__name__].__class__ = _CallableModule
