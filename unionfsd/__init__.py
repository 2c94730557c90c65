"""A FUSE union-mount daemon that keeps kernel overlayfs's on-disk format."""

__version__ = "0.1.0"
