"""Tasks to try, compare and measure on: a LightningModule, small networks, and data that fits in memory."""

from lightning_autolr.tasks.char_lm import CharLMData
from lightning_autolr.tasks.cifar import CIFAR10Data
from lightning_autolr.tasks.digits import DigitsData
from lightning_autolr.tasks.fashion_mnist import FashionMNISTData
from lightning_autolr.tasks.networks import ByteTransformer, ConvNet, MLPMixer, ResNet18, VisionTransformer
from lightning_autolr.tasks.task import ClassificationTask

__all__ = [
    "ByteTransformer",
    "CIFAR10Data",
    "CharLMData",
    "ClassificationTask",
    "ConvNet",
    "DigitsData",
    "FashionMNISTData",
    "MLPMixer",
    "ResNet18",
    "VisionTransformer",
]
