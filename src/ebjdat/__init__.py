"""Reproducibility pipeline for EB-JDAT: train, attack and sample joint energy-based models, and report what holds."""

__version__ = "0.1.0"
