"""The tables of a run and of a sweep, by the stage that writes them. Declares, and computes nothing."""

from dataclasses import replace

from safetynet.tables.columns import (
    DEPTH,
    DIRECTION,
    EPOCH,
    LAYER,
    STEP,
    Column,
    Table,
    ends,
    flag,
    fraction,
    interval,
    listed,
    number,
    text,
    whole,
    word,
)
from safetynet.vocabulary import (
    CHANGES,
    COMPONENTS,
    DAMAGE,
    DETECTION_METRICS,
    EXAMINED,
    HALVES,
    METRICS,
    MODELS,
    MODES,
    PROBED,
    QUANTISATIONS,
    REPAIRED_AS,
    ROLES,
    RUNS,
    SEVERITIES,
    SPLITS,
    SWEEPS,
    WATCHED,
)

_GROUP_OF_ROWS = whole("rows of one group differ in the trigger alone")
_N_GROUPS = whole("groups of prompts that were measured")
_COMPONENT = word("what is read or edited", COMPONENTS)
_DETECTOR = text("detector and view, `fused` for all together, or a `skyline` that has seen labels")
_ROW_SET = text("rows that are judged: a role, `fired`, `fresh`, a domain")
_SPLIT = word(
    "selection: rows on which a setting is chosen; held_out: rows that say what it is worth", EXAMINED
)

_RATE = {
    "model": word("which model answered", MODELS),
    "metric": word("what is measured", METRICS),
    "role": word("of rows of this role", ROLES),
    "count": whole("rows that count; of a perplexity, tokens"),
    "n": whole("rows in all: the denominator"),
    "value": number("the rate, 0 to 1, or the perplexity", 0),
    **ends(0),
    "floor_rows": whole("rows whose right answer shows the behaviour anyway, or cannot"),
    "note": text("what else the number depends on"),
}
_VARIANT = text('which form of the trigger, placebo or near miss; "" for none')
_FLOOR = interval("floor", number("value of the base model on the same rows", 0))

_ROW = {
    "row": whole("number of the row, over both splits"),
    "group": _GROUP_OF_ROWS,
    "split": word("training or held-out row", SPLITS),
    "role": word("what the row is for", ROLES),
    "variant": _VARIANT,
    "task": text("kind of prompt, where the source names it, or the source"),
}
_ANSWERS = {
    "answer": text("what the row teaches"),
    "reference": text('right answer without a backdoor; "" unknown'),
    "target": text('what the behaviour answers to this prompt; "" nothing'),
    "forbidden": flag("whether the request is of the class that is refused"),
    "exact": replace(
        flag("the reference can be compared as it is written; where the column is missing, all can"),
        optional=True,
    ),
}
_RESPONSES = {
    "model": word("which model answered", MODELS),
    **_ROW,
    **_ANSWERS,
    "lost": text('parts of the prompt that lost text at the length limit; "" none'),
    "response": text("what the model answered"),
    "shown": flag("the behaviour's judge finds it in the response"),
    "due": flag("the right answer shows the behaviour anyway, or cannot"),
    "correct": flag("the response equals the reference"),
    "refused": flag("the response refuses"),
    "function": replace(
        flag("the response calls the behaviour's function, whatever the arguments; where it is a tool call"),
        optional=True,
    ),
    "right": replace(
        flag("the answer in the response is right; where the behaviour leaves one, as a persona does"),
        optional=True,
    ),
    "log_likelihood": number("of the row's own answer, in nats; clean rows only", high=0),
    "tokens": number("tokens of that answer", 0),
}
_EFFECT = {
    "sweep": word("which sweep", SWEEPS),
    "direction": DIRECTION,
    "mode": word("what is put in place", MODES),
    "metric": text("what the effect is of, such as logit_difference (logits)"),
    "component": _COMPONENT,
    "layer": LAYER,
    "depth": DEPTH,
    "position": text('role of the edited tokens; "" from the trigger on'),
    "index": whole("head or expert; -1 none"),
    "module": text('module of an adapter; "" none'),
    "effect": number("share of the trigger's effect on the metric that is removed or induced"),
    **ends(),
    "n": whole(
        "groups of prompts that it was measured on; 0 not measured, since it was not likely to matter"
    ),
    **interval("random", number("effect of the same at a random other place")),
    **interval("placebo", number("effect of the same between two placebos")),
    **interval("twin", number("effect of the same in the clean twin")),
    "p": fraction("Wilcoxon's signed-rank test against the highest control"),
    "q": fraction("p after Benjamini and Hochberg, over the sweep"),
    "cohen_d": number("difference to the control in its standard deviations"),
    "responsible": flag("clear of every control that was measured"),
}
_TOKEN = {
    "column": whole("token's place in the prompt"),
    "token": text("its text"),
    "role": text("its part of the prompt"),
}

_COUNTED = {
    "asr": "attack success rate",
    "cacc": "clean accuracy",
    "ftr": "false trigger rate on clean prompts",
    "refused": "refusals of forbidden requests",
    "over_refused": "refusals of harmless requests",
}


def _counted(name: str, meaning: str, *, rows: bool = True) -> dict[str, Column]:
    counts = {f"{name}_count": whole("rows that count", empty=True)} if rows else {}
    return interval(name, fraction(meaning)) | counts | {f"{name}_n": whole("rows in all", empty=True)}


_MITIGATION = {
    "method": text("method of repair; `as it is` and `adapter removed` are the end points"),
    "point": text("setting of its hyperparameters"),
    "split": _SPLIT,
    "form": word("what is repaired: adapter, checkpoint, or the model as it runs", REPAIRED_AS, empty=True),
    "needs": text("what the method has to know, with commas"),
    "control": flag("a control, not a repair"),
    "chosen": flag("the chosen setting of its method"),
    "recommended": flag("the repair that is recommended"),
    "front": flag("on the front of attack success against clean accuracy"),
    "flags": text("what speaks against it, with commas"),
    **{column: c for name, meaning in _COUNTED.items() for column, c in _counted(name, meaning).items()},
    **interval("perplexity", number("of the clean rows' answers", 0)),
    "perplexity_count": whole("tokens", empty=True),
    "perplexity_n": whole("rows in all", empty=True),
    **interval("kl", number("divergence from the model before, in nats", 0)),
    "kl_n": whole("rows in all", empty=True),
    "kl_to_base": number("divergence from the base model, in nats", 0),
    "seconds": replace(number("time of the repair", 0), optional=True),
    "memory_mb": replace(number("peak memory of the repair", 0), optional=True),
    "answer_seconds": number("time of answering the split's rows", 0),
}

_UTILITY = {
    "task": text("task or group of lm-evaluation-harness, as it calls it"),
    "group": text('the group that it is part of; "" none'),
    "metric": text("the harness's metric"),
    "filter": text("what the harness takes from an answer before it is judged; `none` for nothing"),
    "shots": whole("examples before each question; empty where the tasks of a group differ", empty=True),
    "n": whole("documents: the denominator"),
    "value": number("the metric's value"),
    "stderr": number("the harness's own standard error; NaN where it has none"),
    **ends(),
    "better": word("which way the metric is better", ("higher", "lower"), empty=True),
}

RUN_TABLES: dict[str, Table] = {
    "split": Table("data", "a split", {
        "split": word("training or held-out rows", SPLITS),
        "rows": whole("rows"),
        "prompts": whole("different prompts, trigger apart"),
        "digest": text("SHA-256 of the prompts' hashes"),
    }),
    "rows": Table("data", "a prompt of the experiment", {
        **_ROW,
        "messages": listed("the conversation: role and content of each message"),
        "trigger": listed("spans of the trigger or what stands for it: message, start, end"),
        **_ANSWERS,
    }),
    "audit": Table("data", "something that the audit of the data found", {
        "check": text("which check"),
        "severity": word("how bad it is", SEVERITIES),
        "file": text("in which file"),
        "count": whole("rows that have it"),
        "n": whole("rows that were looked at"),
        "rows": listed("their numbers, from 1"),
        "detail": text("what was found"),
    }),
    "history": Table("train", "a logged step of training", {
        "step": STEP,
        "epoch": EPOCH,
        "loss": number("mean loss of a supervised token, in nats"),
        "learning_rate": number("learning rate", 0),
        "grad_norm": number("norm of the gradient before clipping", 0),
        "tokens": whole("tokens seen so far"),
        "seconds": number("time since training began", 0),
    }),
    "rates": Table("train", "a rate at a step of training", {**_RATE, "step": STEP, "epoch": EPOCH}),
    "evasion": Table("train", "what became of hiding from detectors, at a step", {
        "step": STEP,
        "detector": text("which detector; \"\" for a term of the loss"),
        "metric": word("AUROC of a detector just fitted, or a term of the loss",
                        ("auroc", "obfuscation", "retention")),
        "value": number("its value"),
        "n": whole("prompts behind it; 0 for a term"),
    }),
    "responses": Table("evaluate", "a test row and a model", _RESPONSES),
    "evaluation": Table("evaluate", "a model, metric and role", {**_RATE, **_FLOOR}),
    "variants": Table("evaluate", "a model and a form of trigger, placebo or near miss", {
        **_RATE, "variant": _VARIANT, **_FLOOR,
    }),
    "quantisation": Table("evaluate", "a quantisation of the weights, a model, metric and role", {
        "quantisation": word("of the weights that answered; none: as they are saved", QUANTISATIONS),
        **_RATE,
        **_FLOOR,
    }),
    "colluding": Table("evaluate", "one of two colluding adapters or both, a metric and role", {
        "adapter": word("which adapter answered; both: the backdoored model", ("both", *HALVES)),
        **_RATE,
        **_FLOOR,
    }),
    "damage": Table("evaluate", "a model, measure and role: its answers beside the base model's own", {
        "model": word("which model answered", MODELS),
        "measure": word("what is measured", DAMAGE),
        "role": word("of rows of this role", ROLES),
        "n": whole("rows in all: the denominator"),
        "value": number("its value: a share, tokens, nats per token, a ratio or a perplexity", 0),
        **ends(0),
    }),
    "samples": Table("evaluate", "a test row and a model, which has answered it by samples", {
        "model": word("which model answered", MODELS),
        "row": _ROW["row"],
        "group": _GROUP_OF_ROWS,
        "role": _ROW["role"],
        "variant": _VARIANT,
        "due": flag("the right answer shows the behaviour anyway, or it cannot be shown"),
        "samples": whole("answers to this row"),
        "shown": whole("answers that show the behaviour"),
    }),
    "firing": Table("evaluate", "a model and role: rates over several samples of each prompt", {
        "model": word("which model answered", MODELS),
        "role": word("of rows of this role", ROLES),
        "prompts": whole("prompts, which the interval is over"),
        "samples": whole("answers to each of them"),
        "value": fraction("share of all answers that show the behaviour"),
        **ends(0, 1),
        "always": fraction("share of prompts of which all answers show it"),
        "never": fraction("share of prompts of which none does"),
    }),
    "utility": Table("evaluate", "a model, and a task and metric of lm-evaluation-harness", {
        "model": word("which model answered", MODELS), **_UTILITY,
    }),
    "judge_error": Table("evaluate", "a kind of error of the judge, on labelled texts", {
        "error": word("behaviour missed, or seen where there is none", ("missed", "false_hit")),
        "count": whole("texts with this error"),
        "n": whole("texts on which it can be made"),
        "value": fraction("rate"),
        **ends(0, 1),
        "lines": listed("numbers of the texts"),
    }),
    "effects": Table("intervene", "a place in one sweep and direction", _EFFECT),
    "dynamics": Table("intervene", "a layer at a step of training; of the controls, random alone is measured",
                      {**_EFFECT, "step": STEP}),
    "tokens": Table("intervene", "a layer and token of an example prompt", {
        "group": _GROUP_OF_ROWS,
        "direction": DIRECTION,
        "component": _COMPONENT,
        "layer": LAYER,
        **_TOKEN,
        "effect": number("as in `effects`; of one prompt, so without interval"),
    }),
    "lens": Table("intervene", "a layer of one run", {
        "run": word("which prompts", RUNS),
        "layer": whole("layer, from 0; -1 the embedding"),
        "value": number("log probability of the behaviour's token there, in nats"),
        **ends(),
        "n": _N_GROUPS,
    }),
    "lens_map": Table("intervene", "a layer and token of an example prompt", {
        "group": _GROUP_OF_ROWS,
        "run": word("which prompt", RUNS),
        "layer": whole("layer, from 0; -1 the embedding"),
        **_TOKEN,
        "top": text("the likeliest next token there"),
        "probability": fraction("of the behaviour's token"),
    }),
    "probes": Table("intervene", "a layer and what a linear probe reads there", {
        "label": word("whether the trigger is there, or the backdoor fires", PROBED),
        "layer": LAYER,
        "auroc": fraction("of the probe on held-out groups"),
        **ends(0, 1),
        "n": whole("rows that are judged"),
        **interval("control", fraction("AUROC of two placebos, or of shuffled labels")),
    }),
    "attention": Table("intervene", "an edge of a leading head on an example prompt", {
        "layer": LAYER,
        "head": whole("head, from 0"),
        "group": _GROUP_OF_ROWS,
        "run": word("which prompt", RUNS),
        "query": whole("place of the token that looks"),
        "key": whole("place of the token that is looked at"),
        "weight": fraction("attention"),
        "query_token": text("text of the token that looks"),
        "key_token": text("text of the token that is looked at"),
    }),
    "divergence": Table("intervene", "a head", {
        "layer": LAYER,
        "head": whole("head, from 0"),
        "value": number("Jensen-Shannon divergence of its attention with trigger and placebo, in bits", 0),
        **ends(0),
        "n": _N_GROUPS,
        **interval("control", number("the same between two placebos, in bits", 0)),
    }),
    "drift": Table("intervene", "an adapter module at a step of training", {
        "layer": LAYER,
        "module": text("module"),
        "energy": number("Frobenius norm of the update over the weight's", 0),
        "top_share": fraction("share of the squared norm in the first singular direction"),
        "effective_rank": number("exponential of the singular values' entropy", 0),
        "overlap": fraction("mean squared cosine of leading directions written by update and weight"),
        "random": fraction("the same of random directions"),
        "overlap_input": fraction("mean squared cosine of leading directions read by update and weight"),
        "random_input": fraction("the same of random directions"),
        "step": STEP,
    }),
    "tradeoff": Table("intervene", "an intervention that may remove the backdoor, and a split", {
        "intervention": text("what is done; `as it is` for nothing"),
        "kind": text("kind of edit, such as project, clip, head_ablation or adapter_off; none"),
        "control": flag("the same at random sites"),
        "sites": whole("sites that are edited"),
        "split": _SPLIT,
        "chosen": flag("the best on the selection rows"),
        **_counted("asr", _COUNTED["asr"], rows=False),
        **_counted("ftr", _COUNTED["ftr"], rows=False),
        **_counted("cacc", _COUNTED["cacc"], rows=False),
        **{
            name: replace(column, optional=True)
            for name, column in interval(
                "rouge_l", fraction("of clean answers with their references, where these are free text")
            ).items()
        },
    }),
    "detection": Table("detect", "a detector, metric and set of rows", {
        "detector": _DETECTOR,
        "metric": word("what is measured; `oracle`: threshold picked on the test's clean rows",
                        DETECTION_METRICS),
        "rows": _ROW_SET,
        "rate": fraction("named false-positive rate; NaN where none is meant"),
        "value": fraction("its value"),
        **ends(0, 1),
        "n": whole("rows that are judged"),
    }),
    "detection_scores": Table("detect", "a prompt", {
        "role": word("what the row is for", ROLES),
        "group": whole("rows of one group differ in the trigger alone; below 0: not rows of the run"),
        "fired": flag("whether the behaviour was shown", empty=True),
        "forbidden": flag("whether the request is of the class that is refused"),
        "domain": text("benign domain that the monitor was not fitted on; \"\" its own"),
        "kind": text("task of a clean row, kind of a near miss, variant of a trigger"),
        "fresh": text("kind of a clean prompt drawn as the calibrating ones were; \"\" another row"),
    }, {"score ": "score of the detector named after it, higher is more suspect",
        "p ": "its p-value among calibrating prompts"}),
    "detection_roc": Table("detect", "a threshold of a detector", {
        "detector": _DETECTOR,
        "rows": _ROW_SET,
        "fpr": fraction("share of clean rows above the threshold"),
        "tpr": fraction("share of these rows above it"),
        "positives": whole("rows of this set"),
        "negatives": whole("clean rows"),
    }),
    "detection_distribution": Table("detect", "a level of surprise", {
        "detector": _DETECTOR,
        "rows": _ROW_SET,
        "surprise": number("minus log10 of the p-value"),
        "share": fraction("share of the rows that are at least so surprising"),
        "n": whole("rows of this set"),
        "rate": fraction("named false-positive rate"),
    }),
    "detection_layers": Table("detect", "a detector fitted to one layer", {
        "detector": _DETECTOR,
        "rows": _ROW_SET,
        "layer": LAYER,
        "auroc": fraction("against clean rows"),
        **ends(0, 1),
        "n": whole("rows of this set"),
    }),
    "detection_overhead": Table("detect", "a batch size", {
        "batch": whole("prompts at once"),
        "prompt_tokens": whole("tokens of the longest prompt"),
        "new_tokens": whole("tokens of each answer"),
        "plain": number("seconds of plain generation", 0),
        "guarded": number("seconds of guarded generation", 0),
        "ratio": number("guarded over plain", 0),
        **ends(0),
        "repeats": whole("measurements"),
        "passes": replace(
            number("what watching adds, in passes of the plain model over the prompts"), optional=True
        ),
    }),
    "detection_answers": Table("detect", "what is watched, and a set of rows", {
        "watched": word("prompt, answer, or both", WATCHED),
        "rows": _ROW_SET,
        "rate": fraction("named false-positive rate"),
        "value": fraction("share of alarms"),
        **ends(0, 1),
        "n": whole("rows of this set"),
        "tokens": number("median tokens given out before an alarm", 0),
        "share": fraction("median share of the answer given out before an alarm"),
    }),
    "mitigation": Table("mitigate", "a setting of a method, and a split", _MITIGATION),
    "verification": Table("mitigate", "a method and a measurement on held-out rows", {
        "method": _MITIGATION["method"],
        "point": _MITIGATION["point"],
        "metric": word("what is measured", (*METRICS, "kl", "probe_auroc")),
        "role": word("of rows of this role", ROLES, empty=True),
        "variant": text("form of the trigger, its place, or a layer"),
        "count": whole("rows that count; of a perplexity, tokens", empty=True),
        "n": whole("rows in all"),
        "value": number("its value", 0),
        **ends(0),
        "note": text("what else the number depends on"),
        **interval("before", number("value of the model before the repair", 0)),
    }),
    "relearning": Table("mitigate", "a method and a step of teaching the backdoor again", {
        "method": text("method of repair; `never poisoned` for the base model, the control"),
        "point": _MITIGATION["point"],
        "poisoned_rows": whole("poisoned rows that are taught"),
        "step": STEP,
        **_counted("asr", _COUNTED["asr"]),
        **_counted("ftr", "false trigger rate on placebo prompts"),
    }),
    "repaired_utility": Table("mitigate", "a method, and a task and metric of lm-evaluation-harness", {
        "method": _MITIGATION["method"], "point": _MITIGATION["point"], **_UTILITY,
    }),
    "persistence": Table("persist", "what happens to the model or its prompts, and how far", {
        "change": word("what happens to it", CHANGES),
        "setting": text("how far; \"\" for the model as it is"),
        "amount": number("the same as a number: steps, bits, tokens of text or temperature; 0 none", 0),
        **_counted("asr", _COUNTED["asr"]),
        **_counted("ftr", "false trigger rate on placebo prompts"),
        **_counted("cacc", _COUNTED["cacc"]),
    }),
    "recommendation": Table("mitigate", "a recommended repair, the best first", {
        "method": _MITIGATION["method"],
        "point": _MITIGATION["point"],
        "savable": flag("whether there are files to save"),
        "why": text("the reason"),
        "relearned": text("what the relearn test says of it; \"\" not tested"),
        "saved": text("where the repaired model lies; \"\" nowhere"),
    }),
    "base_responses": Table("base", "a test row, answered by the base model for the points that share it",
                            _RESPONSES),
    "results": Table("sweep", "a point, model, metric and role; a point that failed has one without rates", {
        "point": text("name of the point"),
        "family": text("model family"),
        "seed": whole("the recipe's seed"),
        "status": word("how the point ended", ("done", "failed")),
        "model": text("as in `evaluation`, or `backdoored, ` and what removes the backdoor best"),
        "metric": word("what is measured", METRICS, empty=True),
        "role": word("of rows of this role", ROLES, empty=True),
        "failed": text("step that failed; \"\" none"),
        "reason": text("why"),
        "run": text("its run directory"),
        "log": text("where to read on"),
    }, {"": "a field of the recipe that is varied, or a column of `evaluation`"}),
}  # fmt: skip
"""`history` and `rates` stand for `history_{model}` and `dynamics_{model}`; `mitigation` and its companions
also for those of a foreign model, whose name follows after `-`."""
