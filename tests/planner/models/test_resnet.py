from importlib import import_module

import pytest
from transformers import ResNetConfig, ResNetForImageClassification

from optplan.planner.errors import ConfigError
from optplan.planner.models.resnet import resnet_parameters

torch = import_module("torch")

DEPTHS = {
    18: {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
    50: {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"},
}


@pytest.mark.parametrize(("depth", "num_parameters"), [(18, 11_689_512), (50, 25_557_032)])
def test_parameter_counts_are_the_published_ones(depth, num_parameters):
    assert sum(p.numel for p in resnet_parameters(depth)) == num_parameters


@pytest.mark.parametrize("depth", DEPTHS)
def test_shapes_are_those_of_the_real_module(depth):
    with torch.device("meta"):
        model = ResNetForImageClassification(ResNetConfig(num_labels=1000, **DEPTHS[depth]))
    ours = sorted(p.shape for p in resnet_parameters(depth))
    assert ours == sorted(tuple(p.shape) for p in model.parameters())


def test_names_are_unique_and_in_the_order_of_the_modules():
    names = [p.name for p in resnet_parameters(18)]
    assert len(set(names)) == len(names) == 62
    assert names[:4] == ["conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight"]
    assert names[-2:] == ["fc.weight", "fc.bias"]


def test_another_depth_is_refused():
    with pytest.raises(ConfigError) as caught:
        resnet_parameters(34)
    assert str(caught.value) == "a ResNet of depth 34 is not known; known: 18, 50"
