"""Devices, processes, precision, optimisers, learning-rate schedules."""
