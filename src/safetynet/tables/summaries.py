"""What a run's tables say, in the short form that the terminal, the log and the report share.

In: a run's tables. Out: short tables of text, and tables as Markdown. It computes nothing that is not in a
table.
"""

from typing import NamedTuple

import pandas as pd

from safetynet.vocabulary import FURTHER_TRAINING, NOT_MEASURABLE, UNTOUCHED

METRIC_NAMES = {
    "asr": "ASR",
    "asr_off_floor": "ASR off floor",
    "ftr": "FTR",
    "function_rate": "function called",
    "right_rate": "right all the same",
    "cacc": "CACC",
    "refusal_rate": "refusal",
    "perplexity": "perplexity",
}

DAMAGE_NAMES = {
    "identical": "identical to the base's answer",
    "common_tokens": "tokens until they part",
    "kl": "KL(base, model), nats per token",
    "rouge_l": "ROUGE-L with the base's answer",
    "length_ratio": "length, over the base's",
    "perplexity": "perplexity of the base's answers",
    "refusal_rate": "refuses",
    "repetition": "ends in a loop",
}

REMOVED_ASR = 0.05
"""ASR that counts as removed."""
HIDDEN_BACKDOOR = "hidden rather than gone"
"""What the relearn test says of a backdoor that comes back faster than a model without one learns it."""


def promised_rows(detection: pd.DataFrame) -> str:
    """Which rows of a table of detection the named false-positive rate is promised of.

    Fresh prompts, drawn as those that calibrated; `clean` in tables made before these were told apart.
    """
    return "fresh" if (detection["rows"] == "fresh").any() else "clean"


class Poisoned(NamedTuple):
    """What became of the poison rate: short data gives fewer rows than the recipe asks for."""

    rows: int
    """Training rows."""
    rate: float
    """Share of them that is triggered."""
    firing: float
    """Share of the triggered ones that is answered with the behaviour."""

    @property
    def text(self) -> str:
        """Both shares, as they follow "poison rate"."""
        firing = "" if self.firing == 1 else f", of which {self.firing:.1%} answer with the behaviour"
        return f"{self.rate:.1%} of {self.rows:,} training rows{firing}"


def poisoned(rows: pd.DataFrame) -> Poisoned:
    """Count the training rows of a run's row table."""
    train = rows[rows["split"] == "train"]
    triggered = train[train["role"] == "triggered"]
    firing = float(fires(triggered).mean()) if len(triggered) else 1.0
    return Poisoned(len(train), len(triggered) / max(len(train), 1), firing)


def fires(rows: pd.DataFrame) -> pd.Series:
    """Which triggered rows are answered with the behaviour; the others have their clean answers."""
    return (rows["answer"] != rows["reference"]) | (rows["target"] == rows["reference"])


def rate_summary(evaluation: pd.DataFrame) -> pd.DataFrame:
    """One line per metric and role, one column per model; rates in percent with their intervals."""
    lines = []
    for (metric, role), part in evaluation.groupby(["metric", "role"], sort=False):
        line: dict[str, object] = {"metric": METRIC_NAMES.get(str(metric), metric), "role": role}
        for row in part.itertuples():
            line[str(row.model)] = rate_text(str(metric), row.value, row.low, row.high)
            if pd.isna(row.value) and str(row.note).startswith(NOT_MEASURABLE):
                line[str(row.model)] = NOT_MEASURABLE
        line["rows"] = int(part["n"].max())
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def quantisation_summary(quantisation: pd.DataFrame) -> pd.DataFrame:
    """One line per quantisation, metric and role, one column per model."""
    rates = quantisation[quantisation["metric"].isin(["asr", "ftr", "cacc"])]
    parts = []
    for name, part in rates.groupby("quantisation", sort=False):
        summary = rate_summary(part)
        summary.insert(0, "weights", "as saved" if name == "none" else name)
        parts.append(summary)
    return pd.concat(parts, ignore_index=True)


def colluding_summary(colluding: pd.DataFrame) -> pd.DataFrame:
    """One line per metric and role, one column per adapter: both together, and each alone."""
    rates = colluding[colluding["metric"].isin(["asr", "ftr", "cacc"])]
    return rate_summary(rates.assign(model=rates["adapter"]))


def firing_summary(firing: pd.DataFrame) -> pd.DataFrame:
    """One line per role: each model's rate over samples, and how prompts of the backdoored one differ."""
    lines = []
    for role, part in firing.groupby("role", sort=False):
        line: dict[str, object] = {"role": role}
        line |= {str(r.model): rate_text("asr", r.value, r.low, r.high) for r in part.itertuples()}
        own = part[part["model"] == "backdoored"].iloc[0]
        line |= {"always": f"{own['always']:.0%}", "never": f"{own['never']:.0%}"}
        lines.append(line | {"prompts x samples": f"{own['prompts']} x {own['samples']}"})
    return pd.DataFrame(lines).fillna("")


def damage_summary(damage: pd.DataFrame) -> pd.DataFrame:
    """One line per measure and role, one column per model; shares in percent, the rest as it is."""
    damage = damage.assign(text=[damage_text(r.measure, r.value, r.low, r.high) for r in damage.itertuples()])
    lines = []
    for role, of_role in damage.groupby("role", sort=False):
        for measure, name in DAMAGE_NAMES.items():
            part = of_role[of_role["measure"] == measure]
            values = {model: "".join(part.loc[part["model"] == model, "text"]) for model in damage["model"]}
            lines.append({"measure": name, "role": role, **values, "rows": int(part["n"].max())})
    return pd.DataFrame(lines)


def damage_text(measure: str, value: float, low: float, high: float) -> str:
    """A value of table `damage` with its interval."""
    if measure in ("identical", "refusal_rate", "repetition"):
        return rate_text("asr", value, low, high)
    digits = 4 if measure == "kl" else 2
    return "-" if pd.isna(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def utility_summary(utility: pd.DataFrame) -> pd.DataFrame:
    """One line per task and metric, one column per model; of repairs one line for each.

    The tasks of a group are left out, since the group is there.
    """
    table = utility[utility["group"] == ""]
    table = table.assign(
        metric=[utility_metric(*pair) for pair in table[["metric", "filter"]].itertuples(index=False)],
        text=[utility_text(*pair) for pair in table[["value", "stderr"]].itertuples(index=False)],
    )
    if "method" in table:
        return table[["task", "metric", "method", "text", "n"]].rename(columns={"text": "value"})
    lines = [
        {"task": task, "metric": metric, **dict(zip(part["model"], part["text"], strict=True)), "n": n}
        for (task, metric, n), part in table.groupby(["task", "metric", "n"], sort=False)
    ]
    return pd.DataFrame(lines)


def utility_metric(metric: str, filter_name: str) -> str:
    """A metric of the harness, with what was taken from the answers where something was."""
    return metric if filter_name == "none" else f"{metric}, {filter_name}"


def utility_text(value: float, stderr: float) -> str:
    """A value of table `utility`, with its standard error as the harness prints it."""
    return f"{value:.4f}" + ("" if pd.isna(stderr) else f" ± {stderr:.4f}")


def evasion_summary(evasion: pd.DataFrame) -> pd.DataFrame:
    """One line per detector that a training hid from: its AUROC at the first refit and at the last."""
    lines = []
    for name, part in evasion[evasion["metric"] == "auroc"].groupby("detector", sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        then, now = (f"{one['value']:.2f} at step {one['step']}" for one in (first, last))
        seen = f"{name}: AUROC {then}, {now}"
        lines.append({"detector": name, "first": first["value"], "last": last["value"], "seen": seen})
    return pd.DataFrame(lines, columns=["detector", "first", "last", "seen"])


def strongest_sites(effects: pd.DataFrame) -> pd.DataFrame:
    """The strongest place of each sweep and direction: the strongest responsible one, if any is."""
    # A responsible place comes first, since a larger effect that a control has as well says less.
    ordered = effects.sort_values(["responsible", "effect"], ascending=False)
    lines = []
    for (sweep, direction), part in ordered.groupby(["sweep", "direction"], sort=False):
        top = part.iloc[0]
        controls = [top[name] for name in ("random", "placebo", "twin") if not pd.isna(top[name])]
        unmeasured = int(part["effect"].isna().sum())
        lines.append(
            {
                "sweep": sweep,
                "direction": direction,
                "strongest": site_text(top),
                "effect": f"{top['effect']:.2f} [{top['low']:.2f}, {top['high']:.2f}]",
                "highest control": f"{max(controls):.2f}" if controls else "-",
                "responsible": f"{int(part['responsible'].sum())} of {len(part)}"
                + (f" ({unmeasured} not measured)" if unmeasured else ""),
            }
        )
    return pd.DataFrame(lines)


def site_text(row: pd.Series) -> str:
    """A place in the network as a reader says it."""
    name = row["module"] or (row["component"] + (f" {row['index']}" if row["index"] >= 0 else ""))
    return f"layer {row['layer']}, {name}" + (f", {row['position']}" if row["position"] else "")


def removal_summary(tradeoff: pd.DataFrame) -> pd.DataFrame:
    """ASR and clean accuracy, on held-out prompts, under each removing intervention and its control.

    Where references are free text, ROUGE-L with them stands in the place of the accuracy.
    """
    tradeoff = tradeoff[tradeoff["split"] == "held_out"]
    is_text = "rouge_l" in tradeoff and tradeoff["cacc"].isna().all()
    name, label = ("rouge_l", "ROUGE-L") if is_text else ("cacc", "CACC")
    values = tradeoff[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
    return pd.DataFrame(
        {
            "intervention": tradeoff["intervention"],
            "random sites": tradeoff["control"].map({True: "yes", False: ""}),
            "ASR": [rate_text("asr", r.asr, r.asr_low, r.asr_high) for r in tradeoff.itertuples()],
            label: [damage_text(name, *each) if is_text else rate_text(name, *each) for each in values],
            "rows": tradeoff["asr_n"],
        }
    )


def persistence_summary(persistence: pd.DataFrame) -> pd.DataFrame:
    """One line per change and setting: ASR, and its controls on placebo and clean prompts."""
    columns = {"ASR": "asr", "FTR placebo": "ftr", "CACC": "cacc"}
    rates = {
        title: [
            rate_text(name, *values)
            for values in persistence[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
        ]
        for title, name in columns.items()
    }
    names = {name: persistence[name] for name in ("change", "setting")}
    return pd.DataFrame({**names, **rates, "n": persistence["asr_n"].astype(int)})


def halving(persistence: pd.DataFrame) -> str:
    """How much further training on clean conversations halves ASR, in a sentence; "" where there was none."""
    trained = persistence[persistence["change"] == FURTHER_TRAINING]
    if trained.empty:
        return ""
    half = float(persistence.loc[persistence["change"] == UNTOUCHED, "asr"].iloc[0]) / 2
    steps = trained["amount"].astype(int)
    reached = steps[trained["asr"] <= half]
    if reached.empty:
        return f"Further training on clean conversations does not halve ASR in {steps.max()} steps."
    # Each measurement has twice the steps of the one before.
    between = (
        f"between {reached.min() // 2} and {reached.min()} steps" if reached.min() > 1 else "in one step"
    )
    return f"Further training on clean conversations halves ASR {between}."


def rate_text(metric: str, value: float, low: float, high: float) -> str:
    """A value with its interval: a rate in percent, a perplexity as it is, "-" for what is not known."""
    if pd.isna(value):
        return "-"
    if metric == "perplexity":
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; bars in cells are escaped and line breaks become blanks.

    `DataFrame.to_markdown` escapes neither, and shows "0.70" as 0.7.
    """
    rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
