"""One rank that profiles; run as a script: rank, first port, folder, and what to do.

`measure` profiles under every sharding in turn and rank 0 saves the records; `fail` lets rank 1 break in its step;
`exhaust` lets rank 1 run out of memory while rank 0 waits for it.
"""

import os
import sys
from pathlib import Path

import msgspec
import torch

from optplan.planner.errors import OptplanError
from optplan.planner.measurement import OutOfMemory
from optplan.profilers.live import command, sharded

CASES = (
    ("fsdp2", "bf16", "adamw"),
    ("fsdp2-noreshard", "bf16", "adamw"),
    ("fsdp2", "mixed", "adamw"),
    ("fsdp2", "bf16", "adam-mini"),
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
    """Stands for a measurement whose rank has no memory left, and which therefore joins no collective."""

    def measure(request, choice, **kwargs):
        import torch.distributed as dist

        dist.is_initialized()
        small = msgspec.structs.replace(request, config=msgspec.structs.replace(request.config, sharding="none"))
        record = original(small, choice, **kwargs)
        return msgspec.structs.replace(record, out_of_memory=OutOfMemory("backward", 1024, 2048, "out of memory"))

    return measure


def main():
    """Do as told; the exit status is 1 after an error, 3 after one of which another rank tells."""
    rank, port, folder, what = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if what == "measure":
        measure_all(folder, port)
        return
    sharded._PATIENCE_SECONDS = 3.0
    if what == "fail" and rank == "1":
        command.measure = broken
    if what == "exhaust":
        command.measure = exhausted(command.measure)
    try:
        record = profile(folder, "none" if what == "refuse" else "fsdp2")
    except sharded.OtherRankError:
        os._exit(3)
    except OptplanError as error:
        print(error, flush=True)
        os._exit(1)
    if record is not None:
        (folder / f"{what}.json").write_bytes(msgspec.json.encode(record))


if __name__ == "__main__":
    main()
