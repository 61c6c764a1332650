"""Engines that read a tape of the forward pass: norms and clipped sums from layers' inputs and output gradients."""
