"""Networks whose classes grow: the contract, and the common case of a backbone with one linear head."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cil.models.heads import GrowingLinear, HeadInit
from kd import Outputs, Taps
from kd.cam import class_maps
from kd.registry import Registry, unknown

InputShape = tuple[int, int, int]

models: Registry["type[Network]"] = Registry("model", "cil.models")


@dataclass(frozen=True)
class TapPaths:
    """Where in a network the named features are: `kd.taps.Tapped(network, paths.outputs, paths.inputs, head="head")`.

    Attributes:
        outputs: Name of a tap to the path of the module whose output it is.
        inputs: Name of a tap to the path of the module whose first input it is.
    """

    outputs: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_backbone(cls, *, stem: str, post: list[str], pre: list[str], last: str) -> "TapPaths":
        """Taps of a `BackboneNetwork`, all paths below its backbone.

        Args:
            stem: What gives the maps that the first stage reads.
            post: The stages.
            pre: The last activation of every stage, or none.
            last: What gives the maps that are pooled.
        """
        outputs = {"stem": stem, **{f"stage{i}.post": path for i, path in enumerate(post)}, "last": last}
        inputs = {f"stage{i}.pre": path for i, path in enumerate(pre)}
        return cls(*({name: f"backbone.{path}" for name, path in paths.items()} for paths in (outputs, inputs)))


class Network(nn.Module):
    """A network that starts without classes and is grown task by task.

    Args:
        input_shape: Channels, height and width of an image.
        embedding_width: Width of the features before the head.

    Attributes:
        task_sizes: Number of classes of every task so far.
    """

    def __init__(self, input_shape: InputShape, embedding_width: int) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.embedding_width = embedding_width
        self.task_sizes: list[int] = []
        #: Names of the taps that `forward` adds to what it says; see `expose`.
        self.exposed: tuple[str, ...] = ()

    #: Whether maps lie in channels-last memory (`cil.fast`).
    channels_last = True
    #: Names under which parameters begin anew with every task, and inherit nothing from those of the same name before.
    fresh_parts: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes over all tasks so far."""
        return sum(self.task_sizes)

    @property
    def num_tasks(self) -> int:
        """Number of tasks so far."""
        return len(self.task_sizes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Outputs:
        """Scores of all classes so far, and the embedding before the head."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to classify images")

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """What the encoder makes of images, for phases that show the same views of samples again (`Phase.views`)."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder that could be read once")

    def tap_paths(self) -> TapPaths:
        """Where its feature maps are; a network without such maps names none."""
        return TapPaths()

    def taps(self) -> list[str]:
        """Names of what `expose` can add; a network without such maps has none."""
        paths = self.tap_paths()
        names = [*paths.outputs, *paths.inputs]
        return [*names, "class_maps"] if "last" in names else names

    def expose(self, taps: Iterable[str]) -> None:
        """Let `forward` say these taps too, from now on: maps by name (`tap_paths`) and "class_maps".

        Raises:
            ValueError: If there is no such tap.
        """
        for name in (wanted := tuple(taps)):
            if name not in self.taps():
                raise ValueError(unknown("tap", name, self.taps()))
        self.exposed = wanted

    def grow(self, num_new: int) -> None:
        """Make room for the classes of one more task.

        What is added is drawn from torch's CPU generator, on any device, and takes gradients.

        Raises:
            ValueError: If `num_new` is not positive.
        """
        if num_new < 1:
            raise ValueError(f"a task needs at least one class, found {num_new}")
        self._grow(num_new)
        self.task_sizes.append(num_new)

    def _grow(self, num_new: int) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not say how it grows")

    def structure(self) -> dict[str, Any]:
        """What growing has made of the modules, as plain JSON values."""
        return {"task_sizes": list(self.task_sizes)}

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Grow a fresh network to a saved structure; the values come from its state dict.

        Raises:
            ValueError: If this network has classes already.
        """
        if self.task_sizes:
            raise ValueError(f"only a fresh network can be rebuilt, this one has tasks of {self.task_sizes} classes")
        for num_new in structure["task_sizes"]:
            self.grow(num_new)


class BackboneNetwork(Network):
    """A backbone that gives one embedding per image, and one linear head over all classes.

    Args:
        input_shape: Channels, height and width of an image.
        backbone: Maps images to embeddings `[batch, embedding_width]`.
        embedding_width: Width of the embedding.
        keep_bias: See `GrowingLinear`.
        taps: Where its feature maps are.
        head_init: How new outputs of the head begin.
    """

    #: Path, below the backbone, of the activation whose output is pooled; None where there is none.
    last_activation: str | None = None

    def __init__(
        self,
        input_shape: InputShape,
        backbone: nn.Module,
        embedding_width: int,
        keep_bias: bool = True,
        taps: TapPaths | None = None,
        head_init: HeadInit = "torch",
    ) -> None:
        super().__init__(input_shape, embedding_width)
        self._taps = taps or TapPaths()
        self.backbone = backbone
        self.head = GrowingLinear(embedding_width, keep_bias=keep_bias, init=head_init)

    def tap_paths(self) -> TapPaths:
        """Where its feature maps are."""
        return self._taps

    def taps(self) -> list[str]:
        """Names of what `expose` can add; class maps only where the head has one vector for each class."""
        found = super().taps()
        return found if self.head.map_weight is not None else [name for name in found if name != "class_maps"]

    def drop_last_activation(self) -> None:
        """Let features have both signs: take away the activation before the pool, where there is one."""
        if self.last_activation is not None:
            self.backbone.set_submodule(self.last_activation, nn.Identity())

    def _grow(self, num_new: int) -> None:
        self.head.grow(num_new)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Outputs:
        """Scores of all classes so far, the embedding before the head, and what is exposed."""
        if self.channels_last:  # convolutions are faster on it, twice in bf16
            images = images.contiguous(memory_format=torch.channels_last)
        if not self.exposed:
            embedding = self.backbone(images)
            return Outputs(self.head(embedding), embedding)
        paths, read = self.tap_paths(), {*self.exposed, *({"last"} if "class_maps" in self.exposed else ())}
        outputs = {name: path for name, path in paths.outputs.items() if name in read}
        with Taps(self, outputs, {name: path for name, path in paths.inputs.items() if name in read}) as taps:
            embedding = self.backbone(images)
            found = dict(taps)
        if "class_maps" in self.exposed:
            found["class_maps"] = class_maps(found["last"], self.head.map_weight)
        return Outputs(self.head(embedding), embedding, {name: found[name] for name in self.exposed})
