"""Named feature taps: what flows inside any network, without changing its code."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd.base import Outputs
from kd.registry import unknown


class _Tap:
    """A hook that stores a tensor under a name and hands a copy of it on.

    The stored tensor is on the path to whatever is computed from it, so that gradients with respect to it exist; a
    later in-place activation or sum overwrites the copy.
    """

    def __init__(self, features: dict[str, Tensor], name: str, side: int) -> None:
        self.features = features
        self.name = name
        self.side = side

    def __call__(self, module: nn.Module, *sides: Any) -> Any:
        passed = sides[self.side]
        value = passed[0] if isinstance(passed, tuple) and passed else passed
        if not isinstance(value, Tensor):
            raise ValueError(
                f"tap {self.name!r} is on a {type(module).__name__}, which passes {type(value).__name__} there; "
                "tap a module that passes a tensor"
            )
        # what the caller of the module holds too may still be overwritten by the caller
        is_held = self.side == 0 or any(_shares_memory(value, other) for other in sides[0])
        feature = value.clone() if is_held else value
        self.features[self.name] = feature
        if not isinstance(passed, tuple):
            return feature.clone()
        handed_on = (feature.clone(), *passed[1:])
        return type(passed)._make(handed_on) if hasattr(passed, "_make") else handed_on

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Deaf":
        return _Deaf()


class _Deaf:
    """What a tap becomes in a copy of its module: the copy is another network and reports to nobody."""

    def __call__(self, module: nn.Module, *sides: Any) -> None:
        return


def _shares_memory(value: Tensor, other: object) -> bool:
    return isinstance(other, Tensor) and value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _find(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in module.named_modules() if name]
        raise ValueError(unknown("module", path, known)) from None


class Taps(Mapping[str, Tensor]):
    """Features of a network by name: of the last forward pass, of the last call where a module is called twice.

    ```python
    with Taps(network, {"stage1": "layer1", "stage2": "layer2"}, inputs={"stage1.pre": "layer1.1.act2"}) as taps:
        logits = network(images)
        features = taps["stage1"]
    ```

    A feature is the tensor itself, with the values before any in-place operation, and the rest of the network is
    computed from it: `torch.autograd.grad(logits.sum(), features)` exists. A deep copy of the network (a teacher) has
    no taps; give it its own.

    Args:
        module: The network.
        outputs: Name of a tap to the path of the module whose output it takes (the first, where there are several).
        inputs: Name of a tap to the path of the module whose first input it takes (before an activation).

    Raises:
        ValueError: If there is no such path or two taps have one name; on use, if a module passes no tensor there, or
            the network has not run yet.
    """

    def __init__(self, module: nn.Module, outputs: Mapping[str, str], inputs: Mapping[str, str] | None = None) -> None:
        inputs = inputs or {}
        if twice := sorted(outputs.keys() & inputs.keys()):
            raise ValueError(f"taps need different names, found twice: {', '.join(twice)}")
        self._names = [*outputs, *inputs]
        self._features: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        tapped = {path: _find(module, path) for path in [*outputs.values(), *inputs.values()]}
        for name, path in outputs.items():
            self._handles.append(tapped[path].register_forward_hook(_Tap(self._features, name, side=1)))
        for name, path in inputs.items():
            self._handles.append(tapped[path].register_forward_pre_hook(_Tap(self._features, name, side=0)))

    def remove(self) -> None:
        """Take the taps off the network and forget the features."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._features.clear()

    def __enter__(self) -> "Taps":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise ValueError(unknown("tap", name, self._names))
        if name not in self._features:
            raise ValueError(
                f"tap {name!r} has seen nothing yet: pass images through the network first, or tap a module that it "
                "calls in this mode"
            )
        return self._features[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Tapped(nn.Module):
    """Any classifier as a network that says what distillers read: logits, embedding and feature maps by name.

    ```python
    student = Tapped(
        timm.create_model("resnet18", num_classes=100),
        outputs={"stage0.post": "layer1", "stage1.post": "layer2", "last": "layer4"},
        inputs={"stage0.pre": "layer1.1.act2", "stage1.pre": "layer2.1.act2"},
        embedding="fc",
        head="fc",
    )
    teacher = frozen(student)  # a copy has the same taps
    ```

    Hooks are on the network during a call only. The wrapped network is `.network`: its state dict is
    `tapped.network.state_dict()`, that of the wrapper has the prefix `network.` and nothing more.

    Args:
        network: Maps images to logits, or to `Outputs`, whose taps stay beside those of the wrapper.
        outputs: Name of a tap to the path of the module whose output it takes.
        inputs: Name of a tap to the path of the module whose first input it takes.
        embedding: Path of the module whose first input is the embedding, the classifier; None keeps that of `Outputs`.
        head: Path of a linear classifier of the pooled map; adds the tap "class_maps", made of the tap "last".
        cosine: The head compares directions: the class maps are made with $w_k / \\|w_k\\|$, as in `kd.cam.CAM`, which
            checks a head.

    Raises:
        ValueError: If there is no such path, `head` is given without a tap "last", or `cosine` without a head; on use,
            if the embedding is no vector or the head is not linear.
    """

    def __init__(
        self,
        network: nn.Module,
        outputs: Mapping[str, str] | None = None,
        inputs: Mapping[str, str] | None = None,
        *,
        embedding: str | None = None,
        head: str | None = None,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if cosine and head is None:
            raise ValueError("cosine=True is about the head, found none: name its path")
        self.network = network
        self.outputs = dict(outputs or {})
        self.inputs = dict(inputs or {})
        self.read_by_head = {} if embedding is None else {"embedding": embedding}
        self.head = head
        self.cosine = cosine
        Taps(network, self.outputs, self.inputs).remove()  # refuses what it does not know
        for path in filter(None, [embedding, head]):
            _find(network, path)
        names = [*self.outputs, *self.inputs]
        if head is not None and "last" not in names:
            raise ValueError(
                f"class maps of the head {head!r} are made of the map that is pooled: tap it as 'last', found the taps "
                f"{', '.join(names) or '(none)'}"
            )

    def forward(self, images: Float[Tensor, "batch ..."]) -> Outputs:
        """Logits, embedding and taps."""
        with Taps(self.network, self.outputs, self.inputs) as taps, Taps(self.network, {}, self.read_by_head) as read:
            said = self.network(images)
            found, embedding = dict(taps), read["embedding"] if read else None
        if not isinstance(said, Outputs):
            said = Outputs(said)
        embedding = said.embedding if embedding is None else self._as_vectors(embedding)
        if self.head is not None:
            from kd.cam import class_maps, linear_weight  # which reads taps itself

            weight = linear_weight(self.network.get_submodule(self.head))
            found["class_maps"] = class_maps(found["last"], F.normalize(weight, dim=1) if self.cosine else weight)
        return Outputs(said.logits, embedding, {**said.taps, **found}, said.views)

    def _as_vectors(self, embedding: Tensor) -> Float[Tensor, "batch width"]:
        if embedding.numel() != embedding.shape[0] * embedding.shape[1]:
            raise ValueError(
                f"an embedding is one vector per image, found {tuple(embedding.shape)} at "
                f"{self.read_by_head['embedding']!r}; name the module that reads the pooled features"
            )
        return embedding.flatten(1)


def read_tap(outputs: Outputs, name: str, reader: str) -> Float[Tensor, "batch ..."]:
    """The feature of that name.

    Args:
        outputs: What a network says.
        name: Name of the tap.
        reader: Who asks, for the message ("at, student").

    Raises:
        ValueError: If there is no such tap.
    """
    if name not in outputs.taps:
        raise ValueError(
            f"{reader}: needs the tap {name!r}, found {', '.join(sorted(outputs.taps)) or 'no taps'}; "
            f"kd.taps.Tapped(network, outputs={{{name!r}: PATH_OF_A_MODULE}}) makes it"
        )
    return outputs.taps[name]


def stage_taps(outputs: Outputs, side: Literal["pre", "post"]) -> list[str]:
    """Names of the taps before ("pre") or after ("post") the last activation of every stage, from the first stage."""
    pattern = re.compile(rf"stage(\d+)\.{side}")
    numbers = {int(match[1]): name for name in outputs.taps if (match := pattern.fullmatch(name))}
    return [numbers[number] for number in sorted(numbers)]
