"""One rank that profiles; run as a script: rank, first port, folder, and what to do.

`measure` profiles under every sharding in turn and rank 0 saves the records. `fail` asks for what is refused, lets both
ranks run out of memory, and at last lets rank 1 break while rank 0 waits for it.
"""

import os
import sys
from pathlib import Path

import msgspec
import torch

from optplan.planner.errors import OptplanError
from optplan.planner.measured.measurement import OutOfMemory
from optplan.profilers.live import command, sharded

CASES = (
    ("fsdp2", "bf16", "adamw"),
    ("fsdp2-noreshard", "bf16", "adamw"),
    ("fsdp2", "mixed", "adamw"),
    ("fsdp2", "bf16", "adam-mini"),
    ("fsdp2", "mixed", "adam-mini"),
    ("ddp", "mixed", "adam-mini"),
    ("ddp", "bf16", "adamw"),
    ("ddp-copies", "mixed", "adamw"),
    ("zero1", "bf16", "adamw"),
)


def profile(folder, sharding="fsdp2", precision="bf16", optimizer="adamw"):
    """This rank's part of a profile of the small model."""
    return command.profile(
        str(folder / "config.json"),
        optimizer=optimizer,
        device="cpu",
        num_steps=4,
        sharding=sharding,
        precision=precision,
        batch_size=2,
        seq_len=16,
    )


def measure_all(folder, port):
    """Every case; each meets at a port of its own."""
    for number, case in enumerate(CASES):
        os.environ["MASTER_PORT"] = str(port + number)
        record = profile(folder, *case)
        assert (record is None) == (os.environ["RANK"] != "0")
        if record is not None:
            (folder / f"{'-'.join(case)}.json").write_bytes(msgspec.json.encode(record))


def broken(*args, **kwargs):
    """Stands for a measurement that fails on one rank."""
    del args, kwargs
    raise RuntimeError("the disk of this rank is gone")


def exhausted(original):
    """Stands for a measurement whose rank runs out of memory, so that it joins no collective."""

    def measure(request, choice, **kwargs):
        alone = msgspec.structs.replace(request, config=msgspec.structs.replace(request.config, sharding="none"))
        record = original(alone, choice, **kwargs)
        return msgspec.structs.replace(record, out_of_memory=OutOfMemory("backward", 1024, 2048, "out of memory"))

    return measure


def try_failures(folder, port):
    """One failure after the other, and for each a line of what this rank tells."""
    rank, original = os.environ["RANK"], command.measure
    stand_ins = {"refuse": original, "exhaust": exhausted(original), "fail": broken if rank == "1" else original}
    for number, (what, stand_in) in enumerate(stand_ins.items()):
        os.environ["MASTER_PORT"] = str(port + number)
        command.measure = stand_in
        try:
            record = profile(folder, "none" if what == "refuse" else "fsdp2")
        except sharded.OtherRankError:
            told = "(another rank tells)"
        except OptplanError as error:
            told = str(error)
        else:
            told = "" if record is None else str([row.out_of_memory.phase for row in record.ranks])
        sys.stdout.write(f"{what}: {told}\n")
        sys.stdout.flush()


def main():
    """Do as told."""
    rank, port, folder, what = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    if what == "measure":
        measure_all(folder, port)
    else:
        try_failures(folder, port)
        os._exit(0)  # as a failed rank's process ends: without waiting for the others


if __name__ == "__main__":
    main()
