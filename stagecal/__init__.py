"""Calibrated ALMA data on request: from a trigger file to a published data set and a mail with its link."""

__version__ = "0.1.0"
