"""Networks that come from, or go to, other programs; and runs that go to experiment trackers."""
