"""Image folders: listing, decoding, augmentation, and a loader that resumes to the same batches."""

from .folder import IMAGE_SUFFIXES, ImageFolder
from .loader import Batch, ImageLoader, UnreadableError
from .transforms import center_crop, load_images, open_image, random_resized_crop

__all__ = [
    "Batch",
    "IMAGE_SUFFIXES",
    "ImageFolder",
    "ImageLoader",
    "UnreadableError",
    "center_crop",
    "load_images",
    "open_image",
    "random_resized_crop",
]
