"""megaroute: pretraining of language models in which every token decides, layer by layer, whether to be computed."""

__version__ = "0.1.0"
