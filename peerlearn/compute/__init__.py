"""Devices, processes, precision, optimisers."""
