"""Networks of other libraries, with the taps that distillers read."""

import timm
import torch
import torchvision
from timm.models.vgg import VGG
from torch import nn

from kd.taps import Tapped


def resnet(name: str = "resnet18", num_classes: int = 5) -> Tapped:
    """A ResNet of timm; its activations are in place."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=num_classes, zero_init_last=False)
    layers = [f"layer{number}" for number in (1, 2, 3, 4)]
    return Tapped(
        network,
        outputs={f"stage{i}.post": layer for i, layer in enumerate(layers)} | {"stem": "act1", "last": "layer4"},
        inputs={f"stage{i}.pre": f"{layer}.{len(getattr(network, layer)) - 1}.act2" for i, layer in enumerate(layers)},
        embedding="fc",
        head="fc",
    )


def mobilenet(num_classes: int = 5) -> Tapped:
    """A MobileNetV2 of timm: no activation at the end of a stage, and a map that is pooled behind the last stage."""
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv2_050", num_classes=num_classes, drop_rate=0.0)
    stages = {f"stage{i}.post": f"blocks.{block}" for i, block in enumerate((1, 2, 4, 6))}
    return Tapped(network, outputs=stages | {"last": "bn2"}, embedding="classifier", head="classifier")


def vgg(num_classes: int = 5) -> Tapped:
    """A small VGG of timm with in-place activations; its embedding is not the mean of a map."""
    torch.manual_seed(0)
    layers = [8, "M", 16, "M", 24, "M", 24, "M"]
    network = VGG(layers, num_classes=num_classes, mlp_ratio=0.01, norm_layer=nn.BatchNorm2d)
    pools = [i for i, layer in enumerate(network.features) if isinstance(layer, nn.MaxPool2d)]
    return Tapped(
        network,
        outputs={f"stage{i}.post": f"features.{pool - 1}" for i, pool in enumerate(pools)},
        inputs={f"stage{i}.pre": f"features.{pool - 1}" for i, pool in enumerate(pools)},
        embedding="head.fc",
    )


def shufflenet(num_classes: int = 5) -> Tapped:
    """A ShuffleNetV2 of torchvision: three stages, and a map that is pooled behind the last stage."""
    torch.manual_seed(0)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=num_classes)
    stages = {f"stage{i}.post": f"stage{i + 2}" for i in range(3)}
    return Tapped(network, outputs=stages | {"last": "conv5"}, embedding="fc", head="fc")


NETWORKS = {"resnet": resnet, "mobilenet": mobilenet, "vgg": vgg, "shufflenet": shufflenet}


def images(count: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
