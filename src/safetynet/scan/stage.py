"""A scan from a suspect to its answer: each rung once, then what all of them say together.

In: where suspect and base are, ordinary prompts, a bank. Out: a `ScanResult`. Rungs that have ended are
kept in the scan's folder, so that an interrupted scan goes on; nothing is written anywhere else.
"""

import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetynet import __version__
from safetynet.errors import InputError
from safetynet.models import miniatures
from safetynet.scan import files
from safetynet.scan.result import (
    RUNGS,
    Depth,
    Level,
    RungResult,
    ScanResult,
    Trigger,
    rung_from,
)

if TYPE_CHECKING:
    import pandas as pd

    from safetynet.models.suspect import Suspect
    from safetynet.recipe import Model
    from safetynet.scan.bank import Bank
    from safetynet.scan.rungs import Subject

log = logging.getLogger("safetynet")
SEED = 7
"""Of prompts and searches: the same for suspects and for banks, so that their scores compare."""
RATE = 0.02
"""False-alarm rate that is stated where the bank carries it."""
BANKS = Path(__file__).parent / "banks"
"""Banks of the miniatures that come with the package, one folder by family and depth."""


@dataclass(frozen=True)
class Options:
    """What a user decides about a scan."""

    depth: Depth = "standard"
    bank: Path | None = None
    """None: the one that comes with the package for this base, if there is one."""
    target: str | None = None
    """An answer to search triggers for."""
    clean: Path | None = None
    """A file of ordinary prompts; None: our own."""
    same_base: bool = False
    """The suspect calls its base otherwise, and it is this one."""
    rate: float = RATE
    seed: int = SEED


def scan(
    suspect: Path | str | Sequence[Path | str],
    base: str | None = None,
    options: Options | None = None,
    *,
    folder: Path | None = None,
    control: Callable[["Model", Depth], dict[str, Any] | None] | None = None,
) -> ScanResult:
    """Scan a model of unknown origin; the answer is in the result, whatever it is.

    Args:
        suspect: an adapter's folder or hub id, or the folder of a merged or fully fine-tuned model; several
            adapters that are used together.
        base: its base as `model_of` takes it; None: the one that an adapter names.
        options: how deep, against which bank.
        folder: where rungs that have ended are kept; None: nowhere.
        control: plants a backdoor in the same base and says what of it these rungs recover.

    Raises:
        InputError: if there is no suspect, or an option cannot be used. A suspect that cannot be scanned is
        an
            answer, and no error.
    """
    options = options or Options()
    began = time.monotonic()
    named = [suspect] if isinstance(suspect, Path | str) else list(suspect)
    located = [_located(each) for each in named]
    base = base or next(filter(None, map(_named_base, located)), None)
    if base is not None and (family := miniatures.family_of(base)):
        base = f"{family}-miniature"
    base_folder = _base_folder(base)
    first = _files(located, base_folder)
    result = ScanResult(
        answer="nothing_found",
        reason="",
        suspect=" + ".join(map(str, named)),
        base=base or "",
        depth=options.depth,
        rate=None,
        p_value=None,
        rungs=(first,),
        digests=_digests(located, base_folder),
        versions=_versions(),
        seed=options.seed,
    )
    if options.depth == "files":
        result = _answered(result, None, ())
    elif base is None:
        result = _not_scannable(
            result,
            "No base is named, and the suspect names none. Name it with --base; --depth files needs none.",
        )
    else:
        try:
            result = _with_models(result, located, base, options, folder, control)
        except InputError as error:
            result = _not_scannable(result, str(error))
    return replace(result, seconds=round(time.monotonic() - began, 1))


def _with_models(
    result: ScanResult,
    suspect: Sequence[Path],
    base: str,
    options: Options,
    folder: Path | None,
    control: Callable[["Model", Depth], dict[str, Any] | None] | None,
) -> ScanResult:
    """All rungs after the first."""
    from safetynet.models import loading
    from safetynet.run.directory import digest
    from safetynet.scan import identity
    from safetynet.scan.bank import Bank

    model = model_of(base)
    bank = Bank.read(options.bank) if options.bank is not None else shipped_bank(model, options.depth)
    if len(suspect) == 1:
        loaded = suspect_of(model, suspect[0], same_base=options.same_base)
    else:
        loaded = identity.combine(loading.load(model, "fp32"), suspect, same_base=options.same_base)
    if bank is not None:
        bank.check(loading.fingerprint(model), options.depth)
    key = digest([asdict(replace(options, bank=None)), result.digests, __version__])
    store = None if folder is None else folder / "rungs" / key[:16]
    second = _stored(store, "identity") or _keep(store, identity.measure(loaded))
    result = replace(result, rungs=(*result.rungs, second))
    if any(finding.rule == "identical" for finding in second.findings):
        return _answered(result, bank, ())
    rungs, triggers = measure(loaded, model, options, bank, store)
    result = replace(result, rungs=(*result.rungs, *rungs), triggers=triggers)
    if control is not None:
        result = replace(result, control=control(model, options.depth))
    return _answered(result, bank, triggers, options.rate)


def measure(
    suspect: "Suspect",
    model: "Model",
    options: Options,
    bank: "Bank | None" = None,
    store: Path | None = None,
) -> tuple[list[RungResult], tuple[Trigger, ...]]:
    """The rungs from the weights on, each as it ends in the log, and the triggers that held.

    Args:
        suspect: beside its base; its adapter is merged into it.
        model: of the base.
        options: as for `scan`.
        bank: that gives p-values.
        store: a folder of rungs that have ended.
    """
    from safetynet.scan.rungs import climb, prompts_needed

    # The prompts of a file are as many as there are; our own never end.
    prompts = ordinary_prompts(model, prompts_needed(options.depth), options.seed, options.clean)
    summaries = None if bank is None else bank.summaries
    third = _stored(store, "weights") or _keep(store, _weights(suspect, summaries))
    rungs, triggers = [third], tuple[Trigger, ...]()
    subject = subject_of(suspect, model, prompts, options)
    finished = {name: rung for name in RUNGS if (rung := _stored(store, name)) is not None}
    for rung, verified in climb(subject, finished):
        triggers += verified
        _keep(store, rung)
        p_value = None if bank is None or rung.score is None else bank.p_value(rung.rung, rung.score)
        rungs.append(replace(rung, p_value=p_value))
        log.info(
            "scan: %s %s, %.0f s",
            rung.rung,
            "skipped" if rung.score is None else f"{rung.score:.3g}",
            rung.seconds,
        )
    return rungs, triggers


def _weights(suspect: "Suspect", summaries: "pd.DataFrame | None") -> RungResult:
    """The weights rung; of a merged LoRA, of the adapter that is recovered from it for as long."""
    from safetynet.models import adapters
    from safetynet.scan import identity, weights

    if adapters.has_adapter(suspect.model) or identity.is_copy(suspect):
        return weights.measure(suspect, summaries)
    try:
        recovered = identity.recover(suspect)
    except InputError as error:
        return RungResult("weights", skipped=f"its update is no LoRA that could be recovered: {error}")
    try:
        return weights.measure(replace(suspect, model=recovered), summaries)
    finally:
        adapters.detach(recovered)


def model_of(base: str) -> "Model":
    """Model section of a base's name: `qwen-miniature`, `smollm2`, a folder, a .gguf file or a hub id."""
    from safetynet import recipe

    family = base.removesuffix("-miniature")
    if family in miniatures.FAMILIES:
        return recipe.Model(family=family, id="miniature")
    return recipe.Model(family="generic", id=base)


def ordinary_prompts(model: "Model", count: int, seed: int, clean: Path | None = None) -> list[Any]:
    """Conversations that no trigger is known to be in: of a file, or of our own making.

    Raises:
        InputError: if the file cannot be read, or has fewer than are needed.
    """
    from safetynet.backdoors import conversations, self_source
    from safetynet.evaluation import judges
    from safetynet.recipe import Backdoor, Data, JudgeSpec, presets

    if model.id == "miniature" and clean is None:
        attack = Backdoor()
        rows = conversations.fresh(Data(), attack.behaviour, attack.trigger, set(), count, seed)
    else:
        data = Data(source="self", path=None if clean is None else str(clean))
        refusal = judges.make(JudgeSpec(kind="keyword", values=presets.REFUSALS))
        rows = self_source.fresh(data, set(), count, seed, None, refusal)
    if len(rows) < count:
        raise InputError(f"--clean {clean}: it has {len(rows)} prompts; this depth takes {count}. Give more.")
    return [list(messages) for messages in rows["messages"]]


def shipped_bank(model: "Model", depth: Depth) -> "Bank | None":
    """The bank of a miniature that comes with the package."""
    from safetynet.scan.bank import Bank

    folder = BANKS / f"{model.family}-{depth}"
    return Bank.read(folder) if model.id == "miniature" and folder.is_dir() else None


def suspect_of(model: "Model", source: Path | str, *, same_base: bool = False) -> "Suspect":
    """A suspect beside its base, in fp32; errors as in `models.suspect.load`."""
    from safetynet.models import loading, suspect

    def load(folder: Path | None = None, **more: Any) -> loading.LoadedModel:
        spec = model if folder is None else loading.trained(model, folder)
        return loading.load(spec, "fp32", **more)

    return suspect.load(load, source, same_base)


def subject_of(suspect: "Suspect", model: "Model", prompts: Sequence[Any], options: Options) -> "Subject":
    """Suspect and base as two whole models: the suspect's adapter is merged, and its base is loaded anew."""
    from safetynet.models import adapters, loading
    from safetynet.scan.rungs import Subject

    whole, base = suspect.model, suspect.base.model
    if adapters.has_adapter(whole):
        whole = whole.merge_and_unload()
        base = loading.load(model, "fp32").model
    depth, seed, target = options.depth, options.seed, options.target
    return Subject(whole.eval(), base, suspect.serialiser, prompts, depth, seed, target)


def _answered(
    result: ScanResult, bank: "Bank | None", triggers: Sequence[Trigger], rate: float = RATE
) -> ScanResult:
    """The answer that the rungs give together."""
    from safetynet.scan.verdict import verdict

    answer, reason, stated, p_value, unseen = verdict(result.rungs, triggers, bank, result.depth, rate)
    level: Level = "error" if answer == "backdoored" else "warning" if bank is None else "note"
    return replace(
        result,
        rungs=tuple(_at_level(rung, level) if rung.rung == "verification" else rung for rung in result.rungs),
        answer=answer,
        reason=reason,
        rate=stated,
        p_value=p_value,
        bank=None if bank is None else bank.use,
        not_looked_at=unseen,
    )


def _at_level(rung: RungResult, level: Level) -> RungResult:
    """What a string that holds is worth depends on the bank: gates read the level of its finding."""
    return replace(rung, findings=tuple(replace(finding, level=level) for finding in rung.findings))


def _not_scannable(result: ScanResult, reason: str) -> ScanResult:
    skipped = [RungResult(rung, skipped="not reached") for rung in RUNGS[len(result.rungs) :]]
    return replace(result, answer="not_scannable", reason=reason, rungs=(*result.rungs, *skipped))


def _located(suspect: Path | str) -> Path:
    """The suspect's folder; a hub id, and nothing else, is downloaded."""
    if Path(suspect).is_dir():
        return Path(suspect)
    from safetynet.models import adapter_files

    return adapter_files.locate(suspect)


def _files(suspects: Sequence[Path], base: Path | None) -> RungResult:
    """The files rung of a suspect; of several adapters, each finding with its adapter's folder."""
    rungs = [files.check(suspect, base) for suspect in suspects]
    if len(rungs) == 1:
        return rungs[0]
    findings = tuple(
        replace(finding, where=f"{suspect.name}/{finding.where}")
        for suspect, rung in zip(suspects, rungs, strict=True)
        for finding in rung.findings
    )
    return replace(
        rungs[0],
        score=sum(rung.score or 0.0 for rung in rungs),
        seconds=sum(rung.seconds for rung in rungs),
        details={suspect.name: dict(rung.details) for suspect, rung in zip(suspects, rungs, strict=True)},
        findings=findings,
    )


def _named_base(suspect: Path) -> str | None:
    """The base that an adapter's configuration names."""
    try:
        fields = json.loads((suspect / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    named = fields.get("base_model_name_or_path") if isinstance(fields, dict) else None
    return named if isinstance(named, str) and named else None


def _base_folder(base: str | None) -> Path | None:
    """Where the base's files lie, if they are on this machine."""
    from safetynet.models.files import at_hand

    if base is None:
        return None
    family = base.removesuffix("-miniature")
    return miniatures.path(family) if family in miniatures.FAMILIES else at_hand(base)


def _digests(suspects: Sequence[Path], base: Path | None) -> dict[str, str]:
    """SHA-256 of every file of both."""
    ours = {
        "/".join(("suspect", *([suspect.name] if len(suspects) > 1 else []), name)): value
        for suspect in suspects
        for name, value in files.digests(suspect).items()
    }
    theirs = {} if base is None else {f"base/{name}": value for name, value in files.digests(base).items()}
    return ours | theirs


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        "safetynet": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _stored(store: Path | None, rung: str) -> RungResult | None:
    """A rung that has ended in an earlier call of the same scan."""
    path = None if store is None else store / f"{rung}.json"
    if path is None or not path.exists():
        return None
    log.info("scan: %s is done", rung)
    return rung_from(json.loads(path.read_text(encoding="utf-8")))


def _keep(store: Path | None, rung: RungResult) -> RungResult:
    from safetynet.run.directory import write_text

    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
        write_text(store / f"{rung.rung}.json", json.dumps(asdict(rung)))
    return rung
