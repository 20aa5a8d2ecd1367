"""The network of DyTox: Transformers for Continual Learning with Dynamic Token Expansion (Douillard et al., CVPR 2022,
arXiv:2111.11326), on the encoder of ConViT (d'Ascoli et al., ICML 2021, arXiv:2103.10697).

A ConViT encoder turns an image into patch tokens; for each task token apart, a decoder of class-attention blocks reads
the patches, and a classifier of that task alone reads the answer. No task token sees another, so all of them are
decoded in one pass, over keys and values of the patches that are computed once.

Shapes in the names of axes: b batch, n patches, t tasks, d width.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cil.models.heads import Classifier
from cil.models.network import InputShape, models
from cil.models.noise import DropPath
from cil.models.patches import PatchMaps, PatchNetwork
from kd import Outputs

Tokens = Float[Tensor, "batch tokens width"]

_TOKEN_STD = 0.02  # of tokens, positions and linear weights at the start, as in ViT


def relative_positions(rows: int, columns: int) -> Float[Tensor, "patches patches 3"]:
    """(dx, dy, dx^2 + dy^2) from every query patch to every key patch, x along a row."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place = torch.stack([x.flatten(), y.flatten()], dim=1).float()
    offset = place[None, :, :] - place[:, None, :]
    return torch.cat([offset, offset.square().sum(dim=2, keepdim=True)], dim=2)


class GPSA(nn.Module):
    """Gated positional self-attention: each head blends attention by content with attention by relative position.

    $A = (1 - \\sigma(g))\\,\\mathrm{softmax}(q k^T / \\sqrt{d}) + \\sigma(g)\\,\\mathrm{softmax}(W \\delta + b)$, rows
    normalised to 1, with $\\delta$ from `relative_positions`.

    Args:
        width: Width of a token.
        num_heads: Number of heads.
        locality: How sharply the heads look at one neighbour each at the start ($\\alpha$ of the paper).
    """

    def __init__(self, width: int, num_heads: int, locality: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(width, 2 * width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.position = nn.Linear(3, num_heads)
        self.gate = nn.Parameter(torch.ones(num_heads))
        self.locality = locality

    @torch.no_grad()
    def look_around(self) -> None:
        """Start as a convolution: head (i, j) of a square of heads attends to the neighbour (i, j) of a patch.

        $W \\delta = -\\alpha (|\\delta|^2 - 2\\, \\delta \\cdot \\Delta_h)$ peaks at $\\delta = \\Delta_h$ (ConViT).
        """
        nn.init.eye_(self.v.weight)
        side = int(self.num_heads**0.5)  # heads beyond the square keep theirs
        middle = (side - 1) / 2  # between two neighbours if the side is even
        for head in range(side**2):
            dy, dx = head // side - middle, head % side - middle
            self.position.weight[head] = self.locality * torch.tensor([2.0 * dx, 2.0 * dy, -1.0])

    def forward(self, x: Tokens, positions: Float[Tensor, "tokens tokens 3"]) -> Tokens:
        """Normalised tokens in, their update out."""
        q, k = rearrange(self.qk(x), "b n (two head d) -> two b head n d", two=2, head=self.num_heads)
        v = rearrange(self.v(x), "b n (head d) -> b head n d", head=self.num_heads)
        by_content = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        by_place = rearrange(self.position(positions), "q k head -> 1 head q k").softmax(dim=-1)
        gate = rearrange(self.gate, "head -> 1 head 1 1").sigmoid()
        attention = (1 - gate) * by_content + gate * by_place
        attention = (attention / attention.sum(dim=-1, keepdim=True)).to(v.dtype)
        update: Tensor = self.proj(rearrange(attention @ v, "b head n d -> b n (head d)"))
        return update


class ClassAttention(nn.Module):
    """Every task token attends to itself and to all patches, and to no other task token.

    Args:
        width: Width of a token.
        num_heads: Number of heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(
        self, tasks: Float[Tensor, "batch_or_1 tasks width"], patches: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch tasks width"]:
        """Normalised task tokens, of each sample or the same for all, and patches in; the updates of the tokens out."""
        weights = self._weights(tasks, patches)
        own_v, v = (
            rearrange(self.v(tokens), "b n (head d) -> b head n d", head=self.num_heads) for tokens in (tasks, patches)
        )
        answers = weights[..., :1] * own_v + weights[..., 1:] @ v
        update: Tensor = self.proj(rearrange(answers, "b head t d -> b t (head d)"))
        return update

    def looks(
        self, tasks: Float[Tensor, "batch_or_1 tasks width"], patches: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch tasks patches"]:
        """How much each task token looks at each patch, mean over the heads; the rest of 1 it looks at itself."""
        return self._weights(tasks, patches)[..., 1:].mean(dim=1)

    def _weights(
        self, tasks: Float[Tensor, "batch_or_1 tasks width"], patches: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch head tasks seen"]:
        """How much each task token looks at itself, first, and at each patch; rows add up to 1."""
        split = "b n (head d) -> b head n d"
        q, own_k = (rearrange(layer(tasks), split, head=self.num_heads) for layer in (self.q, self.k))
        k = rearrange(self.k(patches), split, head=self.num_heads)
        q = q * q.shape[-1] ** -0.5
        # plain products, as in `cil.models.dkt`: faster than torch's fused attention with a mask
        to_itself = (q * own_k).sum(dim=-1, keepdim=True).expand(patches.shape[0], -1, -1, -1)
        return torch.cat([to_itself, q @ k.mT], dim=-1).softmax(dim=-1)


class MLP(nn.Module):
    """Linear, GELU, linear.

    Args:
        width: Width of a token.
        hidden: Width in between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tokens) -> Tokens:
        """Tokens in, tokens out."""
        update: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return update


class EncoderBlock(nn.Module):
    """GPSA, then the MLP, both residual.

    Args:
        attention: The attention of the block.
        width, hidden: Width of a token and inside the MLP.
        drop_path: Rate of stochastic depth.
        name: What the block draws its stochastic depth as.
    """

    def __init__(self, attention: GPSA, width: int, hidden: int, drop_path: float, name: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)
        self.drop_attention = DropPath(drop_path, f"{name}.attention")
        self.drop_mlp = DropPath(drop_path, f"{name}.mlp")

    def forward(self, x: Tokens, positions: Float[Tensor, "tokens tokens 3"]) -> Tokens:
        """Patches in, patches out."""
        x = x + self.drop_attention(self.attention(self.norm1(x), positions))
        updated: Tensor = x + self.drop_mlp(self.mlp(self.norm2(x)))
        return updated


class DecoderBlock(nn.Module):
    """Class attention of the task tokens, each to itself and the patches, then the MLP, both residual.

    Args:
        width, num_heads, hidden: Width of a token, heads of the attention, width inside the MLP.
    """

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = ClassAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(
        self, tasks: Float[Tensor, "batch_or_1 tasks width"], patches: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch tasks width"]:
        """The task tokens after asking the patches."""
        tasks = tasks + self.attention(self.norm1(tasks), self.norm1(patches))
        updated: Tensor = tasks + self.mlp(self.norm2(tasks))
        return updated


@models.register("dytox")
class DyToxNetwork(PatchNetwork):
    """A ConViT encoder, a decoder that all task tokens pass apart from each other, and one classifier per task.

    `Outputs.embedding` is the answer to the newest token. From the second task on a divergence head, `divergence`,
    reads it too: one score for every old class together, then one for each class of the newest task. It is for training
    (`learner=dytox`) and no part of what the network says. What it can say inside are the taps of `PatchNetwork`.

    Args:
        input_shape: Channels, height and width of an image.
        width: Width of a token and of the embedding.
        num_heads: Heads of every attention.
        depth: Encoder blocks.
        decoder_depth: Decoder blocks.
        patch_size: Side of a patch.
        mlp_ratio: Width inside the MLP, as a multiple of `width`.
        drop_path: Stochastic depth; block i of the encoder drops at `drop_path * i / depth`, the decoder never.
        locality: See `GPSA`.

    Raises:
        ValueError: If `width` is no multiple of `num_heads`, or no whole patches can be cut.
    """

    fresh_parts = ("divergence.",)

    def __init__(
        self,
        input_shape: InputShape,
        *,
        width: Annotated[int, Field(gt=0)] = 384,
        num_heads: Annotated[int, Field(gt=0)] = 12,
        depth: Annotated[int, Field(gt=0)] = 5,
        decoder_depth: Annotated[int, Field(gt=0)] = 1,
        patch_size: Annotated[int, Field(gt=0)] = 4,
        mlp_ratio: Annotated[int, Field(gt=0)] = 4,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        locality: Annotated[float, Field(ge=0)] = 1.0,
    ) -> None:
        super().__init__(input_shape, width)
        channels, height, image_width = input_shape
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, found width={width} and num_heads={num_heads}")
        if height % patch_size or image_width % patch_size:
            raise ValueError(
                f"both sides of an image must be multiples of patch_size={patch_size}, found {height}x{image_width}"
            )
        rows, columns, hidden = height // patch_size, image_width // patch_size, mlp_ratio * width
        self.patch_embedding = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.zeros(1, rows * columns, width))
        self.encoder = nn.ModuleList(
            EncoderBlock(GPSA(width, num_heads, locality), width, hidden, drop_path * i / depth, f"block{i}")
            for i in range(depth)
        )
        self.decoder = nn.ModuleList(DecoderBlock(width, num_heads, hidden) for _ in range(decoder_depth))
        self.task_tokens = nn.ParameterList()
        self.heads = nn.ModuleList()
        self.divergence: Classifier | None = None
        self.register_buffer("positions", relative_positions(rows, columns), persistent=False)
        nn.init.trunc_normal_(self.position, std=_TOKEN_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_TOKEN_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, GPSA):
                module.look_around()

    def _grow(self, num_new: int) -> None:
        token = nn.init.trunc_normal_(torch.empty(1, 1, self.embedding_width), std=_TOKEN_STD)
        self.task_tokens.append(nn.Parameter(token.to(self.position)))
        self.heads.append(self._classifier(num_new))
        if self.num_tasks > 0:
            self.divergence = self._classifier(1 + num_new)

    def _classifier(self, num_classes: int) -> Classifier:
        classifier = Classifier(self.embedding_width)
        classifier.head.grow(num_classes)
        return classifier.to(self.position)

    @property
    def depth(self) -> int:
        """Number of encoder blocks."""
        return len(self.encoder)

    def classifiers(self) -> list[Classifier]:
        """One for each task."""
        return list(self.heads)  # type: ignore[arg-type]

    def encode(
        self, images: Float[Tensor, "batch channels height width"], maps: PatchMaps | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The patches behind the encoder; `maps` collects what is exposed."""
        cut = self.patch_embedding(images)
        patches: Tensor = rearrange(cut, "b d h w -> b (h w) d") + self.position
        for i, block in enumerate(self.encoder):
            patches = block(patches, self.positions)
            if maps is not None:
                patches = maps.pass_on(i, patches, (cut.shape[2], cut.shape[3]))
        return rearrange(patches, "b (h w) d -> b d h w", h=cut.shape[2])

    def decode(self, maps: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch tasks width"]:
        """The answers to all task tokens, from what `encode` made of images."""
        patches = rearrange(maps, "b d h w -> b (h w) d")
        tasks = torch.cat(list(self.task_tokens), dim=1)
        for block in self.decoder:
            tasks = block(tasks, patches)
        return tasks

    def tokens_of_tasks(self) -> Float[Tensor, "tasks width"]:
        """The task tokens, the oldest first."""
        return torch.cat([token[0] for token in self.task_tokens])

    def attention(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch rows columns"]:
        """How much the newest task token looks at each patch in the last decoder block, mean over the heads."""
        maps, tasks = self.encode(images), torch.cat(list(self.task_tokens), dim=1)
        patches = rearrange(maps, "b d h w -> b (h w) d")
        *before, last = self.decoder
        for block in before:
            tasks = block(tasks, patches)
        assert isinstance(last, DecoderBlock)
        looks = last.attention.looks(last.norm1(tasks), last.norm1(patches))[:, -1]
        return rearrange(looks, "b (h w) -> b h w", h=maps.shape[2])

    def classify(self, answers: Float[Tensor, "batch tasks width"]) -> Float[Tensor, "batch classes"]:
        """Scores of all classes, in the order in which they were learned."""
        return torch.cat([head(own) for head, own in zip(self.heads, answers.unbind(dim=1), strict=True)], dim=1)

    def forward(self, images: Float[Tensor, "batch channels height width"], *, encoded: bool = False) -> Outputs:
        """Scores of all classes so far, the answer to the newest task token, and what is exposed.

        Args:
            images: The images.
            encoded: Whether they are what `encode` made of images; nothing is exposed then.
        """
        maps = None if encoded else self.listen()
        answers = self.decode(images if encoded else self.encode(images, maps))
        taps = {} if maps is None else maps.taps(self.classifiers())
        return Outputs(self.classify(answers), embedding=answers[:, -1], taps=taps)
