"""The sampling process drawn: the later a token appeared, the darker (paper, Tables 3, 13 and 14)."""

from llada_lightning.generation.pictures.picture import check_picture_path, write_picture

__all__ = ["check_picture_path", "write_picture"]
