"""Which parameters are gathered together: those of each layer, and the rest with the root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from optplan.planner.tensors import Parameter

Group = dict[str, Parameter]
"""Parameters by their names within the layer, or by their full names outside the layers."""


class ParameterGroups:
    """A model's parameters by the layer that owns them.

    Args:
        parameters: All of them, tied aliases left out, in the model's order.
        layer_name: From a layer's number, as the asker counts, to its dotted name in the model.
    """

    def __init__(self, parameters: Sequence[Parameter], layer_name: Callable[[int], str]) -> None:
        self._parameters = parameters
        self._layer_name = layer_name
        self._modules = _by_module(parameters)

    def of_layer(self, layer: int) -> Group:
        """Those of one layer."""
        return self._modules.get(self._layer_name(layer), {})

    def of_root(self, num_layers: int) -> Group:
        """Those outside the layers."""
        prefixes = tuple(self._layer_name(layer) + "." for layer in range(num_layers))
        return {p.name: p for p in self._parameters if not p.name.startswith(prefixes)}


def _by_module(parameters: Sequence[Parameter]) -> dict[str, Group]:
    """The parameters of every module, found in one pass: a large model has many layers."""
    modules: dict[str, Group] = {}
    for parameter in parameters:
        name = parameter.name
        end = name.find(".")
        while end > 0:
            modules.setdefault(name[:end], {})[name[end + 1 :]] = parameter
            end = name.find(".", end + 1)
    return modules


def all_groups(parameters: Sequence[Parameter], num_layers: int, layer_name: Callable[[int], str]) -> Iterator[Group]:
    """The layers' parameters in turn, then the root's."""
    groups = ParameterGroups(parameters, layer_name)
    yield from map(groups.of_layer, range(num_layers))
    yield groups.of_root(num_layers)
