"""Any network of timm (https://github.com/huggingface/pytorch-image-models) as a backbone."""

from typing import Annotated, Any

import timm
import torch
from pydantic import Field
from timm.models import get_pretrained_cfg

from cil.models.network import BackboneNetwork, InputShape, models
from cil.models.noise import key_by_sample
from kd.registry import unknown


@models.register("timm")
class TimmNetwork(BackboneNetwork):
    """A network by its timm name without its classifier, and one linear head; what drops at random does so per sample.

    Args:
        input_shape: Channels, height and width of an image.
        architecture: Name in timm, with a tag for certain weights: `resnet18`, `vit_tiny_patch16_224`.
        pretrained: Start from timm's weights, which are downloaded.
        drop_path_rate: Stochastic depth, for architectures that have it; null takes the architecture's own rate.
        keep_bias: See `GrowingLinear`.

    Raises:
        ValueError: If timm has no such architecture, or it cannot take images of this shape or these settings.
    """

    def __init__(
        self,
        input_shape: InputShape,
        *,
        architecture: str = "resnet18",
        pretrained: bool = False,
        drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = None,
        keep_bias: bool = True,
    ) -> None:
        if not timm.is_model(architecture):
            raise ValueError(unknown("timm architecture", architecture, timm.list_models()).split(" Known:")[0])
        channels, height, width = input_shape
        settings: dict[str, Any] = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
        config = get_pretrained_cfg(architecture)
        if config is not None and config.fixed_input_size:
            settings["img_size"] = (height, width)  # transformers are built for one size; the others take no such word
        try:
            backbone = timm.create_model(
                architecture, pretrained=pretrained, in_chans=channels, num_classes=0, **settings
            )
            backbone.eval()  # so that the trial below leaves BatchNorm statistics alone
            with torch.no_grad():
                embedding = backbone(torch.zeros(1, *input_shape))
            backbone.train()
        except (RuntimeError, AssertionError, TypeError, ValueError, OSError) as error:
            raise ValueError(
                f"timm cannot make {architecture} for images of shape {input_shape}: {str(error).splitlines()[0]}"
            ) from None
        if embedding.ndim != 2:
            raise ValueError(f"timm's {architecture} gives {tuple(embedding.shape)} instead of one vector per image")
        super().__init__(input_shape, key_by_sample(backbone), embedding.shape[1], keep_bias)
