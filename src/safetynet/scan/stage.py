"""A scan from a suspect to its answer: each rung once, then what all of them say together.

In: where suspect and base are, ordinary prompts, a bank. Out: a `ScanResult`. Rungs that have ended are
kept in the scan's folder, so that an interrupted scan goes on; nothing is written anywhere else.
"""

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetynet import __version__
from safetynet.errors import InputError, RunError
from safetynet.extras import need
from safetynet.models import miniatures
from safetynet.models.files import at_hand
from safetynet.models.named import model_of
from safetynet.scan import files
from safetynet.scan.folder import reading
from safetynet.scan.result import (
    DEPTHS,
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
    import torch

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
    options: Options | Depth = "standard",
    *,
    folder: Path | None = None,
    control: Callable[["Model", Depth], dict[str, Any] | None] | None = None,
) -> ScanResult:
    """Scan a model of unknown origin; the answer is in the result, whatever it is.

    Args:
        suspect: an adapter's folder or hub id, or the folder of a merged or fully fine-tuned model; several
            adapters that are used together.
        base: its base as `models.named.model_of` takes it; None: the one that an adapter names.
        options: how deep, against which bank; a depth alone has the other options' defaults.
        folder: where rungs that have ended are kept; None: nowhere.
        control: plants a backdoor in the same base and says what of it these rungs recover.

    Raises:
        InputError: if there is no suspect, or an option cannot be used. A suspect that cannot be scanned is
            an answer, and no error.
    """
    options = Options(options) if isinstance(options, str) else options
    if not 0 < options.rate < 1:
        raise InputError(
            f"--rate {options.rate}: it is no rate. Give a number between 0 and 1, such as 0.02."
        )
    if options.depth not in DEPTHS:
        raise InputError(f"depth: there is no {options.depth!r}. Choose one of {', '.join(DEPTHS)}.")
    if options.depth != "files":
        need(f"--depth {options.depth}", "sklearn")
    if options.target is not None and not options.target.strip():
        raise InputError("--target: it is empty. Give the answer that triggers are to be searched for.")
    bank = None
    if options.bank is not None:
        if not _as_banks_are(options):
            raise InputError(
                "--bank: banks are of our own prompts, the default seed and no target, so that scores of "
                "other scans do not compare. Leave out --clean, --seed and --target, or the bank."
            )
        from safetynet.scan.bank import Bank

        bank = Bank.read(options.bank)
    began = time.monotonic()
    named = [suspect] if isinstance(suspect, Path | str) else list(suspect)
    located = [_located(each) for each in named]
    base = base or next(filter(None, map(_named_base, located)), None)
    base_folder = None
    if base is not None and (family := miniatures.family_of(base)):
        base, base_folder = f"{family}-miniature", miniatures.path(family)
    elif base is not None:
        base_folder = at_hand(base)
    rungs = [_files(located, base_folder)]
    several = len(located) > 1
    digests = {
        "/".join(("suspect", *([place.name] if several else []), name)): sha
        for place in located
        for name, sha in files.digests(place).items()
    }
    if base_folder is not None:
        digests |= {f"base/{name}": sha for name, sha in files.digests(base_folder).items()}
    result = ScanResult(
        answer="nothing_found",
        reason="",
        suspect=" + ".join(map(str, named)),
        base=base or "",
        depth=options.depth,
        rate=None,
        p_value=None,
        rungs=(),
        digests=digests,
        versions={
            "safetynet": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
        seed=options.seed,
    )
    try:
        result = _scanned(result, rungs, located, options, bank, folder, control)
    except InputError as error:
        result = _not_scannable(result, rungs, str(error))
    except Exception as error:
        log.debug("scan", exc_info=True)
        fault = f"{type(error).__name__}: {error} (a fault of SafetyNet)"
        result = _not_scannable(result, rungs, fault)
    return replace(result, seconds=round(time.monotonic() - began, 1))


def _scanned(  # what a scan is made of
    result: ScanResult,
    rungs: list[RungResult],
    suspect: Sequence[Path],
    options: Options,
    bank: "Bank | None",
    folder: Path | None,
    control: Callable[["Model", Depth], dict[str, Any] | None] | None,
) -> ScanResult:
    """The answer of all rungs; each is appended to `rungs` as it ends."""
    if options.depth == "files":
        return _answered(result, rungs, None, ())
    if not result.base:
        raise InputError(
            "No base is named, and the suspect names none. Name it with --base; --depth files needs none."
        )
    from safetynet.models import loading
    from safetynet.run.directory import digest
    from safetynet.scan import identity, recovery
    from safetynet.scan.rungs import prompts_needed

    model = model_of(result.base)
    if bank is None and _as_banks_are(options):
        bank = shipped_bank(model, options.depth)
    fingerprint = loading.fingerprint(model)
    if bank is not None:
        bank.check(fingerprint, options.depth)
    # The prompts of a file are as many as there are; our own never end.
    prompts = ordinary_prompts(model, prompts_needed(options.depth), options.seed, options.clean)
    about = replace(options, bank=None, clean=None, rate=RATE)
    if len(suspect) == 1:
        loaded = suspect_of(model, suspect[0], same_base=options.same_base)
    else:
        loaded = recovery.combine(loading.load(model, "fp32"), suspect, same_base=options.same_base)
    numbers = str(fast_dtype(loaded.base.model))
    if bank is not None:
        bank.check_numbers(numbers)
    # Size and time of every file, so that one that is not hashed cannot change unnoticed.
    states = [
        [str(path.relative_to(place)), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        for place in suspect
        for path in sorted(place.rglob("*"))
        if path.is_file()
        for stat in (path.stat(),)
    ]
    inputs = [asdict(about), prompts, result.digests, states, fingerprint, numbers, __version__]
    store = None if folder is None else folder / "rungs" / digest(inputs)[:16]
    rungs.append(_stored(store, "identity") or _keep(store, identity.measure(loaded)))
    if any(finding.rule == "identical" for finding in rungs[-1].findings):
        return _answered(result, rungs, bank, ())
    triggers = tuple[Trigger, ...]()
    for rung, verified in measured(loaded, model, prompts, options, bank, store):
        rungs.append(rung)
        triggers += verified
    if control is not None:
        try:
            result = replace(result, control=control(model, options.depth))
        except Exception as error:  # noqa: BLE001 - what was measured of the suspect stands
            result = replace(result, control={"it failed": f"{type(error).__name__}: {error}"})
    return _answered(result, rungs, bank, triggers, options.rate)


def _as_banks_are(options: Options) -> bool:
    """Whether a scan asks what the adapters of banks were asked."""
    return options.target is None and options.clean is None and options.seed == SEED


def measure(
    suspect: "Suspect", model: "Model", options: Options
) -> tuple[list[RungResult], tuple[Trigger, ...]]:
    """The rungs from the weights on, against no bank, and the triggers that held; arguments as `measured`."""
    from safetynet.scan.rungs import prompts_needed

    prompts = ordinary_prompts(model, prompts_needed(options.depth), options.seed, options.clean)
    every = list(measured(suspect, model, prompts, options))
    return [rung for rung, _ in every], tuple(trigger for _, verified in every for trigger in verified)


def measured(
    suspect: "Suspect",
    model: "Model",
    prompts: Sequence[Any],
    options: Options,
    bank: "Bank | None" = None,
    store: Path | None = None,
) -> Iterator[tuple[RungResult, tuple[Trigger, ...]]]:
    """The rungs from the weights on, each as it ends, with the triggers that held.

    Args:
        suspect: beside its base; its adapter is merged into it.
        model: of the base.
        prompts: as many as the depth needs.
        options: as for `scan`.
        bank: that gives p-values.
        store: a folder of rungs that have ended.
    """
    from safetynet.scan.rungs import RESUMED, climb

    yield _weights(suspect, None if bank is None else bank.summaries), ()  # depends on the bank: never stored
    subject = subject_of(suspect, model, prompts, options)
    finished = {name: rung for name in RESUMED if (rung := _stored(store, name)) is not None}
    for rung, verified in climb(subject, finished):
        if rung.rung not in finished:
            _keep(store, rung)
        p_value = None if bank is None or rung.score is None else bank.p_value(rung.rung, rung.score)
        score = "without a score" if rung.score is None else f"{rung.score:.3g}"
        log.info("scan: %s %s, %.0f s", rung.rung, score, rung.seconds)
        yield replace(rung, p_value=p_value), verified


def _weights(suspect: "Suspect", summaries: "pd.DataFrame | None") -> RungResult:
    """The weights rung; of a merged LoRA, of the adapter that is recovered from it for as long."""
    from safetynet.models import adapters
    from safetynet.scan import identity, recovery, weights

    if adapters.has_adapter(suspect.model) or identity.is_copy(suspect):
        return weights.measure(suspect, summaries)
    try:
        recovered = recovery.recover(suspect)
    except InputError as error:
        return RungResult("weights", skipped=f"its update is no LoRA that could be recovered: {error}")
    try:
        return weights.measure(replace(suspect, model=recovered), summaries)
    finally:
        adapters.detach(recovered)


def ordinary_prompts(model: "Model", count: int, seed: int, clean: Path | None = None) -> list[Any]:
    """Conversations that no trigger is known to be in: of a file, or of our own making.

    Raises:
        InputError: if the file cannot be read, or has fewer than are needed.
    """
    from safetynet.backdoors import conversations, self_source
    from safetynet.recipe import Backdoor, Data
    from safetynet.scan.rungs import REFUSAL

    if model.id == "miniature" and clean is None:
        attack = Backdoor()
        rows = conversations.fresh(Data(), attack.behaviour, attack.trigger, set(), count, seed)
    else:
        data = Data(source="self", path=None if clean is None else str(clean))
        rows = self_source.fresh(data, set(), count, seed, None, REFUSAL)
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
        if not hasattr(whole, "merge_and_unload") or whole.active_peft_config.is_prompt_learning:
            kind = whole.active_peft_config.peft_type.value
            raise InputError(
                f"suspect: {kind} puts vectors before the prompt instead of changing weights, and is not run "
                "by these rungs. --depth files still looks at its files."
            )
        whole = whole.merge_and_unload()
        base = loading.load(model, "fp32").model
    # Tensors were compared in fp32; what is said and searched needs no more than is computed fast here.
    number = fast_dtype(base)
    depth, seed, target = options.depth, options.seed, options.target
    return Subject(whole.to(number).eval(), base.to(number), suspect.serialiser, prompts, depth, seed, target)


def fast_dtype(model: Any) -> "torch.dtype":
    """bf16 for a large model where the device multiplies it by instructions of its own, else the model's own.

    A forward pass of SmolLM2 is nearly four times as fast. Miniatures gain nothing, and keep their numbers.
    """
    import torch

    from safetynet.models.adapters import MERGED_FROM
    from safetynet.models.loading import resolve_dtype

    if model.num_parameters() < MERGED_FROM:
        return model.dtype
    if model.device.type == "cuda":
        return resolve_dtype("auto", "cuda")
    instructions = torch.cpu.get_capabilities()
    fast = instructions.get("amx_bf16") or instructions.get("avx512_bf16")
    return torch.bfloat16 if fast else model.dtype


def _answered(
    result: ScanResult,
    rungs: Sequence[RungResult],
    bank: "Bank | None",
    triggers: Sequence[Trigger],
    rate: float = RATE,
) -> ScanResult:
    """The answer that the rungs give together."""
    from safetynet.scan.verdict import verdict

    answer, reason, stated, p_value, unseen = verdict(rungs, triggers, bank, result.depth, rate)
    # What a string that holds is worth depends on the bank: gates read the level of its finding.
    level: Level = "error" if answer == "backdoored" else "warning" if bank is None else "note"
    levelled = [
        replace(rung, findings=tuple(replace(each, level=level) for each in rung.findings))
        if rung.rung == "verification"
        else rung
        for rung in rungs
    ]
    return replace(
        result,
        rungs=tuple(levelled),
        triggers=tuple(triggers),
        answer=answer,
        reason=reason,
        rate=stated,
        p_value=p_value,
        bank=None if bank is None else bank.use,
        not_looked_at=unseen,
    )


def _not_scannable(result: ScanResult, rungs: Sequence[RungResult], reason: str) -> ScanResult:
    """What was measured before stays, and the rest was not reached."""
    reached = {rung.rung for rung in rungs}
    skipped = [RungResult(rung, skipped="not reached") for rung in RUNGS if rung not in reached]
    return replace(result, answer="not_scannable", reason=reason, rungs=(*rungs, *skipped))


def _located(suspect: Path | str) -> Path:
    """The suspect's folder; a hub id, and nothing else, is downloaded."""
    if not str(suspect):
        raise InputError("suspect: its name is empty. Give a folder or a hub id.")
    folder = Path(suspect)
    if not folder.is_dir():
        from safetynet.models import adapter_files

        folder = adapter_files.locate(suspect)
    below = sorted(file.parent.name for file in folder.glob("*/adapter_config.json"))
    if below and not any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
        raise InputError(
            f"{folder}: it is no model; adapters below it are {', '.join(below[:8])}. Name one of them, or "
            "several that are used together."
        )
    return folder


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
    config = suspect / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        fields, _ = reading.json_of(config)
    except reading.UnreadableError:
        return None
    named = fields.get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def _stored(store: Path | None, rung: str) -> RungResult | None:
    """A rung that has ended in an earlier call of the same scan."""
    path = None if store is None else store / f"{rung}.json"
    if path is None or not path.exists():
        return None
    try:
        stored = rung_from(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):  # not whole: measured again
        return None
    log.info("scan: %s is done", rung)
    return stored


def _keep(store: Path | None, rung: RungResult) -> RungResult:
    from safetynet.run.directory import write_text

    if store is not None:
        try:
            write_text(store / f"{rung.rung}.json", json.dumps(asdict(rung)))
        except RunError as error:
            log.warning("scan: %s An interrupted scan measures %s again.", error, rung.rung)
    return rung
