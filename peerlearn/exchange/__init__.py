"""Networks that come from, or go to, other programs."""
