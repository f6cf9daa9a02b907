"""Image folders and packed images: listing, decoding, augmentation, and a loader that resumes to the same batches."""

from .batch import Batch
from .folder import IMAGE_SUFFIXES, ImageFolder
from .loader import ImageLoader, UnreadableError, open_images
from .pack import pack
from .packed import PackedImages
from .paired import PairedLoader
from .source import ImageFiles, ImageSource
from .transforms import center_crop, load_images, open_image, random_resized_crop

__all__ = [
    "Batch",
    "IMAGE_SUFFIXES",
    "ImageFiles",
    "ImageFolder",
    "ImageLoader",
    "ImageSource",
    "PackedImages",
    "PairedLoader",
    "UnreadableError",
    "center_crop",
    "load_images",
    "open_image",
    "open_images",
    "pack",
    "random_resized_crop",
]
