"""Tensor parallelism: each rank has some heads, some neurons of the feed-forward blocks, some rows of the vocabulary.

Queries, keys, values, gate and up are cut by output neurons, attention output and down by input, embedding and output
head by tokens; norms are whole on every rank. So a rank's model is a narrower decoder whose hidden size stays.

Source: Shoeybi et al. 2019, arXiv 1909.08053; torch `distributed/tensor/parallel/style.py`; the plan of torchtitan's
Llama (`models/llama3/infra/parallelize.py`).
"""

from __future__ import annotations

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.models.registry import family_of
from optplan.planner.models.spec import ModelSpec

DIVISIBLE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


def tensor_parallel_part(spec: ModelSpec, num_ranks: int) -> ModelSpec:
    """The model as one of `num_ranks` ranks has it.

    Raises:
        ConfigError: The family is not described, or a size is not a multiple of the ranks.
    """
    if num_ranks == 1:
        return spec
    if spec.model_type not in DIVISIBLE_FAMILIES:
        known = ", ".join(DIVISIBLE_FAMILIES)
        raise ConfigError(f"--tensor-parallel is modelled for {known}, {spec.name} is of the family {spec.model_type}")
    for name in _DIVIDED:
        if spec.config[name] % num_ranks:
            raise ConfigError(
                f"--tensor-parallel must divide the {name} of {spec.name}, {spec.config[name]}, got {num_ranks}"
            )
    config = spec.config | {name: spec.config[name] // num_ranks for name in _DIVIDED}
    inventory = family_of(spec.model_type).build(config)
    return msgspec.structs.replace(
        spec, config=config, parameters=tuple(inventory.parameters), buffers=tuple(inventory.buffers)
    )
