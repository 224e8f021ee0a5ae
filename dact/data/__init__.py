"""Datamodules: your own files, generated reviews without a download, and a real data set."""

from dact.data.compositional import CompositionalSentiment
from dact.data.text import TextClassificationData
from dact.data.vader import VaderSentiment

__all__ = ["CompositionalSentiment", "TextClassificationData", "VaderSentiment"]
