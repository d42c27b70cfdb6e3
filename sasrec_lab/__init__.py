"""sasrec_lab: a research lab for SASRec and its relatives."""

__version__ = "0.1.0"
