"""Pages about runs and studies: a file to send around, and the same page live."""
