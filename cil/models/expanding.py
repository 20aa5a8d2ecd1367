"""Networks that get a copy of a part of themselves with every task, and one head over the features of all copies."""

import copy
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cil.models.heads import fresh_linear
from cil.models.network import BackboneNetwork, TapPaths
from kd import Outputs, Taps

_LAST = "last"  # the tap whose map is pooled, and thereby the one that all copies have a part in

#: What an auxiliary head tells apart: the newest classes and, as output 0, all others; or every class.
Told = Literal["newest", "all"]


class Joined(nn.Module):
    """The pooled maps of all copies, one behind the other: made only where a tap listens."""

    @property
    def is_heard(self) -> bool:
        """Whether there is a tap."""
        return bool(self._forward_hooks)

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "batch channels height width"]:
        """One map for all."""
        return torch.cat(maps, dim=1)


class Copies(nn.Module):
    """A module and copies of it beside it: they read the same, and what they give stands one behind the other.

    Args:
        first: The module.
        last: Where below it the map is that is pooled; nothing where there is none, or what it gives is that map.
    """

    def __init__(self, first: nn.Module, last: TapPaths) -> None:
        super().__init__()
        self.each = nn.ModuleList([first])
        self.last = last
        self.joined = Joined()

    def add(self) -> None:
        """Put a copy of the newest beside it."""
        self.each.append(copy.deepcopy(self.each[-1]))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """What the copies give, along the channels."""
        if not self.joined.is_heard:
            return torch.cat([module(x) for module in self.each], dim=1)
        given, maps = [], []
        for module in self.each:
            with Taps(module, self.last.outputs, self.last.inputs) as taps:
                given.append(module(x))
                maps.append(taps[_LAST])
        self.joined(maps)
        return torch.cat(given, dim=1)


class ExpandingNetwork(BackboneNetwork):
    """A `BackboneNetwork` that gets a copy of a part of its backbone with every task but the first.

    The head reads the features of all copies: as they get more, what it has learned of the old ones stays, and what it
    makes of the new ones begins as in a new head, for the old classes too. The taps are those of the newest copy, but
    "last", like the embedding, is of all.

    Args:
        network: Gives its backbone, which becomes a part of this; it has no classes yet.
        part: Path of what is copied: the backbone, or a part whose output is pooled.
        auxiliary: What a head on the features of the newest copy alone tells apart, from the second task on. None for
            no such head.

    Attributes:
        copy_width: Width of the features of one copy.
        auxiliary: The auxiliary head of the newest task.
    """

    fresh_parts = ("auxiliary",)

    def __init__(self, network: BackboneNetwork, *, part: str = "backbone", auxiliary: Told | None = None) -> None:
        width, paths, head = network.embedding_width, network.tap_paths(), network.head
        super().__init__(network.input_shape, network.backbone, width, head.keep_bias, paths, head.init)
        self.part = part
        self.copy_width = width
        self.tells = auxiliary
        self.auxiliary: nn.Linear | None = None
        below = f"{part}."
        inner = (
            {name: path.removeprefix(below) for name, path in side.items() if name == _LAST and path.startswith(below)}
            for side in (paths.outputs, paths.inputs)
        )
        self.set_submodule(part, Copies(self.get_submodule(part), TapPaths(*inner)))

    @property
    def copies(self) -> Copies:
        """The part with its copies."""
        found = self.get_submodule(self.part)
        assert isinstance(found, Copies)
        return found

    @property
    def settled(self) -> list[nn.Module]:
        """The copies of earlier tasks, which learn no more."""
        return list(self.copies.each[:-1])

    def tap_paths(self) -> TapPaths:
        """Where the maps of the newest copy are, and those of all that are pooled."""
        outputs = {name: self._in_newest(path) for name, path in self._taps.outputs.items() if name != _LAST}
        inputs = {name: self._in_newest(path) for name, path in self._taps.inputs.items() if name != _LAST}
        if self.copies.last.outputs or self.copies.last.inputs:
            outputs[_LAST] = f"{self.part}.joined"
        elif _LAST in self._taps.outputs:
            outputs[_LAST] = self._taps.outputs[_LAST]
        return TapPaths(outputs, inputs)

    def _in_newest(self, path: str) -> str:
        if path != self.part and not path.startswith(f"{self.part}."):
            return path
        return f"{self.part}.each.{len(self.copies.each) - 1}{path.removeprefix(self.part)}"

    def _grow(self, num_new: int) -> None:
        if not self.num_tasks:
            super()._grow(num_new)
            return
        self.copies.add()
        self.embedding_width += self.copy_width
        self.head.widen(self.copy_width)
        super()._grow(num_new)
        if self.tells is not None:
            num_outputs = num_new + 1 if self.tells == "newest" else self.head.out_features
            self.auxiliary = fresh_linear(self.copy_width, num_outputs, self.head.init).to(self.head.weight)

    def grow_head(self, num_new: int) -> None:
        """Make room for the classes of one more task, without a copy."""
        super()._grow(num_new)
        self.task_sizes.append(num_new)

    def auxiliary_logits(self, outputs: Outputs) -> Float[Tensor, "batch outputs"]:
        """Scores of the auxiliary head, from what the network says."""
        assert self.auxiliary is not None, "the first task has no auxiliary head"
        assert outputs.embedding is not None
        scores: Tensor = self.auxiliary(outputs.embedding[:, -self.copy_width :])
        return scores

    @torch.no_grad()
    def read_off(self, later: Outputs) -> Outputs | None:
        """What this network says, read off what one says that has grown from it and whose old copies have not changed.

        So it need not be asked, which costs a pass through all its copies. Both evaluate those the same way.

        Args:
            later: What the grown network says.

        Returns:
            None where it has to be asked: for maps and for other views.
        """
        if self.exposed or later.views or later.embedding is None:
            return None
        embedding = later.embedding.detach()[:, : self.embedding_width]
        return Outputs(self.head(embedding), embedding)

    def structure(self) -> dict[str, Any]:
        """What growing has made of the modules, as plain JSON values."""
        return super().structure() | {"num_copies": len(self.copies.each)}

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Grow a fresh network to a saved structure; the values come from its state dict.

        Raises:
            ValueError: If this network has classes already.
        """
        super().rebuild({"task_sizes": []})  # which is where such a network is refused
        sizes = structure["task_sizes"]
        num_without = len(sizes) - structure["num_copies"] + 1  # the copies came with the last tasks
        for task, num_new in enumerate(sizes):
            if task < num_without:
                self.grow_head(num_new)
            else:
                self.grow(num_new)
