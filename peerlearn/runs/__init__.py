"""A run on the disk: its folder, its lock, its saves, its heartbeats; and how a run is stopped."""
