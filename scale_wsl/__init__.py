"""scale_wsl: hashtag-supervised image pretraining at any capacity."""

__version__ = "0.1.0"
