"""What W&B has kept of a run offline: its log of records, which the package writes and has no reader for.

In: a folder `offline-run-*`. Out: the logged values, a dict a step.

The log is a header of seven bytes, then blocks of 32 KiB. A block holds fragments, each with checksum, length
and kind: whole, or the first, a middle or the last fragment of a record. A record is a Protocol Buffer of the
package's own.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from safetynet.errors import InputError
from safetynet.extras import need

HEADER, MAGIC = struct.Struct("<4sHB"), (b":W&B", 0xBEE1)
BLOCK = 32 * 1024
FRAGMENT = struct.Struct("<IHB")
"""Checksum of the kind and the data, length of the data, kind."""
WHOLE, LAST = 1, 4
NO_NUMBERS = ("NaN", "Infinity", "-Infinity")
"""As texts, since JSON has no number for them."""


def history(folder: Path) -> list[dict[str, float]]:
    """The numbers that an offline run has logged; tables, pictures and texts are left out.

    Of a run that goes on, or was killed, the last record may be cut: it is left out.

    Args:
        folder: `wandb/offline-run-*`, or `latest-run`.

    Raises:
        InputError: if it holds no log or several, wandb is not installed, or the log is damaged or has
            logged no number.
    """
    logs = sorted(folder.glob("*.wandb"))
    if len(logs) != 1:
        runs = ", ".join(path.name for path in sorted(folder.glob("offline-run-*"))[:3])
        raise InputError(
            f"{folder}: there are {len(logs)} files *.wandb; name the folder of one run of W&B"
            + (f", such as one of {runs}" if runs else ", or the file trainer_state.json of a checkpoint")
        )
    need(str(folder), "wandb")
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made by protobuf

    steps = []
    for record in map(Record.FromString, _records(logs[0])):
        if record.WhichOneof("record_type") == "history":
            logged = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            steps.append(
                {
                    key: float(value)
                    for key, value in logged.items()
                    if isinstance(value, int | float) or value in NO_NUMBERS
                }
            )
    if not steps:
        raise InputError(
            f"{logs[0]}: no value is logged in it. If the run goes on, W&B has not written it yet; "
            "wait for its end, or call wandb.teardown()."
        )
    return steps


def _records(path: Path) -> Iterator[bytes]:
    """The records of a log, as far as they are whole.

    Raises:
        InputError: if it cannot be read, is no log of W&B, or a checksum is wrong.
    """
    try:
        log = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(log) < HEADER.size or HEADER.unpack_from(log)[:2] != MAGIC:
        raise InputError(f"{path}: is no log of Weights & Biases")
    place, record = HEADER.size, b""
    while place < len(log):
        left = BLOCK - place % BLOCK
        if left < FRAGMENT.size:  # too short for another fragment, and padded
            place += left
            continue
        begin = place + FRAGMENT.size
        if begin > len(log):
            return
        checksum, length, kind = FRAGMENT.unpack_from(log, place)
        if begin + length > len(log):
            return
        if crc32(log[begin - 1 : begin + length]) != checksum:
            raise InputError(f"{path}: is damaged at byte {place}; copy it again, or run wandb sync")
        record += log[begin : begin + length]
        if kind in (WHOLE, LAST):
            yield record
            record = b""
        place = begin + length
