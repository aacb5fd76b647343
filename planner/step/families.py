"""The families whose step is described: how each is recorded, by `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import msgspec

from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.bert import Bert, bert_config
from optplan.planner.step.causal_lm import RECOMPUTED, StepModel, kind_of
from optplan.planner.step.decoder import Decoder
from optplan.planner.step.decoder_config import DECODERS, decoder_config, decoder_layers
from optplan.planner.step.gpt2 import Gpt2, gpt2_config
from optplan.planner.step.gpt_neox import GptNeox, gpt_neox_config
from optplan.planner.step.opt import Opt, opt_config
from optplan.planner.step.options import StepOptions
from optplan.planner.step.palm import Palm, palm_config
from optplan.planner.step.t5 import T5, t5_config, t5_layer_names, t5_layers
from optplan.planner.step.tape import Tape
from optplan.planner.step.vit import Vit, vit_config


class StepFamily(msgspec.Struct, frozen=True, kw_only=True):
    """How the models of one family are recorded.

    Attributes:
        model: The class that takes the step.
        config: What it needs to know about a model.
        layers: A name for each layer of a model; layers of the same name are alike.
        layer_name: From a layer's number to its dotted name.
        layer_names: The same where it depends on the model.
        activation: Field that names the activation of the MLPs.
        stack_of: From a layer's kind to the stack it is in; the layers of a model are one stack if left out.
        least_first: Layers at a stack's beginning that may be unlike those after them.
    """

    model: Callable[[Tape, Any, tuple[str, ...], StepOptions], StepModel[Any]]
    config: Callable[[ModelSpec], Any]
    layers: Callable[[ModelSpec], tuple[str, ...]]
    layer_name: Callable[[int], str] | None = None
    layer_names: Callable[[ModelSpec], Callable[[int], str]] | None = None
    activation: str = "hidden_act"
    stack_of: Callable[[str], str] | None = None
    least_first: int = 1

    def namer(self, spec: ModelSpec) -> Callable[[int], str]:
        """From a layer's number to its dotted name in this model."""
        name = self.layer_names(spec) if self.layer_names is not None else self.layer_name
        assert name is not None
        return name

    def layer_kinds(self, spec: ModelSpec, options: StepOptions) -> tuple[str, ...]:
        """A name for each layer that also says whether it alone is recomputed.

        Selective checkpointing recomputes every second layer, beginning with the first.

        Source: transformers `PreTrainedModel.gradient_checkpointing_enable` (`every_n_layers=2`).
        """
        kinds = self.layers(spec)
        if options.checkpointing != "selective":
            return kinds
        return tuple(kind if index % 2 else f"{kind} {RECOMPUTED}" for index, kind in enumerate(kinds))

    def stacks(self, kinds: Sequence[str]) -> list[tuple[str, ...]]:
        """The kinds of the layers, those of each stack by themselves."""
        return [tuple(stack) for _, stack in groupby(kinds, key=self.stack_of or (lambda _: ""))]


def _alike(field: str) -> Callable[[ModelSpec], tuple[str, ...]]:
    return lambda spec: ("block",) * int(spec.config[field])


_DECODER = StepFamily(model=Decoder, config=decoder_config, layers=decoder_layers, layer_name="model.layers.{}".format)

FAMILIES: dict[str, StepFamily] = {
    **dict.fromkeys(DECODERS, _DECODER),
    "gpt2": StepFamily(
        model=Gpt2,
        config=gpt2_config,
        layers=_alike("n_layer"),
        layer_name="transformer.h.{}".format,
        activation="activation_function",
    ),
    "gpt_neox": StepFamily(
        model=GptNeox,
        config=gpt_neox_config,
        layers=_alike("num_hidden_layers"),
        layer_name="gpt_neox.layers.{}".format,
    ),
    **{
        name: StepFamily(
            model=Bert,
            config=bert_config,
            layers=_alike("num_hidden_layers"),
            layer_name=f"{name}.encoder.layer.{{}}".format,
        )
        for name in ("bert", "roberta")
    },
    "opt": StepFamily(
        model=Opt,
        config=opt_config,
        layers=_alike("num_hidden_layers"),
        layer_name="model.decoder.layers.{}".format,
        activation="activation_function",
    ),
    "palm": StepFamily(
        model=Palm, config=palm_config, layers=_alike("num_hidden_layers"), layer_name="layers.{}".format
    ),
    "t5": StepFamily(
        model=T5,
        config=t5_config,
        layers=t5_layers,
        layer_names=t5_layer_names,
        activation="dense_act_fn",
        stack_of=kind_of,
        # The first makes the bias that all others are given; it ends in backward with the first, the second, or, where
        # every second layer is recomputed, the third.
        least_first=3,
    ),
    "vit": StepFamily(
        model=Vit, config=vit_config, layers=_alike("num_hidden_layers"), layer_name="vit.layers.{}".format
    ),
}
"""By `model_type`."""
