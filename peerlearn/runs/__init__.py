"""What a run is on the disk: its folder, lock, saves, signs of life; and how it is stopped."""
