"""The network of DKT: Diverse Knowledge Transfer Transformer (Gao et al., CVPR 2023, pages 24236-24245).

Patch tokens pass through a shared encoder. A pool keeps one general token, which the last encoder block (GKAB) reads
beside the patches, and one token per task. A decoder block (SKAB) lets the newest task token ask the older ones and
the patches, once per image, however many tasks there are. Two classifiers read the answer: stability for all old
classes, plasticity for the newest. There is no positional embedding: the depthwise convolutions see the places.

Shapes in the names of axes: b batch, n patches, t task tokens, d width, h and w of the grid of patches.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cil.models.activations import gelu, norm_gelu
from cil.models.heads import Classifier, PlasticityClassifier, StabilityClassifier
from cil.models.network import InputShape, models
from cil.models.noise import DropPath
from cil.models.patches import Grid, PatchMaps, PatchNetwork
from kd import Outputs

Tokens = Float[Tensor, "batch tokens dim"]

_TOKEN_STD = 0.02  # of tokens and of the decoder's attention at the start (release)
_BLOCK_EPS = 1e-6  # of LayerNorms in blocks (release); the classifiers have torch's 1e-5


class TokenPool(nn.Module):
    """What the network remembers in tokens: one general token, and one token per task.

    Args:
        width: Width of a token.
        general: False leaves the general token out: None.
        per_task: False keeps the token of the first task for all of them.
    """

    def __init__(self, width: int, *, general: bool = True, per_task: bool = True) -> None:
        super().__init__()
        self.width = width
        self.per_task = per_task
        self.general_token = nn.Parameter(self._draw(width)) if general else None
        self.task_tokens = nn.ParameterList()

    @staticmethod
    def _draw(width: int) -> Float[Tensor, "1 1 width"]:
        # three axes, so that weight decay counts a token as a matrix, as in the release
        return nn.init.trunc_normal_(torch.empty(1, 1, width), std=_TOKEN_STD)

    def grow(self, like: Tensor) -> None:
        """Add the token of a new task, a fresh draw and no copy, on the device and in the dtype of a tensor."""
        if self.per_task or not self.task_tokens:
            self.task_tokens.append(nn.Parameter(self._draw(self.width).to(like)))

    def newest_first(self, batch_size: int | torch.SymInt) -> Tokens:
        """The task tokens for every sample, in the order in which the decoder reads them."""
        *older, newest = self.task_tokens
        return repeat(torch.cat([newest, *older], dim=1), "1 t d -> b t d", b=batch_size)


class _Rest(torch.autograd.Function):
    """The value itself, with the gradient 0."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


class BeforeNorm(nn.Module):
    """Parts whose biases meet a BatchNorm, which takes the mean of the batch away while it trains.

    The gradient of such a bias is 0, and what is computed is rounding. Adam divides it by its own size and so moves the
    bias by a whole learning rate in a random direction; training does not feel it, but the running mean of the norm,
    which follows late, does in evaluation. So the bias is given the gradient it has.
    """

    still_biases = True
    #: See `cil.fast.Fast`: the maps in channels-last memory, and what norm and GELU make of them kept or not.
    channels_last = True
    recompute = False

    def bias(self, layer: nn.Conv2d | nn.LayerNorm, norm: nn.BatchNorm2d) -> Tensor:
        """The bias of `layer`, behind which `norm` stands."""
        assert layer.bias is not None
        resting: Tensor = _Rest.apply(layer.bias) if self.still_biases and norm.training else layer.bias
        return resting

    def convolved(
        self, x: Float[Tensor, "batch channels rows columns"], layer: nn.Conv2d, norm: nn.BatchNorm2d
    ) -> Tensor:
        """What `layer` and then `norm` make of a map."""
        maps: Tensor = norm(self.linear(x, layer, norm))
        return maps

    def linear(self, x: Float[Tensor, "batch channels rows columns"], layer: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        """What `layer` alone makes of a map, with the bias that `norm` behind it leaves."""
        maps: Tensor = layer._conv_forward(x, layer.weight, self.bias(layer, norm))
        return maps


class ConvPatchEmbedding(BeforeNorm):
    """Convolution, BatchNorm, max-pooling, then one strided convolution that cuts patches (not overlapping).

    Args:
        channels: Channels of an image.
        width: Width of a token.
        stem_width, stem_kernel, stem_stride, stem_padding: The first convolution.
        pool_stride: Stride of the 3x3 pooling; 1 leaves pooling out.
        patch_kernel: Kernel and stride of the second convolution.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        stem_width: int,
        stem_kernel: int,
        stem_stride: int,
        stem_padding: int,
        pool_stride: int,
        patch_kernel: int,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, stem_width, stem_kernel, stem_stride, stem_padding)
        self.norm = nn.BatchNorm2d(stem_width)
        self.pool = nn.MaxPool2d(3, pool_stride, padding=1) if pool_stride > 1 else nn.Identity()
        #: Kernel, stride and padding of what comes before the patches.
        self.windows = [(stem_kernel, stem_stride, stem_padding)] + [(3, pool_stride, 1)] * (pool_stride > 1)
        self.project = nn.Conv2d(stem_width, width, patch_kernel, stride=patch_kernel)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of an image.

        Raises:
            ValueError: If the image is too small or its feature map cannot be cut into whole patches.
        """
        rows, columns = self._map_side(height), self._map_side(width)
        patch = self.project.kernel_size[0]
        if min(rows, columns) < patch or rows % patch or columns % patch:
            raise ValueError(
                f"an image of {height}x{width} becomes a map of {rows}x{columns} before it is cut into patches; both "
                f"sides must be positive multiples of patch_kernel={patch}: change the image size, patch_kernel, "
                "pool_stride or stem_stride"
            )
        return rows // patch, columns // patch

    def _map_side(self, side: int) -> int:
        for kernel, stride, padding in self.windows:
            side = (side + 2 * padding - kernel) // stride + 1
        return side

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Tokens, Grid]:
        """The tokens, row by row, and their grid."""
        grid = self.grid(*images.shape[2:])
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        patches = self.project(self.pool(self.convolved(images, self.stem, self.norm)))
        return rearrange(patches, "b d h w -> b (h w) d").contiguous(), grid


class Attention(nn.Module):
    """Multi-head attention, softmax(q k' / sqrt(width per head)) v, of queries to a context that they may be part of.

    Args:
        width: Width of a token.
        num_heads: Number of heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, queries: Float[Tensor, "batch queries width"], context: Float[Tensor, "batch keys width"]
    ) -> Float[Tensor, "batch queries width"]:
        """One answer per query."""
        weights = self.weights(queries, context)
        v = rearrange(self.v(context), "b n (head d) -> b head n d", head=self.num_heads)
        # plain products: with this few tokens they beat torch's fused attention on a CPU, most of all backward
        answers = rearrange(weights @ v, "b head n d -> b n (head d)")
        projected: Tensor = self.proj(answers)
        return projected

    def weights(
        self, queries: Float[Tensor, "batch queries width"], context: Float[Tensor, "batch keys width"]
    ) -> Float[Tensor, "batch head queries keys"]:
        """How much each query looks at each key: rows add up to 1."""
        split = "b n (head d) -> b head n d"
        q = rearrange(self.q(queries), split, head=self.num_heads)
        k = rearrange(self.k(context), split, head=self.num_heads)
        return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1)


class ConvMLP(BeforeNorm):
    """Two 1x1 convolutions around a 3x3 depthwise one on the grid of patches, each with BatchNorm.

    Args:
        width: Width of a token.
        hidden: Width in between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.reduce = nn.Conv2d(hidden, width, 1)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, tokens: Tokens, grid: Grid) -> Tokens:
        """Tokens in, tokens out."""
        height, width = grid
        # both rearrangements are views: tokens are a map in channels-last memory
        x = rearrange(tokens, "b (h w) d -> b d h w", h=height, w=width)
        if not self.channels_last:
            x = x.contiguous()
        x = self.linear(x, self.expand, self.bn1)
        x = self.activated(x, self.bn1, lambda x: self.linear(x, self.depthwise, self.bn2))
        x = self.activated(x, self.bn2, lambda x: self.linear(x, self.reduce, self.bn3))
        tokens = rearrange(self.bn3(x), "b d h w -> b (h w) d")
        return tokens

    def activated(
        self, x: Float[Tensor, "batch channels rows columns"], norm: nn.BatchNorm2d, then: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What `norm`, GELU and a convolution, `then`, make of a map."""
        # statistics of several processes are another class
        plain = type(norm) is nn.BatchNorm2d and norm.affine and norm.momentum is not None
        if self.recompute and plain and norm.training and torch.is_grad_enabled():
            return norm_gelu(x, norm, then)
        return then(gelu(norm(x)))


class Block(BeforeNorm):
    """What the three kinds of blocks share: attention, then the convolutional MLP, both residual.

    Args:
        width, num_heads, hidden: Width of a token, heads of the attention, width inside the MLP.
        drop_path: Rate of stochastic depth.
        name: What the block draws its stochastic depth as.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, *, drop_path: float = 0.0, name: str = "") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_BLOCK_EPS)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=_BLOCK_EPS)
        self.mlp = ConvMLP(width, hidden)
        self.drop_attention = DropPath(drop_path, f"{name}.attention")
        self.drop_mlp = DropPath(drop_path, f"{name}.mlp")

    def update(self, x: Tokens, queries: Tokens, context: Float[Tensor, "batch keys dim"], grid: Grid) -> Tokens:
        """`x` with what its normalised form, `queries`, learns from `context`, and the MLP of that."""
        x = x + self.drop_attention(self.attention(queries, context))
        bias = self.bias(self.norm2, self.mlp.bn1)  # `expand`, in between, is linear
        normalised = F.layer_norm(x, self.norm2.normalized_shape, self.norm2.weight, bias, self.norm2.eps)
        updated: Tokens = x + self.drop_mlp(self.mlp(normalised, grid))
        return updated


class EncoderBlock(Block):
    """Patches attend to patches."""

    def forward(self, patches: Tokens, grid: Grid) -> Tokens:
        """Patches in, patches out."""
        context = self.norm1(patches)
        return self.update(patches, context, context, grid)


class GKAB(Block):
    """General knowledge attention block: patches attend to patches and to the general token, which stays as it is.

    Without a general token it is an `EncoderBlock`.
    """

    def forward(self, patches: Tokens, grid: Grid, general_token: Float[Tensor, "1 1 width"] | None) -> Tokens:
        """Patches in, patches out."""
        queries = self.norm1(patches)
        if general_token is None:
            return self.update(patches, queries, queries, grid)
        general = repeat(self.norm1(general_token), "1 1 d -> b 1 d", b=patches.shape[0])
        context = torch.cat([queries, general.to(queries.dtype)], dim=1)
        return self.update(patches, queries, context, grid)


class SKAB(Block):
    """Specific knowledge attention block: the newest task token, alone, asks older task tokens and patches.

    Its MLP sees a 1x1 map, so of each depthwise kernel only the middle counts.
    """

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__(width, num_heads, hidden, name="skab")
        for linear in (self.attention.q, self.attention.k, self.attention.v, self.attention.proj):
            nn.init.trunc_normal_(linear.weight, std=_TOKEN_STD)
            nn.init.zeros_(linear.bias)

    def forward(
        self, task_tokens: Float[Tensor, "batch tasks width"], patches: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch width"]:
        """The answer to the first task token."""
        context = self.norm1(torch.cat([task_tokens, patches], dim=1))
        return rearrange(self.update(task_tokens[:, :1], context[:, :1], context, (1, 1)), "b 1 d -> b d")

    def looks(
        self, task_tokens: Float[Tensor, "batch tasks width"], patches: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch patches"]:
        """How much the first task token looks at each patch, mean over the heads."""
        context = self.norm1(torch.cat([task_tokens, patches], dim=1))
        return self.attention.weights(context[:, :1], context)[:, :, 0, task_tokens.shape[1] :].mean(dim=1)


class Encoder(nn.Module):
    """Patch embedding and attention blocks, of which the last is the GKAB: one thing to freeze in fine-tuning.

    Args:
        patch_embedding: Cuts images into tokens.
        blocks: Plain blocks, then one GKAB.
    """

    def __init__(self, patch_embedding: ConvPatchEmbedding, blocks: list[Block]) -> None:
        super().__init__()
        self.patch_embedding = patch_embedding
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        general_token: Float[Tensor, "1 1 dim"] | None,
        maps: PatchMaps | None = None,
    ) -> Float[Tensor, "batch patches dim"]:
        """The encoded patches; `maps` collects what is exposed."""
        patches: Tensor
        patches, grid = self.patch_embedding(images)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            patches = block(patches, grid, general_token) if i == last else block(patches, grid)
            if maps is not None:
                patches = maps.pass_on(i, patches, grid)
        return patches


@models.register("dkt")
class DKTNetwork(PatchNetwork):
    """The whole network; see the module for how it works. One class of each name in it is one attribute here.

    What it can say inside are the taps of `PatchNetwork`; the rows of the stability classifier come first in its class
    maps, those of the plasticity classifier below.

    Args:
        input_shape: Channels, height and width of an image.
        width: Width of a token and of the embedding; 32 per head in the paper.
        num_heads: Heads of every attention.
        depth: Encoder blocks, the GKAB included.
        mlp_ratio: Width inside the MLP, as a multiple of `width`.
        stem_width: Channels of the first convolution.
        stem_kernel: Its kernel (3 for CIFAR, 7 for ImageNet).
        stem_stride: Its stride (1; 2).
        stem_padding: Its padding (1; 2).
        pool_stride: Stride of the max-pooling; 1 leaves pooling out, for small images.
        patch_kernel: Side of a patch on the map after pooling (2; 4).
        drop_path: Stochastic depth; block i of the encoder drops at `drop_path * i / depth`, the decoder never.
        merge_norm: See `StabilityClassifier.absorb`; False is the release (R3b).
        merge_bias: See `StabilityClassifier.absorb`; False is the release (R3a).
        still_biases: Let the biases that training cannot feel rest, see `BeforeNorm`. False is the release, where Adam
            makes full steps of the rounding that is their gradient.
        general_token: False leaves out what the GKAB reads beside the patches; this and the next three take a part of
            the method away, for ablations.
        task_tokens: False has one token for all tasks, which learns on in every one.
        old_tokens: False hides the older task tokens from the newest in the SKAB.
        duplex: False has one classifier, which grows and learns in every task, and nothing to merge.

    Raises:
        ValueError: If `width` is no multiple of `num_heads`, no whole patches can be cut, or a switch acts on a part
            that another one takes away.
    """

    fresh_parts = ("plasticity.",)

    def __init__(
        self,
        input_shape: InputShape,
        *,
        width: Annotated[int, Field(gt=0)] = 384,
        num_heads: Annotated[int, Field(gt=0)] = 12,
        depth: Annotated[int, Field(gt=0)] = 5,
        mlp_ratio: Annotated[int, Field(gt=0)] = 4,
        stem_width: Annotated[int, Field(gt=0)] = 32,
        stem_kernel: Annotated[int, Field(gt=0)] = 3,
        stem_stride: Annotated[int, Field(gt=0)] = 1,
        stem_padding: Annotated[int, Field(ge=0)] = 1,
        pool_stride: Annotated[int, Field(gt=0)] = 2,
        patch_kernel: Annotated[int, Field(gt=0)] = 2,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        merge_norm: bool = True,
        merge_bias: bool = True,
        still_biases: bool = True,
        general_token: bool = True,
        task_tokens: bool = True,
        old_tokens: bool = True,
        duplex: bool = True,
    ) -> None:
        super().__init__(input_shape, width)
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, found width={width} and num_heads={num_heads}")
        if not (task_tokens or old_tokens):
            raise ValueError("model.old_tokens=false has no effect with model.task_tokens=false: there is one token")
        if not (duplex or (merge_norm and merge_bias)):
            raise ValueError("model.merge_norm and model.merge_bias have no effect with model.duplex=false: no merge")
        self.old_tokens = old_tokens
        self.duplex = duplex
        self.merge_norm = merge_norm
        self.merge_bias = merge_bias
        patch_embedding = ConvPatchEmbedding(
            input_shape[0],
            width,
            stem_width=stem_width,
            stem_kernel=stem_kernel,
            stem_stride=stem_stride,
            stem_padding=stem_padding,
            pool_stride=pool_stride,
            patch_kernel=patch_kernel,
        )
        patch_embedding.grid(*input_shape[1:])  # raises if there are no whole patches
        hidden = mlp_ratio * width
        kinds: list[type[Block]] = [EncoderBlock] * (depth - 1) + [GKAB]
        blocks: list[Block] = [
            kind(width, num_heads, hidden, drop_path=drop_path * i / depth, name=f"block{i}")
            for i, kind in enumerate(kinds)
        ]
        self.token_pool = TokenPool(width, general=general_token, per_task=task_tokens)
        self.encoder = Encoder(patch_embedding, blocks)
        self.skab = SKAB(width, num_heads, hidden)
        self.stability = StabilityClassifier(width)
        self.plasticity: PlasticityClassifier | None = None
        for module in self.modules():
            if isinstance(module, BeforeNorm):
                module.still_biases = still_biases

    def _grow(self, num_new: int) -> None:
        like = self.stability.norm.weight
        self.token_pool.grow(like)
        if self.num_tasks == 0 or not self.duplex:
            self.stability.head.grow(num_new)
            return
        if self.plasticity is not None:
            self.stability.absorb(self.plasticity, merge_norm=self.merge_norm, merge_bias=self.merge_bias)
        self.plasticity = PlasticityClassifier(self.embedding_width).to(like)
        self.plasticity.head.grow(num_new)

    @property
    def depth(self) -> int:
        """Number of encoder blocks, the GKAB included."""
        return len(self.encoder.blocks)

    def classifiers(self) -> list[Classifier]:
        """The duplex classifier, old classes first."""
        return [self.stability] if self.plasticity is None else [self.stability, self.plasticity]

    def classify(self, embedding: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """Scores of all classes, in the order in which they were learned."""
        old: Tensor = self.stability(embedding)
        return old if self.plasticity is None else torch.cat([old, self.plasticity(embedding)], dim=1)

    def tokens_of_tasks(self) -> Float[Tensor, "tasks width"]:
        """The task tokens, the oldest first."""
        return torch.cat([token[0] for token in self.token_pool.task_tokens])

    def attention(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch rows columns"]:
        """How much the newest task token looks at each patch in the SKAB, mean over the heads."""
        patches = rearrange(maps := self.encode(images), "b d h w -> b (h w) d")
        tokens = self.token_pool.newest_first(len(images))
        looks = self.skab.looks(tokens if self.old_tokens else tokens[:, :1], patches)
        return rearrange(looks, "b (h w) -> b h w", h=maps.shape[2])

    def encode(
        self, images: Float[Tensor, "batch channels height width"], maps: PatchMaps | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The patches behind the encoder; `maps` collects what is exposed."""
        rows, _ = self.encoder.patch_embedding.grid(*images.shape[2:])
        patches: Tensor = self.encoder(images, self.token_pool.general_token, maps)
        return rearrange(patches, "b (h w) d -> b d h w", h=rows)

    def forward(self, images: Float[Tensor, "batch channels height width"], *, encoded: bool = False) -> Outputs:
        """Scores of all classes so far, the decoder's answer as the embedding, and what is exposed.

        Args:
            images: The images.
            encoded: Whether they are what `encode` made of images; nothing is exposed then.
        """
        maps = None if encoded else self.listen()
        patches = rearrange(images if encoded else self.encode(images, maps), "b d h w -> b (h w) d")
        tokens = self.token_pool.newest_first(images.shape[0])
        z = self.skab(tokens if self.old_tokens else tokens[:, :1], patches)
        taps = {} if maps is None else maps.taps(self.classifiers())
        return Outputs(self.classify(z), embedding=z, taps=taps)
