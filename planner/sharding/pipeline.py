"""Pipeline parallelism: each rank has some consecutive layers, and holds what several micro-batches saved there.

Layers are dealt out evenly, the first stages taking one more where they do not divide. The first stage has the
embedding, the last one the norm, the output head and the loss. How many micro-batches wait at a stage for their
backward depends on the schedule:

    gpipe         all of the step
    1f1b          as many as there are stages from this one on
    interleaved   two chunks of layers a rank, warmed up as Megatron does; counted in whole stages, rounded up

Source: Huang et al. 2018, arXiv 1811.06965; Narayanan et al. 2021, arXiv 2104.04473, section 2.2; Megatron-LM
`core/pipeline_parallel/schedules.py` (`num_warmup_microbatches`).
"""

from __future__ import annotations

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.models.registry import family_of
from optplan.planner.models.spec import ModelSpec
from optplan.planner.sharding.tensor_parallel import DIVISIBLE_FAMILIES

SCHEDULES = ("gpipe", "1f1b", "interleaved")
NUM_CHUNKS = 2
"""Chunks of layers that each rank of an interleaved schedule has."""


class Stage(msgspec.Struct, frozen=True):
    """One stage of a pipeline.

    Attributes:
        index: From 0.
        num_stages: Stages of the pipeline.
    """

    index: int
    num_stages: int

    @property
    def starts(self) -> bool:
        """Whether it has the embedding."""
        return self.index == 0

    @property
    def ends(self) -> bool:
        """Whether it has the output head and the loss."""
        return self.index == self.num_stages - 1

    def num_layers(self, total: int) -> int:
        """Its layers of `total`."""
        return total // self.num_stages + (self.index < total % self.num_stages)

    def num_in_flight(self, schedule: str, num_micro_batches: int) -> int:
        """Most micro-batches whose saved activations it holds at once."""
        later = self.num_stages - 1 - self.index
        if schedule == "gpipe":
            return num_micro_batches
        if schedule == "1f1b":
            return min(num_micro_batches, later + 1)
        chunks = min(2 * later + (NUM_CHUNKS - 1) * self.num_stages + 1, num_micro_batches * NUM_CHUNKS)
        return -(-chunks // NUM_CHUNKS)


def stage_part(spec: ModelSpec, stage: Stage) -> ModelSpec:
    """The model as one stage has it; its layers are numbered from 0.

    Raises:
        ConfigError: The family is not described, there are fewer layers than stages, or both ends share a weight.
    """
    if stage.num_stages == 1:
        return spec
    if spec.model_type not in DIVISIBLE_FAMILIES:
        known = ", ".join(DIVISIBLE_FAMILIES)
        raise ConfigError(
            f"--pipeline-parallel is modelled for {known}, {spec.name} is of the family {spec.model_type}"
        )
    total = spec.config["num_hidden_layers"]
    if total < stage.num_stages:
        raise ConfigError(
            f"--pipeline-parallel must be at most the {total} layers of {spec.name}, got {stage.num_stages}"
        )
    if spec.config["tie_word_embeddings"]:
        raise ConfigError(
            f"{spec.name} ties its output head to its embedding, which two stages of a pipeline would share"
        )
    config = spec.config | {"num_hidden_layers": stage.num_layers(total)}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: stage.num_layers(total)]
    inventory = family_of(spec.model_type).build(config)
    left_out: tuple[str, ...] = () if stage.starts else ("model.embed_tokens.",)
    left_out += () if stage.ends else ("model.norm.", "lm_head.")
    parameters = tuple(p for p in inventory.parameters if not p.name.startswith(left_out))
    return msgspec.structs.replace(spec, config=config, parameters=parameters, buffers=tuple(inventory.buffers))
