"""A recorded step named event by event, on a record short enough to follow by hand."""

from optplan.planner.history.events import HistoryEvent
from optplan.planner.replay import LiveTensor
from optplan.planner.timeline import Allocation, Free
from optplan.profilers.live.live_history import Ownership, StartingBlock, phase_peaks, step_history
from optplan.profilers.live.owners import Owner
from optplan.profilers.live.phases import Mark

WEIGHT, UNKNOWN, HIDDEN, LOGITS = 0x1000, 0x2000, 0x3000, 0x4000
NONE = (0, 0)


def alloc(address: int, size: int) -> HistoryEvent:
    return HistoryEvent("alloc", address, size, 0, NONE, 0)


def free(address: int, size: int) -> HistoryEvent:
    return HistoryEvent("free_requested", address, size, 0, NONE, 0)


HISTORY = step_history(
    [
        alloc(HIDDEN, 900),
        alloc(LOGITS, 2000),
        free(LOGITS, 2000),
        free(HIDDEN, 900),
        alloc(HIDDEN, 1000),
        alloc(LOGITS, 3000),
        alloc(0x5000, 10),
        free(0x5000, 10),
        free(HIDDEN, 1000),
        free(UNKNOWN, 700),
    ],
    allocated=[1536, 2560, 4608, 2560, 1536, 2560, 5632, 6144, 5632, 4608, 3584],
    start=[StartingBlock(WEIGHT, 1024), StartingBlock(UNKNOWN, 512)],
    marks=[
        Mark(0, "forward", "layer", False),
        Mark(1, "forward", "head", True),
        Mark(2, "backward", "", True),
        Mark(3, "backward", "layer", False),
        Mark(5, "step", "", False),
        Mark(8, "zero", "", False),
    ],
    ownerships=[
        Ownership(0, {WEIGHT: Owner("parameters", "weight")}),
        Ownership(5, {WEIGHT: Owner("parameters", "weight"), HIDDEN: Owner("gradients", "weight")}),
        Ownership(8, {LOGITS: Owner("optimizer_state", "weight exp_avg")}),
    ],
    reserved_bytes=2**21,
)


def test_every_event_has_its_owner_or_the_code_that_made_it() -> None:
    assert [event for event in HISTORY.events if isinstance(event, Allocation)] == [
        Allocation(3, 900, "activations", "layer forward", "forward"),
        Allocation(4, 2000, "logits_and_loss", "head forward", "forward"),
        Allocation(7, 1000, "gradients", "weight", "backward"),
        Allocation(8, 3000, "optimizer_state", "weight exp_avg", "step"),
        Allocation(9, 10, "optimizer_temporaries", "step temporary", "step"),
    ]


def test_frees_name_what_was_made_at_the_address_last() -> None:
    assert [event for event in HISTORY.events if isinstance(event, Free)] == [
        Free(4, "backward"),
        Free(3, "backward"),
        Free(9, "step"),
        Free(7, "zero"),
        Free(2, "zero"),
    ]


def test_what_was_there_before_and_has_no_owner_is_unexplained() -> None:
    assert HISTORY.resident == [
        LiveTensor("weight", "parameters", 1024),
        LiveTensor("alive before the step, owner unknown", "unexplained", 512),
    ]


def test_the_peak_adds_up() -> None:
    alive = HISTORY.alive(HISTORY.peak_event)
    assert sum(tensor.bytes for tensor in alive) == 6144


def test_peaks_by_phase_from_the_marks() -> None:
    marks = [Mark(0, "forward", "", False), Mark(1, "forward", "layer", False), Mark(2, "backward", "", True)]
    later = [Mark(3, "clip", "", False), Mark(3, "step", "", False), Mark(3, "zero", "", False)]
    assert phase_peaks([*marks, *later], [10, 30, 20, 25, 5]) == {
        "forward": 30,
        "backward": 25,
        "step": 25,
        "zero": 25,
    }


def test_a_workspace_is_known_by_its_size() -> None:
    history = step_history(
        [],
        allocated=[32 * 2**20],
        start=[StartingBlock(WEIGHT, 32 * 2**20)],
        marks=[Mark(0, "forward", "", False)],
        ownerships=[Ownership(0, {})],
        reserved_bytes=2**21,
    )
    assert history.resident[0].category == "workspace"
