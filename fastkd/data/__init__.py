"""Images in folders, in archives or packed: reading, augmentation, and loaders that resume to the same batches."""

from .batch import Batch, Loader
from .folder import IMAGE_SUFFIXES, ImageFolder
from .loader import ImageLoader, UnreadableError, open_images
from .pack import pack
from .packed import PackedImages
from .paired import PairedLoader
from .source import ImageFiles, ImageSource
from .tars import TarImages
from .transforms import center_crop, load_images, open_image, random_resized_crop

__all__ = [
    "Batch",
    "IMAGE_SUFFIXES",
    "ImageFiles",
    "ImageFolder",
    "ImageLoader",
    "ImageSource",
    "Loader",
    "PackedImages",
    "PairedLoader",
    "TarImages",
    "UnreadableError",
    "center_crop",
    "load_images",
    "open_image",
    "open_images",
    "pack",
    "random_resized_crop",
]
