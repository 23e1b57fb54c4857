"""Every task that a recipe can name: its line in ``--help``, its keys, its class. To add one, enter it here.

Imports no torch. Other packages enter theirs as entry points (:mod:`caspr_cli.common.plugins`).
"""

from dataclasses import dataclass, field
from enum import Enum

from caspr_cli.common import plugins
from caspr_cli.common.errors import UserError
from caspr_cli.recipe.task import Target, TaskConf
from caspr_cli.tasks import Entry


@dataclass
class C4LMConf(TaskConf):
    """A decoder-only transformer language model on English text."""

    name: str = "c4_lm"
    vocab_size: int = 2048  # size of the byte-level BPE, trained on the training split
    sequence: int = 128  # tokens a sample
    layers: int = 4
    width: int = 128
    heads: int = 4
    dropout: float = 0.0
    train_documents: int | None = None  # use only the first so many documents (required for task.data=hub)
    eval_documents: int | None = None  # the same for validation and for test, each


@dataclass
class MolPCBAConf(TaskConf):
    """A graph network on molecules, 128 yes-or-no labels with most cells missing."""

    name: str = "ogbg_molpcba"
    batch_size: int = 128
    target: Target = field(default_factory=lambda: Target("val/map", None, True))
    width: int = 64  # of node, edge and global states
    steps: int = 3  # of message passing
    dropout: float = 0.1


class Tags(Enum):
    upos = "upos"  # universal part of speech
    xpos = "xpos"  # the treebank's own tags


@dataclass
class TaggingConf(TaskConf):
    """A transformer encoder that tags words."""

    name: str = "ud_pos"
    batch_size: int = 32  # sentences
    target: Target = field(default_factory=lambda: Target("val/accuracy", None, True))
    treebank: str = "en_ewt"  # code on the hub, for task.data=hub
    tags: Tags = Tags.upos  # which of the treebank's two columns
    max_length: int = 256  # words; longer sentences are cut in training, and tagged in pieces after it
    vocab_size: int = 20000  # words known, at most: the commonest of the training split
    characters: bool = True  # add to each word's vector one made of its characters
    word_dropout: float = 0.25  # a: in training a word seen n times is hidden with probability a / (a + n)
    layers: int = 2
    width: int = 128
    heads: int = 4
    dropout: float = 0.1


class Images(Enum):
    """Which images ``task.data=files`` and ``hub`` mean; ``sample`` has its own."""

    cifar10 = "cifar10"
    cifar100 = "cifar100"
    fashion_mnist = "fashion_mnist"
    imagenet = "imagenet"
    folder = "folder"  # root/{train,validation or val,test}/<class>/<image>, or a zip of it


class Augment(Enum):
    """Augmentation of training images."""

    none = "none"
    crop_flip = "crop_flip"  # shifted by up to an eighth, and mirrored half of the time
    imagenet = "imagenet"  # a random resized crop, and mirrored half of the time
    rand_augment = "rand_augment"  # the same, and two random operations of RandAugment


@dataclass
class ImagesConf(TaskConf):
    """The keys that both image tasks have."""

    batch_size: int = 128
    target: Target = field(default_factory=lambda: Target("val/accuracy", None, True))
    images: Images = Images.cifar10
    size: int = 32  # pixels a side, as the model sees them; other images are scaled and cut to the middle
    augment: Augment = Augment.crop_flip  # of training images
    mixup: float = 0.0  # parameter of the Beta distribution; 0: none
    label_smoothing: float = 0.0  # share of each target spread over all classes, in training


@dataclass
class ResNetConf(ImagesConf):
    """A residual convolutional network."""

    name: str = "resnet"
    depth: int = 18  # 18, 34, 50, 101 or 152 as in torchvision, or 10: one block a stage
    width: int = 64  # channels of the first stage
    stem: int = 1  # what the first layers divide the side by: 1 for 32 pixels, 4 for 224 as in torchvision, or 2


@dataclass
class ViTConf(ImagesConf):
    """A vision transformer."""

    name: str = "vit"
    patch: int = 4  # pixels a side; divides size
    layers: int = 4
    width: int = 128  # of the residual stream; the MLPs are 4 times wider
    heads: int = 4  # of each attention; divides width
    dropout: float = 0.0


def _entry(about: str, keys: type[TaskConf], task: str, data: str | None = None) -> Entry:
    """Return a task of ``<name>.task:<class>``; its data are read by the folder ``data``, by default its own."""
    return Entry(about, keys, f"caspr_cli.tasks.{task}", f"caspr_cli.tasks.{data or keys.name}.sources:samples")


GRAPHS = "graph network on molecules, 128 yes-or-no labels (mean average precision)"
OURS = {
    "c4_lm": _entry("decoder language model on English text (log-perplexity)", C4LMConf, "c4_lm.task:C4LM"),
    "ogbg_molpcba": _entry(GRAPHS, MolPCBAConf, "ogbg_molpcba.task:MolPCBA"),
    "resnet": _entry(
        "residual convolutional network on images (accuracy)", ResNetConf, "resnet.task:ResNetTask", "images"
    ),
    "ud_pos": _entry("part-of-speech tagger on a treebank (accuracy)", TaggingConf, "ud_pos.task:Tagging"),
    "vit": _entry("vision transformer on images (accuracy)", ViTConf, "vit.task:ViTTask", "images"),
}
TASKS = plugins.joined(plugins.TASKS, OURS)
CONFS: dict[str, type[TaskConf]] = {name: entry.keys for name, entry in TASKS.items()}
for name, keys in CONFS.items():
    if not (issubclass(keys, TaskConf) and keys.name == name):
        raise UserError(f"{keys.__module__}.{keys.__name__}: should be a TaskConf with name: str = '{name}'")
