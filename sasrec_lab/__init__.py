"""Train, evaluate and compare SASRec-style sequential recommenders."""

__version__ = "0.1.0"
