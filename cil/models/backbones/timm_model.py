"""Any network of timm (https://github.com/huggingface/pytorch-image-models) as a backbone."""

import re
from typing import Annotated, Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from pydantic import Field
from timm.models import VisionTransformer, get_pretrained_cfg
from torch import Tensor, nn

from cil.models.network import BackboneNetwork, InputShape, TapPaths, models
from cil.models.noise import key_by_sample
from cil.models.patches import PatchMaps, block_taps
from kd import Outputs
from kd.connect import held_still
from kd.registry import unknown

_WEIGHTS = "model.safetensors"  # which cannot run code, as other files of the same folder could


@models.register("timm")
class TimmNetwork(BackboneNetwork):
    """A network by its timm name without its classifier, and one linear head; what drops at random does so per sample.

    A `VisionTransformer` (ViT, DeiT) can say its patch tokens behind every block as maps, by the names of
    `PatchNetwork` but without "class_maps": a variant of this project. Other transformers say no maps.

    Args:
        input_shape: Channels, height and width of an image.
        architecture: Name in timm, with a tag for certain weights: `resnet18`, `vit_tiny_patch16_224`.
        pretrained: Start from timm's weights, which must be on this machine: a run opens no connection for them.
        drop_path_rate: Stochastic depth, for architectures that have it; null takes the architecture's own rate.
        keep_bias: See `GrowingLinear`.

    Raises:
        ValueError: If timm has no such architecture, it cannot take images of this shape or these settings, or weights
            are wanted that are not here.
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
        if pretrained:
            settings["pretrained_cfg_overlay"] = {"file": _kept_weights(architecture), "custom_load": False}
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
        self._paths: TapPaths | None = None
        if isinstance(backbone, timm.models.ResNet):  # what the others have before the pool has no common name
            paths = [path for path, _ in backbone.named_modules() if re.fullmatch(r"layer4\.\d+\.act\d", path)]
            self.last_activation = paths[-1]

    def tap_paths(self) -> TapPaths:
        """The levels that timm names and that are maps, and "last" where the embedding is the mean of a map.

        The first level is the stem where it is named otherwise than the second: `act1` before `layer1`, but not
        `stages.0` before `stages.1`. A transformer, whose levels are tokens, has none.
        """
        if self._paths is None:
            self._paths = self._find_paths()
        return self._paths

    def taps(self) -> list[str]:
        """Names of what `expose` can add."""
        return block_taps(len(self.backbone.blocks)) if isinstance(self.backbone, VisionTransformer) else super().taps()

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Outputs:
        """Scores of all classes so far, the embedding before the head, and what is exposed."""
        if not self.exposed or not isinstance(self.backbone, VisionTransformer):
            return super().forward(images)
        maps = PatchMaps(self.exposed, len(self.backbone.blocks))
        handles = [block.register_forward_hook(self._passing(i, maps)) for i, block in enumerate(self.backbone.blocks)]
        try:
            embedding = self.backbone(images)
        finally:
            for handle in handles:
                handle.remove()
        return Outputs(self.head(embedding), embedding, maps.taps([]))

    def _passing(self, index: int, maps: PatchMaps) -> Any:
        """A hook that lets the patch tokens of a block pass `maps`; tokens before them (class, register) pass by."""
        assert isinstance(self.backbone, VisionTransformer)
        grid, num_before = self.backbone.patch_embed.grid_size, self.backbone.num_prefix_tokens

        def hook(module: nn.Module, inputs: tuple[Any, ...], tokens: Tensor) -> Tensor:
            patches = maps.pass_on(index, tokens[:, num_before:], grid)
            return torch.cat([tokens[:, :num_before], patches], dim=1)

        return hook

    def _find_paths(self) -> TapPaths:
        modules = dict(self.backbone.named_modules())
        widths = {level["module"]: level["num_chs"] for level in getattr(self.backbone, "feature_info", [])}
        pools = [path for path in modules if path.rpartition(".")[2] == "global_pool"]
        given: dict[str, Tensor] = {}
        handles = [modules[path].register_forward_hook(_keep(given, path)) for path in widths if path in modules]
        handles += [modules[path].register_forward_pre_hook(_keep(given, path)) for path in pools]
        parameter = next(self.parameters())
        image = torch.rand(1, *self.input_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
        try:
            with held_still(self), torch.no_grad():
                embedding = self.backbone(image)
        finally:
            for handle in handles:
                handle.remove()
        levels = [path for path, width in widths.items() if path in given and _is_map(given[path], width)]
        outputs = {}
        if len(levels) > 1 and re.sub(r"\d", "", levels[0]) != re.sub(r"\d", "", levels[1]):
            outputs["stem"] = f"backbone.{levels.pop(0)}"
        outputs |= {f"stage{i}.post": f"backbone.{path}" for i, path in enumerate(levels)}
        pooled = [path for path in pools if path in given and _is_mean(embedding, given[path])]
        return TapPaths(outputs, {"last": f"backbone.{pooled[0]}"} if pooled else {})


def _kept_weights(architecture: str) -> str:
    """Where timm's weights are on this machine.

    Raises:
        ValueError: If they are not; says how to fetch them.
    """
    config = get_pretrained_cfg(architecture)
    if config is None or not config.hf_hub_id:
        raise ValueError(f"model.pretrained=true: timm publishes no weights of {architecture}: leave it out")
    found = try_to_load_from_cache(config.hf_hub_id, _WEIGHTS)
    if not isinstance(found, str):
        raise ValueError(
            f"model.pretrained=true: the weights of {architecture} are not on this machine, and a run fetches none. "
            f"Fetch them once with: hf download {config.hf_hub_id} {_WEIGHTS}"
        )
    return found


def _keep(given: dict[str, Tensor], path: str) -> Any:
    """A hook, of either kind, that stores what a module gives, or what it is given."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
        value = inputs[0] if output is None else output
        if isinstance(value, Tensor):
            given[path] = value.clone()  # a later layer may write into it

    return hook


def _is_map(value: Tensor, width: int) -> bool:
    return value.ndim == 4 and value.shape[1] == width


def _is_mean(embedding: Tensor, pooled: Tensor) -> bool:
    """Whether nothing is behind the pool; what a norm or a layer makes of the mean has no class maps."""
    if not _is_map(pooled, embedding.shape[1]):
        return False
    return torch.allclose(pooled.mean((2, 3)), embedding, rtol=1e-3, atol=1e-5)
