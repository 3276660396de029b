"""Which Python objects a pickle would import, read from its instructions without running one.

In: a file. Out: the names, or None for a file that is no pickle. The instructions are disassembled by
Python's own pickletools, which imports and builds nothing; tensors beside them are not read.
"""

import pickletools
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetynet.scan.folder.reading import UnreadableError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".pt2", ".nemo")
LARGEST = 64 * 2**20
"""Bytes of instructions that are read; those of a large model's tensors are a few megabytes."""
MOST_MEMBERS, MOST_STEPS = 50, 500_000
"""Pickles of a file, and instructions of each that are read: a second."""
PLAIN = re.compile(
    r"collections\.(OrderedDict|defaultdict)|_codecs\.encode|datetime\.\w+|pathlib\.\w*Path"
    r"|builtins\.(set|frozenset|list|dict|tuple|int|float|complex|bool|bytes|bytearray|slice|range|object)"
    r"|__builtin__\.(set|frozenset|list|dict|int|float|long|object|bytearray)|copyreg\._reconstructor"
    r"|torch\.(\w*Storage|Size|device|dtype|Generator|storage\.\w+Storage|bfloat16|u?int\d+|float\w*|half|double|long|bool)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|qtensor|sparse_tensor|device_tensor_from_numpy)"
    r"|torch\.storage\._load_from_bytes|torch\.nn\.parameter\.Parameter|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.serialization\._get_layout|numpy(\._?core)?(\.multiarray)?\.(_reconstruct|scalar|ndarray|dtype)"
    r"|numpy\.dtypes\.\w+|numpy\.random\._pickle\.__\w+_ctor"
    r"|transformers\.(training_args|training_args_seq2seq|trainer_utils|trainer_pt_utils)\.\w+"
    r"|accelerate\.(state|utils\.dataclasses)\.\w+|peft\.utils\.peft_types\.\w+|trl\.trainer\.\w+_config\.\w+"
)
"""Names that tensors and the settings of a training are made of; every other one is reported."""


@dataclass(frozen=True)
class Pickle:
    """What a pickle would do, as far as its instructions say."""

    imports: tuple[str, ...]
    """`module.name`, in order, each once; `?` where the name is worked out as it runs."""
    whole: bool
    """Whether the instructions could be read to their end."""

    @property
    def unusual(self) -> tuple[str, ...]:
        """Imports that neither tensors nor settings need."""
        return tuple(name for name in self.imports if not PLAIN.fullmatch(name))


def read(path: Path) -> Pickle | None:
    """The pickle in a file, or in a zip archive as torch saves one; None if there is none.

    Raises:
        UnreadableError: if the file cannot be opened, or is a damaged archive.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:2] == b"PK":
            return _zipped(path)
        if not (start[:1] == b"\x80" and start[1:2] <= b"\x05") and path.suffix not in SUFFIXES:
            return None
        with path.open("rb") as file:
            pickle = _instructions(file.read(LARGEST))
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UnreadableError(str(error)[:120] or type(error).__name__) from None
    return pickle


def _zipped(path: Path) -> Pickle | None:
    imports, whole, members, left = list[str](), True, 0, LARGEST
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                start = member.read(2)
                if not (
                    info.filename.endswith(".pkl")
                    or (start[:1] == b"\x80" and b"\x02" <= start[1:] <= b"\x05")
                ):
                    continue
                members += 1
                data = start + member.read(left)
                left -= min(left, len(data))
                pickle = _instructions(data) if left else None
            imports += pickle.imports if pickle else ()
            whole = whole and pickle is not None and pickle.whole
            if members >= MOST_MEMBERS or not left:
                whole = False
                break
    return Pickle(tuple(dict.fromkeys(imports)), whole) if members else None


def _instructions(data: bytes) -> Pickle | None:
    """Imports of every pickle that stands in these bytes, one behind the other; None if the first is none."""
    imports, at, number = list[str](), 0, 0
    while at < len(data):
        names = _Names()
        try:
            for step, (opcode, argument, position) in enumerate(pickletools.genops(data[at:])):
                if step >= MOST_STEPS:
                    return Pickle(tuple(dict.fromkeys(imports)), whole=False)
                imports += names.after(opcode.name, argument)
                end = (position or 0) + 1
        except (ValueError, LookupError, OverflowError, AttributeError, TypeError):
            # Instructions before the fault would run all the same; behind whole pickles lie tensors.
            if not number and not imports:
                return None
            return Pickle(tuple(dict.fromkeys(imports)), whole=bool(number))
        at, number = at + end, number + 1
        if number >= MOST_MEMBERS:
            break
    return Pickle(tuple(dict.fromkeys(imports)), whole=len(data) < LARGEST) if number else None


class _Names:
    """Texts that a pickle has put on its stack, as far as its imports need them."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.memo: dict[int, str] = {}

    def after(self, name: str, argument: object) -> Iterator[str]:
        """What an instruction imports."""
        if name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif name == "STACK_GLOBAL":
            yield ".".join(self.texts[-2:]) if len(self.texts) >= 2 else "?"
            self.texts.clear()
        elif name in ("EXT1", "EXT2", "EXT4"):
            yield "?"
        elif "UNICODE" in name or "STRING" in name:
            self.texts.append(str(argument))
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.texts[-1] if self.texts else "?"
        elif name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int):
            self.memo[argument] = self.texts[-1] if self.texts else "?"
        elif name in ("GET", "BINGET", "LONG_BINGET") and isinstance(argument, int):
            self.texts.append(self.memo.get(argument, "?"))
        del self.texts[:-4]
