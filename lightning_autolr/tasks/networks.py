"""Small networks, plain modules, for the tasks in this package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

__all__ = ["ByteTransformer", "ConvNet", "MLPMixer", "ResNet18", "VisionTransformer"]


class ConvNet(nn.Sequential):
    """Blocks of 3x3 convolution, optional batch normalisation, ReLU and 2x2 max-pooling, then means and one linear layer.

    Args:
        in_channels: colour channels.
        num_classes: outputs.
        widths: channels of each block. Images are at least ``2 ** len(widths)`` pixels high and wide.
        batch_norm: normalise after each convolution.

    >>> ConvNet(widths=(4, 8))(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, widths: Sequence[int] = (32, 64), batch_norm: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        for channels, width in zip((in_channels, *widths), widths, strict=False):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        # Means over the picture, since a linear layer on all its pixels allows small learning rates only.
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


class ResNet18(nn.Module):
    """ResNet-18 for small images: torchvision's, its first layer a 3x3 convolution of stride 1 without pooling.

    References: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2 for the stem.

    >>> ResNet18()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.resnet = resnet18(num_classes=num_classes)
        self.resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.resnet.maxpool = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.resnet(images)
        return logits


class _Patches(nn.Module):
    """Images `(n, channels, size, size)` to tokens `(n, num_patches, width)`."""

    def __init__(self, image_size: int, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"Expected image_size to be a multiple of patch_size, got {image_size=}, {patch_size=}.")
        self.embed = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.num = (image_size // patch_size) ** 2

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.embed(images)
        return tokens.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A small pre-norm vision transformer: patches, learned positions, mean of the tokens.

    References: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021. Differs from the
    paper: the mean of the tokens is classified in place of a class token, because that is simpler.

    >>> VisionTransformer(image_size=28)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 1,
        num_classes: int = 10,
        patch_size: int = 4,
        width: int = 64,
        depth: int = 3,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patches = _Patches(image_size, in_channels, patch_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(self.patches.num, width))
        self.encoder = _encoder(width, depth, num_heads, dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.patches(images) + self.positions).mean(1))
        return logits


class _MixerBlock(nn.Module):
    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(num_tokens, width), nn.GELU(), nn.Linear(width, num_tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.channel_norm(x))
        return x


class MLPMixer(nn.Sequential):
    """Patches mixed over tokens and over channels in turn, without attention.

    References: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", 2021.

    >>> MLPMixer(image_size=28)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 1,
        num_classes: int = 10,
        patch_size: int = 4,
        width: int = 64,
        depth: int = 3,
    ) -> None:
        patches = _Patches(image_size, in_channels, patch_size, width)
        blocks = [_MixerBlock(patches.num, width) for _ in range(depth)]
        super().__init__(patches, *blocks, nn.LayerNorm(width), _Mean(), nn.Linear(width, num_classes))


class _Mean(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


class ByteTransformer(nn.Module):
    """A causal pre-norm transformer over bytes: the logits of each next byte.

    Args:
        context: longest input, bytes.
        vocabulary: number of tokens; 256 reads any text without a dictionary.
        width: of the tokens.
        depth: layers.
        num_heads: divides ``width``.
        dropout: share of activations dropped.

    >>> ByteTransformer(context=16)(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 256])
    """

    mask: Tensor

    def __init__(
        self,
        context: int = 128,
        vocabulary: int = 256,
        width: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.encoder = _encoder(width, depth, num_heads, dropout)
        self.head = nn.Linear(width, vocabulary)
        # Not part of the state: it follows from `context`.
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, bytes_: Tensor) -> Tensor:
        length = bytes_.shape[1]
        tokens = self.embed(bytes_) + self.positions[:length]
        logits: Tensor = self.head(self.encoder(tokens, mask=self.mask[:length, :length], is_causal=True))
        return logits


def _encoder(width: int, depth: int, num_heads: int, dropout: float) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, num_heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
    )
    # Nested tensors are for padding masks, which none of these networks has.
    encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
    for parameter in encoder.parameters():
        # The encoder copies one layer, weights and all; layers that start equal learn more slowly.
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return encoder
