"""From files on a disk to batches of views."""
