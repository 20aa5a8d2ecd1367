"""Named feature taps: what flows inside any network, without changing its code."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd.registry import unknown


class _Tap:
    """A hook that stores a copy of a tensor under a name.

    The copy is made since a later in-place activation or sum would overwrite the tensor; gradients pass through it.
    """

    def __init__(self, features: dict[str, Tensor], name: str, side: int) -> None:
        self.features = features
        self.name = name
        self.side = side

    def __call__(self, module: nn.Module, *sides: Any) -> None:
        value = sides[self.side]
        if isinstance(value, tuple) and value:
            value = value[0]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"tap {self.name!r} is on a {type(module).__name__}, which passes {type(value).__name__} there; "
                "tap a module that passes a tensor"
            )
        self.features[self.name] = value.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Deaf":
        return _Deaf()


class _Deaf:
    """What a tap becomes in a copy of its module: the copy is another network and reports to nobody."""

    def __call__(self, module: nn.Module, *sides: Any) -> None:
        return


class Taps(Mapping[str, Tensor]):
    """Features of a network by name: of the last forward pass, of the last call where a module is called twice.

    ```python
    with Taps(network, {"stage1": "layer1", "stage2": "layer2"}, inputs={"stage1.pre": "layer1.1.act2"}) as taps:
        logits = network(images)
        features = taps["stage1"]
    ```

    A deep copy of the network (a teacher) has no taps; give it its own.

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
        known = dict(module.named_modules())
        for path in [*outputs.values(), *inputs.values()]:
            if path not in known:
                raise ValueError(unknown("module", path, [name for name in known if name]))
        for name, path in outputs.items():
            self._handles.append(known[path].register_forward_hook(_Tap(self._features, name, side=1)))
        for name, path in inputs.items():
            self._handles.append(known[path].register_forward_pre_hook(_Tap(self._features, name, side=0)))

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
            raise ValueError(f"tap {name!r} has seen nothing yet: pass images through the network first")
        return self._features[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
