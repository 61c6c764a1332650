"""epsbench: a benchmark and reproduction harness for differentially private training."""

__version__ = "0.1.0"
